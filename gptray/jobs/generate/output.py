"""A generate job's output folder: opened or resumed, filled part by part, checked at the end."""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from gptray.config import RunFailed, UserError
from gptray.data.parts import SCRATCH, part_name, part_sha256, write_part
from gptray.data.prompts import InputScan, scan, staged
from gptray.jobs.generate.checked import CheckedBatch
from gptray.jobs.generate.output_plan import (
    BACKEND,
    MANIFEST,
    PLAN,
    SUCCESS,
    Record,
    busy,
    check_place,
    decided,
    existing_plan,
    job_identity,
    new_plan,
    not_of_this_job,
    refuse_differences,
    resumed,
    write_json,
)
from gptray.storage.driver_lock import held
from gptray.storage.files import is_uri, no_empty_folders, storing

log = logging.getLogger("gptray")


class Output:
    """A job's opened output folder, locked against other jobs. For a URI, `RemoteOutput`."""

    def __init__(self, job: CheckedBatch, plan: Record) -> None:
        self.job, self.folder = job, job.folder
        self.rows: int = plan["rows"]
        self.samples: int = plan["num_samples"]
        self.rows_per_file: int = plan["rows_per_file"] * self.samples
        self._plan = plan
        self.check_held: Callable[[], None] = lambda: None
        self._sha256: dict[str, str] = {}  # of the parts that existed at the start

    @classmethod
    @contextmanager
    def opened(cls, job: CheckedBatch) -> Iterator[Output]:
        """Create the folder, or resume in it.

        Raises UserError if it belongs to something else or to a job with other settings, and for
        input that cannot be read; RunFailed if the disk is full.
        """
        plan, identity = cls.plan_there(job)
        found = None
        if plan is None:
            # Check the whole input before creating anything.
            found = scan_input(job)
            plan = new_plan(identity, job.full_name, found.rows)
        with _scratch(job, is_new=found is not None), cls.held(job) as check_held:
            if found and (there := cls.existing_plan(job)):
                # Another job has started here since the check above.
                refuse_differences(job.output, there["identity"], resumed(identity, there))
                plan = there
            output = cls(job, plan)
            output.check_held = check_held
            missing = output.missing_parts()
            output.begin(is_whole=not missing)
            if found or not all(map(output.is_staged, missing)):
                output._stage(found or scan_input(job))
            yield output

    @classmethod
    def plan_there(cls, job: CheckedBatch) -> tuple[Record | None, Record]:
        """The same job's plan in the folder, if there is one, and the job's identity."""
        plan = cls.existing_plan(job)
        if not is_uri(job.output):
            check_place(job.folder)
        identity = job_identity(job.config, job.model_dir, job.files)
        if plan is not None:
            refuse_differences(job.output, plan["identity"], resumed(identity, plan))
        return plan, identity

    @classmethod
    def existing_plan(cls, job: CheckedBatch) -> Record | None:
        """The plan of the folder's job. Raises UserError if something else wrote the folder."""
        return existing_plan(job.folder)

    @classmethod
    @contextmanager
    def held(cls, job: CheckedBatch) -> Iterator[Callable[[], None]]:
        """Keep other jobs out; for a local folder, the lock on the scratch folder does that.

        Yields a function that raises RunFailed if others are no longer kept out.
        """
        yield lambda: None

    @property
    def parts(self) -> int:
        """The number of output files; at least one, which has the columns."""
        return max(1, -(-self.rows // self.rows_per_file))

    def rows_of(self, part: int) -> int:
        return min(self.rows_per_file, self.rows - part * self.rows_per_file)

    def staged(self, part: int) -> Path:
        """A part's staged input, not named *.parquet: some readers search hidden folders too."""
        return self.folder / SCRATCH / Path(part_name(part)).with_suffix(".staged")

    def handed(self, part: int) -> str | bytes:
        """A part's staged input for an engine: its path or its content."""
        return str(self.staged(part))

    def add(self, table: pa.Table) -> None:
        """Write the only part."""
        write_part(table, self.folder / part_name(0))

    def missing_parts(self) -> list[int]:
        """Parts without an output file. Files appear only when they are complete."""
        return [n for n in range(self.parts) if not (self.folder / part_name(n)).is_file()]

    def begin(self, *, is_whole: bool) -> None:
        """Remove leftovers of a killed job. is_whole: whether no part is missing.

        Raises UserError for a file that is not the job's, RunFailed for a damaged one.
        """
        self._drop_partials()
        own = {part_name(number) for number in range(self.parts)}
        for path in sorted(self.folder.glob("part-*.parquet")):
            if path.name not in own or not path.is_file():
                raise not_of_this_job(path)
            self._sha256[path.name] = part_sha256(path)
        if not is_whole:
            (self.folder / SUCCESS).unlink(missing_ok=True)

    def is_staged(self, part: int) -> bool:
        """Whether the staged input of a part exists and is intact."""
        try:
            part_sha256(self.staged(part))
        except RunFailed:
            return False
        return True

    @property
    def backend(self) -> str:
        """The backend of all engines: native, torch, or auto on GPUs; UNDECIDED at first."""
        backend: str = self._plan["identity"][BACKEND]
        return backend

    def decide(self, backend: str) -> None:
        """Record the backend of all engines, before the first part is written."""
        self._plan = decided(self._plan, backend)
        self.record()

    def record(self) -> None:
        write_json(self.folder / SCRATCH / PLAN, self._plan)

    def metadata(self) -> dict[str, str]:
        """Metadata of the output files: the settings and a fingerprint of the job."""
        text = json.dumps(self._plan["identity"], ensure_ascii=False)
        return {"gptray.settings": text, "gptray.fingerprint": self._plan["fingerprint"]}

    def _stage(self, found: InputScan) -> None:
        """Write the input in parts for the engines, and then plan.json."""
        from gptray.jobs.generate.openai_batch import RequestReader

        rows = self._plan["rows_per_file"]
        read = RequestReader(self.job.model_dir)
        for part, table in enumerate(staged(self.job.files, found, rows, read)):
            write_part(table, self.staged(part))
        self.record()

    def finish(self) -> Record:
        """Check the files, write the manifest and _SUCCESS, remove staged input; return counts."""
        reasons: collections.Counter[str] = collections.Counter()
        tokens = rows = 0
        files = {}
        for part in range(self.parts):
            name = part_name(part)
            place = f"{self.job.output}/{name}"
            with self.opened_part(name) as (path, digest):
                table, size = _counts(path, place), path.stat().st_size
            if table.num_rows != self.rows_of(part):
                raise RunFailed(f"{place} has {table.num_rows} rows, not {self.rows_of(part)}")
            reasons.update(table["finish_reason"].to_pylist())
            tokens += sum(table["output_tokens"].to_pylist())
            rows += table.num_rows
            files[name] = {"rows": table.num_rows, "size": size, "sha256": digest}
        summary = {
            "output_path": self.job.output,
            "rows": rows,
            "errors": reasons["error"],
            "output_tokens": tokens,
            "finish_reasons": dict(sorted(reasons.items())),
        }
        self._drop_partials()
        self.publish({**self._plan, **summary, "files": files})
        for path in (self.folder / SCRATCH).glob("part-*"):
            path.unlink()
        return summary

    def _drop_partials(self) -> None:
        """Remove incomplete files of killed engines."""
        for partial in self.folder.glob(".part-*.partial"):
            partial.unlink()

    @contextmanager
    def opened_part(self, name: str) -> Iterator[tuple[Path, str]]:
        """An existing part as a local file, and its sha256. Raises RunFailed if it is damaged."""
        path = self.folder / name
        yield path, self._sha256.get(name) or part_sha256(path)

    def publish(self, manifest: Record) -> None:
        """Write the manifest and, last, _SUCCESS."""
        success = self.folder / SUCCESS
        if not (success.is_file() and (self.folder / MANIFEST).is_file()):
            write_json(self.folder / MANIFEST, manifest)
            with storing(success):
                success.touch()


@contextmanager
def _scratch(job: CheckedBatch, *, is_new: bool) -> Iterator[None]:
    """Lock an output's hidden folder; if a mistake ends a new output, remove the folder."""
    scratch = job.folder / SCRATCH
    with no_empty_folders(scratch):
        try:
            scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"generate.output_path: {job.folder} cannot be written: {error}"
            raise UserError(message) from None
        with held(scratch, busy=busy(job.output)):
            try:
                yield
            except UserError:
                if is_new:
                    for path in scratch.iterdir():
                        path.unlink()
                raise


def scan_input(job: CheckedBatch) -> InputScan:
    """Scan the whole input and log warnings. Raises UserError for mistakes."""
    found = scan(job.files, job.config.generate)
    for note in found.columns.notes:
        log.warning("generate.input_path: %s", note)
    return found


def _counts(path: Path, place: str) -> pa.Table:
    """The columns of an output file that the summary needs.

    place: the file's public path or URI. Raises RunFailed if it is damaged.
    """
    try:
        return parquet.ParquetFile(path).read(columns=["finish_reason", "output_tokens"])
    except (pa.ArrowException, OSError) as error:
        raise RunFailed(
            f"{place} is damaged: {error}; delete it and run the same command again"
        ) from None
