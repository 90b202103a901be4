"""Recognises files of other kinds by their first bytes, such as a zip archive named .txt."""

from __future__ import annotations

from gptray.config import UserError

PARQUET = b"PAR1"
# The first bytes, what they begin, and what to do with it.
_KINDS = (
    (b"\x1f\x8b", "a gzip file; add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file; add .zst to its name"),
    (b"BZh91AY&SY", "a bzip2 file; add .bz2 to its name"),
    (b"\xfd7zXZ\0", "an xz file; unpack it"),
    (b"PK\3\4", "a zip archive, like .docx and .epub; extract its text"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"%PDF-", "a PDF document; extract its text"),
    (b"{\\rtf", "an RTF document; save it as text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document; save it as text"),
    (PARQUET, "a Parquet file; name it .parquet"),
    (b"ARROW1", "an Arrow file; write its table as Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream; write its table as Parquet"),
    (b"SQLite format 3", "an SQLite database; export its rows"),
    (b"version https://git-lfs", "a Git LFS pointer to the file; run `git lfs pull`"),
)
_TAR = 257, b"ustar"  # where the name of the format is


def refuse_other_kind(name: str, head: bytes) -> None:
    """Raise UserError for a file that is no text, by its first bytes."""
    place, mark = _TAR
    words = next((words for first, words in _KINDS if head.startswith(first)), None)
    if words is None and head.startswith(mark, place):
        words = "a tar archive; unpack it"
    if words is not None:
        raise UserError(f"{name}: this is {words}")
