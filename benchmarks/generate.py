"""Tokens per second of gptray's engine against transformers' generate, CTranslate2 and llama.cpp.

Random weights of a GPT-2 or Llama shape, the same prompts of 32 tokens, 64 new tokens each, top-k
50, including prefill. Systems run in separate processes and take turns, so that a busy machine
slows all alike; figures are medians over rounds.

    python benchmarks/generate.py [--shape 124m|llama-135m|10m] [--batch 1,8,32,64]
        [--systems bf16,ct2-int8]

bf16+adapters and int8+adapters give each sequence one of 32 adapters of rank 8 on all layers.
CTranslate2 (pip install ctranslate2) runs a single sequence on all cores, and several on replicas
with a core each, where it is fastest. llama.cpp (pip install llama-cpp-python, which builds it for
this processor) decodes all sequences as one batch on all cores. Peers that are not installed are
left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from turns import answer, median_ratio, take_turns

# Fields of ModelConfig.
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "10m": {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 50257},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 50257},
    "llama-135m": {  # SmolLM2's
        "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "n_inner": 1536,
        "vocab_size": 49152, "norm": "rmsnorm", "positions": "rotary", "rope_theta": 100_000,
        "mlp": "swiglu", "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False,
    },
}  # fmt: skip
SHAPES["tiny-llama"] = SHAPES["llama-135m"] | {
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 64,
}
N_POSITIONS = 1024
# Prompts are drawn from this many words.
WORDS = 49_000
PROMPT_TOKENS, NEW_TOKENS, TOP_K = 32, 64, 50
MAX_BATCH_SIZE = 64
PEERS = {
    "hf": ("transformers", ("fp32", "bf16")),
    "ct2": ("ctranslate2", ("float32", "int8")),
    "llama": ("llama_cpp", ("fp16", "q8_0")),
}
SYSTEMS = (
    *(f"{peer}-{weights}" for peer, (_, kinds) in PEERS.items() for weights in kinds),
    "fp32", "bf16", "int8", "int4", "iq4_nl",
)  # fmt: skip
OF_ADAPTERS = ("bf16+adapters", "int8+adapters")
ADAPTED = "+adapters"
ADAPTERS, RANK = 32, 8
# What generate.backend=auto chooses between.
OF_BACKENDS = (
    *("fp32:native", "fp32:torch", "bf16:native", "bf16:torch"),
    *("int8:native", "int8:torch", "int4:native"),
)

# Generates for a batch of this size; the second argument varies the prompts.
Run = Callable[[int, int], None]


def prompts(batch: int, salt: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(salt)
    return cast(list[list[int]], rng.integers(WORDS, size=(batch, length)).tolist())


def gptray_run(model_dir: str, precision: str) -> Run:
    from gptray.config import Config, override
    from gptray.generation.loading import open_engine
    from gptray.generation.sequence import Sequence
    from gptray.generation.settings import Sampling

    kind, adapted, _ = precision.partition(ADAPTED)
    weights, _, backend = kind.partition(":")  # such as int8:torch
    is_quantized = weights in ("int8", "int4", "iq4_nl")
    asked = {
        "generate.max_batch_size": MAX_BATCH_SIZE,
        "generate.precision": "bf16" if is_quantized else weights,
        "generate.backend": backend or "auto",
        "quantize.weights": weights if is_quantized else "none",
    }
    engine, _ = open_engine(model_dir, override(Config(), asked), takes_adapters=bool(adapted))
    adapters = random_adapters(engine, model_dir) if adapted else [None]

    def run(batch: int, salt: int) -> None:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, top_k=TOP_K)
        generations = engine.run(
            [
                Sequence(ids, sampling, adapter=adapters[row % len(adapters)])
                for row, ids in enumerate(prompts(batch, salt))
            ]
        )
        assert all(len(generation.tokens) == NEW_TOKENS for generation in generations)

    return run


def random_adapters(engine: Any, model_dir: str) -> list[Any]:
    import torch

    from gptray.model.adapter import Base
    from gptray.model.adapter_files import LowRank

    sizes: dict[str, list[int]] = {}  # of parameters: outputs, inputs
    for part in Base.of(model_dir).linear:
        turned = part.dims[::-1] if part.layout == "transposed" else part.dims
        sizes.setdefault(part.parameter, [0, turned[1]])[0] += part.rows
    return [
        engine.pack(
            {
                name: LowRank(torch.randn(RANK, inputs), 0.01 * torch.randn(outputs, RANK))
                for name, (outputs, inputs) in sizes.items()
            }
        )
        for _ in range(ADAPTERS)
    ]


def hf_model(model_dir: str | Path, precision: str) -> Any:
    """transformers' model of a folder, in fp32 or bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, trust_remote_code=False
    )
    return model.eval()


def hf_generate(model: Any, ids: Any, new_tokens: int, mask: Any = None) -> Any:
    """transformers' output for prompts ids (B, T): exactly new_tokens more, sampled by top-k."""
    import torch

    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=True,
            top_k=TOP_K,
            pad_token_id=0,
        )


def hf_run(model_dir: str, precision: str) -> Run:
    import torch

    model = hf_model(model_dir, precision)

    def run(batch: int, salt: int) -> None:
        out = hf_generate(model, torch.tensor(prompts(batch, salt)), NEW_TOKENS)
        assert out.shape == (batch, PROMPT_TOKENS + NEW_TOKENS)

    return run


def ct2_run(model_dir: str, compute_type: str) -> Run:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    folder = f"{model_dir}/ct2-{compute_type}"
    TransformersConverter(model_dir).convert(folder, quantization=compute_type)
    names = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False).convert_ids_to_tokens(
        list(range(WORDS))
    )
    cores = os.cpu_count() or 1
    alone = ctranslate2.Generator(folder, compute_type=compute_type, intra_threads=cores)
    spread = ctranslate2.Generator(
        folder, compute_type=compute_type, inter_threads=cores, intra_threads=1
    )

    def run(batch: int, salt: int) -> None:
        starts = [[names[token] for token in ids] for ids in prompts(batch, salt)]
        results = (alone if batch == 1 else spread).generate_batch(
            starts,
            max_batch_size=-(-batch // cores),
            max_length=NEW_TOKENS,
            min_length=NEW_TOKENS,
            include_prompt_in_result=False,
            sampling_topk=TOP_K,
        )
        lengths = {len(result.sequences_ids[0]) for result in results}
        assert lengths == {NEW_TOKENS}, lengths

    return run


def llama_run(model_dir: str, precision: str) -> Run:
    from llama_peer import open_llama, write_without_words

    length = PROMPT_TOKENS + NEW_TOKENS
    path = write_without_words(Path(model_dir), precision)
    generate = open_llama(path, most=MAX_BATCH_SIZE, length=length, top_k=TOP_K)
    return lambda batch, salt: generate(prompts(batch, salt), NEW_TOKENS)


def installed(systems: list[str]) -> list[str]:
    """The systems whose packages are installed."""
    packages = {system: PEERS.get(system.partition("-")[0], ("gptray",))[0] for system in systems}
    return [one for one, package in packages.items() if importlib.util.find_spec(package)]


def timed(system: str, model_dir: str) -> Callable[[int], float]:
    """Load a system; return a function that generates for a batch and returns the seconds."""
    kind, _, precision = system.rpartition("-")
    run = {"": gptray_run, "hf": hf_run, "ct2": ct2_run, "llama": llama_run}[kind](
        model_dir, precision
    )
    salts = itertools.count()

    def seconds(batch: int) -> float:
        begin = time.perf_counter()
        run(batch, next(salts))
        return time.perf_counter() - begin

    return seconds


def make_model(shape: str, folder: Path) -> None:
    """Make a model folder with random weights and a word tokenizer that all systems can open."""
    from made_tokens import word_tokenizer

    from gptray.config import ModelConfig
    from gptray.model.gpt import GPT
    from gptray.model.hf import save_pretrained

    fields = SHAPES[shape]
    vocab_size: int = fields["vocab_size"]
    config = ModelConfig(n_positions=N_POSITIONS, **fields)
    save_pretrained(GPT(config, vocab_size=vocab_size), folder, eos_token_id=vocab_size - 1)
    word_tokenizer(vocab_size).save(folder)


def measure(shape: str, batches: list[int], systems: list[str], rounds: int) -> dict[str, Any]:
    """Median tokens per second of each system at each batch, and the ratios to each peer."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        seconds = take_turns(__file__, systems, ["--model", folder], batches, rounds)
    ours = [system for system in systems if "-" not in system]
    peers = [system for system in systems if "-" in system]

    return {
        "shape": shape,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "tokens_per_sec": {
            system: {b: round(b * NEW_TOKENS / statistics.median(seconds[b][system]), 1)
                     for b in batches}
            for system in systems
        },
        "ms_per_step": {
            system: {b: round(statistics.median(seconds[b][system]) / NEW_TOKENS * 1e3, 1)
                     for b in batches}
            for system in systems
        },
        "ratios": {
            f"{one}/{other}": {
                b: median_ratio(seconds[b][one], seconds[b][other]) for b in batches
            }
            for one in ours
            for other in [*peers, one.removesuffix(ADAPTED)]
            if one != other and other in systems
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--batch", default="1,8,32,64")
    every = SYSTEMS + OF_ADAPTERS
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="of " + " ".join(every))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=every + OF_BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        answer(lambda: timed(args.worker, args.model))
        return
    batches = [int(batch) for batch in args.batch.split(",")]
    result = measure(args.shape, batches, installed(args.systems.split(",")), args.rounds)
    for title in ("tokens_per_sec", "ms_per_step", "ratios"):
        print(f"{title:20}" + "".join(f"{f'B={b}':>10}" for b in batches))
        for name, row in result[title].items():
            print(f"{name:20}" + "".join(f"{row[b]:>10,}" for b in batches))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
