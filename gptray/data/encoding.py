"""Decodes text files: by the encoding asked for, the byte order mark, or as UTF-8.

Decoding is strict. Errors name the line, and the encoding that would probably fit.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from io import BufferedReader

from gptray.config import UserError
from gptray.data.file_kinds import refuse_other_kind

BLOCK_BYTES = 1 << 20
UTF8 = "utf-8"
_SAMPLE = 1 << 14  # bytes
_SURELY = 20  # characters beyond ASCII that decode as UTF-8 only if the text is UTF-8
# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Encodings to try, and the scripts besides ASCII letters that text in them uses.
_LIKELY = (
    ("shift_jis", {"HIRAGANA", "KATAKANA", "CJK"}),
    ("euc_jp", {"HIRAGANA", "KATAKANA", "CJK"}),
    ("cp949", {"HANGUL"}),
    ("gb18030", {"CJK"}),
    ("big5", {"CJK"}),
    ("cp1251", {"CYRILLIC"}),
    ("cp1252", {"LATIN"}),
)
_KANA = {"HIRAGANA", "KATAKANA"}


def codec_of(encoding: str | None) -> str | None:
    """The codec's canonical name; None for UTF-8, with or without a byte order mark."""
    name = codecs.lookup(encoding or UTF8).name
    return None if name in (UTF8, "utf-8-sig") else name


def stream_encoding(stream: BufferedReader, encoding: str | None) -> str:
    """The encoding of a stream at its start: `encoding`, or by its byte order mark if None."""
    head = stream.peek(len(codecs.BOM_UTF32_LE))
    if head.startswith(codecs.BOM_UTF8):
        return UTF8
    marked = (name for mark, name in _MARKS if head.startswith(mark))
    return codec_of(encoding) or next(marked, UTF8)


def decoded(
    name: str,
    stream: BufferedReader,
    encoding: str,
    *,
    size: int = -1,
    first: bool = True,
    first_line: Callable[[], int] = lambda: 1,
) -> Iterator[str]:
    """Decode the next `size` bytes of a stream (-1: all) strictly, without translating newlines.

    first: the text begins here, so a byte order mark is dropped. `name` and `first_line` are for
    messages. Raises UserError for bytes that cannot be decoded.
    """
    lines = 0
    decoder = codecs.getincrementaldecoder(encoding)()
    while True:
        block = stream.read(BLOCK_BYTES if size < 0 else min(BLOCK_BYTES, size))
        if first:
            check_head(name, block, encoding)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(encoding, "replace")
            line = first_line() + lines + before.count("\n")
            raise UserError(f"{name}:{line}: {undecodable(error, encoding)}") from None
        except UnicodeError as error:  # utf-16 and utf-32 without their byte order mark
            told = _as_utf8(block) or "; name the file's encoding by data.encoding"
            raise UserError(f"{name}: not {encoding}: {error}{told}") from None
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        lines += text.count("\n")
        size -= len(block) if size > 0 else 0
        if text:
            yield text
        if not block:
            return


def undecodable(error: UnicodeDecodeError, encoding: str = UTF8) -> str:
    """Say what is wrong, and which encoding is likely."""
    spelled = "UTF-8" if encoding == UTF8 else encoding
    problem = f"not {spelled}: {error.reason}"
    before = error.object[: error.start][-_SAMPLE:].decode(encoding, "ignore")
    if encoding == UTF8 and sum(not character.isascii() for character in before) >= _SURELY:
        return f"{problem}; the text before it is UTF-8, so the file is damaged there"
    begin = error.object.rfind(b"\n", 0, error.start) + 1
    if encoding != UTF8 and (told := _as_utf8(error.object[begin:])):
        return problem + told
    likely = _wide_encoding(error.object, least=0.03) or likely_encoding(
        error.object[begin : begin + _SAMPLE]
    )
    if likely is None or likely == encoding:
        return f"{problem}; set data.encoding to the file's encoding"
    return f"{problem}; it looks like {likely}: set data.encoding={likely}"


def _as_utf8(data: bytes) -> str:
    """The advice for UTF-8 text for which another encoding was given; "" for other bytes."""
    try:
        codecs.getincrementaldecoder(UTF8)().decode(data[:_SAMPLE])
    except UnicodeDecodeError:
        return ""
    return "; it is UTF-8: leave data.encoding out"


def likely_encoding(sample: bytes) -> str | None:
    """The encoding in which bytes that are not UTF-8 spell letters of one script, if any."""
    for encoding, scripts in _LIKELY:
        found = _scripts(sample, encoding)
        foreign = sum(found.values()) - found["ASCII"]
        if not found or sum(found[script] for script in scripts) < 0.95 * foreign:
            continue
        if scripts >= _KANA and sum(found[script] for script in _KANA) < 0.1 * foreign:
            continue  # Chinese characters alone suggest another encoding
        if encoding != "cp1252" and not foreign:
            continue  # quotation marks and dashes among Latin letters
        if encoding == "cp1251" and foreign < found["ASCII"]:
            continue  # accents among Latin letters
        return encoding
    return None


def _scripts(sample: bytes, encoding: str) -> Counter[str]:
    """How many letters of each script; empty if the bytes are invalid in this encoding."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return Counter()
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\t\r\n\f" for c in text):
        return Counter()
    letters = (c for c in text if c.isalpha())
    return Counter("ASCII" if c.isascii() else unicodedata.name(c, "?").split()[0] for c in letters)


def check_head(name: str, head: bytes, encoding: str = UTF8) -> None:
    """Raise UserError for a file whose first bytes are not text in `encoding`, but another kind."""
    refuse_other_kind(name, head)
    if encoding == UTF8:
        _refuse_wide_characters(name, head)


def _refuse_wide_characters(name: str, head: bytes) -> None:
    """Raise UserError for UTF-16 or UTF-32 without a byte order mark.

    Its ASCII letters are valid UTF-8, with a zero in every other byte. Zeros alone are not text.
    """
    if head and not head.strip(b"\0"):
        raise UserError(
            f"{name}: it begins with nothing but zero bytes: it is damaged, or not text"
        )
    wide = _wide_encoding(head, least=0.25)
    if wide:
        raise UserError(
            f"{name}: it looks like {wide} without a byte order mark: set data.encoding={wide}"
        )


def _wide_encoding(data: bytes, *, least: float) -> str | None:
    """UTF-16 or UTF-32, with its byte order, if more than `least` of the bytes are zero."""
    head = data[:_SAMPLE]
    zeros = [head[start::4].count(0) for start in range(4)]
    if sum(zeros) <= least * len(head):
        return None
    if sum(zeros) > 0.6 * len(head):
        return "utf-32-le" if zeros[3] > zeros[0] else "utf-32-be"
    return "utf-16-le" if zeros[1] + zeros[3] > zeros[0] + zeros[2] else "utf-16-be"
