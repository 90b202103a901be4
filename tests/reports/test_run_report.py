"""report.html as a browser gets it: whole, safe, of this machine alone, and true to the run."""

from __future__ import annotations

import html
import json
import logging
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from gptray.config import UserError, load_config
from gptray.jobs.progress.reporter import Reporter
from gptray.jobs.train.watch import watching
from gptray.reports.chart import averaged, thinned
from gptray.reports.picture import tick_text, ticks
from gptray.reports.run.report import write_report
from gptray.storage.record import Event, write_event
from tests.reports.curves import config_of, evaluated, rows_of, started, write_run
from tests.reports.pages import Page

LOSSES = [4.0, 3.0, 2.5, 2.2, 2.05, 2.0, 2.01, 2.1, 2.2, 2.3, 2.4, 2.5]
EVIL = "</b></blockquote><script>alert('1')</script><img src=x onerror=alert(2)> &amp; \x00\x1b[31m"
KOREAN = "\uc61b\ub0a0 \uc61b\ub0a0\uc5d0 \U0001f42f"


def overfitted(folder: Path, *overrides: str, prompt: str = "Once") -> Path:
    rows = rows_of(LOSSES)
    events = [started()]
    events += [evaluated(10 * (i + 1), [[prompt, f" upon {i}"]], time=6.0 * i) for i in range(12)]
    return write_run(folder, rows, events, config_of(rows, *overrides))


def evaluation(**changes: Any) -> dict[str, Any]:
    split = {
        "loss": 2.345678,
        "stderr": 0.0123,
        "ppl": 10.44,
        "bpb": 1.2345,
        "tokens": 12345,
        "bytes": 45678,
        "documents": 17,
        "how": "every token but the first",
    }
    score = {"score": 12.34, "signature": "nrefs:1|case:mixed", "passages": 8}
    return {
        "model_dir": "/models/gpt2",
        "model_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "source": ["book.txt"],
        "time": "2026-01-01T00:00:00+00:00",
        "block_size": 128,
        "stride": 64,
        "splits": {"train": None, "val": None, "test": split},
        "gap": None,
        "bleu": {"greedy": score, "sampled": score | {"score": 5.67}},
        "chrf": None,
        "distinct_1": 0.5,
        "distinct_2": None,
        "repetition": 0.25,
        "memorised_20": 0.9,
        "memorised_50": 0.875,
        "samples": [{"prompt": EVIL, "reference": KOREAN, "greedy": "g" * 300, "sampled": ""}],
        "how": {"bleu": "sacrebleu's corpus BLEU", "memorised_50": "share of the 50-grams"},
        **changes,
    }


def with_evaluation(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation(**changes)))
    return folder


def test_report_of_a_run_has_the_diagnosis_the_numbers_and_the_pictures(tmp_path: Path) -> None:
    path = write_report(overfitted(tmp_path / "run"))
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    assert "Validation loss was best at step 60 (2.00); the 60 steps after it" in page.text
    assert "best: step 60 (2.00)" in page.text and "turned: step 70" in page.text
    for number in ("2.0000", "2.0100", "2.5000", "7.39", "12.18", "120 of 120"):
        assert number in page.text
    assert "exp(validation loss)" in page.text and "averaged over the whole" in page.text
    assert "upon 5" in page.text and "upon 11" in page.text  # samples of the best and the last
    assert "model.dropout 0.2" in page.text and "torch 2.99" in page.text
    assert len(page.all("svg")) == 6  # three charts, wide and narrow
    for name in ("loss", "lr", "grad_norm"):
        assert (tmp_path / "run" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((tmp_path / "run").glob(".*tmp"))


def test_what_other_texts_score_stands_in_the_report_of_an_evaluation(tmp_path: Path) -> None:
    other = evaluation()["splits"]["test"] | {"bpb": 9.8765}
    page = Page(write_report(with_evaluation(tmp_path / "old")))
    assert "also kept" not in page.text
    page = Page(write_report(with_evaluation(tmp_path / "new", also={"kept": other})))
    assert "also kept" in page.text and "9.8765" in page.text


def test_best_and_turn_stand_where_they_were_measured(tmp_path: Path) -> None:
    page = Page(write_report(overfitted(tmp_path / "run"), running=True))
    circles = [c for c in page.all("circle") if c["class"] in ("mark best", "mark turned")][:2]
    dots = [c for c in page.all("circle") if c["class"] == "dot val"][:12]
    assert [(c["cx"], c["cy"]) for c in circles] == [
        (dots[5]["cx"], dots[5]["cy"]),
        (dots[6]["cx"], dots[6]["cy"]),
    ]
    # higher losses stand higher, later steps further right
    heights = [float(dot["cy"] or 0) for dot in dots[5:]]
    assert heights == sorted(heights, reverse=True)
    assert float(dots[0]["cx"] or 0) < float(dots[11]["cx"] or 0)


def test_a_page_renews_itself_only_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = overfitted(tmp_path / "run", "train.max_steps=400")
    running = Page(write_report(folder, running=True))
    assert [m for m in running.all("meta") if m.get("http-equiv") == "refresh"]
    assert "running : step 120 of 400 (30%)" in running.text
    assert not (folder / "loss.png").exists()
    done = Page(write_report(folder))
    assert not [m for m in done.all("meta") if m.get("http-equiv") == "refresh"]
    assert "running" not in done.text and "interrupted after step 120 of 400" in done.text
    write_event(folder, "end", stopped="patience")
    assert "stopped early at step 120 of 400" in Page(write_report(folder)).text


def test_what_a_model_writes_is_shown_and_never_run(tmp_path: Path) -> None:
    folder = overfitted(tmp_path / "run", prompt=EVIL + KOREAN)
    page = Page(write_report(with_evaluation(folder)))
    assert page.all("script") == [] and page.all("img") == []
    assert "<script>alert('1')</script><img src=x onerror=alert(2)> &amp;" in page.text
    assert KOREAN in page.text and "\x00" not in page.html and "\x1b" not in page.html
    policy = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy[0]["content"])


def test_lone_surrogates_do_not_stop_a_report(tmp_path: Path) -> None:
    samples = [{"prompt": "\ud800", "reference": "", "greedy": "", "sampled": ""}]
    page = Page(write_report(with_evaluation(tmp_path / "m", samples=samples)))
    assert "\ufffd" in page.text


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = Page(write_report(with_evaluation(overfitted(tmp_path / "run"))))
    assert not {"link", "script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    attributes = [name for _, attributes in page.tags for name in attributes]
    assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert not re.search(r"url\((?!#)|@import|@font-face|https?://", page.html)


def test_an_evaluation_alone_has_a_report_with_how_each_number_came(tmp_path: Path) -> None:
    page = Page(write_report(with_evaluation(tmp_path / "gpt2")))
    assert "The loss on the test text is 2.346 nats per token: perplexity 10.4" in page.text
    assert "It recites its training text: 87.5%" in page.text
    for text in ("2.3457", "0.0123", "12,345", "12.34", "5.67", "nrefs:1|case:mixed", "50.0%"):
        assert text in page.text
    assert "sacrebleu's corpus BLEU" in page.text and "share of the 50-grams" in page.text
    assert "every token but the first" in page.text and "b" * 64 in page.text
    assert page.all("svg") == []


def test_an_evaluation_where_little_was_measured_has_a_report(tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("bleu", "chrf", "distinct_1", "repetition", "memorised_20", "memorised_50")
    )
    splits = {"train": None, "val": None, "test": None}
    page = Page(write_report(with_evaluation(tmp_path / "m", **nothing, splits=splits, samples=[])))
    assert "No text was scored." in page.text and "None" not in page.text


def test_numbers_of_an_evaluation_join_those_of_its_run(tmp_path: Path) -> None:
    page = Page(write_report(with_evaluation(overfitted(tmp_path / "run"))))
    assert "Validation loss was best at step 60" in page.text and "12,345" in page.text


def whole_evaluation(**changes: Any) -> dict[str, Any]:
    """Of a run's own text, by the run's best model."""
    split = evaluation()["splits"]["test"]
    splits = {
        "train": split | {"loss": 1.25},
        "val": split | {"loss": 2.0},
        "test": split,
    }
    score = {"score": 12.34, "signature": "nrefs:1|tok:char|version:2", "passages": 8}
    scores = {"greedy": score, "sampled": score}
    found = {"splits": splits, "gap": 0.75, "chrf": scores | {"greedy": score | {"score": 34.5}}}
    return {**found, "bleu": scores, **changes}


def tiles_of(page: Page) -> str:
    return page.text[page.text.index("best validation loss") : page.text.index("What comes next")]


def test_the_tile_and_the_table_have_one_gap_measured_without_dropout(tmp_path: Path) -> None:
    folder = overfitted(tmp_path / "run")
    before = Page(write_report(folder))
    assert "- gap, not measured yet: training has dropout on" in tiles_of(before)
    command = f"python jobs/evaluate.py evaluate.model={folder}"
    assert f"not measured: training has dropout on; {command} measures it" in before.text
    after = Page(write_report(with_evaluation(folder, **whole_evaluation())))
    assert "+0.750 gap, dropout off in both" in tiles_of(after)
    assert "Training loss, dropout off 1.2500 - -" in after.text
    assert "Gap +0.7500 - -" in after.text and "not measured" not in after.text
    assert "gap +0.7500:" in after.text  # the evaluation's own section
    plain = Page(write_report(overfitted(tmp_path / "plain", "model.dropout=0")))
    assert "gap, dropout off in both" in tiles_of(plain)
    words = ("model.dropout=0", "data.token_replacement=0.1")
    replaced = Page(write_report(overfitted(tmp_path / "replaced", *words)))
    assert "- gap, not measured yet: training has token replacement on" in tiles_of(replaced)
    assert "no dropout" not in replaced.text


def test_test_loss_and_text_scores_are_at_the_top_once_evaluated(tmp_path: Path) -> None:
    folder = with_evaluation(overfitted(tmp_path / "run"), **whole_evaluation())
    found = tiles_of(Page(write_report(folder)))
    places = [found.index(text) for text in ("2.346 test loss", "34.5 chrF", "12.3 BLEU (char)")]
    assert places == sorted(places)


def test_an_evaluation_of_an_earlier_model_is_not_at_the_top(tmp_path: Path) -> None:
    folder = with_evaluation(overfitted(tmp_path / "run"), **whole_evaluation())
    write_event(folder, "evaluated", step=120, best=True, samples=[])
    page = Page(write_report(folder))
    assert "test loss" not in tiles_of(page) and "not measured yet" in tiles_of(page)
    assert "has found a better model since this evaluation" in page.text
    assert "2.3457" in page.text


def test_what_was_not_measured_says_why(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"memorised_50": None, "bleu": None, "chrf": None}
    reason = "not measured: every continuation ended before that many tokens"
    how = {"memorised_50": reason, "bleu": "not measured: evaluate.passages is 0"}
    page = Page(write_report(with_evaluation(tmp_path / "m", **changes, how=how)))
    assert f"Recited, 50 tokens in a row - {reason}" in page.text
    assert "BLEU - - not measured: evaluate.passages is 0" in page.text
    assert "Time 2026-01-01 00:00:00 UTC" in page.text


def test_one_reason_for_measuring_no_generated_text_is_given_once(tmp_path: Path) -> None:
    generated = "chrf bleu distinct_1 distinct_2 repetition memorised_20 memorised_50"
    keys = generated.split()
    reason = "not measured: an ensemble scores text but does not generate it"
    nothing: dict[str, Any] = dict.fromkeys(keys)
    folder = with_evaluation(tmp_path / "m", **nothing, how=dict.fromkeys(keys, reason))
    assert Page(write_report(folder)).text.count(reason) == 1


@pytest.mark.parametrize("name", ["run", "\ud55c\uad6d\uc5b4", 'it\'s a "run" $HOME'])
@pytest.mark.parametrize(
    ("losses", "overrides"),
    [
        (LOSSES, ()),
        (LOSSES, ("model.dropout=0", "optim.weight_decay=0", "data.fraction=0.5")),
        (LOSSES, ("optim.lr=0.01", "optim.max_grad_norm=null")),
        ([4.0, 3.5, 3.0, 2.6, 2.3, 2.0], ()),
        ([4.0], ()),
        ([6.0, 6.0, 6.0, 6.0], ("optim.lr=1e-5", "optim.min_lr=1e-6")),
        ([6.0, 6.0, 6.0, 6.0], ("optim.lr=0.1",)),
        ([4.0, 3.0, 2.5, 2.4, 2.4, 2.4, 2.4], ()),
    ],
)
def test_commands_of_the_report_work_when_they_are_typed(
    tmp_path: Path, name: str, losses: list[float], overrides: tuple[str, ...]
) -> None:
    rows = rows_of(losses)
    folder = write_run(tmp_path / name, rows, [started()], config_of(rows, *overrides))
    (tmp_path / f"{name}-2").mkdir()
    page = Page(write_report(folder))
    # As a browser copies them: the text of each <pre> but that of the whole config.
    found = re.findall(r"python jobs/\w+\.py [^\n<]*", html.unescape(page.html))
    commands = {line for line in found if "measures" not in line}
    jobs = [words(line) for line in commands]
    assert {job for job, _ in jobs} >= {"evaluate", "generate", "serve"}
    as_it_is = load_config(str(folder / "config.yaml"), [])
    for job, given in jobs:
        if job != "train":
            assert given[0].endswith(f".model={folder}")
            continue
        assert given[:2] == ["--config", str(folder / "config.yaml")]
        config = load_config(given[1], [one for one in given[2:] if not one.startswith("name=")])
        assert config != as_it_is
        names = [one for one in given if one.startswith("name=")]
        assert names in ([], [f"name={name}-3"])


def words(line: str) -> tuple[str, list[str]]:
    """The job and its arguments, as a shell hands them over."""
    shown = subprocess.run(
        ["sh", "-c", line.replace("python", "printf '%s\\n'", 1)], capture_output=True, text=True
    )
    job, *given = shown.stdout.splitlines()
    return Path(job).stem, given


def test_a_resumed_run_shows_each_evaluation_once_and_says_that_it_went_on(tmp_path: Path) -> None:
    rows = rows_of([4.0, 3.0, 2.5])
    events: list[Event] = [
        started(),
        evaluated(10, [["a", " first"]]),
        evaluated(20, [["a", " lost"]]),
        {"event": "failure", "time": 1.0, "message": "worker 0 failed: <gone>"},
        started(10),
        evaluated(20, [["a", " kept"]]),
        evaluated(30, [["a", " last"]]),
        evaluated(40, [["a", " beyond the rows"]]),
    ]
    page = Page(write_report(write_run(tmp_path / "run", rows, events, config_of(rows))))
    assert "kept" in page.text and "lost" not in page.text and "beyond" not in page.text
    assert "resumed after step 10" in page.text and "worker 0 failed: <gone>" in page.text


def test_a_run_that_failed_at_its_last_step_has_not_finished(tmp_path: Path) -> None:
    rows = rows_of([4.0, 3.0, 2.5])
    failure: Event = {"event": "failure", "time": 9.0, "message": "cannot write checkpoint_000030"}
    folder = write_run(tmp_path / "run", rows, [started(), failure], config_of(rows))
    page = Page(write_report(folder))
    assert "failed after step 30 of 30; the same command resumes it" in page.text
    assert "cannot write checkpoint_000030" in page.text
    write_run(folder, rows, [started(), failure, started(20)], config_of(rows))
    assert "finished after 30 steps" in Page(write_report(folder)).text


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path) -> None:
    config = config_of([])
    folder = write_run(tmp_path / "new", [], [started()], config)
    assert "no evaluation to judge from" in Page(write_report(folder, running=True)).text
    row = rows_of([4.0])[0]
    del row["val_loss"], row["val_ppl"], row["val_bpb"], row["gap"]
    row["step"] = 1
    write_run(folder, [row], [started()], config)
    page = Page(write_report(folder, running=True))
    assert "step 1 of 100" in page.text and len(page.all("svg")) == 6


def test_a_folder_with_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a run .* nor an evaluation\.json"):
        write_report(tmp_path)


def test_long_runs_are_thinned_and_keep_their_peaks() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    points[777] = (777.0, 99.0)
    thin = thinned(points)
    assert len(thin) <= 401 and (777.0, 99.0) in thin and thin[-1] == points[-1]
    assert list(thin) == sorted(thin)
    means = averaged(points)
    assert len(means) <= 200 and means[-1][0] == points[-1][0]
    assert averaged(points[:3]) == tuple(points[:3]) and thinned(points[:3]) == tuple(points[:3])


def test_axes_have_round_numbers() -> None:
    assert ticks(0, 20_000, 5) == [0, 5000, 10_000, 15_000, 20_000]
    assert f"{ticks(0, 800, 8)[0]:.0f}" == "0"  # not -0
    assert ticks(2.4, 6.9, 5) == [3, 4, 5, 6]
    assert ticks(2.63, 3.39, 3) == [2.8, 3, 3.2]  # with 0.5 between them there would be one
    assert [tick_text(x, 0.5) for x in (0, 0.5, 1.0)] == ["0", "0.5", "1.0"]
    assert [tick_text(x, 5e-5) for x in (0.0, 5e-5, 1e-4)] == ["0", "5e-5", "0.0001"]


def test_a_report_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = overfitted(tmp_path / "run")
    (folder / "report.html").mkdir()
    reporter = Reporter(folder, str(folder))
    with caplog.at_level(logging.WARNING, logger="gptray"):
        reporter.write(running=True)
        reporter.write(running=True)
    assert reporter.path is None
    told = f"was not written: cannot write {folder / 'report.html'}: Is a directory"
    assert len(caplog.records) == 1 and told in caplog.text
    (folder / "report.html").rmdir()
    reporter.write(running=False)
    assert reporter.path == str(folder / "report.html")


def test_the_report_is_rewritten_when_an_evaluation_is_known(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], [], config_of([]))
    reporter, begun = Reporter(folder, str(folder)), threading.Event()

    def rewrite() -> None:
        reporter.write(running=True)
        begun.set()

    with watching(folder, 100, on_evaluation=rewrite):
        start = {key: value for key, value in started().items() if key not in ("event", "time")}
        write_event(folder, "start", **start)
        assert begun.wait(30)
        assert "no evaluation to judge from" in Page(folder / "report.html").text
        row = rows_of([4.0])[0]
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        write_event(folder, "evaluated", step=10, best=True, samples=[["Once", " upon"]])
    assert "4.0000" in Page(folder / "report.html").text


def test_report_says_the_shares_of_the_text_and_what_is_odd_about_it(tmp_path: Path) -> None:
    rows = rows_of(LOSSES)
    start = started() | {
        "text": {"train": "9 documents, 1.8 MB (90.0%), 700,000 tokens"},
        "warnings": ["the text holds <|endoftext|> as plain text"],
    }
    page = Page(write_report(write_run(tmp_path / "run", rows, [start], config_of(rows))))
    assert "Training text" in page.text
    assert "9 documents, 1.8 MB (90.0%), 700,000 tokens" in page.text
    assert "the text holds <|endoftext|> as plain text" in page.text
