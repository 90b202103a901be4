"""The serve job: an HTTP endpoint on Ray Serve, with replicas behind Serve's proxy.

`gptray.jobs.serve.worker` defines the replicas.
"""

from __future__ import annotations

import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ray import serve

from gptray.config import Config, RunFailed, UserError
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.cluster.shared_storage import check_shared
from gptray.jobs.engine_plan import build_engine_backend
from gptray.jobs.next_steps import tell
from gptray.jobs.progress.doing import doing
from gptray.jobs.serve.body_limits import environment
from gptray.jobs.serve.check import CheckedEndpoint, completion_command, endpoint_url
from gptray.jobs.serve.watch import Watch, why_not_started
from gptray.jobs.serve.worker import APPLICATION, bound
from gptray.native.measured import NAMES
from gptray.signals import failure, leaving_within, sigterm_sets
from gptray.standard_output import line_printer
from gptray.wording import count

log = logging.getLogger("gptray")

# How much Serve's time limits exceed the endpoint's, which answers in OpenAI's format.
SPARE_S = 10.0
# Serve stops a replica whose engine is dead after three health checks, of one a second.
START_S, POLL_S = 60.0, 1.0
OPEN_PORT = (
    "Ray Serve keeps one port of each replica open to the network; it needs a token that only this "
    "job has"
)


def run(checked: CheckedEndpoint) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running requests finish.

    Prints the JSON line as soon as the endpoint generates. Raises UserError if it cannot start,
    RunFailed if it does not come up or goes away, and KeyboardInterrupt after Ctrl-C.
    """
    print_line = line_printer()
    config, model = checked.config, checked.model
    build_engine_backend(config)
    url = endpoint_url(config)
    on_cluster = ray_cluster(environment(config.serve), wait_s=config.compute.wait_s)
    log.info("starting %s at %s", model["model"], url)
    watch = Watch(model["model"])
    with on_cluster as is_own, ExitStack() as stack:
        with doing(f"starting {count(config.serve.num_replicas, 'engine')}"):
            stack.enter_context(_started(config, model, is_own=is_own))
            _wait_until_healthy(url)
            _tell_backends()
            watch.look()
        drain_s = config.serve.drain_timeout_s
        with sigterm_sets() as stop, leaving_within(drain_s + 2 * SPARE_S):
            print_line({"url": url, "model": model["served_model_name"]})
            log.info("serving %s at %s", model["model"], url)
            tell([completion_command(config, url, model["served_model_name"])])
            if is_own:
                log.info("%s", OPEN_PORT)
            try:
                while not stop.wait(POLL_S):
                    watch.look()
            except KeyboardInterrupt:
                if not failure():
                    _drain(drain_s)
                raise
            _drain(drain_s)


@contextmanager
def _started(config: Config, model: Mapping[str, str], *, is_own: bool) -> Iterator[None]:
    """Run the application on Ray Serve; afterwards restore Serve's previous state.

    is_own: whether the cluster ends with the job, and all of Serve with it.
    """
    adapters = config.serve.adapters or {}
    places = [adapters] if isinstance(adapters, str) else list(adapters.values())
    read = {"serve.model": [Path(model["model"])], "serve.adapters": list(map(Path, places))}
    check_shared(read=read, use_gpu=config.compute.use_gpu)
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    before = serve.status()
    if APPLICATION in before.applications:
        raise UserError(f"the cluster already serves an application {APPLICATION!r}")
    application = bound(config, model)  # raises if no node has the resources
    serve.start(
        http_options={
            "host": config.serve.host,
            "port": config.serve.port,
            "request_timeout_s": config.serve.request_timeout_s + SPARE_S,
        }
    )
    try:
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise _failure_to_start(error) from None
        yield
    finally:
        if before.proxies:
            serve.delete(APPLICATION)
        elif not is_own:
            serve.shutdown()


def _failure_to_start(error: RuntimeError) -> UserError | RunFailed:
    """Why no replica came up: Serve's error does not say, but its status does."""
    found = serve.status().applications.get(APPLICATION)
    told = "\n".join(one.message for one in found.deployments.values()) if found else ""
    failure = why_not_started(told) if told else RunFailed(why_ended(error))
    if isinstance(failure, UserError):
        return failure
    return RunFailed(f"the endpoint did not start: {failure}")


def _wait_until_healthy(url: str) -> None:
    """Return when the endpoint generates."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while True:
        try:
            direct.open(f"{url}/health", timeout=START_S).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise RunFailed(f"{url}/health did not answer: {error}") from None
            time.sleep(0.1)


def _tell_backends() -> None:
    """Log the replicas' backends, which each has chosen on its machine."""
    answers = serve.get_app_handle(APPLICATION).broadcast("backend").results(timeout_s=START_S)
    names = sorted({NAMES[answer] for answer in answers if answer in NAMES})
    if names:
        log.info("generate.backend: %s", " and ".join(names))
    if len(names) > 1:
        log.warning(
            "a prompt's text may depend on the replica that answers; set generate.backend=torch "
            "to make them agree"
        )


def _drain(timeout_s: float) -> None:
    """Have all replicas finish running requests and refuse new ones."""
    log.info("draining: running requests have %g s to finish", timeout_s)
    asked = serve.get_app_handle(APPLICATION).broadcast("drain", timeout_s)
    left = asked.results(timeout_s=timeout_s + SPARE_S, return_exceptions=True)
    cut = sum(number for number in left if isinstance(number, int))  # a dead replica has none
    if cut:
        log.warning("%s did not end in time", count(cut, "request"))
