"""What many tests share: one local Ray for the session, a tiny text, and its prepared tokens."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from gptray.data.tokens import TokenData
from tests.tiny import tiny_config, tiny_text

# Whatever the environment says: each process of -n, and each run, would rewrite all asserts anew.
sys.dont_write_bytecode = False
# Nor the jobs that tests start: a shell has what it runs in the background ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)


RAY_TOKEN = {"RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
# What other processes need to connect to the session's Ray.
RAY_ACCESS = RAY_TOKEN | {"RAY_AUTH_MODE": "token"}


@cache
def group_of(path: Path) -> str:
    """The group that a file's tests are marked with, or ""."""
    found = re.search(r'xdist_group\("(\w+)"\)', path.read_text("utf-8"))
    return found[1] if found else ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With `-n`, give a file to one process as a whole, since its tests share what it made.

    All files of a group go to one too. xdist's own loadgroup keeps neither together under pytest
    9.2, where a test cannot be renamed by its group.
    """
    scheduler = LoadFileScheduling(config, log)

    def process_of(nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return group_of(config.rootpath / file) or file

    scheduler._split_scope = process_of
    return scheduler


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark `ray` what uses the session's Ray; leave out `chaos` unless `-m` names it.

    The group comes first, since one process runs it from end to end, then files that start Ray.
    """
    asked = "chaos" in config.option.markexpr
    left_out = [item for item in items if item.get_closest_marker("chaos") and not asked]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    starts_ray = set()
    for item in items:
        if item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.timeout(3600))
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("ray"):
            starts_ray.add(item.path)

    def place(item: pytest.Item) -> int:
        return 0 if group_of(item.path) else 1 if item.path in starts_ray else 2

    items.sort(key=place)


def pytest_runtest_setup() -> None:
    """Compute in one thread: more of them gain nothing here, and spin while Ray needs the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The session's Ray: two CPUs on this machine, started and ended as a job's own.

    Except for its address, the machine's in the network: on the loopback address, to which a job's
    own is confined, neither other processes would find it nor jobs the clusters that tests start.
    """
    from gptray.jobs.cluster.connection import OWN_TRAIN_ENV, TRAIN_ENV
    from gptray.jobs.cluster.own_ray import CLUSTERS, own_ray

    # Tiny runs report in quick succession: do not have each report wait for the next poll.
    os.environ.update(TRAIN_ENV | OWN_TRAIN_ENV, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1")
    before = dict(os.environ)
    with own_ray(
        RAY_TOKEN | {CLUSTERS: "1"}, num_cpus=2, log_to_driver=False, logging_level="ERROR"
    ):
        # What keeps this Ray to itself is not for clusters that tests start.
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        yield


@pytest.fixture(scope="session")
def joining(ray_cluster: None) -> dict[str, str]:
    """The environment of a job, as a process, that joins the session's Ray."""
    import ray

    address = ray.get_runtime_context().gcs_address
    return {**os.environ, **RAY_ACCESS, "RAY_ADDRESS": address}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a tiny text."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(tiny_text())
    return path


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path whose token data is made once for the session."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def tiny_data(ray_cluster: None, text_file: Path, data_root: Path) -> TokenData:
    """The prepared tokens of the tiny text."""
    from gptray.jobs.prepare.run import prepare

    return prepare(tiny_config(text_file, data_root))
