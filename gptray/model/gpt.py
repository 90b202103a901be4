"""The decoder: GPT-2's network or, with other settings, that of Llama, Qwen, GPT-NeoX and more.

Its parameters have the names of Hugging Face's GPT-2, whatever the family, and (out, in) weights;
`gptray.model.parameters` lists them. They are fp32 masters: the forward pass computes in
`compute_dtype` and casts each weight on use, so gradients arrive at the masters in fp32.
`gptray.model.hf` handles files.

Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
Shapes: B batch, T tokens, C = n_embd, V rows of the embedding; x is (B, T, C) everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptray.config import ModelConfig, UserError
from gptray.model import kernels
from gptray.model.attention import Attention
from gptray.model.distillation import SoftTargets, distillation_loss
from gptray.model.layers import LayerNorm, Linear, RMSNorm, activation, dropout, norm_of
from gptray.model.loss import linear_cross_entropy, token_cross_entropy
from gptray.model.quantized_linear import QuantizedLinear
from gptray.model.rotary import Angles, Rotary
from gptray.model.usage import Usage


class MLP(nn.Module):
    """Two linear layers with an activation between them; a gated c_fc makes gate and input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout, self.kind, self.native = config.dropout, config.mlp, False
        outputs = 2 * config.inner if config.is_gated else config.inner
        self.c_fc = Linear(config.n_embd, outputs, bias=config.mlp_bias)
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            weights = self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
            y = kernels.mlp(x, *weights, kind=self.kind)
        else:
            y = self.c_proj(activation(self.c_fc(x), self.kind))
        return dropout(y, self.dropout if self.training else 0.0)


class Block(nn.Module):
    """x + attn(ln_1(x)) = y, then y + mlp(ln_2(y)): GPT-2's block, with the config's variations."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.residual, self.parallel = config.residual, config.parallel_residual
        self.post_norm, self.multiplier = config.post_norm, config.residual_multiplier
        # `compute`, compiled for training: see `gptray.training.device`.
        self.compiled: Callable[[Tensor, Angles | None], Tensor] | None = None
        self.ln_1, self.attn = norm_of(config), Attention(config, layer)
        self.ln_2, self.mlp = norm_of(config), MLP(config)
        outputs = norm_of if config.sandwich_norm else lambda _: nn.Identity()
        self.ln_1_out, self.ln_2_out = outputs(config), outputs(config)

    def forward(self, x: Tensor, angles: Angles | None) -> Tensor:
        if self.compiled and torch.is_grad_enabled():
            return self.compiled(x, angles)
        return self.compute(x, angles)

    @property
    def norms(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Before and after attention, before and after the MLP."""
        if self.post_norm:  # those of outputs are then identities
            return self.ln_1_out, self.ln_1, self.ln_2_out, self.ln_2
        return self.ln_1, self.ln_1_out, self.ln_2, self.ln_2_out

    def compute(self, x: Tensor, angles: Angles | None) -> Tensor:
        before_attn, after_attn, before_mlp, after_mlp = self.norms
        y: Tensor = self._scaled(after_attn(self.attn(before_attn(x), angles)))
        y = x + y if self.residual else y
        z = self._scaled(after_mlp(self.mlp(before_mlp(x if self.parallel else y))))
        return y + z if self.residual or self.parallel else z

    def _scaled(self, output: Tensor) -> Tensor:
        return output if self.multiplier == 1 else output * self.multiplier


class Transformer(nn.Module):
    """Embeddings, blocks and the final norm: everything but the head. rows: V.

    The norm's output is divided by what divides the logits, so the head need not do it.
    """

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.dropout, self.checkpoint_blocks = config.dropout, config.checkpoint_blocks
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.scale, self.divisor = config.embedding_scale, config.logits_scaling
        self.wte = _embedding(rows, config.n_embd)
        if not self.rotary:
            self.wpe = _embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm_of(config)

    def forward(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        """The normalised output of the last block for idx (B, T), computed in dtype."""
        T, p = idx.size(1), self.dropout if self.training else 0.0
        x = F.embedding(idx, self.wte.weight)  # (B, T, C)
        if self.scale != 1:
            x = x * self.scale
        layer_angles: Sequence[Angles | None]
        if self.rotary:
            layer_angles = self.rotary.at(torch.arange(T, device=idx.device), dtype)
        else:
            x, layer_angles = x + self.wpe.weight[:T], [None] * len(self.h)
        x = dropout(x.to(dtype), p)
        for block, angles in zip(self.h, layer_angles, strict=True):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, use_reentrant=False, preserve_rng_state=p > 0)
            else:
                x = block(x, angles)
        out: Tensor = self.ln_f(x)
        return out if self.divisor == 1 else out / self.divisor


def _embedding(rows: int, width: int) -> nn.Embedding:
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class GPT(nn.Module):
    """The network of `config` for a tokenizer of `vocab_size` entries.

    `config.vocab_size` may be larger: the rows beyond `valid_vocab_size` are padding, always zero,
    and have no probability in the loss or the logits.
    seed: of the initial weights; None: they are loaded instead. The meta device holds none.
    Raises UserError if `config.vocab_size` is smaller than the tokenizer.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, seed: int | None = 0) -> None:
        super().__init__()
        rows = config.vocab_size or vocab_size
        if rows < vocab_size:
            raise UserError(
                f"model.vocab_size={rows} is smaller than the tokenizer's {vocab_size} entries"
            )
        self.config = config
        self.valid_vocab_size = vocab_size
        # Travels with the weights from folder to folder.
        self.usage = Usage()
        self.compute_dtype = torch.float32
        self.head_loss, self.native_head = linear_cross_entropy, False
        # Gives a whole parameter, which may be sharded, merged with an adapter or not read yet.
        self.full_tensor: Callable[[Tensor], Tensor] = Tensor.detach
        self.transformer = Transformer(config, rows)
        self.lm_head = None if config.tie_word_embeddings else _embedding(rows, config.n_embd)
        if seed is not None and not self.transformer.wte.weight.is_meta:
            self.initialise(seed)

    @property
    def head(self) -> Tensor:
        """The weight (V, C) of the head: the embedding, unless the head has its own."""
        weight: Tensor = (self.lm_head or self.transformer.wte).weight
        return weight

    @property
    def device(self) -> torch.device:
        """The device of the weights, or the CPU if they have not been read."""
        device: torch.device = self.transformer.wte.weight.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def num_params(self) -> int:
        """The number of parameters, counting a tied head once."""
        held = [m.weight for m in self.modules() if isinstance(m, QuantizedLinear)]
        return sum(p.numel() for p in [*self.parameters(), *held])

    @property
    def is_native(self) -> bool:
        """Whether any module uses `gptray.model.kernels`."""
        return any(getattr(module, "native", False) for module in self.modules())

    def use_kernels(self) -> None:
        """Use `gptray.model.kernels` for bf16 on a CPU in all modules of even width.

        PyTorch still computes attention with dropout, and with windows shorter than the sequence.
        """
        assert self.compute_dtype == torch.bfloat16
        width, inner = self.config.n_embd, self.config.inner
        self.native_head = width % 2 == 0
        for module in self.modules():
            if isinstance(module, Attention):
                module.native = module.head_width % 2 == 0
            elif isinstance(module, MLP):
                module.native = width % 2 == 0 and inner % 2 == 0
            elif isinstance(module, Linear):
                module.native = module.in_features % 2 == 0 and module.out_features % 2 == 0
            elif isinstance(module, (LayerNorm, RMSNorm)):
                module.native = width % 2 == 0

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw GPT-2's initial weights: N(0, initializer_range), less for residual projections.

        Drawn on the CPU, in the parameters' order, so a seed gives the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:  # of a norm
                parameter.fill_(0.0 if self.config.centred_norm else 1.0)
            else:
                # Each block adds to the residual stream twice: keep its variance flat with depth.
                depth = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                fresh = torch.empty(parameter.shape, device="cpu")
                parameter.copy_(fresh.normal_(0.0, std / math.sqrt(depth), generator=generator))
        for weight in {self.transformer.wte.weight, self.head}:
            weight[self.valid_vocab_size :].zero_()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, soft: SoftTargets | None = None
    ) -> Tensor:
        """Logits (B, T, V) for idx (B, T), or with targets (B, T) the mean cross-entropy in fp32.

        With `soft` targets, two losses: see `distillation_loss`. Padding has logits of -inf.
        """
        x, weight, valid = self.hidden(idx), self.head, self.valid_vocab_size
        if targets is None:
            logits = F.linear(x, weight.to(x.dtype))
            if valid < weight.size(0):
                logits[..., valid:] = float("-inf")
            return logits
        rows, targets = x.flatten(0, 1), targets.flatten()  # (B T, C), (B T)
        if soft:
            return distillation_loss(rows, weight, targets, soft, valid=valid)
        return self.head_loss(rows, weight, targets, valid=valid, native=self.native_head)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each target, (B, T) fp32, in nats; no gradient."""
        x = self.hidden(idx).flatten(0, 1)
        losses = token_cross_entropy(x, self.head, targets.flatten(), valid=self.valid_vocab_size)
        return losses.view(targets.shape)

    def hidden(self, idx: Tensor) -> Tensor:
        """The head's input, (B, T, C). Raises ValueError for too many tokens."""
        most = self.config.n_positions
        if idx.size(1) > most:
            raise ValueError(f"{idx.size(1)} tokens are more than model.n_positions={most}")
        hidden: Tensor = self.transformer(idx, self.compute_dtype)
        return hidden
