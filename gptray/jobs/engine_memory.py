"""What the memory of an engine will hold, roughly, before any of it is taken."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config
from gptray.model.packed_weights import PACKINGS
from gptray.model.parameters import parameter_count
from gptray.model.shape import read_shape

# Of a process that has imported PyTorch and opened a tokenizer, as it was measured.
PROCESS = 0.34e9
_BYTES = {"fp32": 4, "bf16": 2}
# Of a scale of quantized weights, and of a weight in a quantized head.
_SCALE, _HEAD = 2, 1


def planned_memory(config: Config, model_dir: Path, sequences: int) -> str:
    """What a plan says of the memory of one engine for so many sequences at a time.

    The embedding is kept twice: to look up tokens, and packed as the head where that is tied.
    """
    model = read_shape(model_dir)
    rows, precision = model.rows, config.generate.precision
    named: str = "bf16 (twice that in fp32)" if precision == "auto" else precision
    each = _BYTES.get(precision, 2)
    embedding = rows * model.n_embd
    layers = parameter_count(model, rows) - embedding * (1 if model.tie_word_embeddings else 2)
    layer_bytes, head_bytes = float(each), each
    if packing := PACKINGS.get(config.quantize.weights):
        named, head_bytes = config.quantize.weights, _HEAD
        layer_bytes = packing.bits / 8 + (_SCALE / packing.group if packing.group else 0)
    weights = layers * layer_bytes + embedding * (head_bytes + each)
    token = 2 * model.n_layer * model.kv_heads * model.head_width * each
    cache = sequences * model.n_positions * token
    return (
        f"{_size(weights)} of weights in {named}, up to {_size(cache)} of keys and values, about "
        f"{_size(PROCESS)} for the process"
    )


def _size(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"
