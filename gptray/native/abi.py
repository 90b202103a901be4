"""The ctypes interface of the native library, compared with the library's own when it is loaded.

The structures mirror decode.h and draw.h, which document them. The functions of decode.cpp and
train.cpp get their types from the library's description of them; all return void. A pointer
parameter takes a contiguous tensor of its dtype, or None for nullptr.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from gptray.config import RunFailed
from gptray.native.build import build_library

if TYPE_CHECKING:
    from ctypes import _CDataType

# Outputs that a product computes side by side; a multiple of the sampler's chunk.
PANEL = 64
# Words of a product's input that are written at a time.
LANES = 16
# Inputs that share a scale: in 4-bit weights, and in a row to be multiplied by int8 weights.
GROUP, INT8_GROUP = 32, 128
# Sums of an adapter that are computed side by side.
RANK_STEP = 4
# Partial sums of a layer norm's gradients over the rows.
NORM_PARTS = 32
FP32, BF16, INT8, INT4, IQ4_NL = range(5)
NONE, GELU_TANH, GELU, RELU, SWIGLU, GEGLU = range(6)
ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu": GELU, "relu": RELU, "swiglu": SWIGLU, "geglu": GEGLU}

S = TypeVar("S", bound="_Struct")


class _Pointer(c_void_p):
    """A pointer to the data of a contiguous tensor of one dtype."""

    text: ClassVar[str]
    dtype: ClassVar[str]
    _seen: ClassVar[object] = None  # the dtype of that name, once seen

    @classmethod
    def from_param(cls, tensor: Any) -> Self:
        """The pointer to a tensor, which the caller keeps alive; ctypes calls this."""
        if tensor is None:
            return cls(None)
        if tensor.dtype is not cls._seen:
            assert str(tensor.dtype) == cls.dtype, f"{tensor.dtype} for {cls.text}"
            cls._seen = tensor.dtype
        assert tensor.is_contiguous(), f"{cls.text} is not contiguous"
        return cls(tensor.data_ptr())


class Float(_Pointer):
    text, dtype = "f32*", "torch.float32"


class Double(_Pointer):
    text, dtype = "f64*", "torch.float64"


class Half(_Pointer):
    text, dtype = "bf16*", "torch.bfloat16"


class Int(_Pointer):
    text, dtype = "i32*", "torch.int32"


class Long(_Pointer):
    text, dtype = "i64*", "torch.int64"


class Words(_Pointer):
    """Packed numbers, aligned to 64 bytes as PyTorch aligns new tensors."""

    text, dtype = "words*", "torch.int32"


# The types by abi.h's names; a pointer to one of them has a * more.
_TYPES: dict[str, type[_CDataType]] = {
    **{"f32": c_float, "f64": c_double, "i32": c_int32, "i64": c_int64, "void*": c_void_p},
    **{kind.text: kind for kind in (Float, Double, Half, Int, Long, Words)},
}
STRUCTS: list[type[_Struct]] = []


def _type(text: str) -> type[_CDataType]:
    return _TYPES[text] if text in _TYPES else POINTER(_type(text.removesuffix("*")))


class _Struct(Structure):
    """A structure; `text` describes its fields as abi.h does, but for their offsets."""

    text: ClassVar[str]


def _described(struct: type[S]) -> type[S]:
    """Give a structure the fields of its text."""
    pairs = (field.split() for field in struct.text.split(", "))
    struct._fields_ = [(name, _type(kind)) for name, kind in pairs]
    _TYPES[struct.__name__] = struct
    STRUCTS.append(struct)
    return struct


@_described
class Norm(_Struct):
    text = "weight f32*, bias f32*, eps f32"


@_described
class Linear(_Struct):
    text = "weight void*, bias f32*, scale f32*, inputs i32, outputs i32, kind i32, number i32"


@_described
class LowRank(_Struct):
    text = "a void*, b void*, rank i32, kind i32, inputs i32"


@_described
class Block(_Struct):
    text = (
        "before_attn Norm, after_attn Norm, before_mlp Norm, after_mlp Norm, q_norm Norm, "
        "k_norm Norm, c_attn Linear, attn_proj Linear, c_fc Linear, mlp_proj Linear, window i32, "
        "rotary i32, cos f32*, sin f32*"
    )


@_described
class Model(_Struct):
    text = (
        "blocks Block*, wte f32*, wpe f32*, ln_f Norm, head Linear, n_layer i32, n_embd i32, "
        "n_head i32, kv_heads i32, head_width i32, activation i32, residual i32, parallel i32, "
        "wide_qk_norm i32, scale f32"
    )


@_described
class Cache(_Struct):
    text = "keys void**, values void**, length i32, kind i32"


@_described
class Step(_Struct):
    text = (
        "tokens i32*, slots i32*, positions i32*, asked i32*, adapters LowRank**, rows i32, "
        "asked_rows i32, apart i32, most_rank i32, x f32*, branch f32*, attended f32*, "
        "narrow f32*, wide f32*, words i32*, logits f32*, logits_stride i32"
    )


@_described
class Draw(_Struct):
    text = "temperature f64, top_p f64, min_p f64, seed i64, row i64, position i64, top_k i64"


CONSTANTS = {
    **{"LANES": LANES, "PANEL": PANEL, "RANK_STEP": RANK_STEP, "NORM_PARTS": NORM_PARTS},
    **{"FP32": FP32, "BF16": BF16, "INT8": INT8, "INT4": INT4, "IQ4_NL": IQ4_NL},
    **{"GROUP": GROUP, "INT8_GROUP": INT8_GROUP},
    **{"NONE": NONE, "GELU_TANH": GELU_TANH, "GELU": GELU, "RELU": RELU},
    **{"SWIGLU": SWIGLU, "GEGLU": GEGLU},
}


@cache
def load_library(*, key: str) -> ctypes.CDLL:
    """Load the native library with typed functions; build it if this machine has none yet.

    key: the config's key that can be set to torch to do without it, for messages.

    Raises:
        RunFailed: it cannot be built, see `gptray.native.build.build_library`, or not loaded.
    """
    path = build_library(key=key)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # such as functions that its OpenMP lacks
        told = f"the native library cannot be loaded: {error}"
        raise RunFailed(f"{told}; set {key}=torch to do without it") from None
    for describe in (library.decode_abi, library.train_abi):
        describe.restype, describe.argtypes = c_char_p, ()
    description = (library.decode_abi() + library.train_abi()).decode()
    check_abi(description)
    for name, parameters in re.findall(r"(\w+)\((.*)\)", description):
        function = getattr(library, name)
        function.argtypes, function.restype = list(map(_type, parameters.split(", "))), None
    return library


def check_abi(theirs: str) -> None:
    """Assert that a library's constants and structures are those of this file."""
    ours = [f"{name} {number}" for name, number in CONSTANTS.items()]
    ours += [_struct_line(one) for one in STRUCTS]
    described = {line for line in theirs.splitlines() if "(" not in line}
    different = sorted(set(ours) ^ described)
    if different:
        lines = "\n".join(f"{'abi.py' if line in ours else 'C++':>6}: {line}" for line in different)
        raise AssertionError(f"abi.py and the native library differ:\n{lines}")


def _struct_line(struct: type[_Struct]) -> str:
    """A structure in abi.h's format: its size, and each field's type and offset."""
    fields = struct.text.split(", ")
    offsets = [getattr(struct, field.split()[0]).offset for field in fields]
    placed = ", ".join(f"{field} {offset}" for field, offset in zip(fields, offsets, strict=True))
    return f"{struct.__name__} {ctypes.sizeof(struct)}: {placed}"
