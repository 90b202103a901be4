"""Which backend trains this run's network faster here: a block's forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gptray.config import Config
from gptray.model.families import SHAPE
from gptray.model.gpt import GPT
from gptray.native.backend import TRAIN_KEY
from gptray.native.measured import Choice, Step, faster

# Tokens beyond which a GEMM's speed no longer changes.
TOKENS = 2048
# Of a network's fields those that a block's speed does not depend on.
_NOT_OF_A_BLOCK = {
    *("n_layer", "n_positions", "dropout", "initializer_range", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "layer_norm_epsilon"),
}


def faster_kernels(config: Config) -> Choice:
    """The faster backend for the blocks of a run in bf16 on this process's cores.

    Embedding and optimizer are the same code in both, and a head is a linear layer. Measured
    without torch.compile, which takes longer than a trial may. Random numbers are drawn as if
    nothing had been measured.
    """
    model, T = config.model, config.train.block_size
    rows = max(1, min(config.micro_batch_size, TOKENS // T))
    work = {
        "of": "training",
        "threads": torch.get_num_threads(),
        "shape": {name: getattr(model, name) for name in SHAPE if name not in _NOT_OF_A_BLOCK},
        "batch": [rows, T],
        "dropout": model.dropout > 0,
    }

    def maker(*, native: bool) -> Callable[[], Step]:
        return lambda: _block_step(config, rows, native=native)

    makers = {"native": maker(native=True), "torch": maker(native=False)}
    what = f"a block's forward and backward pass over {rows} x {T} tokens"
    with torch.random.fork_rng(devices=[]):
        return faster(TRAIN_KEY, what, work, makers)


def _block_step(config: Config, rows: int, *, native: bool) -> Step:
    """A block of the run's shape in training, ready to run over `rows` sequences."""
    shape = config.model.model_copy(update={"n_layer": 1, "vocab_size": None})
    model = GPT(shape, vocab_size=2)
    model.compute_dtype = torch.bfloat16
    if native:
        model.use_kernels()
    block, angles = model.transformer.h[0], None
    if rotary := model.transformer.rotary:
        angles = rotary.at(torch.arange(config.train.block_size), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    size = (rows, config.train.block_size, shape.n_embd)
    x = torch.randn(size, generator=generator).to(torch.bfloat16).requires_grad_()
    grad = torch.randn(size, generator=generator).to(torch.bfloat16)

    def step() -> None:
        block(x, angles).backward(grad)
        x.grad = None
        block.zero_grad(set_to_none=True)

    return step
