"""Text that a tokenizer loses is paid for: none of those that drop it beats one that does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import dump
from gptray.data.scoring import Score
from gptray.data.tokenizer import Tokenizer, train_bpe
from gptray.data.tokens import TokenData
from gptray.reports.run.report import write_report
from gptray.storage.record import EVENTS, METRICS, read_rows
from gptray.training.loop import fit
from tests.data import foreign
from tests.data.prepared import prepared_here
from tests.tiny import tiny_config

TEXT = foreign.korean_lines(900)
CUT = TEXT.index("\n", 9 * len(TEXT) // 10) + 1


def korean(folder: Path, tokenizer: Tokenizer) -> TokenData:
    return prepared_here(folder, tokenizer, train=TEXT[:CUT], val=TEXT[CUT:])


def trained(data: TokenData, folder: Path) -> dict[str, Any]:
    """A short run; the row of its last evaluation."""
    config = tiny_config(folder, folder, "train.max_steps=20", "train.log_interval=10")
    fit(
        config,
        data,
        folder,
        report=lambda *_: None,
        sample=lambda _: [],
        device=torch.device("cpu"),
    )
    (folder / "config.yaml").write_text(dump(config))
    return read_rows(folder / METRICS)[-1]


Run = tuple[TokenData, dict[str, Any], Path]


def run_of(tokenizer: Tokenizer, folder: Path) -> Run:
    data = korean(folder / "data", tokenizer)
    return data, trained(data, folder / "run"), folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same text and settings with a tokenizer that keeps the text and two that don't."""
    made = {
        "honest": train_bpe([TEXT[:CUT]], 400),
        "wordpiece": foreign.as_tokenizer(foreign.wordpiece()),
        "dropping": foreign.as_tokenizer(foreign.dropping_bpe()),
    }
    return {name: run_of(made[name], tmp_path_factory.mktemp(name)) for name in made}


@pytest.mark.parametrize("kind", ["wordpiece", "dropping"])
def test_a_tokenizer_that_loses_the_text_never_wins(runs: dict[str, Run], kind: str) -> None:
    (data, row, _), honest = runs[kind], runs["honest"][1]
    assert data.val.lost > 0.7 and row["val_lost"] == data.val.lost
    # Without the charge it would have won.
    assert row["val_bpb"] - 8 * data.val.lost < honest["val_bpb"] < row["val_bpb"]
    assert "val_lost" not in honest


def test_the_gap_compares_losses_that_are_both_charged(runs: dict[str, Run]) -> None:
    data, row, _ = runs["wordpiece"]
    charge = 8 * math.log(2) * data.train.lost_bytes / data.train.tokens
    assert charge > 5 and row["train_loss"] > charge
    assert abs(row["gap"]) < 0.2 * charge


def test_a_loss_whose_perplexity_no_float_holds_is_no_divergence(runs: dict[str, Run]) -> None:
    _, row, _ = runs["dropping"]
    assert row["step"] == 20 and row["val_loss"] > 709
    assert math.isfinite(row["val_ppl"])


def test_the_run_and_its_report_say_what_the_tokenizer_loses(runs: dict[str, Run]) -> None:
    data, _, folder = runs["wordpiece"]
    assert data.loses.startswith("the tokenizer loses ") and "-> '[UNK]" in data.loses
    start = json.loads((folder / EVENTS).read_text().splitlines()[0])
    assert start["loses"] == data.loses
    page = write_report(folder, running=True).read_text("utf-8")
    assert "The tokenizer loses " in page
    assert "losses and bits per byte count 8 bits for each lost byte" in page
    honest = write_report(runs["honest"][2], running=True).read_text("utf-8")
    assert "loses" not in honest


def test_nothing_is_charged_where_nothing_is_lost() -> None:
    nats = 1234.567891234
    score = Score.charged(nats, 10, 100, 0)
    assert score.nats.hex() == nats.hex() and score.lost == 0.0


def test_a_lost_byte_costs_eight_bits() -> None:
    kept, dropped = Score.charged(50.0, 10, 100, 0), Score.charged(50.0, 10, 100, 25)
    assert dropped.bits_per_byte - kept.bits_per_byte == pytest.approx(8 * 0.25)
    assert dropped.loss - kept.loss == pytest.approx(8 * math.log(2) * 25 / 10)
    assert Score.charged(0.0, 10, 100, 100).bits_per_byte == pytest.approx(8.0)
