"""Decides which job an output folder belongs to, and whether another one may write there.

Only complete Parquet files are visible. At the end, _manifest.json, which repeats the plan, and
_SUCCESS are added; readers of a Parquet folder skip names that begin with _. The hidden scratch
folder holds plan.json and the staged input.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gptray.config import Config, SampleConfig, UserError
from gptray.config.keys import written
from gptray.data.batch_requests import holds_requests
from gptray.data.encoding import codec_of
from gptray.data.folders import glob_regex
from gptray.data.parts import SCRATCH, part_name
from gptray.data.sources import SourceFile, file_sha256
from gptray.data.tokenizer_files import tokenizer_files
from gptray.jobs.adapters import adapter_sha256
from gptray.model.usage import Usage
from gptray.storage.driver_lock import LOCK, is_held
from gptray.storage.files import (
    absolute,
    check_writable,
    is_uri,
    refuse_links,
    replacing,
    sha256_of,
    storing,
)
from gptray.storage.stored import Locked, Unreadable, read_object

# A plan, a manifest or a summary.
Record = dict[str, Any]
PLAN, MANIFEST, SUCCESS = "plan.json", "_manifest.json", "_SUCCESS"
MODEL_FILES = "*.safetensors"
# In a job's identity: the backend's key, and its value until an engine's machine has chosen one.
BACKEND, UNDECIDED = "generate.backend", "auto (CPU)"


def job_identity(config: Config, model_dir: Path, files: Sequence[SourceFile]) -> Record:
    """Everything that the output depends on, by config key.

    Model and input are identified by their content, not by their names.
    """
    settings = config.generate
    is_undecided = settings.backend == "auto" and not config.compute.use_gpu
    digest = hashlib.sha256()
    model_files = [*sorted(model_dir.glob(MODEL_FILES)), model_dir / "config.json"]
    for path in [*model_files, *tokenizer_files(model_dir)]:
        digest.update(bytes.fromhex(sha256_of(path)))
    usage = Usage.of(model_dir)
    template = usage.chat_template if holds_requests(files, settings) else None
    digest.update(repr((usage.eos_ids, template)).encode())
    inputs = [(file.format, file_sha256(file)) for file in files]
    return {
        "generate.model": f"sha256 {digest.hexdigest()[:16]}",
        "generate.adapter": adapter_sha256(settings.adapter),
        "generate.adapters": settings.adapters
        and {name: adapter_sha256(source) for name, source in settings.adapters.items()},
        "generate.input_path": f"sha256 {hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}",
        "data.encoding": codec_of(config.data.encoding),
        **{f"generate.{key}": getattr(settings, key) for key in _GENERATE_KEYS},
        BACKEND: UNDECIDED if is_undecided else settings.backend,
        "quantize.weights": config.quantize.weights,
        **_sampling(config.sample),
    }


def _sampling(sample: SampleConfig) -> Record:
    return {f"sample.{k}": v for k, v in sample.model_dump(mode="json", exclude={"prompt"}).items()}


_GENERATE_KEYS = (
    "prompt_column", "id_column", "adapter_column", "settings_from_columns", "prefix",
    "num_samples", "rows_per_file", "precision",
)  # fmt: skip


def resumed(identity: Record, plan: Record) -> Record:
    """The identity of a job that resumes another, with the backend that the other chose."""
    there = plan["identity"].get(BACKEND)
    is_decided = identity[BACKEND] == UNDECIDED and there in ("native", "torch")
    return {**identity, BACKEND: there} if is_decided else identity


def decided(plan: Record, backend: str) -> Record:
    """The plan with this backend."""
    identity = {**plan["identity"], BACKEND: backend}
    plan = {**plan, "identity": identity}
    return {**plan, "fingerprint": _fingerprint(plan)}


def new_plan(identity: Record, model: str, input_rows: int) -> Record:
    """The plan of a job; its `rows` are those of the output."""
    samples = identity["generate.num_samples"]
    plan = {
        "identity": identity,
        "model": model,
        "rows": input_rows * samples,
        "rows_per_file": identity["generate.rows_per_file"],
        "num_samples": samples,
    }
    return {**plan, "fingerprint": _fingerprint(plan)}


def existing_plan(folder: Path) -> Record | None:
    """The plan of a folder's job. Raises UserError if something else wrote the folder."""
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


def refuse_differences(folder: str, before: Record, now: Record) -> None:
    """Raise UserError, listing the keys that differ, unless the identities are the same.

    An output of an older version lacks the newest keys of `sample`, which had no effect there.
    """
    before = {**_sampling(SampleConfig()), **before}
    differing = [
        f"  {key}: {written(before.get(key))} there, {written(now[key])} now"
        for key in now
        if before.get(key) != now[key]
    ]
    if differing:
        cure = "Use the same to resume it, or choose another generate.output_path"
        if (before.get(BACKEND), now.get(BACKEND)) == ("auto", UNDECIDED):
            cure = (
                f"{BACKEND}={UNDECIDED} is decided once for a whole output; this one was started "
                "on GPUs, or by a version of gptray that decided at every start. If on GPUs, "
                "resume it with compute.use_gpu=true; otherwise choose another "
                "generate.output_path"
            )
        raise UserError(
            f"the output {folder} was started with something else:\n" + "\n".join(differing)
            + f"\n{cure}"
        )  # fmt: skip


def json_bytes(content: Record) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Record) -> None:
    with storing(path), replacing(path) as partial:
        partial.write_bytes(json_bytes(content))


def not_of_this_job(path: object) -> UserError:
    """The error for a part in the output that the job did not write."""
    return UserError(
        f"generate.output_path: {path} was not written by this job, but anything that reads the "
        "folder would read it too; remove it, or choose another folder"
    )


def check_overlap(output: str, entries: Sequence[str], files: Sequence[SourceFile]) -> None:
    """Raise UserError for an output folder that holds input, or whose files would become input.

    output: its absolute path, or its URI.
    """
    place = output if is_uri(output) else os.path.realpath(output)
    for file in files:
        name = file.name if file.uri else os.path.realpath(file.path)
        if _is_inside(name, place):
            raise UserError(
                f"generate.output_path: {output} holds {name} of generate.input_path; choose "
                "another folder"
            )
    for entry in entries:
        if is_uri(entry):
            pattern = entry.partition("?")[0].rstrip("/")
            whole = [glob_regex(one) for one in (pattern, f"{pattern}/**")]
            part = f"{place}/{part_name(0)}"
            caught = any(re.fullmatch(one, part) for one in whole)
        elif os.path.isdir(path := str(absolute(entry))):
            caught = _is_inside(place, os.path.realpath(path))
        else:
            caught = _matches(f"{output}/{part_name(0)}", path)
        if caught:
            raise UserError(
                f"generate.output_path: {output} is inside generate.input_path={entry}, where the "
                "output would be read as input; choose another folder"
            )


def check_place(folder: Path) -> None:
    """Raise UserError if a folder is not writable, or another job is writing there."""
    check_writable(folder, key="generate.output_path")
    if is_held(folder / SCRATCH):
        raise UserError(busy(str(folder)))


def busy(folder: str) -> str:
    """The message about an output that another job is writing."""
    return f"another job is writing to {folder} now"


def _fingerprint(plan: Record) -> str:
    text = json.dumps({key: plan[key] for key in _FINGERPRINTED}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_FINGERPRINTED = ("identity", "rows", "rows_per_file", "num_samples")


def _read_plan(path: Path) -> Record | None:
    """Read a plan; None if it is damaged."""
    try:
        return valid_plan(read_object(path))
    except (OSError, Locked) as error:
        raise UserError(f"generate.output_path: {path} cannot be read: {error}") from None
    except Unreadable:
        return None


def valid_plan(plan: object) -> Record | None:
    """The plan if its fingerprint is right; None if it is damaged."""
    if not isinstance(plan, dict):
        return None
    try:
        return plan if plan["fingerprint"] == _fingerprint(plan) else None
    except (ValueError, TypeError, KeyError):
        return None


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob pattern matches a path; `**` is any number of folders."""
    if "**" in pattern:
        return fnmatch(path, pattern.replace("**/", "*"))
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch, parts, wanted))
