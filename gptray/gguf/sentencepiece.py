"""Converts SentencePiece's pieces in a GGUF file to models of Hugging Face's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence

from gptray.config import UserError

# SentencePiece's space.
MARK = "\u2581"
# The longest piece, in characters; SentencePiece's default is 16.
_LONGEST = 128


def piece_merges(
    tokens: Sequence[str], normal: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """The merges, in order; normal: the ids of pieces.

    SentencePiece joins the two neighbours that form the piece with the highest score. Hugging
    Face's BPE does the same if all merges into a piece come before those into the next one, which
    is also how transformers reads such files. Raises UserError for absurdly long pieces.
    """
    number_of = {tokens[number]: number for number in normal}
    merges: list[list[str]] = []
    for number in sorted(normal, key=lambda number: -scores[number]):
        piece = tokens[number]
        if len(piece) > _LONGEST:
            raise UserError(f"it has a token of {len(piece):,} characters")
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [[left, right] for left, right in cuts if left in number_of and right in number_of]
        merges += sorted(known, key=lambda pair: (number_of[pair[0]], number_of[pair[1]]))
    return merges


def character_model(tokens: Sequence[str], normal: Sequence[int]) -> dict[str, object]:
    """The steps of a tokenizer with one token per character, as export writes it.

    Raises UserError if there are longer pieces without byte fallback.
    """
    names = [" " if token == MARK else token for token in tokens]
    longer = next((names[number] for number in normal if len(names[number]) != 1), None)
    if longer is not None:
        raise UserError(f"its tokenizer has no tokens for bytes, but pieces such as {longer!r:.60}")
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {name: number for number, name in enumerate(names)},
            "unk_token": "<unk>",
        },
    }
