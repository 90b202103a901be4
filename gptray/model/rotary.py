"""Rotary positions: rotates queries and keys, pair by pair, by angles that grow with position.

Su et al. 2021, RoFormer. The two numbers of a pair are R / 2 apart, as in Hugging Face's files of
all supported families but ERNIE 4.5, whose rows `gptray.model.hf` reorders.

Shapes: T positions, R rotated dimensions of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptray.config import ModelConfig

# Cosines and sines, (T, R / 2) each.
Angles = tuple[Tensor, Tensor]


class Rotary:
    """The angles of a network's rotary positions, with its scaling for longer contexts.

    dtype: fp32 or fp64, in which they are computed.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        self._kinds = [frequencies(config, dtype)]
        self._kind_of = [0] * config.n_layer
        if config.local_rope_theta:
            plain = {"rope_theta": config.local_rope_theta, "rope_scaling": None}
            self._kinds.append(frequencies(config.model_copy(update=plain), dtype))
            windows = map(config.window, range(config.n_layer))
            self._kind_of = [0 if window is None else 1 for window in windows]
        self._rotates = [config.rotates(layer) for layer in range(config.n_layer)]
        # By device: a CUDA graph cannot hold a copy from the host, and an eager step would wait.
        self._kinds_on = {torch.device("cpu"): self._kinds}

    def at(self, positions: Tensor, dtype: torch.dtype) -> list[Angles | None]:
        """Each layer's angles of integer positions (T,); None: it does not rotate."""
        if (kinds := self._kinds_on.get(positions.device)) is None:
            kinds = [(one.to(positions.device), scale) for one, scale in self._kinds]
            self._kinds_on[positions.device] = kinds
        made: list[Angles] = []
        for per_position, scale in kinds:
            angles = positions.to(per_position.dtype)[:, None] * per_position
            made.append(((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)))
        both = zip(self._kind_of, self._rotates, strict=True)
        return [made[kind] if rotates else None for kind, rotates in both]


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """x (..., T, heads, head width) with the first R numbers of each head rotated."""
    cos, sin = (part.unsqueeze(-2) for part in angles)
    half = cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def frequencies(config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """The radians by which each pair turns per position, (R / 2,) in `dtype` on the CPU, and the
    factor of cosines and sines."""
    width, cpu = config.rotary_width, torch.device("cpu")
    exponents = torch.arange(0, width, 2, dtype=dtype, device=cpu) / width
    plain = 1.0 / config.rope_theta**exponents
    scaling = dict(config.rope_scaling or {})
    kind = scaling.pop("rope_type", None)
    if kind is None:
        return plain, 1.0
    numbers = {key: float(value) for key, value in scaling.items() if not isinstance(value, list)}
    if kind == "linear":
        return plain / numbers["factor"], 1.0
    if kind == "longrope":
        # Of short contexts (Ding et al. 2024); ModelConfig refuses longer ones.
        short = torch.tensor(scaling["short_factor"], dtype=dtype, device=cpu)
        return plain / short, numbers["attention_factor"]
    return (_llama3 if kind == "llama3" else _yarn)(plain, numbers, config)


def _llama3(plain: Tensor, scaling: dict[str, float], config: ModelConfig) -> tuple[Tensor, float]:
    """Llama 3.1's scaling: stretches long wavelengths, keeps short ones, with a ramp between.

    Grattafiori et al. 2024, The Llama 3 Herd of Models. `low_freq_factor` and `high_freq_factor`:
    how many wavelengths fit into the original context at the ends of the ramp.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
    kept = ((turns - low) / (high - low) if high != low else turns - low).clamp(0, 1)
    return (1 - kept) * plain / scaling["factor"] + kept * plain, 1.0


def _yarn(plain: Tensor, scaling: dict[str, float], config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): like Llama 3.1's, with the ramp over the pairs' indices, and scaled
    attention scores."""
    factor, width = scaling["factor"], config.rotary_width
    context = scaling["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        """The pair that turns this often in the original context."""
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_of(scaling.get("beta_fast", 32.0)), pair_of(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", 1.0):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=plain.device)
    stretched = ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
    return plain * (1 - stretched) + plain / factor * stretched, _yarn_scale(factor, scaling)


def _yarn_scale(factor: float, scaling: dict[str, float]) -> float:
    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
