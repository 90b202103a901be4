"""Texts that are scored besides a run's own: before the first step and at every evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptray.data.tokens import TokenData
from gptray.evaluation.forgetting import change_sentence, changes_of
from gptray.model.hf import load_pretrained
from gptray.storage.record import last_event, read_events, read_metrics
from gptray.training.validation import score_split
from gptray.training.workers import Workers
from tests.data.prepared import whole_here
from tests.tiny import tiny_text
from tests.training.runs import Killed, rows, run
from tests.training.test_families import config_from


@pytest.fixture
def with_others(tiny_data: TokenData, tmp_path: Path) -> TokenData:
    """The tiny text, and besides it one like it and one that is unlike it."""
    texts = {"like": tiny_text(60, seed=3), "unlike": tiny_text(60, seed=4)[::-1]}
    for name, text in texts.items():
        whole_here(tmp_path / name, tiny_data.tokenizer, text)
    return TokenData.open(tiny_data.data_dir, also={name: tmp_path / name for name in texts})


def scored(run_dir: Path) -> list[dict[str, Any]]:
    return [row["also"] for row in rows(run_dir) if "val_loss" in row]


@pytest.mark.parametrize(
    "words",
    [(), ("lora.rank=2", "optim.lr=0.05"), ("train.ema=0.5",)],
    ids=["full", "lora", "average"],
)
def test_what_a_run_does_to_other_texts_is_scored_before_and_after(
    words: tuple[str, ...], with_others: TokenData, tmp_path: Path
) -> None:
    config = config_from("gpt2", with_others, tmp_path, "train.patience=9", *words)
    run(config, with_others, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, with_others, tmp_path / "cut", kill_at=2)
    run(config, with_others, tmp_path / "cut")
    assert scored(tmp_path / "cut") == scored(tmp_path / "whole")
    base = last_event(read_events(tmp_path / "cut"), "base")
    assert base
    whole = last_event(read_events(tmp_path / "whole"), "base")
    assert whole and base == {**whole, "time": base["time"]}

    changes = changes_of(read_metrics(tmp_path / "cut"), read_events(tmp_path / "cut"))
    assert [one.name for one in changes] == ["", "like", "unlike"]
    best = min(rows(tmp_path / "cut"), key=lambda row: row.get("val_loss", 99.0))
    assert best["step"] == 4
    for name in ("like", "unlike"):
        score = score_split(
            load_pretrained(tmp_path / "cut"),
            with_others.scored[f"also/{name}"],
            block_size=32,
            batch_size=4,
            workers=Workers(0, 1),
        )
        assert best["also"][name]["loss"] == pytest.approx(score.loss, abs=1e-4)
        assert best["also"][name]["bpb"] == pytest.approx(score.bits_per_byte, abs=1e-4)
    own, like, unlike = changes
    assert own.before and own.after < own.before
    assert like.before and like.after < like.before and not like.is_forgotten
    assert (unlike.before, unlike.after) == (
        base["also"]["unlike"]["bpb"],
        best["also"]["unlike"]["bpb"],
    )


def test_what_was_forgotten_is_said_in_a_sentence() -> None:
    events: list[Any] = [
        {"event": "base", "val_loss": 4.0, "val_bpb": 3.9,
         "also": {"kept": {"loss": 2.0, "bpb": 2.2}, "same": {"loss": 2.0, "bpb": 2.0}}},
    ]  # fmt: skip
    also = {"kept": {"loss": 2.5, "bpb": 2.9}, "same": {"loss": 2.0, "bpb": 2.01}}
    evaluations: list[Any] = [
        {"step": 1, "val_loss": 3.0, "val_bpb": 3.1, "also": also},
        {"step": 2, "val_loss": 3.5, "val_bpb": 3.6, "also": {}},
    ]
    assert change_sentence(changes_of(evaluations, events)) == (
        "Bits per byte: on your text 3.90 -> 3.10; on kept 2.20 -> 2.90: it forgot; "
        "on same 2.00 -> 2.01."
    )
    assert change_sentence(changes_of(evaluations, [])) == (
        "Bits per byte: on your text 3.10; on kept 2.90; on same 2.01."
    )
    assert change_sentence(changes_of([], events)) == ""
