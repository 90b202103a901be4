"""Times a block's forward and backward pass to find the faster training backend on this CPU."""

from __future__ import annotations

from functools import partial

import torch

from gptray.config import Config
from gptray.model.adapter import adapted_parts, replaced_parts
from gptray.model.families import SHAPE
from gptray.model.gpt import GPT
from gptray.model.lora import add_adapters, freeze
from gptray.model.quantized_linear import quantized_layers
from gptray.native.backend import TRAIN_KEY
from gptray.native.measured import NAMES, Choice, Step, faster
from gptray.training.building import base_of

# A GEMM's speed no longer changes beyond this many tokens.
TOKENS = 2048
# Fields of the network's shape that do not change a block's speed.
_NOT_OF_A_BLOCK = {
    *("n_layer", "n_positions", "dropout", "initializer_range", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "layer_norm_epsilon"),
}


def faster_kernels(config: Config) -> Choice:
    """The faster backend for the blocks of a run in bf16 on this process's cores.

    The embedding and optimizer are the same code in both, and the head is just a linear layer.
    Measured without torch.compile, which would take too long. Leaves the random state unchanged.
    """
    model, T = config.model, config.train.block_size
    rows = max(1, min(config.micro_batch_size, TOKENS // T))
    work = {
        "of": "training",
        "threads": torch.get_num_threads(),
        "shape": {name: getattr(model, name) for name in SHAPE if name not in _NOT_OF_A_BLOCK},
        "batch": [rows, T],
        "dropout": model.dropout > 0,
        **_adapter(config),
    }

    makers = {name: partial(_block_step, config, rows, native=name == "native") for name in NAMES}
    what = f"a block's forward and backward pass over {rows} x {T} tokens"
    with torch.random.fork_rng(devices=[]):
        return faster(TRAIN_KEY, what, work, makers)


def _adapter(config: Config) -> dict[str, object]:
    """What else the speed of a block with an adapter depends on."""
    lora = config.lora
    if not lora.rank:
        return {}
    adapter = {"rank": lora.rank, "targets": lora.targets, "norms": "norms" in lora.train}
    return adapter | {"adapter_dropout": lora.dropout > 0, "quantized": config.quantize.weights}


def _block_step(config: Config, rows: int, *, native: bool) -> Step:
    """A function that runs one training step of a block of the run's shape on `rows` sequences."""
    model = _network(config, native=native)
    block, angles = model.transformer.h[0], None
    if rotary := model.transformer.rotary:
        angles = rotary.at(torch.arange(config.train.block_size), torch.bfloat16)[0]
    generator = torch.Generator().manual_seed(0)
    size = (rows, config.train.block_size, config.model.n_embd)
    x = torch.randn(size, generator=generator).to(torch.bfloat16).requires_grad_()
    grad = torch.randn(size, generator=generator).to(torch.bfloat16)

    def step() -> None:
        block(x, angles).backward(grad)
        x.grad = None
        block.zero_grad(set_to_none=True)

    return step


def _network(config: Config, *, native: bool) -> GPT:
    """The run's network with one block and random weights; frozen if it has an adapter."""
    shape = config.model.model_copy(update={"n_layer": 1, "vocab_size": None})
    with torch.device("meta"):
        model = GPT(shape, vocab_size=2)
    model.compute_dtype = torch.bfloat16
    if native:
        model.use_kernels()
    base = base_of(config)
    if base:
        freeze(model, replaced_parts(base, config.lora.train), base.quantized)
    model.to_empty(device="cpu").initialise(0)
    if base:
        for layer in quantized_layers(model).values():
            layer.put(slice(None), torch.randn(layer.weight.shape))
        adapted = adapted_parts(base, config.lora.targets)
        first = [part for part in adapted if part.parameter.startswith("transformer.h.0.")]
        add_adapters(model, config.lora, first, seed=0)
    return model
