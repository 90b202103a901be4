"""Prepares a layer's q and k for scores: normalises and rotates their heads.

Shapes: N tokens, H heads, K heads of keys and values, E = head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptray.model.layers import rms_norm
from gptray.model.rotary import Angles, rotate


@dataclass(frozen=True)
class Queries:
    """H = n_head, K = kv_heads, E = width.

    norms: weights of RMSNorms of q and k, one after the other, of a head (2 E,) or, if wide, of all
    heads ((H + K) E,); q's include the scores' scale. None: the weight that makes q includes it.
    """

    n_head: int
    kv_heads: int
    width: int
    norms: Tensor | None = None
    eps: float = 0.0
    is_wide: bool = False

    def __call__(self, qkv: Tensor, angles: Angles | None) -> Tensor:
        """q, k, v (N, (H + 2 K) E), with q and k ready for scores; angles: None: not rotated."""
        if self.norms is None and angles is None:
            return qkv
        if self.is_wide:
            qkv = self.wide_norm(qkv, rms_norm)
        heads = qkv.view(len(qkv), -1, self.width)
        q, k, v = torch.split(heads, [self.n_head, self.kv_heads, self.kv_heads], dim=1)
        if self.norms is not None and not self.is_wide:
            q_weight, k_weight = self.norms.chunk(2)
            q, k = rms_norm(q, q_weight, self.eps), rms_norm(k, k_weight, self.eps)
        if angles:
            q, k = rotate(q, angles), rotate(k, angles)
        return torch.cat((q, k, v), dim=1).flatten(1)

    def wide_norm(self, qkv: Tensor, norm: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        """q, k, v with q and k normalised by `norm` over all of their heads."""
        assert self.norms is not None
        widths = self.n_head * self.width, self.kv_heads * self.width
        q, k, v = torch.split(qkv, [*widths, widths[1]], dim=1)
        q_weight, k_weight = torch.split(self.norms, [*widths])
        return torch.cat((norm(q, q_weight, self.eps), norm(k, k_weight, self.eps), v), dim=1)
