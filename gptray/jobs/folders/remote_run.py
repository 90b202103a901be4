"""Runs and sweeps whose home is an object store: made in a local folder, published as they go.

The store is the source of truth: before a run starts, the local folder is made equal to it. While
it trains, changes are published (`gptray.jobs.folders.publisher`). If the machine is lost, steps
after the last published checkpoint are trained again, to the same bits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from gptray.config import Config, RunFailed, UserError
from gptray.config.errors import naming
from gptray.jobs.folders.fetching import fetch_run
from gptray.jobs.folders.publisher import RunPublisher, Sent, SweepPublisher, is_hidden
from gptray.jobs.folders.run_folder import run_dir, run_place
from gptray.storage.driver_lock import held
from gptray.storage.files import is_uri
from gptray.storage.lease import Lease, leased
from gptray.storage.manifest import MANIFEST
from gptray.storage.node_cache import hold, make_room, set_published
from gptray.storage.remote_folder import RemoteFolder, StoredFile
from gptray.tuning.sweep_record import load_trials, trial_dir

log = logging.getLogger("gptray")

_LEASES = ".gptray"
_MODEL_MANIFEST = f"model/{MANIFEST}"


# By local folder of a downloaded run: what the store held then, and what of it is local.
_downloaded: dict[Path, tuple[Mapping[str, StoredFile], Sent]] = {}


def download_run(config: Config, *, busy: str | None = None) -> None:
    """Make the folder of a resolved config's run equal to its home, if that is an object store.

    Checkpoints of a sweep's ended trials stay in the store, except of those that wait at a rung.
    busy: as for `held`.

    Raises UserError if the store cannot be read or a local process is training the run, RunFailed
    if the disk is full or a sweep's record is damaged.
    """
    if not is_uri(config.storage_path):
        return
    folder, home = run_dir(config), RemoteFolder(run_place(config))
    hold(folder)
    make_room()
    with naming("storage_path"):
        there = _listed(home)
    names = [name for name in there if not name.endswith(_MODEL_MANIFEST)]
    with held(folder, busy=busy):
        sent = fetch_run(home, folder, names, ended=lambda: _ended(folder))
        set_published(folder, True)
    _downloaded[folder] = there, sent


def _listed(home: RemoteFolder) -> dict[str, StoredFile]:
    return {name: one for name, one in home.files(deep=True).items() if not is_hidden(name)}


def _ended(folder: Path) -> set[Path]:
    """The trials of a sweep that will not be trained further. Raises RunFailed."""
    trials = [one for one in load_trials(folder) if one.outcome not in (None, "stopped")]
    return {trial_dir(folder, one.name) for one in trials if not one.passing}


@contextmanager
def publishing(
    config: Config, folder: Path, *, sweep: bool = False
) -> Iterator[Callable[[], None]]:
    """Publish a run or a sweep while the block runs, if its home is an object store.

    Yields a function that has all changes published soon; at the end they are. Keeps other jobs
    from writing there.

    Raises:
        UserError: another job is at work there, or the store cannot be written.
        RunFailed: another job has changed the run; or at the end, the store cannot be written.
    """
    if not is_uri(config.storage_path):
        yield lambda: None
        return
    home, kind = RemoteFolder(run_place(config)), SweepPublisher if sweep else RunPublisher
    busy = f"another job {'runs the sweep' if sweep else 'is training the run'} {home}"
    with leased(home / _LEASES, busy=busy) as lease:
        there, sent = _downloaded.pop(folder)
        if _listed(home) != there:
            raise RunFailed(f"another job has just changed {home}; run the same command again")
        set_published(folder, False)
        thread = _PublishingThread(kind(home, folder, sent), lease)
        try:
            yield thread.wake
        except BaseException:
            with suppress(RunFailed):
                thread.publish()
            raise
        else:
            thread.publish()
            set_published(folder, True)
        finally:
            thread.end()


class _PublishingThread:
    """Publishes a folder on demand in a thread, so that training does not wait."""

    def __init__(self, publisher: RunPublisher | SweepPublisher, lease: Lease) -> None:
        self._publisher, self._lease = publisher, lease
        self._guard, self._wanted, self._ended = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._follow, name="publisher", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Publish soon."""
        self._wanted.set()

    def end(self) -> None:
        """Stop, before the lease is released and another job may write there."""
        self._ended = True
        self._wanted.set()
        self._thread.join()

    def _follow(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ended:
                return
            try:
                self.publish()
            except RunFailed as error:
                log.warning("not published yet: %s", error)
            except FileNotFoundError as error:  # replaced or pruned meanwhile
                log.debug("not published yet: %s", error)

    def publish(self) -> None:
        """Publish all changes. Raises RunFailed."""
        with self._guard:
            self._lease.check()
            try:
                self._publisher.publish()
            except UserError as error:  # the store cannot be read
                raise RunFailed(str(error)) from None
