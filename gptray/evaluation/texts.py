"""Generated text against real text: which passages are continued, and what the results are worth.

Pure functions of tokens and texts; making the continuations is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import sacrebleu

from gptray.data.tokens import TokenSplit
from gptray.evaluation.result import TextScore

# Tokens of a passage at most: half of it prompt, half of it to be foretold.
PASSAGE_TOKENS = 128
# A shorter piece of a document is no passage.
LEAST_TOKENS = 8
REPETITION_NGRAM = 4
# How decoders show bytes that are no whole character.
REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Passage:
    """Tokens of one document: a prompt and what really follows."""

    prompt: list[int]
    reference: list[int]


def cut_passages(
    split: TokenSplit, decode: Decode, *, eos_id: int, count: int, length: int, room: int = 0
) -> list[Passage]:
    """Up to `count` passages of at most `length` tokens, spread evenly, none over a document's end.

    The prompt is the first half, a little more where that would cut a character in two. `room` is
    how many tokens are to follow each passage, where the split has as many.
    """
    usable = max(len(split) - room, min(len(split), length))
    count = min(count, usable // length)
    gap = (usable - length) // max(1, count - 1) if count else 0
    found, marks = [], {eos_id, *split.document_prefix}
    for number in range(count):
        tokens = split.slice(number * gap, number * gap + length).tolist()
        piece = _without_torn_start(_longest_piece(tokens, marks), decode)
        if len(piece) < max(2, min(LEAST_TOKENS, length)):
            continue
        half = len(piece) // 2
        while half < len(piece) - 1 and decode(piece[:half]).endswith(REPLACEMENT):
            half += 1
        found.append(Passage(piece[:half], piece[half:]))
    return found


def _longest_piece(tokens: list[int], marks: set[int]) -> list[int]:
    """The longest run without one of the tokens that mark a document's ends."""
    runs = groupby(tokens, key=marks.__contains__)
    return max((list(run) for is_mark, run in runs if not is_mark), key=len, default=[])


def _without_torn_start(tokens: list[int], decode: Decode) -> list[int]:
    """Drop tokens that begin within a character: UTF-8 has at most three bytes after the first."""
    for start in range(min(4, len(tokens))):
        if not decode(tokens[start:]).startswith(REPLACEMENT):
            return tokens[start:]
    return tokens


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a"
) -> TextScore:
    """Corpus BLEU of texts against one reference each (Papineni et al. 2002; Post 2018)."""
    return _corpus_score(sacrebleu.BLEU(tokenize=tokenize), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> TextScore:
    """Corpus chrF2 of texts against one reference each (Popovic 2015)."""
    return _corpus_score(sacrebleu.CHRF(), hypotheses, references)


def _corpus_score(
    metric: sacrebleu.BLEU | sacrebleu.CHRF, hypotheses: Sequence[str], references: Sequence[str]
) -> TextScore:
    # A text to a line, as sacrebleu's own command reads them.
    lines = [" ".join(text.split()) for text in hypotheses]
    real = [" ".join(text.split()) for text in references]
    score = metric.corpus_score(lines, [real])
    return {
        "score": float(score.score),
        "signature": str(metric.get_signature()),
        "passages": len(lines),
    }


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words / all of them, over all texts (Li et al. 2016)."""
    grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(continuations: Sequence[Sequence[int]]) -> float | None:
    """Mean share of a continuation's 4-grams of tokens that it has said before.

    seq-rep-4 of Welleck et al. 2020: 1 - different 4-grams / all of them.
    """
    grams = [_ngrams(tokens, REPETITION_NGRAM) for tokens in continuations]
    shares = [1 - len(set(one)) / len(one) for one in grams if one]
    return sum(shares) / len(shares) if shares else None


def _ngrams(items: Sequence[object], n: int) -> list[tuple[object, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
