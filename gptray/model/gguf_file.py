"""Writes a GGUF file, one tensor at a time, with the `gguf` package of llama.cpp's authors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import numpy.typing as npt

from gptray.model.gguf_names import FOUR_BITS, GgufTensor
from gptray.model.rounding import dtype_of, rounded

if TYPE_CHECKING:
    from gptray.model.importance import Quantizer

_KINDS = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "iq4_nl": (gguf.GGMLQuantizationType.IQ4_NL, gguf.LlamaFileType.MOSTLY_IQ4_NL),
}


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, object],
    tensors: Sequence[GgufTensor],
    vectors: Mapping[str, Sequence[float]],
    *,
    precision: str,
    quantized: Quantizer,
) -> None:
    """Write a model's fields and tensors.

    fields: by GGUF's keys, of the types that `add_field` takes. vectors: fp32 tensors that are not
    weights, by name. quantized: makes the 4-bit weights. Raises UserError as `rounded` does, and
    OSError.
    """
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_file_type(_KINDS[precision][1])
        if precision == "q8_0" or precision in FOUR_BITS:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in fields.items():
            add_field(writer, key, value)
        numbers = {name: np.array(vector, np.float32) for name, vector in vectors.items()}
        for name, vector in numbers.items():
            writer.add_tensor_info(name, vector.shape, vector.dtype, vector.nbytes)
        for one in tensors:
            kind, _ = _KINDS[one.precision]
            writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for vector in numbers.values():
            writer.write_tensor_data(vector)
        for one in tensors:
            writer.write_tensor_data(_encoded(one, quantized))
    finally:
        writer.close()


def add_field(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Write a field of metadata, as the GGUF type of its value."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list() | bytes():  # a list of texts, integers (int32) or floats; bytes: uint8
            writer.add_array(key, value)
        case _:
            raise AssertionError(f"{key}: GGUF cannot hold {type(value)}")


def _encoded(tensor: GgufTensor, quantized: Quantizer) -> npt.NDArray[np.uint8]:
    """A tensor's bytes for the file, because NumPy has no bf16."""
    import torch

    if tensor.precision in FOUR_BITS:
        return _four_bits(tensor, quantized)
    weight = rounded(tensor.stored, dtype_of(tensor.precision))
    weight = (weight.t() if tensor.transposed else weight).contiguous()
    if tensor.more:
        weight = weight + tensor.more
    if tensor.order:
        weight = weight[torch.tensor(tensor.order)]
    assert tuple(weight.shape) == tensor.shape, tensor.name
    if tensor.precision == "q8_0":
        blocks: npt.NDArray[np.uint8] = gguf.quantize(
            weight.numpy(), gguf.GGMLQuantizationType.Q8_0
        )
        return blocks
    return weight.view(torch.uint8).numpy()


def _four_bits(tensor: GgufTensor, quantized: Quantizer) -> npt.NDArray[np.uint8]:
    """A weight of `gptray.model.quantized` in GGUF's blocks: a scale, then 16 bytes with the codes
    of the group's first half in the lower bits and those of the second half in the upper."""
    held = quantized(tensor.stored, tensor.transposed)
    codes = held.codes().numpy().reshape(len(held.scales), -1, 2, 16)
    values = codes[:, :, 0] | codes[:, :, 1] << 4
    scales = held.scales.numpy()[..., None].view(np.uint8)
    blocks = np.concatenate((scales, values), axis=-1).reshape(len(codes), -1)
    return blocks[tensor.order] if tensor.order else blocks
