"""What is said when Ray itself fails: not what a full disk is told by."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import ray.exceptions

from gptray.config import Config, RunFailed, load_config
from gptray.config.errors import WorkerFailed
from gptray.jobs.train.attempts import fit_until_done
from gptray.jobs.train.fitting import ray_failures
from gptray.jobs.train.trainer import Trainer
from tests.test_jobs import job


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.GetTimeoutError("Get timed out\nwith details"),
        TimeoutError("Get timed out"),
        ConnectionError("Get timed out"),
    ],
)
def test_a_ray_that_does_not_answer_is_no_full_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(RunFailed) as told, ray_failures(Config(), tmp_path):
        raise error
    assert str(told.value) == (
        "Ray does not answer: Get timed out; the same command resumes once it does"
    )


def test_a_folder_that_ray_cannot_write_is_named(tmp_path: Path) -> None:
    told = pytest.raises(RunFailed, match=rf"^cannot write {tmp_path}: No space left on device \(")
    with told, ray_failures(Config(), tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_too_deep_for_rays_sockets_is_named(text_file: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    words = [f"data.source={text_file}", f"storage_path={tmp_path}"]
    done = job("prepare", *words, environment={"RAY_TMPDIR": str(deep)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"prepare: Ray did not start: the path {deep} is too long for its sockets; "
        "set RAY_TMPDIR to another folder"
    )


def test_what_one_worker_alone_failed_by_is_told_without_its_traceback(tmp_path: Path) -> None:
    from ray.train import WorkerGroupError

    failures: dict[int, Exception] = {0: RuntimeError("lost"), 1: WorkerFailed("no memory")}
    with pytest.raises(RunFailed, match="^no memory$"), ray_failures(Config(), tmp_path):
        raise WorkerGroupError("a traceback", failures)


@pytest.mark.parametrize("workers", ["1", "[1, 2]"])
def test_workers_that_lack_memory_are_not_started_again(
    ray_cluster: None, tmp_path: Path, workers: str
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    attempts = tmp_path / "attempts"

    def lack_memory() -> None:
        with attempts.open("a") as file:
            file.write("one\n")
        raise WorkerFailed("no memory")

    config = load_config(None, [f"compute.num_workers={workers}", "compute.max_failures=2"])
    retries = 0 if config.compute.is_elastic else config.compute.max_failures

    def fit(number: int) -> dict[str, object]:
        run = RunConfig("run", str(tmp_path), failure_config=FailureConfig(max_failures=retries))
        trainer = Trainer(lack_memory, scaling_config=ScalingConfig(num_workers=1), run_config=run)
        result: dict[str, object] = trainer.fit()
        return result

    with pytest.raises(RunFailed, match="^no memory$"), ray_failures(config, tmp_path):
        fit_until_done(config, {"CPU": 1.0}, fit)
    assert attempts.read_text() == "one\n"


@pytest.mark.parametrize("is_storage", [True, False])
def test_a_controllers_failure_is_told_by_its_kind(tmp_path: Path, is_storage: bool) -> None:
    from ray.train import ControllerError

    cause = OSError(errno.EIO, os.strerror(errno.EIO)) if is_storage else TimeoutError("no answer")
    failed = "Ray Train's controller failed; the same command"
    begins = f"cannot write {tmp_path}: Input/output error" if is_storage else failed
    with pytest.raises(RunFailed, match=f"^{begins}"), ray_failures(Config(), tmp_path):
        raise ControllerError(cause)


def test_a_dying_scorer_is_guessed_only_where_there_is_one(tmp_path: Path) -> None:
    from ray.train import ControllerError

    config = load_config(None, ["train.async_validation=true"])
    guess = "failed, which happens when the process that scores checkpoints dies more than"
    with pytest.raises(RunFailed, match=guess), ray_failures(config, tmp_path):
        raise ControllerError(TimeoutError("no answer"))
