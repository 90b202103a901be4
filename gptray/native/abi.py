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
from typing import Any, ClassVar, Self

from gptray.native.build import build_library

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


class Norm(Structure):
    _fields_ = (("weight", Float), ("bias", Float), ("eps", c_float))


class Linear(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", Float),
        ("scale", Float),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("kind", c_int32),
        ("number", c_int32),
    )


class LowRank(Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("rank", c_int32),
        ("kind", c_int32),
        ("inputs", c_int32),
    )


class Block(Structure):
    _fields_ = (
        *((name, Norm) for name in ("before_attn", "after_attn", "before_mlp", "after_mlp")),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("c_attn", Linear),
        ("attn_proj", Linear),
        ("c_fc", Linear),
        ("mlp_proj", Linear),
        ("window", c_int32),
        ("rotary", c_int32),
        ("cos", Float),
        ("sin", Float),
    )


class Model(Structure):
    _fields_ = (
        ("blocks", POINTER(Block)),
        ("wte", Float),
        ("wpe", Float),
        ("ln_f", Norm),
        ("head", Linear),
        ("n_layer", c_int32),
        ("n_embd", c_int32),
        ("n_head", c_int32),
        ("kv_heads", c_int32),
        ("head_width", c_int32),
        ("activation", c_int32),
        ("residual", c_int32),
        ("parallel", c_int32),
        ("wide_qk_norm", c_int32),
        ("scale", c_float),
    )


class Cache(Structure):
    _fields_ = (
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("length", c_int32),
        ("kind", c_int32),
    )


class Step(Structure):
    _fields_ = (
        ("tokens", Int),
        ("slots", Int),
        ("positions", Int),
        ("asked", Int),
        ("adapters", POINTER(POINTER(LowRank))),
        ("rows", c_int32),
        ("asked_rows", c_int32),
        ("apart", c_int32),
        ("most_rank", c_int32),
        ("x", Float),
        ("made", Float),
        ("attended", Float),
        ("narrow", Float),
        ("wide", Float),
        ("words", Int),
        ("logits", Float),
        ("logits_stride", c_int32),
    )


class Draw(Structure):
    _fields_ = (
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("seed", c_int64),
        ("row", c_int64),
        ("position", c_int64),
        ("top_k", c_int64),
    )


CONSTANTS = {
    **{"LANES": LANES, "PANEL": PANEL, "RANK_STEP": RANK_STEP, "NORM_PARTS": NORM_PARTS},
    **{"FP32": FP32, "BF16": BF16, "INT8": INT8, "INT4": INT4, "IQ4_NL": IQ4_NL},
    **{"GROUP": GROUP, "INT8_GROUP": INT8_GROUP},
    **{"NONE": NONE, "GELU_TANH": GELU_TANH, "GELU": GELU, "RELU": RELU},
    **{"SWIGLU": SWIGLU, "GEGLU": GEGLU},
}
STRUCTS: tuple[type[Structure], ...] = (Norm, Linear, LowRank, Block, Model, Cache, Step, Draw)
_TEXTS: dict[type, str] = {
    **{c_void_p: "void*", c_float: "f32", c_double: "f64"},
    **{c_int32: "i32", c_int64: "i64"},
}


@cache
def load_library(*, key: str) -> ctypes.CDLL:
    """Load the native library with typed functions; build it if this machine has none yet.

    key: the config's key that can be set to torch to do without it, for messages.

    Raises:
        RunFailed: it cannot be built; see `gptray.native.build.build_library`.
    """
    library = ctypes.CDLL(str(build_library(key=key)))
    for describe in (library.decode_abi, library.train_abi):
        describe.restype, describe.argtypes = c_char_p, ()
    description = (library.decode_abi() + library.train_abi()).decode()
    check_abi(description)
    types = {text: kind for kind, text in _TEXTS.items()}
    types |= {kind.text: kind for kind in (Float, Double, Half, Int, Long, Words)}
    types |= {f"{struct.__name__}*": POINTER(struct) for struct in STRUCTS}
    for name, parameters in re.findall(r"(\w+)\((.*)\)", description):
        function = getattr(library, name)
        function.argtypes, function.restype = [types[one] for one in parameters.split(", ")], None
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


def _struct_line(struct: type[Structure]) -> str:
    """A structure in abi.h's format: its size, and each field's type and offset."""
    fields = ", ".join(
        f"{field[0]} {_text(field[1])} {getattr(struct, field[0]).offset}"
        for field in struct._fields_
    )
    return f"{struct.__name__} {ctypes.sizeof(struct)}: {fields}"


def _text(kind: Any) -> str:
    """A type in abi.h's format."""
    if kind in _TEXTS:
        return _TEXTS[kind]
    if issubclass(kind, _Pointer):
        return str(kind.text)
    if issubclass(kind, Structure):
        return str(kind.__name__)
    return f"{_text(kind._type_)}*"
