"""Drawing tokens from logits, and continuing a few prompts without a cache.

The samples that a run shows at every evaluation come from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptray.config import SampleConfig
from gptray.model.gpt import GPT


def draw_tokens(
    logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """One token id for each row of logits (B, V); returns (B,).

    `temperature` 0 takes the likeliest. Under `top_k` exactly k tokens are eligible, ties
    included: the draw is made among the k indices, not by a threshold. `generator` is on the CPU.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = logits.float().topk(min(top_k or logits.size(-1), logits.size(-1)), dim=-1)
    probabilities = torch.softmax(values / temperature, dim=-1).cpu()
    choice = torch.multinomial(probabilities, 1, generator=generator).to(ids.device)  # (B, 1)
    return ids.gather(-1, choice).squeeze(-1)


@torch.no_grad()
def continue_prompts(
    model: GPT, prompts: Sequence[Sequence[int]], settings: SampleConfig, *, eos_id: int
) -> list[list[int]]:
    """The tokens that follow each prompt, at most `max_new_tokens`, up to and without EOS.

    All rows advance together: a row shorter than its neighbours is padded on the right, where
    causal attention cannot see it. Contexts longer than `n_positions` lose their beginning.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    rows = [list(prompt) or [eos_id] for prompt in prompts]
    outputs: list[list[int]] = [[] for _ in rows]
    live = list(range(len(rows)))
    for _ in range(settings.max_new_tokens):
        contexts = [rows[row][-model.config.n_positions :] for row in live]
        longest = max(map(len, contexts))
        padded = [context + [eos_id] * (longest - len(context)) for context in contexts]
        logits = model(torch.tensor(padded, device=device))  # (B, T, V)
        last = torch.tensor([len(context) - 1 for context in contexts], device=device)
        tokens = draw_tokens(
            logits[torch.arange(len(live), device=device), last],
            temperature=settings.temperature,
            top_k=settings.top_k,
            generator=generator,
        )
        for row, token in zip(live, tokens.tolist(), strict=True):
            if token != eos_id:
                outputs[row].append(token)
                rows[row].append(token)
        ended = {row for row, token in zip(live, tokens.tolist(), strict=True) if token == eos_id}
        live = [row for row in live if row not in ended]
        if not live:
            break
    model.train(was_training)
    return outputs
