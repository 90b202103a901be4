"""What the doctor says of a cluster: judgements of facts, and a visit to this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptray.config import RunFailed, load_config
from gptray.entry_points import run
from gptray.jobs.cluster.cluster_nodes import NoAnswer, Node
from gptray.jobs.doctor.check import check
from gptray.jobs.doctor.facts import ClusterFacts, Disk, Examined, NodeFacts, OpenPort
from gptray.jobs.doctor.judgements import Finding, judge
from gptray.jobs.doctor.run import run as visit
from gptray.jobs.doctor.worker import node_facts, open_ports, process_name, two_gpus_add_up
from tests.object_store import ACCESS_KEY, object_store

GIB = 1 << 30
HEALTHY = NodeFacts(
    hostname="a",
    versions={"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "gptray": "1.0"},
    disks=(Disk("storage_path", "/x", 80 * GIB, 100 * GIB),),
    shared_memory=Disk("shared memory", "/dev/shm", 8 * GIB, 8 * GIB),
)
H100 = replace(HEALTHY, gpus=("NVIDIA H100",), torch_cuda="13.0", driver="580.82.07")
HEAD = Examined(Node("10.0.0.1", {"CPU": 4.0, "object_store_memory": GIB}, "1"), HEALTHY)


def second(facts: NodeFacts = HEALTHY, *, gpus: float = 0.0, clock_s: float = 0.0) -> Examined:
    offers = {"CPU": 4.0, "GPU": gpus, "object_store_memory": GIB}
    return Examined(Node("10.0.0.2", offers, "2"), facts, clock_s)


def cluster(*nodes: Examined, **facts: Any) -> ClusterFacts:
    return ClusterFacts("/x", nodes or (HEAD, second()), **facts)


def not_ok(facts: ClusterFacts) -> list[Finding]:
    return [finding for finding in judge(facts) if finding.level != "ok"]


def test_a_healthy_cluster_has_a_line_for_each_check_and_all_are_ok() -> None:
    findings = judge(cluster())
    assert [finding.level for finding in findings] == ["ok"] * len(findings)
    assert [finding.check for finding in findings] == [
        "nodes",
        "versions",
        "packages",
        "gpus",
        "compiler",
        "nccl",
        "storage",
        "disk",
        "shared memory",
        "authentication",
        "ports",
        "clocks",
    ]
    assert findings[1].line == (
        "ok    versions: python 3.11.9, ray 2.60.0, torch 2.13.0, gptray 1.0 on 2 nodes"
    )


OPEN = OpenPort("dashboard", "0.0.0.0", 8265)
RAYLET = OpenPort("raylet", "10.0.0.2", 40123)


@pytest.mark.parametrize(
    ("facts", "level", "check", "said"),
    [
        (
            cluster(blind=("storage_path=/x: node 10.0.0.2 does not see this folder",)),
            "fail",
            "storage",
            "10.0.0.2 does not see",
        ),
        (
            cluster(HEAD, second(replace(HEALTHY, missing=("sacrebleu",)))),
            "fail",
            "packages",
            "10.0.0.2 lacks sacrebleu; install",
        ),
        (
            cluster(HEAD, second(replace(HEALTHY, versions={**HEALTHY.versions, "ray": "2.59"}))),
            "fail",
            "versions",
            "ray 2.60.0 on 10.0.0.1, 2.59 on 10.0.0.2; install the same",
        ),
        (
            cluster(HEAD, silent=((second().node, NoAnswer("fails: No module named x")),)),
            "fail",
            "nodes",
            "10.0.0.2 fails: No module named x; install",
        ),
        (
            cluster(HEAD, second(replace(HEALTHY, disks=(Disk("runs", "/x", 5 << 20, GIB),)))),
            "fail",
            "disk",
            "5.0 MiB free for runs in /x on 10.0.0.2; make room",
        ),
        (
            cluster(
                HEAD, second(replace(HEALTHY, disks=(Disk("runs", "/x", 4 * GIB, 100 * GIB),)))
            ),
            "warn",
            "disk",
            "4.0 GiB free for runs in /x on 10.0.0.2, 96% used",
        ),
        (
            cluster(
                HEAD, second(replace(HEALTHY, shared_memory=Disk("", "/dev/shm", 9, 64 << 20)))
            ),
            "fail",
            "shared memory",
            "64.0 MiB in /dev/shm on 10.0.0.2; give",
        ),
        (
            cluster(
                HEAD, second(replace(HEALTHY, shared_memory=Disk("", "/dev/shm", 9, 512 << 20)))
            ),
            "warn",
            "shared memory",
            "where Ray wants 1.0 GiB",
        ),
        (cluster(HEAD, second(clock_s=-8.0)), "fail", "clocks", "10.0.0.2 is 8 s behind this"),
        (cluster(HEAD, second(clock_s=90.0)), "fail", "clocks", "10.0.0.2 is 90 s ahead of this"),
        (
            cluster(HEAD, second(replace(HEALTHY, no_code="there is no C++ compiler g++"))),
            "warn",
            "compiler",
            "no C++ kernels on 10.0.0.2: there is no C++ compiler g++; jobs use PyTorch there",
        ),
        (
            cluster(
                replace(HEAD, facts=replace(HEALTHY, no_code="this processor has no avx512f")),
                second(replace(H100, no_code="it needs a C compiler"), gpus=1),
            ),
            "fail",
            "compiler",
            "torch.compile does not work on the GPUs of 10.0.0.2: it needs a C compiler",
        ),
        (cluster(nccl="timed out"), "fail", "nccl", "cannot communicate: timed out"),
        (
            cluster(HEAD, second(replace(H100, torch_cuda=None), gpus=1)),
            "fail",
            "gpus",
            "PyTorch on 10.0.0.2 is a CPU build; pip install",
        ),
        (
            cluster(HEAD, second(replace(H100, driver="550.54.14"), gpus=1)),
            "fail",
            "gpus",
            "driver 550.54.14 on 10.0.0.2 is too old for PyTorch's CUDA 13.0; install driver 580",
        ),
        (
            cluster(HEAD, second(H100)),
            "warn",
            "gpus",
            "10.0.0.2 has 1 GPU and offers 0 to Ray; start Ray there with --num-gpus=1",
        ),
    ],
)
def test_each_thing_that_is_wrong_is_named_with_its_node_and_what_to_do(
    facts: ClusterFacts, level: str, check: str, said: str
) -> None:
    (finding,) = not_ok(facts)
    assert (finding.level, finding.check) == (level, check)
    assert said in finding.message


def test_an_open_dashboard_fails_without_a_token_and_passes_with_one() -> None:
    guarded = replace(HEALTHY, open_ports=(OPEN, RAYLET))
    assert not_ok(cluster(HEAD, second(guarded))) == []
    token, ports = not_ok(cluster(HEAD, second(replace(guarded, needs_token=False))))
    assert token.line.startswith("warn  authentication: Ray does not require a token on 10.0.0.2")
    assert ports.level == "fail"
    assert "the dashboard listens on 0.0.0.0:8265" in ports.message
    assert "--dashboard-host=127.0.0.1" in ports.message


def test_a_machine_without_shared_memory_is_told_as_such() -> None:
    (told,) = [
        finding.message
        for finding in judge(cluster(replace(HEAD, facts=replace(HEALTHY, shared_memory=None))))
        if finding.check == "shared memory"
    ]
    assert told == "no /dev/shm, as on macOS: Ray keeps its objects in its folder"


def test_open_ports_without_a_token_are_a_warning() -> None:
    bare = replace(HEALTHY, open_ports=(RAYLET,), needs_token=False)
    _, ports = not_ok(cluster(HEAD, second(bare)))
    assert ports.line.startswith("warn  ports: open beyond loopback: 10.0.0.2 raylet 40123")


def test_gpus_that_fit_their_driver_are_fine() -> None:
    assert not_ok(cluster(HEAD, second(H100, gpus=1), nccl="")) == []


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/v/bin/python /v/ray/dashboard/dashboard.py --host=0.0.0.0 --port=8265", "dashboard"),
        ("/v/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp", "gcs_server"),
        ("/v/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp", "raylet"),
        ("ray::DashboardAgent", "DashboardAgent"),
        ("ray::IDLE", "IDLE"),
        ("ray::Replica(a=1)", "Replica"),
        ("/usr/bin/python book.py", ""),
    ],
)
def test_processes_of_ray_are_known_by_their_command_lines(command: str, name: str) -> None:
    assert process_name(command) == name


@pytest.mark.parametrize(
    ("port", "name"),
    [(8265, "dashboard"), (8267, "dashboard"), (44227, "metrics of the dashboard")],
)
def test_the_dashboards_metrics_are_not_the_dashboard(port: int, name: str) -> None:
    command = "/v/bin/python /v/ray/dashboard/dashboard.py --host=0.0.0.0 --port=8265 --x"
    assert process_name(command, port) == name


@pytest.mark.parametrize(
    ("family", "address", "is_open"),
    [
        ("AF_INET", "0.0.0.0", True),
        ("AF_INET", "127.0.0.1", False),
        ("AF_INET6", "::", True),
        ("AF_INET6", "::1", False),
        ("AF_INET6", "::ffff:127.0.0.1", False),
    ],
)
def test_ports_of_ray_that_other_machines_reach_are_open(
    family: str, address: str, is_open: bool
) -> None:
    listener = f"({address!r}, 0), family=socket.{family}, dualstack_ipv6={':' in address}"
    code = (
        f"import socket; listener = socket.create_server({listener}); "
        "print(listener.getsockname()[1], flush=True); input()"
    )
    command = [sys.executable, "-c", code, "gcs_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        port = OpenPort("gcs_server", address, int(process.stdout.readline()))
        assert (port in open_ports()) == is_open
        process.communicate(b"\n", timeout=60)
    assert port not in open_ports()


def test_a_node_tells_its_versions_disks_and_memory(tmp_path: Path) -> None:
    facts = node_facts(str(tmp_path / "not" / "yet"))
    assert facts.hostname == socket.gethostname()
    assert facts.versions["torch"] and facts.versions["python"]
    assert facts.missing == ()
    assert [disk.what for disk in facts.disks] == ["storage_path", "Ray's files"]
    assert all(0 < disk.free <= disk.total for disk in facts.disks)


def test_a_node_tells_of_a_missing_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = "there is no C++ compiler no-such-compiler on this machine (apt-get install g++)"
    assert node_facts(str(tmp_path)).no_code == told


def test_a_node_of_a_job_whose_home_is_a_store_tells_of_its_cache(tmp_path: Path) -> None:
    disks = node_facts("s3://bucket/runs").disks
    assert [disk.what for disk in disks] == ["gptray's cache", "Ray's files"]


def test_a_store_is_looked_at_as_a_folder_is(
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config(None, ["storage_path=s3://bucket/runs"])
    with object_store(monkeypatch, tmp_path):
        for key in (ACCESS_KEY, "another"):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
            with suppress(RunFailed):  # a machine with a full disk, say; the other key
                visit(check(config))
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    good, bad = ({one["check"]: one for one in line["checks"]}["storage"] for line in lines)
    assert good["message"] == "storage_path=s3://bucket/runs answers the only node"
    assert bad["level"] == "fail" and "credentials come from the environment" in bad["message"]


def test_two_processes_add_up_a_number(ray_cluster: None) -> None:
    assert two_gpus_add_up(backend="gloo", on_gpus=False) == ""
    assert "nowhere" in two_gpus_add_up(backend="nowhere", on_gpus=False).lower()


def test_a_dry_run_looks_at_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", [f"storage_path={tmp_path}", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan == {"checks": f"every node, and {tmp_path}; changes nothing"}


def test_a_visit_to_this_machine_gives_a_json_line_and_says_whether_all_is_well(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"storage_path={tmp_path}"])
    failed = None
    try:
        visit(check(config))
    except RunFailed as error:  # a machine with a full disk, say
        failed = str(error)
    line = json.loads(capsys.readouterr().out)
    assert line["ok"] == (failed is None) == (line["problems"] == [])
    assert len(line["nodes"]) == 1 and len(line["checks"]) == len(judge(cluster()))
    assert list(tmp_path.iterdir()) == []
