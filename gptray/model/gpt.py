"""The decoder: GPT-2's network, with Hugging Face's parameter names and (out, in) weights.

Parameters are fp32 masters; the forward pass computes in `compute_dtype` and casts each weight
where it is used, so gradients arrive on the masters in fp32. Files are `gptray.model.hf`'s.

Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
Shapes: B batch, T tokens, C = n_embd, V rows of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptray.config import ModelConfig, UserError
from gptray.model import kernels
from gptray.model.attention import causal_attention
from gptray.model.layers import LayerNorm, Linear, dropout, gelu
from gptray.model.loss import linear_cross_entropy, token_cross_entropy


def _embedding(rows: int, width: int) -> nn.Embedding:
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    return LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout, self.native = config.n_head, config.dropout, False
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        qkv = self.c_attn(x)
        y = causal_attention(qkv, self.n_head, dropout=p, native=self.native)
        return dropout(self.c_proj(y), p)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout, self.native = config.dropout, False
        self.c_fc = Linear(config.n_embd, config.n_inner or 4 * config.n_embd)
        self.c_proj = Linear(config.n_inner or 4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            weights = self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
            y = kernels.mlp(x, *weights)
        else:
            y = self.c_proj(gelu(self.c_fc(x)))
        return dropout(y, self.dropout if self.training else 0.0)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.residual = config.residual
        # `compute` compiled, for training.
        self.compiled: Callable[[Tensor], Tensor] | None = None
        self.ln_1, self.attn = _norm(config), Attention(config)
        self.ln_2, self.mlp = _norm(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled and torch.is_grad_enabled():
            return self.compiled(x)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        if not self.residual:
            x = self.attn(self.ln_1(x))
            x = self.mlp(self.ln_2(x))
            return x
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.dropout, self.recomputes = config.dropout, config.checkpoint_blocks
        self.wte = _embedding(rows, config.n_embd)
        self.wpe = _embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = _norm(config)

    def forward(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        x = (F.embedding(idx, self.wte.weight) + self.wpe.weight[: idx.size(1)]).to(dtype)
        x = dropout(x, self.dropout if self.training else 0.0)
        for block in self.h:
            if self.recomputes and torch.is_grad_enabled():
                keeps_random = self.dropout > 0
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=keeps_random)
            else:
                x = block(x)
        normed: Tensor = self.ln_f(x)
        return normed


class GPT(nn.Module):
    """GPT-2 of `config`'s shape for a tokenizer of `vocab_size` entries.

    `config.vocab_size` may be larger: the rows beyond `valid_vocab_size` are padding, zero from
    the start and for ever, without probability in the loss or in the logits.
    Raises UserError if `config.vocab_size` is smaller than the tokenizer.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        rows = config.vocab_size or vocab_size
        if rows < vocab_size:
            raise UserError(
                f"model.vocab_size={rows} is smaller than the tokenizer's {vocab_size} entries"
            )
        self.config = config
        self.valid_vocab_size = vocab_size
        self.compute_dtype = torch.float32
        self.head_loss = linear_cross_entropy
        # Makes a whole tensor of a parameter that is spread over processes.
        self.whole: Callable[[Tensor], Tensor] = Tensor.detach
        self.transformer = Transformer(config, rows)
        if not self.transformer.wte.weight.is_meta:
            self.initialise(0)

    @property
    def num_params(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def is_native(self) -> bool:
        """Whether some of it computes by `gptray.model.kernels`."""
        return any(getattr(module, "native", False) for module in self.modules())

    def use_kernels(self) -> None:
        """Compute in bf16 on a CPU by `gptray.model.kernels`, where widths allow it."""
        config = self.config
        assert self.compute_dtype == torch.bfloat16
        width, head = config.n_embd, config.n_embd // config.n_head
        inner = config.n_inner or 4 * width
        for module in self.modules():
            if isinstance(module, Attention):
                module.native = head % 2 == 0 and head <= kernels.LARGEST_HEAD
            elif isinstance(module, (Linear, MLP, LayerNorm)):
                module.native = width % 2 == 0 and inner % 2 == 0

    def compile_parts(self) -> None:
        """Compile each block and the head by itself: gradients come block by block, so that they
        can be reduced while the backward pass goes on, and blocks can be computed again."""
        for block in self.transformer.h:
            assert isinstance(block, Block)
            block.compiled = torch.compile(block.compute)
        self.head_loss = torch.compile(linear_cross_entropy)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """GPT-2's initial weights: N(0, initializer_range), less in the residual projections.

        The same for a seed on every device: drawn on the CPU, in the order of the parameters.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                # Each block adds twice to the residual stream: keep its variance flat with depth.
                depth = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                fresh = torch.empty(parameter.shape, device="cpu")
                parameter.copy_(fresh.normal_(0.0, std / math.sqrt(depth), generator=generator))
        self.transformer.wte.weight[self.valid_vocab_size :].zero_()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of idx (B, T), or with targets (B, T) the mean cross-entropy, fp32.

        Padded entries have logits of -inf.
        """
        x = self._hidden(idx)
        weight = self.transformer.wte.weight
        if targets is not None:
            x = x.flatten(0, 1)
            return self.head_loss(x, weight, targets.flatten(), valid=self.valid_vocab_size)
        logits = F.linear(x, weight.to(x.dtype))
        if self.valid_vocab_size < weight.size(0):
            padded = torch.arange(weight.size(0), device=x.device) >= self.valid_vocab_size
            logits = logits.masked_fill(padded, float("-inf"))
        return logits

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each target, (B, T) fp32, in nats; no gradient."""
        x = self._hidden(idx).flatten(0, 1)
        losses = token_cross_entropy(
            x, self.transformer.wte.weight, targets.flatten(), valid=self.valid_vocab_size
        )
        return losses.view(targets.shape)

    def _hidden(self, idx: Tensor) -> Tensor:
        if idx.size(1) > self.config.n_positions:
            raise ValueError(
                f"{idx.size(1)} tokens are more than model.n_positions={self.config.n_positions}"
            )
        hidden: Tensor = self.transformer(idx, self.compute_dtype)
        return hidden
