"""The backend and memory of a job's engines, as far as they are known before it starts."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config
from gptray.jobs.progress.doing import doing
from gptray.model.packed_weights import PACKINGS
from gptray.model.parameters import parameter_count
from gptray.model.shape import read_shape
from gptray.native.backend import GENERATE_KEY, check_native
from gptray.native.build import build_library

# Measured bytes of a process that has imported PyTorch and opened a tokenizer.
PROCESS = 0.34e9
_BYTES = {"fp32": 4, "bf16": 2}
# Bytes of a quantized group's scale, and of a weight in a quantized head.
_SCALE, _HEAD = 2, 1


def check_engine_backend(config: Config) -> None:
    """Raise UserError if generate.backend=native is not available."""
    backend, use_gpu = config.generate.backend, config.compute.use_gpu
    check_native(GENERATE_KEY, backend, use_gpu=use_gpu, look_at_cache=True)


def build_engine_backend(config: Config) -> None:
    """Build the native library for generate.backend=native. Raises RunFailed if that fails."""
    if config.generate.backend == "native":
        with doing("building the C++ kernels"):
            build_library(key=GENERATE_KEY)


def planned_backend(config: Config) -> str:
    """The backend in words, for a plan."""
    if config.generate.backend != "auto":
        return config.generate.backend
    if config.compute.use_gpu:
        return "auto: CUDA graphs, if their kernels compile"
    return "auto: native or PyTorch, whichever is faster where the engines run"


def planned_memory(config: Config, model_dir: Path, sequences: int) -> str:
    """The rough memory of one engine with `sequences` at a time in words, for a plan.

    A tied embedding is stored twice: for looking up tokens, and packed as the head.
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
        f"{_size(weights)} of weights in {named}, up to {_size(cache)} of keys and values, and "
        f"about {_size(PROCESS)} for the process"
    )


def _size(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"
