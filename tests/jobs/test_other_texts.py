"""evaluate.also through the jobs: texts found, prepared, scored, and held to what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.config import Config, UserError, load_config, override
from gptray.jobs.base import find_job
from gptray.jobs.evaluate.run import evaluate
from gptray.jobs.folders.resuming import check_resumable, save_config
from gptray.jobs.folders.run_folder import resolve, run_dir
from gptray.jobs.train.check import check
from gptray.jobs.train.run import train
from tests.reports.pages import Page
from tests.tiny import tiny_text


def config_of(model_dir: Path, tmp_path: Path, *words: str, max_steps: int = 4) -> Config:
    (tmp_path / "text.txt").write_text(tiny_text(300))
    (tmp_path / "other.txt").write_text(tiny_text(40, seed=3)[::-1])
    settings = [
        f"storage_path={tmp_path / 'runs'}", "name=run", f"model.init_from={model_dir}",
        f"data.source={tmp_path / 'text.txt'}", "train.block_size=16",
        f"train.max_steps={max_steps}", "train.eval_interval=2", "train.precision=fp32",
        "sample.max_new_tokens=2", "compute.cpus_per_worker=1",
    ]  # fmt: skip
    return load_config(None, [*settings, *words])


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_run_forgets_is_in_line_report_and_evaluation(
    model_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    config = config_of(model_dir, tmp_path, f"evaluate.also={{kept: {other}}}")
    result = train(config)
    assert result["also"]["kept"]["bpb"] != result["also"]["kept"]["base_bpb"]
    page = Page(tmp_path / "runs" / "run" / "report.html")
    assert f"on kept {result['also']['kept']['base_bpb']:.2f} -> " in page.text
    assert f"{result['also']['kept']['bpb']:.4f}" in page.text
    words = [f"storage_path={tmp_path / 'runs'}", f"evaluate.also={other}", "evaluate.passages=0"]
    for model, key in ((model_dir, "base_bpb"), (tmp_path / "runs" / "run", "bpb")):
        found = evaluate(
            load_config(
                None, [*words, f"evaluate.model={model}", f"evaluate.source={tmp_path}/text.txt",
                       "train.block_size=16"]
            )
        )  # fmt: skip
        assert found["also"]["other.txt"]["bpb"] == pytest.approx(
            result["also"]["kept"][key], abs=1e-4
        )
    longer = config_of(model_dir, tmp_path, f"evaluate.also={{kept: {other}}}", max_steps=6)
    other.write_text(tiny_text(40, seed=4))
    with pytest.raises(UserError, match="the text kept has changed since the run run started"):
        train(longer)


def test_a_text_that_is_trained_on_or_missing_is_refused(model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    for also, why in (
        (
            f"{{a: {text}, b: {tmp_path}/none.txt}}",
            "a is not held-out text: .*text.txt is also part of",
        ),
        (f"{{a: {text}, b: {tmp_path}/none.txt}}", "evaluate.also=.*none.txt"),
        (f"{tmp_path}", "lies in evaluate.also="),
    ):
        with pytest.raises(UserError, match=why):
            check(config_of(model_dir, tmp_path, f"evaluate.also={also}"))


def test_each_jobs_plan_names_the_other_texts(model_dir: Path, tmp_path: Path) -> None:
    config = config_of(
        model_dir, tmp_path, f"evaluate.also={tmp_path / 'other.txt'}",
        f"evaluate.model={model_dir}", "tune.space=[{path: optim.lr, choice: [1e-3, 2e-3]}]",
    )  # fmt: skip
    for job in (find_job(name) for name in ("train", "evaluate", "tune")):
        assert ("scored too", "other.txt") in job.plan(job.check(config))


def test_other_texts_are_what_a_run_was_started_with(model_dir: Path, tmp_path: Path) -> None:
    config = resolve(config_of(model_dir, tmp_path, f"evaluate.also={tmp_path / 'other.txt'}"))
    run_dir(config).mkdir(parents=True)
    save_config(config, run_dir(config))
    assert check_resumable(config) == []
    with pytest.raises(UserError, match="evaluate.also"):
        check_resumable(override(config, {"evaluate.also": None}))
