"""How much memory a worker of a training needs, for its --dry-run."""

from __future__ import annotations

from gptray.config import Config, override
from gptray.jobs.train.given_models import teacher_bytes, trained_parameters
from gptray.model.weight_bytes import linear_bytes

# Bytes of fp32 weights, gradients and AdamW's two moments, and of train.ema's average.
BYTES_PER_PARAMETER = 16
BYTES_OF_AVERAGE = 4
# The most bytes of logits that exist at a time on a GPU: GPU_BYTES of `gptray.model.loss`.
HEAD_BYTES = 2 << 30


def memory_words(config: Config, parameters: int, vocab_size: int) -> str:
    """A worker's memory in words; if the base is quantized, also without quantization."""
    taught = teacher_bytes(config)
    told = f"about {(_memory(config, parameters, vocab_size) + taught) / 2**30:,.2f} GiB"
    if config.quantize.weights == "none":
        return told
    full = override(config, {"quantize.weights": "none"})
    before = (_memory(full, parameters, vocab_size) + taught) / 2**30
    return f"{told}, or {before:,.2f} GiB with an unquantized base"


def _memory(config: Config, parameters: int, vocab_size: int) -> float:
    """Rough bytes of one worker: its parameters' states, and the activations of one pass.

    Per token, a block keeps for its backward pass about 8 values of the width, 2 of the MLP's width
    (4 if gated) and the attention probabilities (Korthikanti et al. 2022), in fp32. A GPU keeps no
    probabilities, but the logits of a chunk of the head and their gradient, in the dtype of
    train.precision. With `model.checkpoint_blocks`, one block at a time keeps all this, and the
    others only their input.
    """
    model, tokens = config.model, config.micro_batch_size * config.train.block_size
    block, value = 8 * model.n_embd + (4 if model.is_gated else 2) * model.inner, 4
    logits = 0
    if config.compute.use_gpu:
        value = 4 if config.train.precision == "fp32" else 2
        logits = 2 * min(HEAD_BYTES, value * tokens * vocab_size)
    else:
        block += model.n_head * config.train.block_size
    kept = model.n_layer * block
    if model.checkpoint_blocks:
        kept = block + model.n_layer * model.n_embd
    return _states(config, parameters, vocab_size) + value * tokens * kept + logits


def _states(config: Config, parameters: int, vocab_size: int) -> float:
    """Bytes of weights, gradients and moments; frozen weights are stored in the compute dtype.

    If sharded, the largest tensors (the embedding, or two blocks) and their gradients are
    temporarily gathered.
    """
    if not shards_weights(config):
        if trained := trained_parameters(config):
            return frozen_bytes(config, parameters) + BYTES_PER_PARAMETER * trained
        each = BYTES_PER_PARAMETER + (BYTES_OF_AVERAGE if config.train.ema else 0)
        return each * parameters
    embedding = vocab_size * config.model.n_embd * (1 if config.model.tie_word_embeddings else 2)
    blocks = 2 * (parameters - embedding) // config.model.n_layer
    share = BYTES_PER_PARAMETER * parameters / config.compute.min_workers
    return share + 2 * 4 * max(embedding, blocks)


def frozen_bytes(config: Config, parameters: int) -> int:
    """Bytes of the frozen base under an adapter."""
    is_half = config.train.precision == "bf16" or config.compute.use_gpu
    frozen, kind = (2 if is_half else 4) * parameters, config.quantize.weights
    if kind != "none":
        full = linear_bytes(config.model, "none") * (1 if is_half else 2)
        frozen += linear_bytes(config.model, kind) - full
    return frozen


def shards_weights(config: Config) -> bool:
    """Whether each worker holds only its share of the weights."""
    return config.compute.strategy == "fsdp" and config.compute.max_workers > 1
