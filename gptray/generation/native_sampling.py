"""What drawing asks of rows of logits, by `gptray.native`: PyTorch's results in fewer calls.

Between two steps of a network everything that a call touches comes from memory anew, so that many
small ones take as long as a third of a step.

Shapes: B rows, V entries of the vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptray.generation import sampling
from gptray.generation.choosing import Chosen
from gptray.generation.sampling import Row
from gptray.native import abi
from gptray.native.abi import load_library
from gptray.native.backend import GENERATE_KEY


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `gptray.generation.choosing.top_candidates` gives for fp32 logits, faster."""
    B, V = logits.shape
    k = min(k, V)
    logits = logits.contiguous()
    assert logits.dtype == torch.float32
    values, ids = torch.empty(B, k), torch.empty(B, k, dtype=torch.int64)
    threads = min(B, torch.get_num_threads())
    load_library(key=GENERATE_KEY).top_candidates(logits, B, V, k, values, ids, threads)
    return values, ids


def draw_limited(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """What `gptray.generation.sampling.draw_limited` gives; faster if all rows have a top_k."""
    if any(row.sampling.top_k is None for row in rows):
        return sampling.draw_limited(top_candidates, logits, rows)
    B, V = logits.shape
    draws = (abi.Draw * B)(*map(_draw, rows))
    k = min(max(draw.top_k for draw in draws), V)
    best, tokens = torch.empty(B), torch.empty(B, dtype=torch.int64)
    ids, logs = torch.empty(B, k, dtype=torch.int64), torch.empty(B, k, dtype=torch.float64)
    library, threads = load_library(key=GENERATE_KEY), min(B, torch.get_num_threads())
    library.rank_rows(logits.contiguous(), B, V, k, draws, best, ids, logs, threads)
    library.draw_rows(logs.exp_(), ids, B, k, draws, tokens)
    return tokens, best


def _draw(row: Row) -> abi.Draw:
    asked = row.sampling
    top_p = 1.0 if asked.top_p is None else asked.top_p
    reals = asked.temperature, top_p, asked.min_p or 0.0
    return abi.Draw(*reals, asked.seed, row.row, row.new_tokens, asked.top_k)
