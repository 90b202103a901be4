"""Products with quantized weights on a GPU, by Triton kernels.

Sums are fp32, rounded once to x's dtype. Few rows in 16 bits are multiplied by the quantized
weights directly, each its value times its scale in fp32; many rows, and fp32, by weights that
`dequantize` rounds to the dtype. Shapes: M rows, K inputs, N outputs, H = half of the inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.generation.gpu_kernels import Kernels, kernels_for
from gptray.model.gpu_faults import why_failed
from gptray.model.packed_weights import GROUP
from gptray.model.quantized import CODES, QuantizedWeight, quantize

log = logging.getLogger("gptray")

# What one program of `dequantize_kernel` expands.
_OUTPUTS, _INPUTS = 8, 256


@dataclass(frozen=True)
class Tile:
    """What a program multiplies: `rows` of x by `outputs` rows of the weight.

    is_sliced: warps divide the inputs among themselves, each for all outputs, instead of the
    outputs. stages: of Triton's software pipeline, one more than the loads in flight.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    is_sliced: bool = False


def tiles_for(rows: int, dtype: torch.dtype) -> dict[str, Tile]:
    """The tiles that may be the fastest for up to `rows` rows in a dtype, by name; none in fp32."""
    if dtype.itemsize > 2:
        return {}
    if rows > 64:
        return {"shared": Tile(128, 128, warps=8, stages=4)}
    block = max(8, 1 << (rows - 1).bit_length())
    tiles = {"shared": Tile(block if block in (8, 64) else 32, 64, warps=4, stages=6)}
    if block <= 32:
        # Small products need many warps; with more outputs, scales would go through shared memory.
        tiles["sliced"] = Tile(block, 16, warps=4, stages=4 if block == 32 else 6, is_sliced=True)
    return tiles


@dataclass(frozen=True)
class GpuWeight:
    """A `QuantizedWeight` as the kernels read it.

    With 4 bits, a byte holds the codes of inputs i and H + i, H a multiple of GROUP, so that each
    half of the bytes multiplies neighbouring inputs: values (N, H), scales (2 H / GROUP, N). int8
    values stay (N, K), with scales (1, N).
    """

    kind: str
    inputs: int
    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> GpuWeight:
        """Repack a quantized weight."""
        inputs, scales = weight.inputs, weight.scales.T.contiguous()
        if weight.kind == "int8":
            return cls(weight.kind, inputs, weight.values, scales)
        half = -(-inputs // (2 * GROUP)) * GROUP
        codes = F.pad(weight.codes(), (0, 2 * half - inputs))
        values = codes[:, :half] | codes[:, half:] << 4
        scales = F.pad(scales, (0, 0, 0, 2 * half // GROUP - len(scales)))
        return cls(weight.kind, inputs, values, scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """`QuantizedWeight.dequantize`, to the bit, in one pass."""
        (N, width), K = self.values.shape, self.inputs
        out = torch.empty(N, K, dtype=dtype, device=self.values.device)
        _kernels(out).weights.dequantize_kernel[(-(-N // _OUTPUTS), -(-width // _INPUTS))](
            *(self.values, self.scales, out),
            *(N, K, width),
            KIND=self.kind,
            BLOCK_N=_OUTPUTS,
            BLOCK_K=_INPUTS,
        )
        return out


def multiply(x: Tensor, weight: GpuWeight, bias: Tensor | None, tile: Tile) -> Tensor:
    """x W^T + bias, for x (M, K) in 16 bits, the weight (N, K) and bias (N,): (M, N) in x's dtype.

    A row of the result depends only on that row of x, whatever M is.
    """
    (M, K), (N, width), kernels = x.shape, weight.values.shape, _kernels(x)
    out = x.new_empty(M, N)
    is_interpreted = kernels.interpreted
    has_ptx = weight.kind != "int8" and not is_interpreted and torch.version.hip is None
    kernels.weights.multiply_kernel[(-(-M // tile.rows), -(-N // tile.outputs))](
        *(x.contiguous(), weight.values, weight.scales, bias, out),
        *(M, N, K, width),
        KIND=weight.kind,
        UNPACK=unpacking(weight.kind, x.dtype) if has_ptx else None,
        HAS_BIAS=bias is not None,
        IN_FP32=is_interpreted,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        STEP=2 * GROUP if weight.kind == "int8" else GROUP,
        SLICES=tile.warps if tile.is_sliced else 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@cache
def unpacking(kind: str, dtype: torch.dtype) -> str:
    """PTX that turns four bytes of codes, $4, into values, two to a word.

    $0 and $1 receive those of the lower codes, $2 and $3 those of the upper.
    """
    lines = _added(dtype) if kind == "int4" else _looked_up(dtype)
    return "{ " + " ".join(lines) + " }"


def _added(dtype: torch.dtype) -> list[str]:
    """PTX for int4: codes become the last bits of a power of 2; then it and 8 are subtracted."""
    power = 128 if dtype == torch.bfloat16 else 1024
    words = torch.tensor([power, 1, -power - 8], dtype=dtype).view(torch.int16).int() & 0xFFFF
    power, one, offset = (word * 0x10001 for word in words.tolist())
    name = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    lines = [".reg .b32 pair<2>, one, offset;"]
    lines += [f"mov.b32 one, {one};", f"mov.b32 offset, {offset};"]
    lines += ["prmt.b32 pair0, $4, 0, 0x4140;", "prmt.b32 pair1, $4, 0, 0x4342;"]
    for place in range(4):
        pair = f"pair{place % 2}"
        if place > 1:
            lines.append(f"shr.u32 {pair}, {pair}, 4;")
        lines += [
            f"lop3.b32 ${place}, {pair}, 0x000F000F, {power}, 0xEA;",
            f"fma.rn.{name} ${place}, ${place}, one, offset;",
        ]
    return lines


def _looked_up(dtype: torch.dtype) -> list[str]:
    """PTX for iq4_nl: a table lookup by `prmt`, which picks four bytes of eight by 3 bits each.

    For each byte of a value it looks in both halves of the table, then picks one of the two by the
    codes' top bits.
    """
    values = torch.tensor(CODES, dtype=dtype).view(torch.uint8).view(16, 2)
    lines = [
        ".reg .b32 place, half, first, second, found<2>;",
        "and.b32 place, $4, 0x77777777;",
        "shr.u32 half, $4, 1;",
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;",
    ]
    for low, high in (("$0", "$2"), ("$1", "$3")):
        for byte, table in enumerate(values.T.contiguous().view(torch.int32).tolist()):
            for name, (begin, end) in (("first", table[:2]), ("second", table[2:])):
                lines += [f"mov.b32 {name}, {begin};", f"prmt.b32 {name}, {name}, {end}, place;"]
            lines.append(f"prmt.b32 found{byte}, first, second, half;")
        lines += [
            f"prmt.b32 {low}, found0, found1, 0x6240;",
            f"prmt.b32 {high}, found0, found1, 0x7351;",
            "shr.u32 place, place, 16;",
            "shr.u32 half, half, 16;",
        ]
    return lines


def for_gpu(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight | GpuWeight:
    """The weight as the kernels read it, or unchanged where they do not run for the dtype."""
    device = weight.values.device
    works = device.type == "cuda" and _works(weight.kind, dtype, device)
    return GpuWeight.of(weight) if works else weight


@cache
def _works(kind: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel that expands weights gives PyTorch's results here."""
    generator = torch.Generator(device).manual_seed(0)
    weight = quantize(torch.randn(64, 256, generator=generator, device=device), kind)
    expected = weight.dequantize(dtype)
    return is_right(kind, lambda: GpuWeight.of(weight).dequantize(dtype), expected)


def is_right(
    kind: str, compute: Callable[[], Tensor], expected: Tensor, tolerance: Tensor | float = 0.0
) -> bool:
    """Whether a kernel for a kind of weights runs here and is within `tolerance`; warns if not.

    Raises MemoryError and torch.OutOfMemoryError, which say nothing about the kernel.
    """
    try:
        found = compute()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = why_failed(error)
    else:
        if bool(((found - expected).abs() <= tolerance).all()):
            return True
        why = f"its results differ from PyTorch's for {kind}"
    _warn_once(why)
    return False


@cache
def _warn_once(why: str) -> None:
    log.warning("not using a kernel for quantized weights, which may be slower: %s", why)


def _kernels(tensor: Tensor) -> Kernels:
    kernels = kernels_for(tensor)
    assert kernels, "neither on a GPU nor interpreted"
    return kernels
