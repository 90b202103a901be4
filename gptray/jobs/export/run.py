"""The export job: writes a model atomically in another program's format."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptray.config import RunFailed
from gptray.jobs.export.check import CheckedExport, GgufContent
from gptray.jobs.next_steps import of_model, tell
from gptray.jobs.progress.doing import doing
from gptray.model.gguf_file import write_gguf
from gptray.model.gguf_names import FOUR_BITS
from gptray.model.hf_export import write_hf
from gptray.model.importance import quantizer
from gptray.model.rounding import check_tied
from gptray.storage.files import no_empty_folders, replacing, storing

log = logging.getLogger("gptray")


def run(checked: CheckedExport) -> dict[str, object]:
    """Write a checked model; return the JSON line.

    Raises UserError for weights that are damaged or do not fit the precision, RunFailed if the disk
    is full.
    """
    output, settings = checked.output, checked.settings
    if checked.content.kept:
        log.info("%s", checked.content.kept)
    with storing(output), no_empty_folders(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        with doing(f"writing {output}"):
            _write(checked)
        size = sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file())
    served = shlex.join(["llama-server", "-m", str(output)])
    tell([served if settings.format == "gguf" else of_model(output)["generate"]])
    return {
        "path": str(output),
        "format": settings.format,
        "precision": settings.precision,
        "bytes": size,
        "model": checked.name,
    }


def _write(checked: CheckedExport) -> None:
    content, precision = checked.content, checked.settings.precision
    check_tied(checked.model)
    kind = FOUR_BITS.get(precision, precision)
    quantized = quantizer(checked.folder, checked.model, kind)
    if isinstance(content, GgufContent):
        with replacing(checked.output) as file:
            write_gguf(
                file,
                content.architecture,
                content.fields,
                content.tensors,
                content.vectors,
                precision=precision,
                quantized=quantized,
            )
            _refuse_taken(checked.output)
    else:
        with _appearing(checked.output) as folder:
            write_hf(
                checked.folder, folder, checked.model, precision=precision, quantized=quantized
            )
            for path in content.copied:
                shutil.copyfile(path, folder / path.name)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `folder` if all goes well."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    draft.mkdir()
    try:
        yield draft
        _refuse_taken(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_taken(output: Path) -> None:
    if os.path.lexists(output):
        raise RunFailed(f"{output} has appeared in the meantime and is left as it is")
