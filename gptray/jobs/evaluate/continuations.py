"""Measures the model's text: actors continue passages; sacrebleu and n-gram counts score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gptray.config.keys import shown
from gptray.data.tokens import TokenData, TokenSplit
from gptray.evaluation import recitation, texts
from gptray.evaluation.bleu import compares, pick_bleu
from gptray.evaluation.recitation import LENGTHS, PROMPT_TOKENS, RECITED_TOKENS
from gptray.evaluation.result import Sample, TextMeasures, TextScore, TextScores
from gptray.evaluation.texts import LEAST_TOKENS, PASSAGE_TOKENS, Passage
from gptray.generation.settings import Sampling
from gptray.jobs.evaluate.check import CheckedEvaluation
from gptray.jobs.evaluate.scorers import Scorers
from gptray.jobs.evaluate.worker import Call, Continuation

# Prompts per call.
CALL_PROMPTS = 16
# Tokens of the training split that one call searches.
CALL_READ_TOKENS = 1 << 23
# How many passages are kept as samples.
SHOWN = 8


def measure_texts(checked: CheckedEvaluation, data: TokenData, scorers: Scorers) -> TextMeasures:
    """All measures of generated text; None if there is no passage to continue."""
    held_out = data.test or data.val
    length = min(PASSAGE_TOKENS, checked.block_size)
    passages = _passages(checked, data, held_out, length)
    lengths = [len(passage.reference) for passage in passages]
    sampling = Sampling.of(checked.config.sample, min_new_tokens=0, stop=(), stop_token_ids=())
    likeliest = Sampling(temperature=0.0, utf8=sampling.utf8)
    greedy = _continued(scorers, "writing", passages, lengths, likeliest)
    sampled = _continued(scorers, "sampling", passages, lengths, sampling)
    by_greedy, by_sampling = ([one.text for one in made] for made in (greedy, sampled))
    real = [data.tokenizer.decode(passage.reference) for passage in passages]
    tokenize = pick_bleu(checked.config.evaluate.bleu_tokenize, real)
    shares, why = _memorised(checked, data, scorers)
    how = _how(checked, passages, sampling, tokenize)
    missing = {
        f"memorised_{n}": why for n, share in zip(LENGTHS, shares, strict=True) if share is None
    }
    if not passages:
        names = ("chrf", "bleu", "distinct_1", "distinct_2", "repetition")
        missing |= dict.fromkeys(names, _no_passage(checked, "held-out"))
    how |= {name: f"not measured: {reason}" for name, reason in missing.items()}
    return {
        "bleu": _scores(partial(texts.bleu, tokenize=tokenize), by_greedy, by_sampling, real),
        "chrf": _scores(texts.chrf, by_greedy, by_sampling, real),
        "distinct_1": texts.distinct(by_sampling, 1),
        "distinct_2": texts.distinct(by_sampling, 2),
        "repetition": texts.repetition([one.tokens for one in sampled]),
        "memorised_20": shares[0],
        "memorised_50": shares[1],
        "samples": _samples(data, passages, by_greedy, by_sampling, real),
        "how": how,
    }


def _passages(
    checked: CheckedEvaluation, data: TokenData, split: TokenSplit, length: int, *, room: int = 0
) -> list[Passage]:
    return texts.cut_passages(
        split,
        data.tokenizer.decode,
        eos_id=data.eos_id,
        count=0 if checked.others else checked.config.evaluate.passages,
        length=length,
        room=room,
    )


def _continued(
    scorers: Scorers, doing: str, passages: list[Passage], lengths: list[int], sampling: Sampling
) -> list[Continuation]:
    """Continue each passage's prompt by its number of tokens."""
    calls = []
    for first in range(0, len(passages), CALL_PROMPTS):
        part = slice(first, first + CALL_PROMPTS)
        prompts = [passage.prompt for passage in passages[part]]
        arguments = (prompts, lengths[part], sampling, first)
        calls.append(Call("write", arguments, sum(lengths[part])))
    return [one for written in scorers.run(doing, calls) for one in written]


def _scores(
    score: Callable[[Sequence[str], Sequence[str]], TextScore],
    greedy: list[str],
    sampled: list[str],
    real: list[str],
) -> TextScores | None:
    if not real:
        return None
    return {"greedy": score(greedy, real), "sampled": score(sampled, real)}


def _memorised(
    checked: CheckedEvaluation, data: TokenData, scorers: Scorers
) -> tuple[list[float | None], str]:
    """Shares of the generated n-grams that occur in the training split, for each of LENGTHS.

    Also the reason for those that are None.
    """
    nothing: list[float | None] = [None] * len(LENGTHS)
    if "train" not in data.splits:
        return nothing, "the scored text has no training split"
    length = min(2 * PROMPT_TOKENS, checked.block_size // 2)
    passages = _passages(checked, data, data.train, length, room=RECITED_TOKENS)
    if not passages:
        return nothing, _no_passage(checked, "training")
    lengths = [RECITED_TOKENS] * len(passages)
    # The network's own next tokens, even if they make broken characters.
    likeliest = Sampling(temperature=0.0, utf8=False)
    written = _continued(scorers, "reciting", passages, lengths, likeliest)
    grams = [
        np.concatenate(
            [recitation.ngram_hashes(np.array(one.tokens, np.int64), n) for one in written]
        )
        for n in LENGTHS
    ]
    wanted = [np.unique(hashes) for hashes in grams]
    why = "every continuation ended before that many tokens"
    if not any(len(hashes) for hashes in wanted):
        return nothing, why
    calls = [
        Call("find", (start, stop, wanted), stop - start)
        for start in range(0, len(data.train), CALL_READ_TOKENS)
        for stop in [min(start + CALL_READ_TOKENS, len(data.train))]
    ]
    found = [
        np.logical_or.reduce(seen) for seen in zip(*scorers.run("looking", calls), strict=True)
    ]
    shares = [
        float(np.isin(all_of_them, hashes[seen]).mean()) if len(all_of_them) else None
        for all_of_them, hashes, seen in zip(grams, wanted, found, strict=True)
    ]
    return shares, why


def _short(checked: CheckedEvaluation, n: int) -> str:
    """A caveat for a context shorter than the n-grams."""
    size = checked.block_size
    return "" if size >= n else f"; the context is only {size} tokens: a low share says little"


def _no_passage(checked: CheckedEvaluation, kind: str) -> str:
    if checked.others:
        return "an ensemble scores text but does not generate it"
    if not checked.config.evaluate.passages:
        return "evaluate.passages is 0"
    length = min(LEAST_TOKENS, checked.block_size)
    return f"no document of the {kind} text has {length} tokens in a row"


def _samples(
    data: TokenData, passages: list[Passage], greedy: list[str], sampled: list[str], real: list[str]
) -> list[Sample]:
    rows = zip(passages, real, greedy, sampled, strict=True)
    found: list[Sample] = [
        {
            "prompt": data.tokenizer.decode(passage.prompt),
            "reference": reference,
            "greedy": likeliest,
            "sampled": drawn,
        }
        for passage, reference, likeliest, drawn in rows
    ]
    return found[:: max(1, len(real) // SHOWN)][:SHOWN]


def _how(
    checked: CheckedEvaluation, passages: list[Passage], sampling: Sampling, tokenize: str
) -> dict[str, str]:
    """How each measure of generated text was computed, in words."""
    of_real = (
        f"{len(passages)} held-out passages of up to {PASSAGE_TOKENS} tokens: the first half is "
        "the prompt, the continuation is compared with the real second half"
    )
    keys = ("temperature", "top_k", "top_p", "seed")
    settings = {key: getattr(sampling, key) for key in keys}
    drawn = "sampled with " + " ".join(
        f"{key}={shown(value)}" for key, value in settings.items() if value is not None
    )
    recited = (
        "share of the {n}-grams of tokens in greedy continuations of training passages "
        f"({RECITED_TOKENS} tokens each, from prompts of at most {PROMPT_TOKENS}) that occur in "
        "the training split"
    )
    return {
        "chrf": "sacrebleu's corpus chrF2, which says more than BLEU about texts this short; "
        f"{of_real}; {drawn}",
        "bleu": f"sacrebleu's corpus BLEU; {of_real}; {drawn}",
        "bleu_compares": compares(tokenize),
        "distinct_1": f"distinct words / all words of the continuations, {drawn}",
        "distinct_2": f"distinct pairs of words / all pairs of the continuations, {drawn}",
        "repetition": "mean share of a continuation's 4-grams of tokens that occurred in it "
        f"before, {drawn}",
        **{f"memorised_{n}": recited.format(n=n) + _short(checked, n) for n in LENGTHS},
        "samples": f"some of the {of_real}",
    }
