"""Models by the names that people give them: a run's, a folder's, one that is spelled wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from gptray.config import Config, RunFailed, UserError, dump, load_config
from gptray.data.parts import part_name, part_sha256, write_part
from gptray.data.tokenizer import Tokenizer
from gptray.jobs.evaluate.check import check as check_evaluation
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.generate.checked import check_model
from gptray.jobs.models import find_model, open_model, with_tokenizer
from gptray.jobs.prepare.check import check as check_preparation
from gptray.jobs.prepare.check import plan as preparation_plan
from gptray.jobs.serve.check import check as check_endpoint
from gptray.jobs.serve.check import user_config
from gptray.jobs.train.check import check as check_training
from gptray.jobs.tune.check import check as check_sweep
from gptray.model.shape import read_shape
from gptray.storage.driver_lock import held
from tests.damage import locked

ROOT = Path(__file__).resolve().parents[2]
# Every key that names a model.
MODELS = ("generate.model", "serve.model", "evaluate.model", "model.init_from", "data.tokenizer")


@pytest.fixture(autouse=True)
def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def storage(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage path with the run ko-q; the working directory is another folder."""
    storage = tmp_path / "runs"
    shutil.copytree(model_dir, storage / "ko-q" / "model")
    (storage / "ko-q" / "config.yaml").write_text(dump(load_config(None, ["train.block_size=64"])))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return storage


def config_of(storage: Path, *overrides: str) -> Config:
    place = [] if any("storage_path=" in one for one in overrides) else [f"storage_path={storage}"]
    return load_config(None, [*place, *overrides])


def found(storage: Path, source: str) -> Path:
    return find_model(config_of(storage), source, key="generate.model")[0]


def test_a_runs_name_is_taken_wherever_a_model_is_named(storage: Path) -> None:
    run = storage / "ko-q"
    assert found(storage, "ko-q") == run / "model"
    served = user_config(config_of(storage, "serve.model=ko-q"))
    assert served == {"model": str(run), "served_model_name": "ko-q"}
    shape = resolve(config_of(storage, "model.init_from=ko-q", "train.block_size=8")).model
    assert shape.init_from == str(run / "model") and shape.n_positions == 64
    plan = dict(preparation_plan(check_preparation(config_of(storage, "data.tokenizer=ko-q"))))
    assert plan["tokenizer"] == str(run)


def test_a_run_is_evaluated_in_few_bits_by_its_name(storage: Path, text_file: Path) -> None:
    words = [f"evaluate.source={text_file}", "quantize.weights=int4"]
    named, alone = (
        check_evaluation(config_of(storage, *words, word))
        for word in ("evaluate.model=ko-q", "name=ko-q")
    )
    assert alone.found.folder == named.found.folder and alone.folder == named.folder
    assert alone.folder != alone.found.run


def test_a_runs_name_is_evaluated(storage: Path, text_file: Path) -> None:
    overrides = [f"evaluate.source={text_file}", "evaluate.model=ko-q"]
    checked = check_evaluation(config_of(storage, *overrides))
    assert checked.found.folder == storage / "ko-q" / "model"


def test_a_folder_without_a_model_does_not_hide_a_run(
    storage: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    Path("ko-q").mkdir()
    assert found(storage, "ko-q") == storage / "ko-q" / "model"
    assert f"generate.model=ko-q is the run {storage}/ko-q; the folder" in caplog.text
    shutil.copytree(model_dir, "ko-q", dirs_exist_ok=True)
    assert found(storage, "ko-q") == Path("ko-q")
    assert f"; generate.model={storage}/ko-q is the run" in caplog.text


def refused(key: str, storage: Path, source: str) -> str:
    """What the job that has this key says of a model that is nowhere."""
    config = config_of(storage, f"{key}={source}")
    with pytest.raises(UserError) as told:
        if key == "serve.model":
            check_endpoint(config)
        elif key == "evaluate.model":
            check_evaluation(config)
        elif key == "generate.model":
            check_model(config)
        else:
            check_training(config)
    return str(told.value)


OFFLINE = "not in the hub's cache (HF_HUB_OFFLINE is set)"


@pytest.mark.parametrize("key", MODELS)
def test_a_model_that_is_nowhere_is_named_with_the_nearest_run(storage: Path, key: str) -> None:
    place = "no such folder or file" if key == "data.tokenizer" else "no such folder"
    looked = f"no such run in {storage}, {place} here and {OFFLINE}"
    assert refused(key, storage, "KO-p") == f"{key}=KO-p: {looked}; did you mean ko-q?"
    listing = f"python jobs/runs.py storage_path={storage} lists all runs"
    assert refused(key, storage, "unlike") == f"{key}=unlike: {looked}; {listing}"
    assert refused(key, storage, "some/gpt") == f"{key}=some/gpt: {place} here and {OFFLINE}"
    assert refused(key, storage, "./ko-p") == f"{key}=./ko-p: {place}"
    near = f"did you mean {storage}/ko-q?"
    assert refused(key, storage, f"{storage}/ko-p/") == f"{key}={storage}/ko-p/: {place}; {near}"


def test_a_smaller_vocabulary_than_the_models_is_told(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = read_shape(storage / "ko-q").rows
    with caplog.at_level(logging.INFO, logger="gptray"):
        for asked in (rows, rows + 60, 10):
            words = [f"model.vocab_size={asked}", "generate.model=ko-q"]
            check_model(config_of(storage, *words))
    told = [one.message for one in caplog.records if "vocab_size" in one.message]
    place = storage / "ko-q"
    assert told == [f"model.vocab_size=10 is for training: {place} keeps its {rows:,} tokens"]


def test_what_could_be_a_gguf_file_is_missed_as_a_file(storage: Path, tmp_path: Path) -> None:
    key = "generate.model"
    assert refused(key, storage, "./x.gguf") == f"{key}=./x.gguf: no such folder or file"
    (tmp_path / "book.txt").write_text("text")
    said = "a file, but not a model: a model is a folder or a file ending in .gguf"
    assert refused(key, storage, f"{tmp_path}/book.txt").endswith(f"/book.txt: {said}")


def test_a_misspelt_tokenizer_may_be_a_kind_or_a_run(storage: Path) -> None:
    assert refused("data.tokenizer", storage, "bpee").endswith("; did you mean bpe?")
    (storage / "ko-q").rename(storage / "chats")
    assert refused("data.tokenizer", storage, "chat").endswith("; did you mean chats?")


def test_a_hidden_folder_is_no_run(storage: Path) -> None:
    shutil.copytree(storage / "ko-q", storage / ".ko-p")
    os.utime(storage / "ko-q" / "model" / "config.json", (0, 0))
    newest, _ = find_model(config_of(storage), None, key="generate.model")
    assert newest == storage / "ko-q" / "model"
    with pytest.raises(UserError, match=r"did you mean ko-q\?$"):
        found(storage, "ko-p")


def test_a_search_space_takes_the_folder_of_a_run(storage: Path) -> None:
    space = "[{path: data.tokenizer, choice: [%s, bpe]}]"
    keys = ["train.block_size=64", "compute.cpus_per_worker=1"]
    for name, told in (
        ("ko-q", f"a search space takes a run's folder, {storage}/ko-q, not its name"),
        ("ko-p", f"no such run in {storage}, .*; did you mean ko-q"),
    ):
        with pytest.raises(UserError, match=f"^data.tokenizer={name}: {told}"):
            check_sweep(config_of(storage, f"tune.space={space % name}", *keys))
    check_sweep(config_of(storage, f"tune.space={space % (storage / 'ko-q')}", *keys))


def test_a_misspelt_name_gets_the_nearest_runs(storage: Path) -> None:
    with pytest.raises(UserError, match=r"^name=ko-p: no such run in .*; did you mean ko-q\?$"):
        find_model(config_of(storage, "name=ko-p"), None, key="generate.model")


def test_preparing_takes_the_tokenizer_of_the_run_to_start_from(storage: Path) -> None:
    plan = dict(preparation_plan(check_preparation(config_of(storage, "model.init_from=ko-q"))))
    assert plan["tokenizer"] == str(storage / "ko-q")
    with pytest.raises(UserError, match=r"^model.init_from=ko-p: .*; did you mean ko-q\?$"):
        check_preparation(config_of(storage, "model.init_from=ko-p"))


def test_a_folder_without_a_tokenizer_does_not_hide_a_run(storage: Path) -> None:
    Path("ko-q").mkdir()
    given = config_of(storage, "data.tokenizer=ko-q")
    assert with_tokenizer(given).data.tokenizer == str(storage / "ko-q")
    shutil.copy(storage / "ko-q" / "model" / "tokenizer.json", "ko-q")
    assert with_tokenizer(given).data.tokenizer == "ko-q"


def test_names_of_any_script_are_found_and_corrected(storage: Path) -> None:
    run = (storage / "ko-q").rename(storage / "\ud55c\uad6d\uc5b4")
    assert found(storage, unicodedata.normalize("NFD", run.name)) == run / "model"
    with pytest.raises(UserError) as told:
        found(storage, "\ud55c\uad6d")
    assert str(told.value) == (
        f"generate.model=\ud55c\uad6d: no such run in {storage} and no such folder here; "
        f"did you mean {run.name}?"
    )


@pytest.mark.parametrize("key", [*MODELS, "storage_path", "data.source"])
def test_a_home_that_nobody_has_is_one_sentence(storage: Path, key: str) -> None:
    place = "~nobody-of-this-name/x"
    told = f"{key}={place}: no home folder is known for ~nobody-of-this-name; give the whole path"
    assert refused(key, storage, place) == told
    if key in ("data.tokenizer", "storage_path", "data.source"):
        for check in (check_preparation, check_evaluation):
            with pytest.raises(UserError, match=f"(^|\n){told}"):
                check(config_of(storage, "evaluate.model=ko-q", f"{key}={place}"))


@pytest.mark.parametrize("key", MODELS)
def test_a_run_without_a_model_says_what_trains_it(storage: Path, key: str) -> None:
    (storage / "ko-q" / "model").rename(storage / "elsewhere")
    run = storage / "ko-q"
    assert refused(key, storage, "ko-q") == (
        f"{key}=ko-q: the run {run} has no model yet; python jobs/train.py --config "
        f"{run}/config.yaml resumes it"
    )
    with held(run):
        assert refused(key, storage, "ko-q") == (
            f"{key}=ko-q: the run {run} has no model yet: it is training, and its best model comes "
            "after its first evaluation"
        )


@pytest.mark.slow
@pytest.mark.parametrize("key", ["generate.model", "model.init_from", "data.tokenizer"])
def test_a_hub_that_never_answers_is_one_sentence(tmp_path: Path, key: str) -> None:
    job = "generate" if key == "generate.model" else "train"
    words = [f"{key}=nobodys-model", "sample.prompt=a", f"storage_path={tmp_path}"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *words],
            env={**os.environ, **hub, "HOME": str(tmp_path), "HF_HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"{key}=nobodys-model" in line and "does not answer" in line
    assert not list(tmp_path.glob("builtin*"))


class EmptyHub(BaseHTTPRequestHandler):
    """A hub that has no model."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


def test_a_model_that_the_hub_has_not_is_one_sentence(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / "generate.py"), "generate.model=some/gpt",
             "sample.prompt=a", f"storage_path={tmp_path}"],
            env={**os.environ, **env, "HOME": str(tmp_path), "HF_HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        hub.shutdown()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "generate: generate.model=some/gpt: no such folder here and no such model on the hub "
        "(a private one needs HF_TOKEN)\n"
    )


def test_without_a_hub_its_cache_is_used(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--gpt"
    shutil.copytree(model_dir, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    code = (
        "import json; from pathlib import Path; from gptray.model.shape import model_folder;"
        "from gptray.data.tokenizer import Tokenizer;"
        "print(json.dumps([str(model_folder('some/gpt')), Tokenizer.load('some/gpt').vocab_size]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder, size = json.loads(done.stdout)
    assert folder == str(repository / "snapshots" / "abc") and size > 0


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_of_another_user_is_not_called_damaged(name: str, model_dir: Path) -> None:
    with tempfile.TemporaryDirectory() as there:  # not below a folder of root's own
        folder = Path(shutil.copytree(model_dir, Path(there) / "model"))
        for path in (Path(there), folder):
            path.chmod(0o755)
        with locked(folder / name), pytest.raises(UserError) as told:
            open_model(folder, key="generate.model")
            Tokenizer.load(folder)
    assert str(told.value).endswith(f"{folder / name}: cannot be read: Permission denied")


def test_a_part_of_another_user_is_not_to_be_deleted(tmp_path: Path) -> None:
    write_part(pa.table({"a": [1]}), part := tmp_path / part_name(0))
    with locked(part), pytest.raises(RunFailed, match=r"cannot be read: .*Permission denied") as no:
        part_sha256(part)
    assert "delete" not in str(no.value)
