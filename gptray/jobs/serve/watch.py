"""Tells what happens to the endpoint's engines: their news, deaths and failed starts.

And when the files of their model change.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from gptray.config import RunFailed, UserError
from gptray.jobs.cluster.holders import actors_in
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.cluster.waiting import REPLICA
from gptray.jobs.serve.worker import APPLICATION, News
from gptray.model.shape import model_folder
from gptray.wording import count

log = logging.getLogger("gptray")

NEWS_S = 5.0
CHANGED = (
    "the files of %s have changed. Engines that run keep the model that they loaded, and one that "
    "starts from now on serves the new one: start the endpoint again to serve it from all"
)


class Watch:
    """Looks after the engines of one endpoint. model: a folder, or what else names a model."""

    def __init__(self, model: str) -> None:
        self._model, self._files = model, _files(model)
        self._told = defaultdict[str, int](int)  # lines of news of each replica
        self._active: dict[str, int] = {}  # requests in flight of each replica, when last asked
        self._failed = ""  # why the newest engine did not start

    def look(self) -> None:
        """Log what is new. Raises RunFailed if the endpoint is gone."""
        application = serve.status().applications.get(APPLICATION)
        if application is None:
            raise RunFailed("the endpoint was deleted from the cluster")
        news = self._news()
        lines = [line for one in news for line in one.lines[self._told[one.replica] :]]
        self._told |= {one.replica: len(one.lines) for one in news}
        for level, line in dict.fromkeys(lines):
            log.log(level, "%s", line)
        if self._active.keys() - {one.replica for one in news}:
            self._tell_deaths()
        self._active |= {one.replica: one.active for one in news}
        self._tell_failed_start([one.message for one in application.deployments.values()])
        if self._files and _files(self._model) != self._files:
            self._files.clear()  # it is told only once
            log.warning(CHANGED, self._model)

    def _news(self) -> list[News]:
        """What replicas have to say, without those that are ending or busy."""
        asked = serve.get_app_handle(APPLICATION).broadcast("news")
        try:
            found = asked.results(timeout_s=NEWS_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return []
        return [one for one in found if isinstance(one, News)]

    def _tell_deaths(self) -> None:
        """Log which replicas' processes died. Those that Serve itself has ended are forgotten."""
        for actor in actors_in("DEAD"):
            replica = actor.name.rpartition("#")[2]
            if not actor.name.startswith(REPLICA) or replica not in self._active:
                continue
            active = self._active.pop(replica)
            died = actor.death_cause.actor_died_error_context
            if died.reason in (died.WORKER_DIED, died.NODE_DIED):
                lost = f"; {count(active, 'request')} failed with it" if active else ""
                why = why_ended(died.error_message, otherwise="it was killed or out of memory")
                log.warning("an engine's process died: %s%s. Ray Serve starts another", why, lost)

    def _tell_failed_start(self, messages: Iterable[str]) -> None:
        """Log why an engine does not start, by the deployments' status, once for each reason."""
        errors = [error for one in messages if (error := one.partition("Error:\n")[2])]
        before, self._failed = self._failed, "\n".join(str(why_not_started(one)) for one in errors)
        if self._failed and self._failed != before:
            log.error("an engine does not start, and Ray Serve keeps trying: %s", self._failed)


def why_not_started(told: str) -> UserError | RunFailed:
    """The error of an engine that did not start, by Serve's message about its deployment."""
    for kind in (UserError, RunFailed):
        _, is_ours, message = told.rpartition(f"{kind.__name__}: ")
        if is_ours:
            return kind(message.strip())
    return RunFailed(why_ended(told))


def _files(model: str) -> set[tuple[str, int, int]]:
    """The names, times and sizes of a model's files; empty unless they are on this machine."""
    if not Path(model).is_dir():
        return set()
    try:
        folder = model_folder(model)
        stats = {path.name: path.stat() for path in folder.iterdir()}
    except (OSError, UserError):
        return set()
    return {(name, one.st_mtime_ns, one.st_size) for name, one in stats.items()}
