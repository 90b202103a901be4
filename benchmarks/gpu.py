"""Benchmarks gptray on one GPU: speed against peers, determinism, where the time goes.

    python benchmarks/gpu.py [--parts gen,adapters,compiled,quant,serve,more,facts,right,train]
                             [--seconds N] [--out FILE] [--data FOLDER]
    python benchmarks/gpu.py --device cpu --tiny

Needs neither Ray nor a network. The last command is a dry run of all code on a CPU. Parts run in
the given order, by default the most needed figures first; after --seconds, no new one is started.

facts: the GPU's GEMM rate, memory bandwidth and attention kernels, with and without determinism.
right: do two runs, and a resumed one, end with the same bits? Are rows the same alone and in a
    batch, on the GPU and on the CPU?
compiled: GPT-2 124M's compiled step with 32 sequences against a loop like nanoGPT's, in turns.
train: the same with 12 sequences, also without compiling and against transformers' GPT-2.
gen: decoding with GPT-2 124M and SmolLM2's shape, 1, 32 and 256 sequences at a time, against
    transformers' generate, and one step under the profiler.
adapters: a decoding step whose rows have 32 adapters, by CUDA graphs and by plain PyTorch.
more: the bound of decoding set by memory bandwidth, prompts, long prompts and contexts.
quant: matrix products with int8, int4 and iq4_nl weights, and the engine's steps with them, against
    bf16, for 1, 8, 32 and 256 sequences.
serve: the engine thread with many streams, without HTTP.

Every line is printed as soon as it is known. A part that fails says why, the next one runs, and the
exit code is 1. The last line is JSON, which is also written to --out as it grows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from gpu_parts.bench import Bench, OutOfTime
from gpu_parts.facts import facts
from gpu_parts.generate import adapters, generate, generate_more
from gpu_parts.machine import describe
from gpu_parts.quantized import quantized
from gpu_parts.right import right
from gpu_parts.serve import serve
from gpu_parts.train import train, train_compiled

PARTS: dict[str, Callable[[Bench], None]] = {
    "gen": generate,
    "adapters": adapters,
    "compiled": train_compiled,
    "quant": quantized,
    "serve": serve,
    "more": generate_more,
    "facts": facts,
    "right": right,
    "train": train,
}


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU; --device cpu --tiny is a dry run", file=sys.stderr)
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # events and kernels use the current one
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            device,
            tiny=args.tiny,
            scratch=Path(scratch),
            data=args.data,
            out=args.out,
            limit_s=args.seconds,
        )
        machine = describe(device)
        bench.keep("machine", machine)
        with suppress(OutOfTime):
            bench.say(", ".join(f"{name} {value}" for name, value in machine.items() if value))
            for part in args.parts:
                run_part(bench, part)
    print(json.dumps(bench.results))
    return 1 if bench.failures else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--parts", type=parts, default=list(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="when to end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a dry run")
    parser.add_argument("--data", type=Path, help="folder that jobs/prepare.py made (for right)")
    parser.add_argument("--out", type=Path, help="file for the JSON, rewritten at every value")
    return parser.parse_args()


def parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return names


def run_part(bench: Bench, part: str) -> None:
    """Run one part, report any failure, and say how long it took."""
    begin = bench.clock()
    try:
        PARTS[part](bench)
    except OutOfTime:
        raise
    except Exception as error:
        traceback.print_exc()
        bench.fail(part, error)
    torch.use_deterministic_algorithms(False)
    bench.free()
    seconds = bench.clock() - begin
    bench.keep(f"{part}: seconds", round(seconds, 1))
    bench.say(f"== {part}: {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
