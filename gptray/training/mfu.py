"""Model FLOPs utilisation (MFU): the share of a GPU's peak that the model's own arithmetic uses.

Chowdhery et al. 2022, PaLM, appendix B: per token, 6 FLOPs for each weight and 12 L H Q T for
attention, forward and backward, not counting recomputation.
"""

from __future__ import annotations

import re

import torch

from gptray.config import Config
from gptray.model.parameters import parameter_count

# Dense bf16 FLOP/s from NVIDIA's data sheets; the first pattern that matches a device's name wins.
PEAKS = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 836e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 836e12),
    (r"\bH[18]00\b", 989e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bA40\b", 150e12),
    (r"\bA30\b", 165e12),
    (r"\bA10G\b", 70e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX 5090$", 209.5e12),
    (r"\bRTX 4090$", 165e12),
    (r"\bRTX 3090$", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """A GPU's peak bf16 FLOP/s by its name; None if unknown, as for a MIG partition."""
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((peak for name, peak in PEAKS if re.search(name, device_name)), None)


def flops_per_token(config: Config, parameters: int) -> float:
    """Training FLOPs per token; `parameters` is the whole model's number.

    Embeddings are looked up, not multiplied, unless the token embedding is also the head's weight.
    A sliding window limits what a layer attends to.
    """
    model, tokens = config.model, config.train.block_size
    rest = parameter_count(model, 0)  # without the token embedding and head
    learned = model.n_positions * model.n_embd if model.positions == "learned" else 0
    head = (parameters - rest) / (1 if model.tie_word_embeddings else 2)
    weights = rest - learned + head
    seen = sum(min(tokens, model.window(layer) or tokens) for layer in range(model.n_layer))
    # 2 each for the forward pass, the input's gradient and, unless frozen, the weight's gradient.
    per_weight = 6.0 if config.lora.rank is None else 4.0
    return per_weight * weights + 12.0 * model.n_head * model.head_width * seen


def tokens_per_sec_at_peak(
    config: Config, parameters: int, dtype: torch.dtype, device_name: str, *, workers: int
) -> float | None:
    """Tokens per second of all workers at an MFU of 1; None if the peak is not known.

    It is not known in fp32 or for workers that share a GPU.
    """
    peak = peak_flops(device_name)
    if peak is None or dtype != torch.bfloat16 or config.compute.gpus_per_worker < 1:
        return None
    return peak * workers / flops_per_token(config, parameters)
