"""An output in an object store; its scratch folder is local, as is one part at a time for counting.

A part is one upload, which becomes visible when it is complete. A lease keeps other jobs out; an
upload by an engine whose job has lost the lease is harmless, since a part has the same rows whoever
generates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from gptray.config import RunFailed, UserError
from gptray.config.errors import naming
from gptray.data.parts import SCRATCH, digest_file, part_name
from gptray.jobs.generate.checked import CheckedBatch
from gptray.jobs.generate.output import Output
from gptray.jobs.generate.output_plan import (
    MANIFEST,
    PLAN,
    SUCCESS,
    Record,
    busy,
    json_bytes,
    not_of_this_job,
    valid_plan,
)
from gptray.storage.files import is_uri, sha256_of
from gptray.storage.lease import leased
from gptray.storage.node_cache import hold, make_room
from gptray.storage.remote_folder import RemoteFolder
from gptray.storage.stored import Unreadable, parse_json, read_object


def output_kind(job: CheckedBatch) -> type[Output]:
    return RemoteOutput if is_uri(job.output) else Output


class RemoteOutput(Output):
    """A job's opened output in an object store."""

    @property
    def _place(self) -> RemoteFolder:
        return RemoteFolder(self.job.output)

    @classmethod
    def existing_plan(cls, job: CheckedBatch) -> Record | None:
        with naming("generate.output_path"):
            return _plan_in(RemoteFolder(job.output))

    @classmethod
    @contextmanager
    def held(cls, job: CheckedBatch) -> Iterator[Callable[[], None]]:
        hold(job.folder)
        make_room()
        with leased(RemoteFolder(job.output) / SCRATCH, busy=busy(job.output)) as lease:
            yield lease.check

    def is_staged(self, part: int) -> bool:
        try:
            plan = valid_plan(read_object(self.folder / SCRATCH / PLAN))
        except (OSError, Unreadable):
            return False
        return plan == self._plan and super().is_staged(part)

    def handed(self, part: int) -> bytes:
        return self.staged(part).read_bytes()

    def add(self, table: pa.Table) -> None:
        super().add(table)
        publish_part(self.folder, 0, self._place)

    def missing_parts(self) -> list[int]:
        there = self._place.files()
        return [number for number in range(self.parts) if part_name(number) not in there]

    def begin(self, *, is_whole: bool) -> None:
        own = {part_name(number) for number in range(self.parts)}
        for name in self._place.files():
            if name.startswith("part-") and name.endswith(".parquet") and name not in own:
                raise not_of_this_job(self._place / name)
        if not is_whole:
            self._place.remove(SUCCESS)

    def record(self) -> None:
        super().record()
        (self._place / SCRATCH).write(PLAN, json_bytes(self._plan))

    @contextmanager
    def opened_part(self, name: str) -> Iterator[tuple[Path, str]]:
        path = self.folder / SCRATCH / name
        try:
            self._place.download(name, path)
            if (wrong := self._foreign(path)) is not None:
                raise RunFailed(
                    f"{self._place / name} is damaged: {wrong}; delete it and run the same command "
                    "again"
                )
            yield path, sha256_of(path)
        finally:
            path.unlink(missing_ok=True)

    def _foreign(self, path: Path) -> str | None:
        """Why a part is not this job's; None if it is."""
        try:
            metadata = parquet.read_metadata(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            return str(error)
        own = metadata.get(b"gptray.fingerprint") == self._plan["fingerprint"].encode()
        return None if own else "it was not written by this job"

    def publish(self, manifest: Record) -> None:
        self.check_held()
        there = self._place.files()
        if SUCCESS not in there or MANIFEST not in there:
            self._place.write(MANIFEST, json_bytes(manifest))
            self._place.write(SUCCESS, b"")


def publish_part(folder: Path, number: int, place: RemoteFolder) -> None:
    """Move a part from a local folder to the object store. Raises RunFailed."""
    path = folder / part_name(number)
    place.upload(path, path.name)
    path.unlink()
    digest_file(path).unlink()


def _plan_in(place: RemoteFolder) -> Record | None:
    """The plan of a folder's job. Raises UserError if something else wrote the folder."""
    for folder, name in ((place / SCRATCH, PLAN), (place, MANIFEST)):
        raw = folder.read(name)
        if raw is None:
            continue
        try:
            if plan := valid_plan(parse_json(raw)):
                return plan
        except Unreadable:
            pass
        raise UserError(
            f"{folder / name} is damaged or was not written by this job; choose another folder, or "
            f"delete {place}"
        )
    if place.files() or set(place.folders()) - {SCRATCH}:
        raise UserError(f"{place} exists and was not written by this job; choose another")
    return None
