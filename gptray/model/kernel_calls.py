"""Calls the native library's functions for training, see `gptray.native.abi`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptray.native.abi import LANES, PANEL, load_library
from gptray.native.backend import TRAIN_KEY


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a function of the library with tensors and sizes; adds the number of threads."""
    getattr(load_library(key=TRAIN_KEY), name)(*arguments, torch.get_num_threads())


def panels(columns: int, words: int) -> Tensor:
    """Scratch memory for packed numbers; PyTorch aligns it to 64 bytes."""
    return torch.empty(-(-columns // PANEL) * PANEL * words, dtype=torch.int32)


def gated_columns(columns: int) -> int:
    """The columns of a gated layer's panels, each of which is half gates and half inputs."""
    return -(-columns // (PANEL // 2)) * PANEL


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, made contiguous."""
    return [tensor.contiguous() for tensor in tensors]


def sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """M, N and K of x (..., K) with M rows, and W (N, K)."""
    N, K = weight.shape
    return x.numel() // K, N, K


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; W (N, K) and b (N) in fp32."""
    M, N, K = sizes(x, weight)
    y = x.new_empty(*x.shape[:-1], N)
    call("linear", x, weight, bias, y, panels(N, K // 2), M, N, K)
    return y


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W; W (N, K) in fp32."""
    N, K = weight.shape
    grad_x = grad.new_empty(*grad.shape[:-1], K)
    call("input_gradient", grad, weight, grad_x, panels(K, N // 2), *sizes(grad_x, weight))
    return grad_x


def weight_gradients(grad: Tensor, x: Tensor, *, has_bias: bool) -> list[Tensor]:
    """grad^T x (N, K) in fp32 for grad (..., N) and x (..., K), and with a bias grad's sums (N)."""
    N, K = grad.size(-1), x.size(-1)
    M = grad.numel() // N
    made = [torch.empty(N, K), torch.empty(N) if has_bias else None]
    scratch = panels(min(N, K), -(-M // (2 * LANES)) * LANES)
    call("weight_gradients", grad, x, *made, scratch, M, N, K)
    return [one for one in made if one is not None]
