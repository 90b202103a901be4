"""Ray's workers as forks of one process that has imported what they need: four CPU seconds each.

Ray starts this file in the place of its own `setup_worker.py`. The first worker leaves behind a
process that imports Ray, PyTorch and what gptray's workers need, and forks the workers of all
nodes that the test's process starts with the same settings of Ray. It ends with the test's process.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

PRELOADED = [
    "gptray.jobs.evaluate.worker",
    "gptray.jobs.generate.worker",
    "gptray.jobs.prepare.run",
    "gptray.jobs.train.trainer",
    "gptray.jobs.train.worker",
    "gptray.jobs.tune.worker",
    "torch._dynamo",  # which optimizers import
    *("pydantic.v1", "pyarrow.json", "ray.dag", "starlette.datastructures"),  # Ray itself
]
OWNER = "GPTRAY_TESTS_PROCESS"
# What differs between the workers of a node, or between nodes.
OF_A_WORKER = {"RAY_JOB_ID", "RAY_RAYLET_PID"}
MOST_BYTES = 1 << 20  # of a request
STANDARD = [0, 1, 2]  # file descriptors
# Words of a command, its environment, variables of its runtime environment, its folder.
Request = tuple[list[str], dict[str, str], dict[str, str], str]
# What Ray's setup_worker.py takes from the words.
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


@contextmanager
def forking_workers() -> Iterator[None]:
    """Have the nodes that this process starts in the block fork their workers."""
    import pytest
    from ray._private.parameter import RayParams

    missing = [name for name in PRELOADED if find_spec(name) is None]
    assert not missing, f"no worker could start without {missing}"
    given = RayParams.__init__

    def with_this_file(self: RayParams, *others: Any, **named: Any) -> None:
        given(self, *others, **{"setup_worker_path": __file__, **named})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayParams, "__init__", with_this_file)
        patch.setenv(OWNER, str(os.getpid()))
        yield


def main() -> None:
    """Have a worker forked, and end when it has ended; in a fork, become the worker."""
    words = sys.argv[1:]
    found = [one.removeprefix(CONTEXT) for one in words if one.startswith(CONTEXT)]
    context = json.loads(found[0]) if found else {}
    if not _is_plain(context):
        folder = os.path.dirname(_worker_path(words))
        os.execv(sys.executable, [sys.executable, f"{folder}/setup_worker.py", *words])
    address = _address(os.environ)
    if forked := _forked_from_new_template(address):
        _become(forked)
        return
    plain = [one for one in words if not one.startswith((CONTEXT, LANGUAGE))]
    request = json.dumps([plain, dict(os.environ), context.get("env_vars") or {}, os.getcwd()])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        _connect(connection, address)
        socket.send_fds(connection, [request.encode()], STANDARD)
        connection.recv(1)  # the worker has the other end


def _connect(connection: socket.socket, address: str) -> None:
    deadline = time.monotonic() + 60
    while connection.connect_ex(address):  # bound by another worker, which is about to listen
        assert time.monotonic() < deadline, "what forks workers has died"
        time.sleep(0.01)


def _worker_path(words: list[str]) -> str:
    return next(one for one in words if one.endswith("default_worker.py"))


def _is_plain(context: Mapping[str, Any]) -> bool:
    """Whether a worker differs from others of its node by variables at most."""
    others = {key for key, value in context.items() if value} - {"env_vars", "py_executable"}
    return not others and context.get("py_executable", sys.executable) == sys.executable


def _address(environment: Mapping[str, str]) -> str:
    """Where a template listens that has read these settings of Ray at its imports."""
    read = {name for name in environment if name.startswith("RAY_")} - OF_A_WORKER
    settings = json.dumps([(name, environment[name]) for name in sorted(read)])
    return f"\0{environment[OWNER]}-{hashlib.sha256(settings.encode()).hexdigest()}"


def _forked_from_new_template(address: str) -> Request | None:
    """Leave a template behind if there is none. In a fork of it, return what it is to be."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        try:
            listener.bind(address)
        except OSError:  # in use
            return None
        listener.listen(100)
        return None if os.fork() else _serve(listener)


def _serve(listener: socket.socket) -> Request:
    """Fork a worker for each request; return it there. The template itself ends here."""
    os.setsid()  # Ray kills a worker's group with it
    os.closerange(len(STANDARD), listener.fileno())  # Ray's, by which it sees a worker end
    os.closerange(listener.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    # What Ray reads once: workers belong to no job yet, as those that it starts ahead; and what
    # ends them when it ends, for which each watches its own node.
    os.environ |= {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": os.environ[OWNER]}
    owner = os.pidfd_open(int(os.environ[OWNER]))
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or each worker's first collection copies all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    while True:
        ready = select.select([listener.fileno(), owner], [], [])[0]
        if owner in ready:
            os._exit(0)
        connection, _ = listener.accept()
        content, descriptors, _, _ = socket.recv_fds(connection, MOST_BYTES, len(STANDARD))
        if not os.fork():
            os.setpgid(0, 0)
            for there, here in zip(descriptors, STANDARD, strict=True):
                os.dup2(there, here)
                os.close(there)
            os.close(owner)
            connection.detach()  # open until this process ends
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request: Request = json.loads(content)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()


def _become(request: Request) -> None:
    """Run Ray's worker in this process."""
    import runpy

    from ray._private.utils import update_envs

    words, environment, variables, folder = request
    os.environ.clear()
    os.environ.update(environment)
    update_envs(variables)
    os.chdir(folder)
    threading.Thread(
        target=_end_with, args=[int(environment["RAY_RAYLET_PID"])], daemon=True
    ).start()
    path = _worker_path(words)
    sys.path[0] = os.path.dirname(path)
    sys.argv = words[words.index(path) :]
    runpy.run_path(path, run_name="__main__")


def _end_with(raylet: int) -> None:
    """End this process when its node's raylet has ended."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(raylet)], [], [])
    os._exit(1)


if __name__ == "__main__":
    main()
