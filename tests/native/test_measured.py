"""Which backend is faster: measured once for a kind of work on a kind of processor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from gptray.native.measured import Choice, Step, faster
from tests.native.cache import another_model, become, remember

KEY, WHAT = "train.backend", "a sum"


class Works:
    """Two backends that count how often they are prepared for a measurement."""

    def __init__(self) -> None:
        self.prepared = 0

    def _make(self, count: int) -> Step:
        self.prepared += 1
        return lambda: sum(range(count))

    def choice(self, work: int = 1) -> Choice:
        makers: dict[str, Callable[[], Step]] = {
            "native": partial(self._make, 100),
            "torch": partial(self._make, 100_000),
        }
        return faster(KEY, WHAT, {"work": work}, makers)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gptray" / "backends"


def test_a_kind_of_work_is_measured_once(folder: Path) -> None:
    works = Works()
    first = works.choice()
    assert works.prepared == 2 and works.choice() == first and works.prepared == 2
    works.choice(work=2)
    assert works.prepared == 4
    (path, _) = folder.glob("*.json")
    assert set(json.loads(path.read_text())["seconds"]) == {"native", "torch"}


@pytest.mark.parametrize(
    ("native", "torch", "chosen"),
    [(2.0, 1.0, "torch"), (1.0, 2.0, "native"), (1.04, 1.0, "native"), (1.06, 1.0, "torch")],
)
def test_what_is_remembered_is_kept_to_and_a_small_gain_is_noise(
    folder: Path, native: float, torch: float, chosen: str
) -> None:
    works = Works()
    works.choice()
    remember(folder, native=native, torch=torch)
    choice = works.choice()
    assert choice.backend == chosen and works.prepared == 2


def test_a_first_step_that_prepares_does_not_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptray.native.measured.MEASURE_S", 0.0)
    calls: list[int] = []

    def native() -> None:
        calls.append(1)
        sum(range(3_000_000 if len(calls) == 1 else 100))

    makers: dict[str, Callable[[], Step]] = {
        "native": lambda: native,
        "torch": lambda: lambda: sum(range(100_000)),
    }
    assert faster(KEY, WHAT, {"work": 1}, makers).backend == "native"


def test_the_reason_names_both_and_their_times(folder: Path) -> None:
    works = Works()
    works.choice()
    remember(folder, native=0.02, torch=0.0125)
    why = works.choice().why
    assert why.startswith("train.backend: PyTorch, 1.60x as fast as the native kernels on this ")
    assert why.endswith("(12.5 against 20 ms for a sum)")


def test_pytorch_must_gain_more_where_the_cores_were_busy(folder: Path) -> None:
    works = Works()
    works.choice()
    for seconds, chosen in ((1.9, "native"), (2.1, "torch")):
        remember(folder, native=seconds, torch=1.0, busy=True)
        choice = works.choice()
        assert choice.backend == chosen and works.prepared == 2
        assert "other processes kept the cores busy" in choice.why


@pytest.mark.parametrize("was_right", [True, False])
def test_an_answer_stays_once_a_second_measurement_agrees(folder: Path, was_right: bool) -> None:
    """Native is the faster one here: PyTorch's step adds up a thousand times as many numbers."""
    works = Works()
    works.choice()
    (path,) = folder.glob("*.json")
    first = json.loads(path.read_text())
    assert time.time() < first["until"] <= time.time() + 3600

    native, torch = (1.0, 2.0) if was_right else (2.0, 1.0)
    remember(folder, native=native, torch=torch, until=time.time() - 1.0)
    works.choice()
    second = json.loads(path.read_text())
    assert works.prepared == 4
    # A busy machine, too, leaves the question open.
    assert (second["until"] is None) == (was_right and not second["busy"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"seconds": {"native": 1.0}}', '{"seconds": {"native": 1.0, "torch": -1.0}}',
     '{"seconds": {"native": 1.0, "torch": 1.0}, "until": "later"}',
     '{"seconds": {"native": "1", "torch": 1.0}}', '{"seconds": {"native": NaN, "torch": 1.0}}'],
)  # fmt: skip
def test_a_damaged_measurement_is_made_again(folder: Path, text: str) -> None:
    works = Works()
    works.choice()
    (path,) = folder.glob("*.json")
    path.write_text(text)
    works.choice()
    assert works.prepared == 4
    works.choice()
    assert works.prepared == 4


def test_another_processor_is_measured_by_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = Works()
    works.choice()
    become(tmp_path / "cpuinfo", monkeypatch, another_model)
    assert "on this processor, Another" in works.choice().why and works.prepared == 4


@pytest.mark.parametrize("broken", ["native", "torch"])
def test_a_backend_that_fails_is_told_of_and_tried_again_the_next_time(
    folder: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fails() -> Step:
        raise RuntimeError("out of registers")

    good = "torch" if broken == "native" else "native"
    makers: dict[str, Callable[[], Step]] = {broken: fails, good: lambda: lambda: None}
    choice = faster(KEY, WHAT, {}, makers)
    assert choice.backend == good and "failed in a trial" in choice.why
    assert "out of registers" in caplog.text
    assert not list(folder.glob("*.json"))


def test_without_a_cache_folder_each_caller_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="gptray")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    works = Works()
    works.choice(), works.choice()
    assert works.prepared == 4
    assert "cannot write" in caplog.text and "the next job will measure again" in caplog.text
