"""Which job an output folder belongs to, and whether another one may write there.

Only whole Parquet files are visible. At the end _manifest.json, which repeats the plan, and
_SUCCESS join them; readers of a Parquet folder skip names that begin with _. The hidden scratch
folder holds plan.json and the staged input.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gptray.config import Config, UserError
from gptray.data.encoding import codec_of
from gptray.data.parts import SCRATCH, part_name
from gptray.data.sources import SourceFile, file_sha256
from gptray.data.tokenizer_files import tokenizer_files
from gptray.files import (
    absolute,
    check_writable,
    is_uri,
    refuse_links,
    replacing,
    sha256_of,
    storing,
)
from gptray.jobs.run_folder import LOCK
from gptray.stored import read_object

PLAN, MANIFEST, SUCCESS = "plan.json", "_manifest.json", "_SUCCESS"
MODEL_FILES = "*.safetensors"


def job_identity(config: Config, model_dir: Path, files: Sequence[SourceFile]) -> dict[str, Any]:
    """What the output depends on, under the names of the keys that say it.

    An input is its content, whatever its name.
    """
    settings, sample = config.generate, config.sample
    digest = hashlib.sha256()
    model_files = [*sorted(model_dir.glob(MODEL_FILES)), model_dir / "config.json"]
    for path in [*model_files, *tokenizer_files(model_dir)]:
        digest.update(bytes.fromhex(sha256_of(path)))
    inputs = [(file.format, file_sha256(file)) for file in files]
    return {
        "generate.model": f"sha256 {digest.hexdigest()[:16]}",
        "generate.input_path": f"sha256 {hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}",
        "data.encoding": codec_of(config.data.encoding),
        **{f"generate.{key}": getattr(settings, key) for key in _GENERATE_KEYS},
        "quantize.weights": config.quantize.weights,
        **{f"sample.{k}": v for k, v in sample.model_dump(mode="json", exclude={"prompt"}).items()},
    }


_GENERATE_KEYS = (
    "prompt_column", "id_column", "settings_from_columns", "prefix", "num_samples",
    "rows_per_file", "precision", "backend",
)  # fmt: skip


def new_plan(identity: dict[str, Any], model: str, input_rows: int) -> dict[str, Any]:
    """The plan of a job; `rows` counts the output's."""
    samples = identity["generate.num_samples"]
    plan = {
        "identity": identity,
        "model": model,
        "rows": input_rows * samples,
        "rows_per_file": identity["generate.rows_per_file"],
        "num_samples": samples,
    }
    return {**plan, "fingerprint": _fingerprint(plan)}


def existing_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of the job that began in a folder. Raises UserError for a folder of others."""
    names = (f"{SCRATCH}/{PLAN}", MANIFEST)
    refuse_links(folder, (SCRATCH, f"{SCRATCH}/{LOCK}", SUCCESS, *names), what="the job")
    there = [folder / name for name in names if (folder / name).is_file()]
    for path in there:
        if (plan := _read_plan(path)) is not None:
            return plan
    if there:
        raise UserError(
            f"generate.output_path: {there[0]} is damaged or was not written by this job; choose "
            f"another folder, or delete {folder}"
        )
    if folder.is_file() or (folder.is_dir() and any(p.name != SCRATCH for p in folder.iterdir())):
        raise UserError(
            f"generate.output_path: {folder} exists and was not written by this job; choose another"
        )
    return None


def refuse_differences(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError, key by key, unless a job of these identities is one and the same."""
    differing = [
        f"  {key}: {before.get(key)!r} there, {now[key]!r} now"
        for key in now
        if before.get(key) != now[key]
    ]
    if differing:
        raise UserError(
            f"the output {folder} was started with something else:\n" + "\n".join(differing)
            + "\nUse the same to resume it, or choose another generate.output_path"
        )  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    with storing(path), replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def overlap(folder: Path, entries: Sequence[str], files: Sequence[SourceFile]) -> str | None:
    """Why a folder cannot take the output: input is in it, or the output would become input."""
    place = os.path.realpath(folder)
    for file in files:
        if file.uri is None and _is_inside(os.path.realpath(file.path), place):
            return f"{folder} holds {file.path} of generate.input_path; choose another folder"
    for entry in entries:
        path = str(absolute(entry))
        caught = (
            _is_inside(place, os.path.realpath(path))
            if os.path.isdir(path)
            else _matches(str(folder / part_name(0)), path)
        )
        if not is_uri(entry) and caught:
            return (
                f"{folder} is inside generate.input_path={entry}, where the output would be read "
                "as input; choose another folder"
            )
    return None


def check_place(folder: Path) -> None:
    """Raise UserError if a folder cannot be made or written, or another job writes there now."""
    check_writable(folder, key="generate.output_path")
    lock = folder / SCRATCH / LOCK
    if lock.is_file():
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(busy(folder)) from None


def busy(folder: Path) -> str:
    return f"another job is writing to {folder} now"


def _fingerprint(plan: dict[str, Any]) -> str:
    text = json.dumps({key: plan[key] for key in _FINGERPRINTED}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_FINGERPRINTED = ("identity", "rows", "rows_per_file", "num_samples")


def _read_plan(path: Path) -> dict[str, Any] | None:
    """A plan as it was written; None if it is damaged."""
    try:
        plan = read_object(path)
        return plan if plan["fingerprint"] == _fingerprint(plan) else None
    except OSError as error:
        raise UserError(f"generate.output_path: {path} cannot be read: {error}") from None
    except (ValueError, TypeError, KeyError):
        return None


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob finds a path; `**` is any number of folders."""
    if "**" in pattern:
        return fnmatch(path, pattern.replace("**/", "*"))
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch, parts, wanted))
