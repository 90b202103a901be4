"""The folder of a generate job: what it is to hold, what it holds already, when it is whole.

Visible are only whole Parquet files, and at the end manifest.json and _SUCCESS. Scratch is in a
hidden folder: the input in parts, and plan.json, which says what job the folder belongs to.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

from gptray.config import Config, RunFailed, UserError
from gptray.data.parts import part_name, write_whole
from gptray.data.prompts import InputScan, check_columns, scan, staged
from gptray.data.sources import SourceFile, file_sha256, find_files
from gptray.data.tokenizer_files import tokenizer_files
from gptray.files import replacing, sha256_of
from gptray.generation.build import pick_backend
from gptray.model.shape import read_shape
from gptray.runners.models import find_model
from gptray.runners.runs import held

SCRATCH, PLAN, MANIFEST, SUCCESS = ".gptray", "plan.json", "manifest.json", "_SUCCESS"
MODEL_FILES = "*.safetensors"


@dataclass(frozen=True)
class Job:
    """A generate job that has been looked at: everything in it exists, its backend is picked."""

    config: Config
    model_dir: Path
    model_name: str
    files: tuple[SourceFile, ...]
    folder: Path


def check_job(config: Config) -> Job:
    """Look at model, input and output without torch or Ray.

    Raises UserError with all that is wrong, one line each.
    """
    settings, problems = config.generate, []
    files: list[SourceFile] = []
    model_dir, name = Path(), ""
    try:
        model_dir, name = find_model(config, config.generate.model, key="generate.model")
        check_lengths(config, model_dir)
    except UserError as error:
        problems.append(str(error))
    if settings.input_path is None:
        problems.append(
            "generate.input_path is not set: name a file of prompts, or give sample.prompt=... to "
            "see the answer here"
        )
    else:
        try:
            files = find_files(settings.input_path, key="generate.input_path")
            for file in files:
                check_columns(file, settings.prompt_column)
        except UserError as error:
            problems.append(str(error))
    if settings.output_path is None:
        problems.append("generate.output_path is not set: name a folder for the Parquet files")
    elif "://" in settings.output_path:
        problems.append(
            f"generate.output_path={settings.output_path}: must be a folder; on a cluster one "
            "that every node sees"
        )
    try:
        config = with_backend(config)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    folder = Path(os.path.abspath(os.path.expanduser(settings.output_path or "")))
    return Job(config, model_dir, name, tuple(files), folder)


def with_backend(config: Config) -> Config:
    """The config with the backend that `auto` means here, for all engines of the job.

    Raises UserError if the one that is asked for cannot be had.
    """
    backend = pick_backend(config.generate.backend, use_gpu=config.compute.use_gpu)
    settings = config.generate.model_copy(update={"backend": backend})
    return config.model_copy(update={"generate": settings})


def check_lengths(config: Config, model_dir: Path) -> None:
    """Refuse more new tokens than the model's context holds. Raises UserError."""
    n_positions = read_shape(model_dir)["n_positions"]
    if config.sample.max_new_tokens > n_positions:
        raise UserError(
            f"sample.max_new_tokens={config.sample.max_new_tokens} is more than the model's "
            f"context of {n_positions} tokens holds"
        )


class Output:
    """The opened folder of a job; nobody else writes there meanwhile."""

    def __init__(self, job: Job, plan: dict[str, Any]) -> None:
        self.job, self.folder = job, job.folder
        self.rows: int = plan["rows"]
        self.rows_per_file: int = plan["rows_per_file"]
        self._plan = plan

    @classmethod
    @contextmanager
    def opened(cls, job: Job) -> Iterator[Output]:
        """Make the folder or go on in it.

        Raises UserError if it belongs to something else, or to a job with other settings, and for
        input that cannot be read; RunFailed without room.
        """
        existing = _existing_plan(job.folder)
        identity = _identity(job)
        if existing is not None:
            _refuse_differences(job.folder, existing["identity"], identity)
        plan, found = existing, None
        if plan is None:
            # All of the input is looked at before anything is made.
            found = _scan(job)
            plan = _new_plan(job, identity, found.rows)
        scratch = job.folder / SCRATCH
        try:
            scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"generate.output_path: {job.folder} cannot be written: {error}"
            ) from None
        with held(scratch, busy=f"another job is writing to {job.folder} now"):
            output = cls(job, plan)
            for partial in job.folder.glob(".part-*.partial"):
                partial.unlink()
            missing = output.missing_parts()
            if missing:
                (job.folder / SUCCESS).unlink(missing_ok=True)
            if found or not all(output.staged(part).is_file() for part in missing):
                output._stage(found or _scan(job))
            yield output

    @property
    def parts(self) -> int:
        return -(-self.rows // self.rows_per_file)

    def rows_of(self, part: int) -> int:
        return min(self.rows_per_file, self.rows - part * self.rows_per_file)

    def staged(self, part: int) -> Path:
        return self.folder / SCRATCH / part_name(part)

    def missing_parts(self) -> list[int]:
        """Parts without their output file. A file is there only when it is whole."""
        return [n for n in range(self.parts) if not (self.folder / part_name(n)).is_file()]

    def metadata(self) -> dict[str, str]:
        """For the files' own metadata: the settings, and a fingerprint of the whole job."""
        text = json.dumps(self._plan["identity"], ensure_ascii=False)
        return {"gptray.settings": text, "gptray.fingerprint": self._plan["fingerprint"]}

    def _stage(self, found: InputScan) -> None:
        """Write the input in parts that engines can open; plan.json comes last."""
        prompt_column = self.job.config.generate.prompt_column
        tables = staged(self.job.files, prompt_column, found, self.rows_per_file)
        for part, table in enumerate(tables):
            write_whole(table, self.staged(part))
        _write_json(self.folder / SCRATCH / PLAN, self._plan)

    def finish(self) -> dict[str, Any]:
        """Check the files, write the manifest and _SUCCESS, drop the scratch; return the counts."""
        reasons: collections.Counter[str] = collections.Counter()
        tokens = rows = 0
        files = {}
        for part in range(self.parts):
            path = self.folder / part_name(part)
            table = parquet.read_table(path, columns=["finish_reason", "output_tokens"])
            if table.num_rows != self.rows_of(part):
                raise RunFailed(f"{path} has {table.num_rows} rows, not {self.rows_of(part)}")
            reasons.update(table["finish_reason"].to_pylist())
            tokens += sum(table["output_tokens"].to_pylist())
            rows += table.num_rows
            files[path.name] = {"rows": table.num_rows, "size": path.stat().st_size}
        summary = {
            "output_path": str(self.folder),
            "rows": rows,
            "errors": reasons["error"],
            "output_tokens": tokens,
            "finish_reasons": dict(sorted(reasons.items())),
        }
        if not (self.folder / SUCCESS).is_file():
            _write_json(self.folder / MANIFEST, {**self._plan, **summary, "files": files})
            (self.folder / SUCCESS).touch()
        for path in (self.folder / SCRATCH).glob("part-*.parquet"):
            path.unlink()
        return summary


def _existing_plan(folder: Path) -> dict[str, Any] | None:
    for path in (folder / SCRATCH / PLAN, folder / MANIFEST):
        if path.is_file():
            plan: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return plan
    if folder.is_file() or (folder.is_dir() and any(p.name != SCRATCH for p in folder.iterdir())):
        raise UserError(
            f"generate.output_path: {folder} exists and is no output of this job; choose another"
        )
    return None


def _identity(job: Job) -> dict[str, Any]:
    """What the output depends on, under the names of the keys that say it."""
    settings, sample = job.config.generate, job.config.sample
    digest = hashlib.sha256()
    model_files = [*sorted(job.model_dir.glob(MODEL_FILES)), job.model_dir / "config.json"]
    for path in [*model_files, *tokenizer_files(job.model_dir)]:
        digest.update(bytes.fromhex(sha256_of(path)))
    inputs = [(Path(file.path).name, file_sha256(file)) for file in job.files]
    return {
        "generate.model": f"sha256 {digest.hexdigest()[:16]}",
        "generate.input_path": f"sha256 {hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}",
        "generate.prompt_column": settings.prompt_column,
        "generate.id_column": settings.id_column,
        "generate.rows_per_file": settings.rows_per_file,
        "generate.precision": settings.precision,
        "generate.backend": settings.backend,
        "quantize.weights": job.config.quantize.weights,
        **{f"sample.{k}": v for k, v in sample.model_dump(mode="json", exclude={"prompt"}).items()},
    }


def _refuse_differences(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [
        f"  {key}: {before.get(key)!r} there, {now[key]!r} now"
        for key in now
        if before.get(key) != now[key]
    ]
    if differing:
        raise UserError(
            f"the output {folder} was started with something else:\n" + "\n".join(differing)
            + "\nGo on with the same, or choose another generate.output_path"
        )  # fmt: skip


def _scan(job: Job) -> InputScan:
    """Look at all of the input. Raises UserError for what is wrong with it."""
    settings = job.config.generate
    found = scan(job.files, settings.prompt_column, settings.id_column)
    if found.rows == 0:
        raise UserError("generate.input_path: there is no row in it")
    return found


def _new_plan(job: Job, identity: dict[str, Any], rows: int) -> dict[str, Any]:
    text = json.dumps(identity, sort_keys=True)
    return {
        "identity": identity,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        "model": job.model_name,
        "rows": rows,
        "rows_per_file": job.config.generate.rows_per_file,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written: {error}") from None
