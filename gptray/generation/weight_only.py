"""Products with quantized weights on a GPU, by Triton kernels.

Products are summed in fp32 and rounded once to what x is in. Of many rows, and in fp32, they are
those with weights that `dequantize` rounds; of few rows in 16 bits a weight is its value times its
scale in fp32. Shapes: M rows, K inputs, N outputs, H = half of the inputs.
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
from gptray.model.packed_weights import GROUP
from gptray.model.quantized import CODES, QuantizedWeight, quantize

log = logging.getLogger("gptray")

# Of the program that expands weights.
_OUTPUTS, _INPUTS = 8, 256


@dataclass(frozen=True)
class Tile:
    """What a program multiplies: `rows` of x by `outputs` rows of the weight.

    is_sliced: each warp has inputs of its own and all outputs, else outputs of its own and all
    inputs. stages: steps whose numbers are on their way from memory at a time, and one.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    is_sliced: bool = False


def tiles_for(rows: int, dtype: torch.dtype) -> dict[str, Tile]:
    """What may be the fastest for so many rows in a dtype, by name; in fp32 nothing is."""
    if dtype.itemsize > 2:
        return {}
    if rows > 64:
        return {"shared": Tile(128, 128, warps=8, stages=4)}
    block = max(8, 1 << (rows - 1).bit_length())
    tiles = {"shared": Tile(block if block in (8, 64) else 32, 64, warps=4, stages=6)}
    if block <= 32:
        # Small products need many warps; scales of more outputs would go through shared memory.
        tiles["sliced"] = Tile(block, 16, warps=4, stages=4 if block == 32 else 6, is_sliced=True)
    return tiles


@dataclass(frozen=True)
class GpuWeight:
    """A `QuantizedWeight` as the kernels read it.

    Of 4 bits a byte holds the codes of inputs i and H + i, H a multiple of GROUP: so both halves
    meet neighbouring inputs. values (out, H) and scales (2 H / GROUP, out). Of int8 as they are.
    """

    kind: str
    inputs: int
    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> GpuWeight:
        """The same weight."""
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
    """x (M, K) by the weight (N, K), transposed, plus bias (N,): (M, N) in x's dtype, 16 bits.

    A row depends on that row of x alone, whatever M is.
    """
    (M, K), (N, width), kernels = x.shape, weight.values.shape, _kernels(x)
    out = x.new_empty(M, N)
    is_interpreted = kernels.interpreted
    by_hand = weight.kind != "int8" and not is_interpreted and torch.version.hip is None
    kernels.weights.multiply_kernel[(-(-M // tile.rows), -(-N // tile.outputs))](
        *(x.contiguous(), weight.values, weight.scales, bias, out),
        *(M, N, K, width),
        KIND=weight.kind,
        UNPACK=unpacking(weight.kind, x.dtype) if by_hand else None,
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
    """PTX from four bytes of codes, $4, to values, two in a word: of the lower codes $0 and $1, of
    the upper ones $2 and $3."""
    lines = _added(dtype) if kind == "int4" else _looked_up(dtype)
    return "{ " + " ".join(lines) + " }"


def _added(dtype: torch.dtype) -> list[str]:
    """Codes become the last bits of a power of 2, from which it and 8 are taken away again."""
    power = 128 if dtype == torch.bfloat16 else 1024
    words = torch.tensor([power, 1, -power - 8], dtype=dtype).view(torch.int16).int() & 0xFFFF
    power, one, less = (word * 0x10001 for word in words.tolist())
    name = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    lines = [".reg .b32 pair<2>, one, less;", f"mov.b32 one, {one};", f"mov.b32 less, {less};"]
    lines += ["prmt.b32 pair0, $4, 0, 0x4140;", "prmt.b32 pair1, $4, 0, 0x4342;"]
    for place in range(4):
        pair = f"pair{place % 2}"
        if place > 1:
            lines.append(f"shr.u32 {pair}, {pair}, 4;")
        lines += [
            f"lop3.b32 ${place}, {pair}, 0x000F000F, {power}, 0xEA;",
            f"fma.rn.{name} ${place}, ${place}, one, less;",
        ]
    return lines


def _looked_up(dtype: torch.dtype) -> list[str]:
    """`prmt` picks four bytes of eight by the last three bits of four numbers: from each half of a
    table, then by the codes' first bits from what these gave; and so for each byte of a value."""
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
    """The weight as the kernels read it, if it is on a GPU where they run for a dtype."""
    device = weight.values.device
    works = device.type == "cuda" and _works(weight.kind, dtype, device)
    return GpuWeight.of(weight) if works else weight


@cache
def _works(kind: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel expands weights as PyTorch does."""
    generator = torch.Generator(device).manual_seed(0)
    weight = quantize(torch.randn(64, 256, generator=generator, device=device), kind)
    expected = weight.dequantize(dtype)
    return is_right(kind, lambda: GpuWeight.of(weight).dequantize(dtype), expected)


def is_right(
    kind: str, compute: Callable[[], Tensor], expected: Tensor, room: Tensor | float = 0.0
) -> bool:
    """Whether a kernel for a kind of weights runs here, and is at most `room` off; tells why not.

    Raises MemoryError and torch.OutOfMemoryError, which say nothing of the kernel.
    """
    try:
        found = compute()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Triton's have no base class outside of it
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if bool(((found - expected).abs() <= room).all()):
            return True
        why = f"its results differ from PyTorch's for {kind}"
    _tell_once(why)
    return False


@cache
def _tell_once(why: str) -> None:
    log.warning("not using a kernel for quantized weights, which may be slower: %s", why)


def _kernels(tensor: Tensor) -> Kernels:
    kernels = kernels_for(tensor)
    assert kernels, "neither on a GPU nor interpreted"
    return kernels
