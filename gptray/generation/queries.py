"""How a layer makes q and k of its scores: each head normalised and rotated.

Shapes: N tokens, H heads, K heads of keys and values, E = head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptray.model.layers import rms_norm
from gptray.model.rotary import Angles, rotate


@dataclass(frozen=True)
class Queries:
    """H = n_head, K = kv_heads, E = width.

    norms: weights (2, E) of RMSNorms of q and k; q's include the scores' 1 / sqrt(E). None: the
    weight that makes q includes it.
    """

    n_head: int
    kv_heads: int
    width: int
    norms: Tensor | None = None
    eps: float = 0.0
    rotates: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether q and k stay as they are."""
        return self.norms is None and not self.rotates

    def __call__(self, qkv: Tensor, angles: Angles | None) -> Tensor:
        """q, k, v (N, (H + 2 K) E), with q and k ready for scores."""
        if self.is_plain:
            return qkv
        heads = qkv.view(len(qkv), -1, self.width)
        q, k, v = torch.split(heads, [self.n_head, self.kv_heads, self.kv_heads], dim=1)
        if self.norms is not None:
            q, k = (rms_norm(x, w, self.eps) for x, w in zip((q, k), self.norms, strict=True))
        if self.rotates:
            assert angles is not None
            q, k = rotate(q, angles), rotate(k, angles)
        return torch.cat((q, k, v), dim=1).flatten(1)
