"""Reads whole windows of text with an engine's network, to measure what its weights cost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.generation.decoder import PIECE_TOKENS, PROMPT_TOKENS, Piece
from gptray.generation.decoders import make_decoder
from gptray.model.gpt import GPT

# Windows that are read at a time: what a step of an engine carries of prompts.
SLOTS = PROMPT_TOKENS // PIECE_TOKENS


class WindowReader:
    """A network as `gptray.generation.engine` runs it, with the arguments of an `Engine`."""

    def __init__(
        self, model: GPT, *, dtype: torch.dtype, quantize: str = "none", backend: str = "torch"
    ) -> None:
        self._network = make_decoder(backend, model, SLOTS, dtype, quantize)

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """As `GPT.token_losses`."""
        return self.read(idx, targets)[0]

    def read(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of targets (B, T) after the tokens idx (B, T): the losses in nats, fp32, and the
        likeliest tokens, which greedy decoding would take; both (B, T)."""
        losses, likeliest = torch.empty(targets.shape), torch.empty_like(targets)
        losses = losses.to(targets.device)
        for first in range(0, len(idx), SLOTS):
            group = idx[first : first + SLOTS].tolist()
            for start in range(0, idx.size(1), PIECE_TOKENS):
                parts = [window[start : start + PIECE_TOKENS] for window in group]
                pieces = [Piece(n, start, part, scored=True) for n, part in enumerate(parts)]
                logits = self._network.step([], pieces)  # (len(group) * t, V)
                place = slice(first, first + SLOTS), slice(start, start + PIECE_TOKENS)
                wanted = targets[place]
                nats = F.cross_entropy(logits, wanted.flatten(), reduction="none")
                losses[place] = nats.view(wanted.shape)
                likeliest[place] = logits.argmax(-1).view(wanted.shape)
        return losses, likeliest
