"""The jobs as a user types them: exit codes, the last line of stdout, a cluster's job."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from gptray.entry_points import run
from gptray.model.hf import save_pretrained
from gptray.storage.record import read_rows
from gptray.tuning.sweep_record import TRIALS, load_trials
from tests.generation.models import random_gpt, small_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=1",
    "model.n_embd=16",
    "train.max_steps=4",
    "train.eval_interval=2",
    "train.block_size=32",
    "train.global_batch_size=4",
    "sample.max_new_tokens=4",
]


def job(
    name: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=300,
    )


def test_prepare_ends_with_one_json_line(
    joining: dict[str, str], text_file: Path, tmp_path: Path
) -> None:
    words = [f"data.source={text_file}", f"storage_path={tmp_path}", *TINY]
    done = job("prepare", *words, environment=joining)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["documents"] == 1 and set(result["tokens"]) == {"train", "val"}


def test_a_cluster_of_another_python_is_one_message(joining: dict[str, str]) -> None:
    from ray._private.worker import global_worker

    key, stored = b"CLUSTER_METADATA", global_worker.gcs_client
    metadata = stored.internal_kv_get(key, b"cluster")
    other = {**json.loads(metadata), "python_version": "3.99.1"}
    stored.internal_kv_put(key, json.dumps(other).encode(), True, b"cluster")
    try:
        done = job("doctor", environment=joining)
    finally:
        stored.internal_kv_put(key, metadata, True, b"cluster")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"the cluster runs Ray {other['ray_version']} on Python 3.99.1, and" in done.stderr
    assert f"on Python {platform.python_version()}; start" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=3e-4"], "did you mean optim.lr?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["data.source=nowhere.txt"], "nowhere.txt"),
        (["compute.use_gpu=true", "compute.num_workers=16"], "this machine has 0"),
        (["train.compile=true"], "there is no C++ compiler nowhere-g++"),
        (["data.tokenizer=./nowhere"], "nowhere"),
        (["model.init_from=./nowhere"], "nowhere"),
        (["storage_path=s4://bucket"], "s4://bucket"),
    ],
)
def test_mistake_is_one_message_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "nowhere-g++")
    for dry_run in ([], ["--dry-run"]):
        assert run("train", [*arguments, *dry_run]) == 2
        out, err = capsys.readouterr()
        assert message in err and "Traceback" not in err
        assert out == ""


def test_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = job("train", "train.lr=3e-4", environment={"HOME": str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert "did you mean optim.lr?" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["train", "tune", "generate", "prepare", "evaluate", "serve"])
def test_a_start_that_fails_leaves_nothing(text_file: Path, tmp_path: Path, name: str) -> None:
    storage = tmp_path / "new" / "runs"
    words = [f"data.source={text_file}", f"storage_path={storage}", *TINY]
    if name == "tune":
        words += ["tune.space=[{path: model.dropout, uniform: [0, 0.2]}]", "tune.num_samples=1"]
    if name in ("generate", "evaluate", "serve"):
        tokenizer = small_tokenizer()
        save_pretrained(random_gpt(tokenizer), tmp_path / "m", eos_token_id=tokenizer.eos_id)
        tokenizer.save(tmp_path / "m")
        words = [f"{name}.model={tmp_path}/m", "generate.backend=torch", f"storage_path={storage}"]
    if name == "evaluate":
        words.append(f"evaluate.source={text_file}")
    if name == "generate":
        (tmp_path / "p.txt").write_text("one\n")
        words += [f"generate.input_path={tmp_path}/p.txt", f"generate.output_path={storage}/out"]
    done = job(name, *words, environment={"RAY_ADDRESS": f"127.0.0.1:{_free_port()}"})
    assert done.returncode == 2 and done.stdout == ""
    assert "no Ray answers there: Connection refused" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "new").exists()


@pytest.mark.ray
def test_a_jobs_own_ray_is_closed_to_the_network_even_if_ray_was_imported_before() -> None:
    code = (
        "import ray\n"
        "from gptray.jobs.cluster.connection import ray_cluster\n"
        "with ray_cluster(): address = ray.util.get_node_ip_address()\n"
        "print(address)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "127.0.0.1\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(params=["token", pytest.param("disabled", marks=pytest.mark.chaos)])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A `ray start --head` of its own, without and with token authentication.

    It has refused a job with a wrong key: that it takes a job is so seen anyway.
    """
    dashboard = _free_port()
    environment = {
        "RAY_AUTH_MODE": request.param,
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    ray = str(Path(sys.executable).with_name("ray"))
    head_environment = {**os.environ, **environment}
    head_environment.pop("RAY_ADDRESS")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={_free_port()}"]
        + ["--node-ip-address=127.0.0.1"]  # not that of a network which another test makes
        + [f"--dashboard-port={dashboard}", "--disable-usage-stats"]
        # The session's own Ray has an agent on the default port; without one no job is taken.
        + [f"--dashboard-agent-listen-port={_free_port()}"],
        env=head_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # The head takes jobs only some seconds after it listens.
    for _ in range(20):
        first = submit(environment, "jobs/train.py", "optim.lrr=1")
        if "did you mean optim.lr?" in first.stdout:
            break
    assert "did you mean optim.lr?" in first.stdout, first.stdout + first.stderr
    assert first.returncode != 0
    yield environment
    head.terminate()
    try:
        head.wait(timeout=5)
    except subprocess.TimeoutExpired:
        # It would drain its node for half a minute.
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    return subprocess.run(
        [ray, "job", "submit", "--working-dir", str(ROOT), "--entrypoint-num-cpus=1"]
        + ["--", sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.ray
def test_ray_job_submit_trains_and_a_wrong_key_fails(
    cluster: dict[str, str], text_file: Path, tmp_path: Path
) -> None:
    common = [f"data.source={text_file}", f"storage_path={tmp_path}", "name=submitted", *TINY]
    done = submit(cluster, "jobs/train.py", *common)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4/4" in done.stdout and '"stopped": "max_steps"' in done.stdout
    assert (tmp_path / "submitted" / "model" / "model.safetensors").is_file()
    if cluster["RAY_AUTH_MODE"] == "token":
        stranger = {**cluster, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
        (tmp_path / "other").write_text("f" * 64)
        assert submit(stranger, "jobs/train.py", "--dry-run").returncode != 0


def test_generate_reads_prompts_on_the_terminal_and_dry_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = small_tokenizer()
    save_pretrained(random_gpt(tokenizer), tmp_path / "m", eos_token_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "m")
    model = f"generate.model={tmp_path / 'm'}"
    done = job("generate", model, "sample.prompt=\uc61b\ub0a0", "sample.max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    text, _, last = done.stdout.rstrip("\n").rpartition("\n")
    result = json.loads(last)
    assert text == "\uc61b\ub0a0" + result["outputs"][0]["output"]
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    paths = [f"generate.input_path={tmp_path / 'p.txt'}", f"generate.output_path={tmp_path}/out"]
    assert run("generate", [model, *paths, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["output"] == f"{tmp_path}/out"
    assert not (tmp_path / "out").exists()
    assert run("generate", [model, *paths, "generate.prompt_colum=x", "sample.topk=5"]) == 2
    wrong = capsys.readouterr().err
    assert "generate.prompt_column" in wrong and "sample.top_k" in wrong
    assert run("generate", [model]) == 2


def test_evaluate_dry_runs_and_refuses(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = small_tokenizer()
    save_pretrained(random_gpt(tokenizer), tmp_path / "m", eos_token_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "m")
    common = [f"evaluate.model={tmp_path / 'm'}", f"storage_path={tmp_path}", "name=apart"]
    assert run("evaluate", [*common, f"evaluate.source={text_file}", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["text"] == str(text_file)
    assert not (tmp_path / "apart").exists()
    assert run("evaluate", [*common, "evaluate.stride=65"]) == 2
    out, err = capsys.readouterr()
    assert "evaluate.stride=65" in err and "Traceback" not in err and out == ""


def test_tune_dry_runs_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={ROOT / 'configs' / 'overfitting_demo.yaml'}"
    assert run("tune", [config, f"storage_path={tmp_path}", "name=dry", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["trials"] == "16: the config as it is, 15 drawn"
    assert plan["rungs"].startswith("at step 240")
    assert plan["steps"].startswith("15,360 at most")
    assert not (tmp_path / "dry").exists()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("tune:\n  space:\n  - path: model.dropot\n    uniform: [0, 0.3]\n")
    assert run("tune", [f"--config={wrong}", f"storage_path={tmp_path}", "tune.samples=3"]) == 2
    out, err = capsys.readouterr()
    assert f"{wrong}:3: tune.space: unknown path model.dropot; did you mean" in err
    assert "did you mean tune.num_samples?" in err and out == ""
    assert run("tune", [f"storage_path={tmp_path}"]) == 2


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("cluster", ["disabled"], indirect=True)
def test_a_submitted_sweep_that_was_stopped_goes_on_when_submitted_again(
    cluster: dict[str, str], text_file: Path, tmp_path: Path
) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    space = "[{path: model.dropout, uniform: [0, 0.2]}]"
    arguments = [f"data.source={text_file}", f"storage_path={tmp_path}", "name=sweep", *TINY]
    arguments += ["train.max_steps=3000", "train.eval_interval=100", f"tune.space={space}"]
    arguments += ["tune.grace_period=30"]  # none is cut, so that some still run when it is stopped
    arguments = [one for one in arguments if one not in TINY[4:6]] + ["tune.num_samples=4"]
    environment = {**os.environ, **cluster}
    command = [ray, "job", "submit", "--no-wait", "--submission-id=first", "--working-dir"]
    command += [str(ROOT), "--", sys.executable, "jobs/tune.py", *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    while not any(one.outcome for one in load_trials(tmp_path / "sweep")):
        time.sleep(0.5)
    subprocess.run([ray, "job", "stop", "first"], env=environment, check=True, capture_output=True)
    before = [one.name for one in load_trials(tmp_path / "sweep") if one.outcome]
    assert 0 < len(before) < 5
    done = submit(cluster, "jobs/tune.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"trials": 5' in done.stdout
    events = read_rows(tmp_path / "sweep" / TRIALS)
    ended = [event["trial"] for event in events if event["event"] == "ended"]
    assert ended[: len(before)] == before and sorted(ended) == [f"000{n}" for n in range(5)]


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("cluster", ["disabled"], indirect=True)
def test_a_deployed_model_gives_way_to_another_without_a_failed_request(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    tokenizer, port = small_tokenizer(), _free_port()
    deployed = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    deployed["http_options"]["port"] = port
    address = cluster["RAY_ADDRESS"]
    serve = str(Path(sys.executable).with_name("serve"))

    def deploy(seed: int) -> None:
        folder = tmp_path / f"model-{seed}"
        model = random_gpt(tokenizer, seed=seed)
        save_pretrained(model, folder, eos_token_id=tokenizer.eos_id)
        tokenizer.save(folder)
        replica = deployed["applications"][0]["deployments"][0]
        replica["user_config"] = {"model": str(folder)}
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(deployed))
        command = [serve, "deploy", "--address", address, str(tmp_path / "serve.yaml")]
        environment = {**os.environ, **cluster, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True, capture_output=True)

    def ask() -> tuple[str, str]:
        body = {"prompt": "the", "max_tokens": 20, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()["model"], answer.json()["choices"][0]["text"]

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    deploy(1)
    while not answers():
        time.sleep(0.2)
    seen = {ask()}
    changing = threading.Thread(target=deploy, args=(2,))
    changing.start()
    while len(seen) < 2:
        seen.add(ask())
    changing.join()
    seen |= {ask() for _ in range(10)}
    # Each model says one thing.
    assert len(seen) == 2 and {model for model, _ in seen} == {"model-1", "model-2"}
