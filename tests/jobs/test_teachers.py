"""Which models can teach a run, what is told of them, and that they stay the same; without Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gptray.config import UserError, dump
from gptray.data.tokenizer import char_tokenizer, train_bpe
from gptray.data.tokens import TokenData
from gptray.entry_points import run as run_job
from gptray.jobs.folders.resuming import save_config
from gptray.jobs.folders.run_folder import outcome
from gptray.jobs.train.check import CheckedTraining, check, check_data, plan
from gptray.model.shape import weights_sha256
from gptray.reports.run.report import write_report
from tests.data.prepared import prepared_here
from tests.reports.pages import Page
from tests.tiny import tiny_config, tiny_text
from tests.training.runs import run


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, its tokens, and a run called teacher."""
    folder, text = tmp_path_factory.mktemp("house"), tiny_text(300)
    (folder / "text.txt").write_text(text)
    data = prepared_here(folder / "tokens", char_tokenizer(text), train=text, val=text[:900])
    config = tiny_config(folder / "text.txt", folder, "train.max_steps=2", "train.eval_interval=2")
    run(config, data, folder / "teacher")
    (folder / "teacher" / "config.yaml").write_text("{}\n")
    return folder


def checked(house: Path, *words: str) -> CheckedTraining:
    words = ("train.teachers=[teacher]", "name=pupil", *words)
    return check(tiny_config(house / "text.txt", house, *words))


def test_a_runs_name_is_its_model_and_the_plan_tells_of_it(house: Path) -> None:
    found = checked(house, "train.teacher_weight=0.25")
    model = str((house / "teacher" / "model").resolve())
    assert found.config.train.teachers == [model]
    assert dict(plan(found))["teachers"] == f"0.25 of the loss is against {model}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.teachers=[teachr]",), r"train.teachers=teachr: no such run .* mean teacher\?"),
        (("train.teachers=[tokens]",), r"train.teachers=tokens: no such run"),
        (
            ("model.n_positions=64", "train.block_size=64"),
            r"train.teachers: .*/teacher/model reads at most 32 tokens, fewer than .*=64",
        ),
        (("data.tokenizer={other}",), r"train.teachers: .* has another tokenizer than the text"),
        # Of that which would be trained, it is not known, but for the most that it can have.
        (
            ("data.tokenizer=bpe", "data.vocab_size=257", "train.teachers=[{wide}]"),
            r"train.teachers: .*wide/model has another tokenizer than the text",
        ),
        (
            ("train.teachers=[teacher, {house}/teacher/model]",),
            r"teacher/model is listed twice; list",
        ),
        (("train.teachers=[teacher, {wide}]",), r"wide/model has another tokenizer than .*teacher"),
    ],
)
def test_what_cannot_teach_is_refused(house: Path, words: tuple[str, ...], message: str) -> None:
    other = house / "other"
    train_bpe([tiny_text(50)], vocab_size=257).save(other)
    wide = house / "wide"
    if not wide.exists():
        shutil.copytree(house / "teacher", wide)
        train_bpe([tiny_text(50)], vocab_size=258).save(wide / "model")
    with pytest.raises(UserError, match=message):
        checked(house, *(word.format(house=house, other=other, wide=wide) for word in words))


def test_a_run_that_has_seen_the_validation_text_cannot_teach(house: Path) -> None:
    shutil.copytree(house / "teacher", house / "other split")
    words = ("train.max_steps=2", "data.seed=5")
    theirs = dump(tiny_config(house / "text.txt", house, *words))
    (house / "other split" / "config.yaml").write_text(theirs)
    teacher = f"train.teachers=[{house / 'other split'}]"
    with pytest.raises(UserError, match=r"other split was trained .*set data.seed=5 and"):
        checked(house, teacher)
    assert checked(house, teacher, "data.seed=5")
    assert checked(house, teacher, "seed=5", "name=pupil-5")


def test_a_tokenizer_that_is_made_first_is_compared_then(house: Path) -> None:
    other = prepared_here(
        house / "others", train_bpe([tiny_text(50)], vocab_size=257), train=tiny_text(60), val="a b"
    )
    with pytest.raises(UserError, match="train.teachers: .* has another tokenizer than the text"):
        check_data(checked(house).config, other, None)


def test_a_mistake_is_one_line_and_exit_code_2(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.source={house / 'text.txt'}", f"storage_path={house}"]
    assert run_job("train", [*words, "train.teachers=[nobody]", "--dry-run"]) == 2
    assert "train.teachers=nobody: no such run" in capsys.readouterr().err


def test_a_run_resumes_only_with_the_teachers_that_it_began_with(
    house: Path, tmp_path: Path
) -> None:
    shutil.copytree(house / "teacher" / "model", tmp_path / "model")
    words = (f"train.teachers=[{tmp_path / 'model'}]", "train.max_steps=2", "train.eval_interval=2")
    before = checked(house, *words)
    run(before.config, TokenData.open(house / "tokens"), before.folder)
    save_config(before.config, before.folder)

    digest = weights_sha256(tmp_path / "model")
    assert outcome(before.config)["teachers"] == {str(tmp_path / "model"): digest}
    page = Page(write_report(before.folder)).text
    assert f"0.5 of the loss is against their average: {tmp_path / 'model'}" in page
    assert digest[:12] in page

    longer = (*words, "train.max_steps=4")
    assert not checked(house, *longer).is_finished
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match="have changed since the run began"):
        checked(house, *longer)
    assert json.dumps(outcome(before.config))
