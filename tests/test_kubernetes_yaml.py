"""What is shipped for Kubernetes, against KubeRay's, Ray's and gptray's own schemas."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptray.entry_points import main
from gptray.model.hf import save_pretrained
from tests.generation.models import random_gpt, small_tokenizer
from tests.kuberay.manifests import CLUSTER_AT, cluster_of, groups_of, problems, read
from tests.tiny import tiny_text

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "clusters"
TEXTS = {
    path.stem: path.read_text(encoding="utf-8")
    for path in FOLDER.glob("*.yaml")
    if "\napiVersion: " in path.read_text(encoding="utf-8")
}
RAY = [name for name in sorted(TEXTS) if name != "kubernetes"]
JOBS = [name for name in RAY if name.startswith("ray-job-")]
# A test's machine reaches no hub.
OWN = {"ray-job-train": ["data.tokenizer=char"]}


def manifest_of(name: str) -> dict[str, Any]:
    (manifest,) = read(TEXTS[name])
    return manifest


def known_version(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))[package]


@pytest.fixture
def shared(name: str, tmp_path: Path) -> Path:
    """The shared folder as the job of that name expects it."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text(tiny_text())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    if name == "ray-job-generate":
        tokenizer, model = small_tokenizer(), tmp_path / "gpt2" / "model"
        save_pretrained(random_gpt(tokenizer), model, eos_token_id=tokenizer.eos_id)
        tokenizer.save(model)
    return tmp_path


def dry_run(name: str, text: str, shared: Path) -> int:
    """The exit code of a RayJob's command, on this machine's folders."""
    command = read(text)[0]["spec"]["entrypoint"]
    words = command.replace("/mnt/gptray", str(shared)).replace("/opt/gptray", str(ROOT)).split()
    assert words[0] == "gptray"
    return main([*words[1:], *OWN.get(name, []), "--dry-run"])


def test_all_that_is_shipped_is_looked_at() -> None:
    assert {"ray-cluster", "ray-job-train", "ray-job-tune", "ray-job-generate"} <= set(RAY)
    assert {"ray-service", "kubernetes"} <= set(TEXTS)
    kinds = {manifest["kind"] for text in TEXTS.values() for manifest in read(text)}
    assert set(CLUSTER_AT) <= kinds


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_kubernetes_and_kuberay_accept_it(name: str) -> None:
    assert [found for manifest in read(TEXTS[name]) for found in problems(manifest)] == []


# A file, what it says, a typo of that, and what the refusal names.
TYPOS = [
    ("ray-cluster", "kind: RayCluster", "kind: RayClusters", "unknown kind RayClusters"),
    ("ray-cluster", "ray.io/v1", "ray.io/v2", "apiVersion"),
    ("ray-cluster", "authOptions:", "authOption:", "'authOption' was unexpected"),
    ("ray-cluster", "mode: token", "mode: tokens", "'tokens' is not one of"),
    ("ray-cluster", "redisAddress:", "redisAdress:", "'redisAdress' was unexpected"),
    ("ray-cluster", "gptray-redis, key:", "gptray-redis, keys:", "'key' is a required property"),
    ("ray-cluster", "Autoscaling: true", "Autoscaling: 'true'", "'true' is not of type 'boolean'"),
    ("ray-cluster", "TimeoutSeconds:", "TimeoutSecond:", "'idleTimeoutSecond' was unexpected"),
    ("ray-cluster", "num-cpus:", "num-cpu:", "unknown num-cpu"),
    ("ray-cluster", "maxReplicas:", "maxReplica:", "'maxReplica' was unexpected"),
    ("ray-cluster", "replicas: 0", "replicas: none", "'none' is not of type 'integer'"),
    ("ray-cluster", "claimName:", "claimname:", "'claimname' was unexpected"),
    ("ray-cluster", "fsGroup:", "fsGroups:", "'fsGroups' was unexpected"),
    ("ray-cluster", "memory: 16Gi", "memory: 16GiB", "'16GiB' does not match"),
    ("ray-cluster", "tolerations:", "toleration:", "'toleration' was unexpected"),
    ("ray-cluster", "operator:", "operators:", "'operators' was unexpected"),
    ("ray-cluster", "Mounts: *mounts", "Mount: *mounts", "'volumeMount' was unexpected"),
    ("ray-cluster", "- name: ray-head", "- nam: ray-head", "'nam' was unexpected"),
    ("ray-job-train", "JobFinishes:", "JobFinish:", "'shutdownAfterJobFinish' was unexpected"),
    ("ray-job-train", "backoffLimit: 2", "backoffLimit: two", "'two' is not of type 'integer'"),
    ("ray-job-train", "rayClusterSpec:", "rayClusterConfig:", "'rayClusterConfig' was unexpected"),
    ("ray-job-train", "entrypoint:", "entryPoint:", "'entryPoint' was unexpected"),
    ("ray-service", "serveConfigV2:", "serveConfig:", "'serveConfig' was unexpected"),
    ("ray-service", "import_path:", "import_pth:", "import_path"),
    ("ray-service", "proxy_location:", "proxy_locations:", "unknown proxy_locations"),
    ("ray-service", "port: 8000", "prot: 8000", "unknown prot"),
    ("ray-service", "num_replicas:", "num_replica:", "did you mean serve.num_replicas?"),
    ("ray-service", "name: Replica", "name: Replicas", "unknown deployment Replicas"),
    ("ray-service", "served_model_name:", "serve_model_name:", "'serve_model_name'"),
    ("ray-service", "user_config:", "userconfig:", "unknown userconfig"),
    ("kubernetes", "accessModes:", "accessMode:", "'accessMode' was unexpected"),
    ("kubernetes", "type: Recreate", "type: Recreat", "'Recreat' is not one of"),
    ("kubernetes", "containerPort: 6379", "containerport: 6379", "'containerport' was unexpected"),
    ("kubernetes", "- port: 6379", "- ports: 6379", "'ports' was unexpected"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "said"), TYPOS, ids=[one[2] for one in TYPOS])
def test_a_typo_is_refused(name: str, right: str, wrong: str, said: str) -> None:
    assert right in (typo_free := _without_comments(TEXTS[name]))
    manifests = read(typo_free.replace(right, wrong, 1))
    assert said in "\n".join(one for manifest in manifests for one in problems(manifest))


def _without_comments(text: str) -> str:
    return re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE)


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="rayVersion"):
        read(TEXTS["ray-cluster"].replace("spec:\n", "spec:\n  rayVersion: '2.0'\n", 1))


@pytest.mark.parametrize("name", JOBS)
def test_the_command_of_a_job_is_one_that_gptray_accepts(
    name: str, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # as in a submitted job: resources come
    assert dry_run(name, TEXTS[name], shared) == 0, capsys.readouterr().err
    assert '"dry_run": true' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("ray-job-train", "gptray train", "gptray tran"),
        ("ray-job-train", "compute.num_workers", "compute.num_worker"),
        ("ray-job-train", "gpt2_124m.yaml", "gpt2_124.yaml"),
        ("ray-job-tune", "tune.max_concurrent_trials", "tune.max_concurent_trials"),
        ("ray-job-generate", "generate.input_path", "generate.input"),
        ("ray-job-generate", "use_gpu=true", "use_gpu=ture"),
    ],
)
def test_a_typo_in_a_command_is_refused(
    name: str,
    right: str,
    wrong: str,
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert dry_run(name, TEXTS[name].replace(right, wrong), shared) == 2
    assert wrong.removeprefix("gptray ").removeprefix("use_gpu=") in capsys.readouterr().err


@pytest.mark.parametrize("name", JOBS)
def test_a_command_passes_the_submitters_shell_unchanged(name: str) -> None:
    # KubeRay puts it into `sh -c "... ray job submit -- COMMAND ; ..."`.
    command = manifest_of(name)["spec"]["entrypoint"]
    assert "\n" not in command
    assert [shlex.quote(word) for word in command.split(" ")] == command.split(" ")


@pytest.mark.parametrize("name", RAY)
def test_ray_is_the_version_that_was_tested_and_asks_for_the_token(name: str) -> None:
    cluster = cluster_of(manifest_of(name))
    assert cluster["rayVersion"] == known_version("ray")
    assert cluster["authOptions"] == {"mode": "token"}  # KubeRay makes the token itself
    for group in groups_of(manifest_of(name)):
        for container in group["template"]["spec"]["containers"]:
            tag = container["image"].rpartition(":")[2]
            assert tag.startswith(f"ray-{known_version('ray')}-"), container["image"]
            resources = container["resources"]
            has_gpu = "nvidia.com/gpu" in resources["limits"]
            assert has_gpu == ("-cu" in tag) and resources["limits"] == resources["requests"]


@pytest.mark.parametrize("name", RAY)
def test_every_pod_has_the_shared_folder(name: str) -> None:
    claims = [one for one in read(TEXTS["kubernetes"]) if one["kind"] == "PersistentVolumeClaim"]
    assert claims[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups_of(manifest_of(name)):
        pod = group["template"]["spec"]
        mounts = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        shared = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert [mounts[volume["name"]] for volume in shared] == ["/mnt/gptray"]
        assert shared[0]["persistentVolumeClaim"]["claimName"] == claims[0]["metadata"]["name"]
    assert "s3://" not in TEXTS[name]  # storage_path is a folder that nodes mount


@pytest.mark.parametrize("name", ["ray-cluster", "ray-service"])
def test_what_stays_outlives_its_head(name: str) -> None:
    options = cluster_of(manifest_of(name))["gcsFaultToleranceOptions"]
    made = {one["kind"]: one for one in read(TEXTS["kubernetes"])}
    host, _, port = options["redisAddress"].partition(":")
    assert host == made["Service"]["metadata"]["name"]
    assert int(port) == made["Service"]["spec"]["ports"][0]["port"]
    pod = made["Deployment"]["spec"]["template"]
    assert made["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    assert made["Deployment"]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    secret = pod["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secret
    assert f"secret generic {secret['name']} --from-literal={secret['key']}=" in TEXTS["kubernetes"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_takes_its_cluster_along_and_comes_back_after_a_failure(name: str) -> None:
    spec = manifest_of(name)["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] > 0
    asked = dict(re.findall(r"([\w.]+)=(\S+)", spec["entrypoint"]))
    count = asked.get("tune.max_concurrent_trials") or asked.get(
        "generate.num_workers", asked.get("compute.num_workers")
    )
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers["replicas"] == int(count or 0)
    assert int(asked["compute.cpus_per_worker"]) <= int(limits["cpu"])
    assert ("compute.use_gpu" in asked) == ("nvidia.com/gpu" in limits)


def test_the_endpoint_is_the_application_and_needs_a_key() -> None:
    manifest = manifest_of("ray-service")
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, attribute = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    assert application["args"]["serve.host"] == config["http_options"]["host"] == "0.0.0.0"
    folder, _, key = application["args"]["serve.api_key_file"].rpartition("/")
    for group in groups_of(manifest):
        pod = group["template"]["spec"]
        (secret,) = [volume for volume in pod["volumes"] if "secret" in volume]
        mounts = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        assert mounts[secret["name"]] == folder
    name = secret["secret"]["secretName"]
    assert f"secret generic {name} --from-literal={key}=" in TEXTS["kubernetes"]
    # KubeRay's probes of Serve's own paths have no key.
    assert "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH" not in TEXTS["ray-service"]


def test_the_image_is_rays_of_that_version_with_a_compiler_and_the_pinned_packages() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    assert f"ARG RAY_VERSION={known_version('ray')}" in lines
    assert "FROM rayproject/ray:${RAY_VERSION}-py312-${PLATFORM}" in lines
    (install,) = [line for line in lines if "pip install" in line]
    assert "-c constraints.txt" in install and "download.pytorch.org/whl/${TORCH}" in install
    assert any("apt-get install" in line and "g++" in line for line in lines)
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"gptray", "configs", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    tags = set(re.findall(r"gptray:(ray-\S+)", text))
    used = {tag for name in RAY for tag in re.findall(r"gptray:(ray-\S+)", TEXTS[name])}
    assert used <= tags
