"""Generated text against real text: picks the passages to continue and scores the results.

Pure functions of tokens and texts; the caller generates the continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import sacrebleu

from gptray.data.tokens import TokenSplit
from gptray.evaluation.result import TextScore

# Most tokens of a passage: half of it is the prompt, half the reference.
PASSAGE_TOKENS = 128
# Shorter pieces of a document are skipped.
LEAST_TOKENS = 8
REPETITION_NGRAM = 4
# Decoders put this in place of an incomplete character.
REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Passage:
    """Tokens of one document: a prompt and its real continuation."""

    prompt: list[int]
    reference: list[int]


def cut_passages(
    split: TokenSplit, decode: Decode, *, eos_id: int, count: int, length: int, room: int = 0
) -> list[Passage]:
    """Up to `count` passages of at most `length` tokens, evenly spaced, each from one document.

    The prompt is the first half, or a little more if that would split a character. `room` is how
    many tokens should follow each passage, if the split has enough.
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
    """The longest run without a token that marks a document's start or end."""
    runs = groupby(tokens, key=marks.__contains__)
    return max((list(run) for is_mark, run in runs if not is_mark), key=len, default=[])


def _without_torn_start(tokens: list[int], decode: Decode) -> list[int]:
    """Drop leading tokens that start inside a character, which has at most 3 continuation bytes."""
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
    # One text per line, as sacrebleu's command reads them.
    lines = [" ".join(text.split()) for text in hypotheses]
    real = [" ".join(text.split()) for text in references]
    score = metric.corpus_score(lines, [real])
    return {
        "score": float(score.score),
        "signature": str(metric.get_signature()),
        "passages": len(lines),
    }


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words / all n-grams, over all texts (Li et al. 2016)."""
    grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(continuations: Sequence[Sequence[int]]) -> float | None:
    """The mean share of a continuation's token 4-grams that repeat earlier ones.

    seq-rep-4 of Welleck et al. 2020: 1 - distinct 4-grams / all 4-grams.
    """
    grams = [_ngrams(tokens, REPETITION_NGRAM) for tokens in continuations]
    shares = [1 - len(set(one)) / len(one) for one in grams if one]
    return sum(shares) / len(shares) if shares else None


def _ngrams(items: Sequence[object], n: int) -> list[tuple[object, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
