"""The head and its cross-entropy in chunks of rows, so only one chunk's logits exist at a time.

When training in bf16 on CPUs with native kernels, `gptray.model.kernels` computes it instead.

The gradient is computed in the forward pass, while a chunk's logits exist; the backward pass only
scales it. Weights are fp32 masters and their gradient is summed in fp32; frozen ones get none. On a
CPU a chunk fits into the caches; on a GPU it is large, because each chunk reads and writes the
whole gradient of the weight and launches kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptray.model import kernels
from gptray.model.autograd_context import Context

# The size of a chunk's logits in fp32: 128 rows of GPT-2's vocabulary. Below 32 MiB, above which
# glibc gets every allocation from the kernel anew; the page faults would cost more than the
# arithmetic.
CPU_BYTES = 28 * 2**20
# The size of a chunk's logits on a GPU: in fp32 in eager mode, in the dtype of the computation
# under torch.compile. The peak is two to three times as much.
GPU_BYTES = 2 * 2**30
# Rows of the head's gradient that are computed and added at a time, so that they stay in cache.
GRAD_ROWS = 4096
# A target that is left out of the loss; so is any number below 0.
IGNORED = -1


def chunk_rows(rows: int, vocab_size: int, *, on_gpu: bool, logit_bytes: int = 4) -> int:
    """The number of rows in a chunk of `rows` rows, a multiple of 32 if it is at least 32.

    logit_bytes: the size of a logit on a GPU, where all chunks are about the same size.
    """
    if on_gpu:
        most = max(1, GPU_BYTES // (logit_bytes * vocab_size))
        chunks = -(-rows // most)
        size = -(-rows // chunks)
        return -(-size // 32) * 32 if most >= 32 else size
    most = CPU_BYTES // (4 * vocab_size)
    return most // 32 * 32 if most >= 32 else max(most, 1)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, valid: int, native: bool = False
) -> Tensor:
    """Mean of -log softmax(x @ weight.T)[target] over targets that are not ignored, an fp32 scalar.

    x (N, C) in the dtype of the computation, weight (V, C) fp32, targets (N,) int64; those below 0
    are ignored, and if all are the loss is 0. Only the first `valid` of the V rows are tokens:
    the others get no probability and no gradient. native: use `gptray.model.kernels` in eager mode
    with gradients, for x in bf16 and weight in fp32, or frozen in bf16, on a CPU.
    """
    if not torch.is_grad_enabled():
        losses = token_cross_entropy(x, weight, targets.clamp(min=0), valid=valid)
        return mean_loss(losses, targets)
    native = native and not torch.compiler.is_compiling()
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, valid, native)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, valid: int) -> Tensor:
    """-log softmax(x @ weight.T)[target] of each token, (N,) fp32; no gradient."""
    weight = weight.to(x.dtype)
    losses = [
        -log_probabilities(chunk, weight, valid).gather(1, target).squeeze(1)
        for chunk, target in chunks_of(x, weight, targets)
    ]
    return losses[0] if len(losses) == 1 else torch.cat(losses)


def mean_loss(losses: Tensor, targets: Tensor) -> Tensor:
    """The mean (...) of losses (..., N) over the targets (N,) that are not ignored."""
    return losses.masked_fill(targets < 0, 0.0).sum(-1) / num_targets(targets)


def num_targets(targets: Tensor) -> Tensor:
    """The number of targets that are not ignored, at least 1, as a divisor."""
    return (targets >= 0).sum().clamp(min=1)


def zero_ignored(rows: Tensor, targets: Tensor) -> Tensor:
    """Rows (N, C), zeroed where the target (N,) is ignored.

    In the head's input, this keeps a row out of the weight's gradient.
    """
    return rows.masked_fill((targets < 0).unsqueeze(1), 0.0)


def chunks_of(
    x: Tensor, weight: Tensor, targets: Tensor, *, copies: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of x with their targets (rows, 1).

    copies: how many times as much memory a chunk takes as `chunk_rows` assumes.
    """
    on_gpu = x.device.type != "cpu"
    logit_bytes = copies * (x.element_size() if torch.compiler.is_compiling() else 4)
    rows = chunk_rows(x.size(0), weight.size(0), on_gpu=on_gpu, logit_bytes=logit_bytes)
    return zip(torch.split(x, rows), torch.split(targets.unsqueeze(1), rows), strict=True)


def log_probabilities(x: Tensor, weight: Tensor, valid: int) -> Tensor:
    """log softmax(x @ weight.T), (rows, V) fp32, over the first `valid` entries; -inf elsewhere."""
    logits = torch.mm(x, weight.t()).float()  # (rows, V)
    if valid < weight.size(0):
        logits[:, valid:] = float("-inf")
    return torch.log_softmax(logits, dim=-1)


def add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total (V, C) += grad^T (V, rows) @ x (rows, C) in place, summed in fp32."""
    if x.device.type != "cpu":
        total += torch.mm(grad.t(), x)
        return
    rows = total.size(0) if torch.compiler.is_compiling() else GRAD_ROWS
    for start in range(0, total.size(0), rows):
        part = slice(start, start + rows)
        total[part] += torch.mm(grad[:, part].t(), x)


def scores(x: Tensor, weight: Tensor, target: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """The targets' log-probabilities (rows, 1) in fp32, and the logits' gradient (rows, V)."""
    log_p = log_probabilities(x, weight, valid)
    picked = log_p.gather(1, target)
    # d sum / d logits = softmax - onehot
    return picked, log_p.exp_().scatter_(1, target, picked.expm1()).to(x.dtype)


def fused_scores(x: Tensor, weight: Tensor, target: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """`scores` in formulas for inductor on a GPU: it reads the logits twice, writes their gradient
    once, and materialises nothing of that size in fp32."""
    logits = torch.mm(x, weight.t())
    columns = torch.arange(weight.size(0), device=x.device)
    z = logits.float()
    if valid < weight.size(0):
        z = torch.where(columns < valid, z, float("-inf"))
    most = z.amax(1, keepdim=True)
    log_sum = most + (z - most).exp().sum(1, keepdim=True).log()
    grad = (z - log_sum).exp() - (columns == target).float()
    return logits.gather(1, target).float() - log_sum, grad.to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, targets: Tensor, valid: int, native: bool
    ) -> Tensor:
        needs_weight = ctx.needs_input_grad[1]
        score = kernels.head_loss if native else _chunked
        x, some = zero_ignored(x, targets), targets.clamp(min=0)  # any row will do if ignored
        losses, grad_x, grad = score(x, weight, some, valid=valid, needs_weight=needs_weight)
        ctx.save_for_backward(zero_ignored(grad_x, targets), grad, num_targets(targets))
        return mean_loss(losses, targets)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grads[0] / count
        # In place: the gradient of a large head is too big to copy, and is used only once.
        scaled = grad_weight.mul_(scale) if ctx.needs_input_grad[1] else None
        return grad_x.mul_(scale), scaled, None, None, None


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, *, valid: int, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `gptray.model.kernels.head_loss`, on any device."""
    cast = weight.to(x.dtype)
    fused = torch.compiler.is_compiling() and x.device.type != "cpu"
    score = fused_scores if fused else scores
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    log_p, grad_x = [], []
    for chunk, target in chunks_of(x, weight, targets):
        picked, grad = score(chunk, cast, target, valid)
        log_p.append(picked)
        grad_x.append(torch.mm(grad, cast))
        if grad_weight is not None:
            add_product(grad_weight, grad, chunk)
    whole = grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x)
    return torch.cat(log_p).neg().squeeze(1), whole, grad_weight
