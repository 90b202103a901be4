"""Scores windows of text with an engine's decoder, to measure what quantized weights cost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.generation.decoder import PIECE_TOKENS, PROMPT_TOKENS, Piece, StepRows
from gptray.generation.decoders import make_decoder
from gptray.model.gpt import GPT

# Windows read at a time: as many as a step of an engine carries pieces.
SLOTS = PROMPT_TOKENS // PIECE_TOKENS


class WindowReader:
    """The network as an `Engine` with the same arguments runs it."""

    def __init__(
        self, model: GPT, *, dtype: torch.dtype, quantize: str = "none", backend: str = "torch"
    ) -> None:
        self._network = make_decoder(backend, model, SLOTS, dtype, quantize)

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """As `GPT.token_losses`."""
        return self.read(idx, targets)[0]

    def read(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of targets (B, T) after the tokens idx (B, T), in nats, fp32, and the
        likeliest tokens, which greedy decoding would take; both (B, T)."""
        losses, likeliest = torch.empty(targets.shape), torch.empty_like(targets)
        losses = losses.to(targets.device)
        for first in range(0, len(idx), SLOTS):
            group = idx[first : first + SLOTS].tolist()
            for start in range(0, idx.size(1), PIECE_TOKENS):
                parts = [window[start : start + PIECE_TOKENS] for window in group]
                pieces = [Piece(n, start, part, scored=True) for n, part in enumerate(parts)]
                logits = self._network.step(StepRows([], pieces))  # (len(group) * t, V)
                place = slice(first, first + SLOTS), slice(start, start + PIECE_TOKENS)
                wanted = targets[place]
                nats = F.cross_entropy(logits, wanted.flatten(), reduction="none")
                losses[place] = nats.view(wanted.shape)
                likeliest[place] = logits.argmax(-1).view(wanted.shape)
        return losses, likeliest
