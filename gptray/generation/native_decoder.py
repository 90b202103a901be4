"""The decoder of `gptray.native`: a step of the network in one call, on x86 with AVX-512.

Does what `gptray.generation.decoder` does with PyTorch, on some processors about twice as fast:
`gptray.generation.step_timing` finds out where.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.generation.decoder import PROMPT_TOKENS, Piece
from gptray.generation.sampling import Drawn, Row, draw
from gptray.model.gpt import GPT, Attention, Block
from gptray.native import abi
from gptray.native.abi import LANES, PANEL, load_library
from gptray.native.backend import GENERATE_KEY

# Multiplications of a step below which one more thread costs more than it brings.
THREAD_WORK = 2_000_000
_DTYPES = {abi.FP32: torch.float32, abi.BF16: torch.bfloat16, abi.INT8: torch.int8}


class NativeDecoder:
    """The network for S = `slots` sequences, its weights packed once.

    dtype: fp32 or bf16, of the weights, keys and values; what lies between products is fp32.
    quantize: "int8" for the weights of all linear layers and of the head.

    Raises:
        RunFailed: the native library cannot be built.
    """

    prompt_tokens = PROMPT_TOKENS

    def __init__(
        self, model: GPT, slots: int, *, dtype: torch.dtype, quantize: str = "none"
    ) -> None:
        config, transformer = model.config, model.transformer
        self._library = load_library(key=GENERATE_KEY)
        self._vocab_size, self._embd = model.valid_vocab_size, config.n_embd
        kept = abi.BF16 if dtype == torch.bfloat16 else abi.FP32
        weights = _Weights(abi.INT8 if quantize == "int8" else kept)
        blocks = [weights.block(cast(Block, block)) for block in transformer.h]
        wte = transformer.wte.weight.detach()
        self._model = abi.Model(
            (abi.Block * len(blocks))(*blocks),
            weights.floats(wte),
            weights.floats(transformer.wpe.weight.detach()),
            weights.norm(transformer.ln_f),
            weights.linear(wte[: self._vocab_size], None),
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.residual,
        )
        self._weights = weights
        self._width = max(3 * config.n_embd, *(block.c_fc.outputs for block in blocks))
        H, P = config.n_head, config.n_positions
        shape = (config.n_layer, slots, H, P, config.n_embd // H)
        self._keys, self._values = (_room(shape, _DTYPES[kept]) for _ in range(2))
        self._cache = abi.Cache(_layers(self._keys), _layers(self._values), P, kept)
        self._scratch = torch.empty(0)

    @torch.no_grad()
    def step(
        self,
        decoding: Sequence[tuple[int, int]],
        pieces: Sequence[Piece],
        *,
        alone: bool = False,
    ) -> Tensor:
        """See `gptray.generation.decoder.Network`; slots never disturb each other here."""
        tokens = [token for token, _ in decoding]
        positions = [position for _, position in decoding]
        slots = list(range(len(tokens)))
        asked = slots.copy()
        for piece in pieces:
            tokens += piece.tokens
            positions += range(piece.start, piece.start + len(piece.tokens))
            slots += [piece.slot] * len(piece.tokens)
            asked += range(len(tokens) - piece.logits, len(tokens))
        # The C++ trusts its caller.
        assert min(tokens) >= 0 and max(tokens) < self._vocab_size, tokens
        assert min(positions) >= 0 and max(positions) < self._cache.length, positions
        assert min(slots) >= 0 and max(slots) < self._keys.size(1), slots
        rows = [np.array(numbers, np.int32) for numbers in (tokens, slots, positions, asked)]
        logits = torch.empty(len(asked), _rounded(self._vocab_size, PANEL))
        logits[:, self._vocab_size :] = float("-inf")
        step = abi.Step(
            *(numbers.ctypes.data for numbers in rows),
            len(tokens),
            len(asked),
            *self._scratch_for(len(tokens)),
            abi.Float.from_param(logits),
            logits.size(1),
        )
        threads = len(tokens) * self._weights.count // THREAD_WORK + 1
        self._library.decode_step(
            self._model, self._cache, step, min(threads, torch.get_num_threads())
        )
        return logits

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        """See `gptray.generation.decoder.Network`."""
        return draw(logits, rows, self.top)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `gptray.generation.decoder.Network`."""
        return top_candidates(logits, k)

    def move(self, source: int, target: int, tokens: int) -> None:
        """See `gptray.generation.decoder.Network`."""
        for memory in (self._keys, self._values):
            memory[:, target, :, :tokens] = memory[:, source, :, :tokens]

    def _scratch_for(self, rows: int) -> list[int]:
        """Where a step's x, attended, scales, wide and words are."""
        words = _rounded(self._width, LANES)
        sizes = [rows * numbers for numbers in (self._embd, self._embd, 1, self._width, words)]
        if self._scratch.numel() < sum(sizes):
            self._scratch = torch.empty(sum(sizes))
        starts = np.cumsum([0, *sizes[:-1]]) * self._scratch.element_size()
        return [self._scratch.data_ptr() + int(start) for start in starts]


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `gptray.generation.sampling.top_candidates` gives for fp32 logits, faster."""
    B, V = logits.shape
    k = min(k, V)
    logits = logits.contiguous()
    assert logits.dtype == torch.float32
    values, ids = torch.empty(B, k), torch.empty(B, k, dtype=torch.int64)
    threads = min(B, torch.get_num_threads())
    load_library(key=GENERATE_KEY).top_candidates(logits, B, V, k, values, ids, threads)
    return values, ids


class _Weights:
    """A network's numbers as the library reads them, kept alive."""

    def __init__(self, kind: int) -> None:
        self._kind = kind
        self.count = 0  # of all linear layers
        self._kept: list[Tensor] = []

    def keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.contiguous())
        return self._kept[-1]

    def floats(self, tensor: Tensor | None) -> abi.Float | None:
        return None if tensor is None else abi.Float.from_param(self.keep(tensor))

    def block(self, block: Block) -> abi.Block:
        return abi.Block(
            self.norm(block.ln_1),
            self.norm(block.ln_2),
            self._attention_input(block.attn),
            self._layer(block.attn.c_proj),
            self._layer(block.mlp.c_fc),
            self._layer(block.mlp.c_proj),
        )

    def norm(self, module: nn.Module) -> abi.Norm:
        if isinstance(module, nn.Identity):
            return abi.Norm(None, None, 0.0)
        assert isinstance(module, nn.LayerNorm)
        weight, bias = module.weight.detach(), module.bias.detach()
        return abi.Norm(self.floats(weight), self.floats(bias), module.eps)

    def linear(self, weight: Tensor, bias: Tensor | None) -> abi.Linear:
        """weight (out, in), packed as [panel][word][64 outputs][numbers of a word]."""
        outputs, inputs = weight.shape
        self.count += outputs * inputs
        scale = zero = None
        if self._kind == abi.INT8:
            scale = weight.abs().amax(1).clamp_min(1e-12) / 127
            weight = (weight / scale[:, None]).round()
            zero = (128 * weight.sum(1)).to(torch.int32)
        dtype = _DTYPES[self._kind]
        word = 4 // dtype.itemsize
        padded = F.pad(weight, (0, -inputs % word, 0, -outputs % PANEL)).to(dtype)
        panels = padded.view(-1, PANEL, padded.size(1) // word, word).transpose(1, 2)
        packed = _room(panels.shape, dtype).copy_(panels)
        return abi.Linear(
            self.keep(packed).data_ptr(),
            self.floats(bias),
            self.floats(scale),
            None if zero is None else abi.Int.from_param(self.keep(zero)),
            inputs,
            outputs,
            self._kind,
        )

    def _layer(self, layer: nn.Linear) -> abi.Linear:
        return self.linear(layer.weight.detach(), layer.bias.detach())

    def _attention_input(self, attention: Attention) -> abi.Linear:
        """c_attn with the scores' 1 / sqrt(E) in the rows that make q."""
        layer, C = attention.c_attn, attention.c_attn.in_features
        scale = torch.ones(3 * C)
        scale[:C] = (C // attention.n_head) ** -0.5
        return self.linear(layer.weight.detach() * scale[:, None], layer.bias.detach() * scale)


def _room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that is not touched yet; NumPy asks the system for large pages, PyTorch does not."""
    room = np.empty(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(room).view(dtype).view(*shape)


def _layers(memory: Tensor) -> object:
    """Where each layer's part is."""
    return (c_void_p * memory.size(0))(*(layer.data_ptr() for layer in memory))


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step
