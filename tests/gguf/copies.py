"""GGUF files that differ from others in some fields or tensors, as other tools write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import gguf

from gptray.model.gguf_file import add_field


@contextmanager
def copying(
    path: Path, output: Path, fields: Mapping[str, object] | None = None
) -> Iterator[tuple[gguf.GGUFReader, gguf.GGUFWriter]]:
    """Write `output` with the fields of a file; the block adds the tensors.

    fields: other ones in the place of the file's; None leaves one out.
    """
    reader, fields = gguf.GGUFReader(path), fields or {}
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    for key, one in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")) and key not in fields:
            writer.add_key_value(key, one.contents(), one.types[0], one.types[-1])
    for key, value in fields.items():
        if value is not None:
            add_field(writer, key, value)
    yield reader, writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
