"""Connects to Ray: joins the cluster in RAY_ADDRESS, or starts one on this machine, quietly."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout

import ray

from gptray.config import RunFailed, UserError
from gptray.jobs.cluster.own_code import check_own_code
from gptray.jobs.cluster.own_ray import folder_of_ray, own_ray, shut_down
from gptray.jobs.cluster.ray_messages import RayMessages
from gptray.jobs.cluster.waiting import telling_waits
from gptray.jobs.progress.doing import doing
from gptray.storage.files import cannot_write, is_file_error
from gptray.wording import first_line

# Read by Ray Train in driver, controller and workers. By default it polls every two seconds, which
# delays reports by as much; polling every 0.2 seconds costs training a few percent of two cores,
# every second almost nothing. By default it looks for nodes that are being preempted every five
# seconds; some clouds give notice of thirty.
TRAIN_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
# Also set if the cluster is the job's own: nobody preempts its node or reads its metrics, and the
# watcher and the metrics cost seconds at every start.
OWN_TRAIN_ENV = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# Ray prestarts a worker for each core. Ray Train cannot use them, because its workers have their
# own environment.
NO_SPARE_WORKERS = {"RAY_prestart_worker_first_driver": "0"}
# Read by Ray Serve's controller and proxy if the cluster is the job's own. By default, the
# controller's loop runs ten times a second, which takes 3 % of a core. Over gRPC, an update of a
# stream costs the proxy and the replica a fifth less than over Ray's own transport.
# `gptray.jobs.serve.proxy` wraps Serve's proxy.
SERVE_ENV = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "gptray.jobs.serve.proxy:middlewares",
}

# For a session's logs and sockets; with less space than this, Ray's processes do not start.
_RAY_NEEDS = 4 << 20
# Within how many seconds the Ray at RAY_ADDRESS must answer; Ray's default client port.
ANSWER_S, _CLIENT_PORT = 3.0, 10001
# HTTP/2: a client's preface with an empty SETTINGS frame, and the type byte of such a frame.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = b"\x04"


@contextmanager
def ray_cluster(
    environment: Mapping[str, str] | None = None, *, wait_s: float | None = None
) -> Iterator[bool]:
    """Provide Ray for the duration of a job: the cluster in RAY_ADDRESS, or one of its own here.

    If the process is already connected to Ray, that is used and left running. Yields whether the
    cluster is the job's own, which ends with the block. A job that waits for resources says so.

    environment: variables for the processes of the job's own Ray.
    wait_s: how long the job waits for resources, see `telling_waits`; None: forever.
    Raises RunFailed if Ray does not start or answer, or the wait took too long; UserError if the
    working directory has another gptray, or the cluster another Python or Ray.
    """
    if ray.is_initialized():
        with telling_waits(wait_s):
            yield False
        return
    check_own_code()
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_address(address)
    for key, value in (TRAIN_ENV | SERVE_ENV | ({} if address else OWN_TRAIN_ENV)).items():
        os.environ.setdefault(key, value)
    verbose = logging.getLogger("gptray").isEnabledFor(logging.DEBUG)
    level = logging.INFO if verbose else logging.ERROR
    options = {"log_to_driver": verbose, "logging_level": level}
    # Ray prints messages about processes that died; stdout is for the job's result.
    with redirect_stdout(RayMessages()), ExitStack() as stack:
        with warnings.catch_warnings(), _sigterm_kept():
            warnings.simplefilter("default" if verbose else "ignore")
            if address:
                joining = doing(f"joining the cluster at {address}")
                with ray_answers(), _versions_match(address), joining:
                    ray.init(**options)
                stack.callback(shut_down)
            else:
                with _ray_folder(), doing("starting Ray"):
                    stack.enter_context(own_ray(environment or {}, **options))
        with telling_waits(wait_s):
            yield not address


@contextmanager
def _ray_folder() -> Iterator[None]:
    """Raise RunFailed, naming the folder, if Ray cannot write its session's files."""
    folder = folder_of_ray()
    try:
        with ray_answers():
            yield
    except Exception as error:
        if "AF_UNIX path" in str(error):
            failure: object = f"the path {folder} is too long for its sockets"
        elif is_file_error(error):
            failure = cannot_write(folder, error)
        elif shutil.disk_usage(folder).free < _RAY_NEEDS:
            # Ray's own processes died without saying why.
            failure = cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        elif "timed out during startup" in str(error):
            logs = folder / "ray" / "session_latest" / "logs"
            raise RunFailed(
                "Ray did not start in time: other processes keep this machine busy, or part of Ray "
                f"failed (its logs are in {logs}); run the job again once that is over"
            ) from error
        else:
            raise
        message = f"Ray did not start: {failure}; set RAY_TMPDIR to another folder"
        raise RunFailed(message) from error


@contextmanager
def ray_answers() -> Iterator[None]:
    """Turn Ray's timeouts and lost connections into a RunFailed with one sentence."""
    try:
        yield
    except (TimeoutError, ConnectionError) as error:
        if is_file_error(error):
            raise
        raise RunFailed(
            f"Ray does not answer: {first_line(error)}; the same command resumes once it does"
        ) from error


@contextmanager
def _versions_match(address: str) -> Iterator[None]:
    """Raise UserError if Ray refuses this process, whose Python or Ray is not the cluster's."""
    try:
        yield
    except RuntimeError as error:
        found = re.findall(r"(?:Ray|Python): (\S+)", str(error))
        if not str(error).startswith("Version mismatch") or len(found) != 4:
            raise
        their_ray, their_python, ray_version, python = found
        raise UserError(
            f"RAY_ADDRESS={address}: the cluster runs Ray {their_ray} on Python {their_python}, "
            f"and this job Ray {ray_version} on Python {python}; start the job with the cluster's "
            "versions, or submit it with ray job submit, which runs it there"
        ) from None


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Restore the process's SIGTERM handler: Ray's aborts the process after three seconds."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def check_address(address: str) -> None:
    """Raise UserError for an address where no Ray listens: Ray itself would retry for minutes."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is a dashboard's address, for ray job submit; to start a job "
            "directly use HOST:6379, or unset RAY_ADDRESS to have the job start its own Ray"
        )
    place = _running_here() if address == "auto" else address
    if place is None or address == "local":
        return  # Ray itself fails or starts at once
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if not host and place.startswith("ray://"):
        host, port = port, str(_CLIENT_PORT)
    if not host or not port.isdecimal():
        raise UserError(f"RAY_ADDRESS={address}: is not HOST:PORT, such as 127.0.0.1:6379, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as connection:
            _speak(connection)
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        found = f" ({place})" if address == "auto" else ""
        raise UserError(
            f"RAY_ADDRESS={address}{found}: no Ray answers there: {reason}; start one with ray "
            "start --head, or unset RAY_ADDRESS to have the job start its own Ray"
        ) from None


def _speak(connection: socket.socket) -> None:
    """Greet as a gRPC client, since Ray speaks gRPC. Raises OSError if the answer is not gRPC."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # it answers only over TLS
    connection.sendall(_PREFACE)
    answer = connection.recv(9)
    if answer[3:4] != _SETTINGS:
        raise ConnectionError("whatever is listening there is not Ray")


def _running_here() -> str | None:
    """The address of the Ray cluster last started on this machine, if any."""
    folder = folder_of_ray() / "ray"
    try:
        return (folder / "ray_current_cluster").read_text("utf-8").strip() or None
    except OSError:
        return None
