"""The HTTP endpoint under load, against its engine alone and two typical servers.

Random weights of a GPT-2 shape, bf16, prompts of 16 to 128 tokens, outputs of 16 to 128, top-k 50,
streamed; every client sends its next request as soon as it has its answer. Systems: gptray
(jobs/serve.py), engine (no HTTP), app (gptray's routes without Ray), hf (FastAPI and transformers'
generate, one request at a time), batch (transformers' generate over batches of 32 with
@serve.batch). They take turns, each started afresh and running alone.

    python benchmarks/serve.py [--shape 124m|10m] [--clients 1,8,32,64] [--systems gptray,engine]
    python benchmarks/serve.py --overload
    python benchmarks/serve.py --adapters [--rounds 3]

--overload tests gptray alone with ten times as many clients as fit, which honour Retry-After: its
throughput compared with that of as many clients as fit, before and after. --adapters serves a model
with 32 adapters of rank 8 on all layers: 32 clients that each name an adapter, against 32 that name
the model, in turns, with weights in bf16 and in int8.

Prints a table and, last, one JSON line with tokens per second and waiting times: from a request to
its first token, and between an output's tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from generate import ADAPTERS, RANK, SHAPES, make_model
from serve_load import TOP_K, Answer, Window, asks, load
from tiny import ROOT, free_port
from turns import Contestant, answer

SYSTEMS = ("gptray", "engine", "app", "hf", "batch")
BATCH_SIZE = 32
START_S, STOP_S = 120.0, 60.0

Measure = Callable[[int], dict[str, Any]]


def engine_alone(model_dir: str, seconds: float) -> Measure:
    """The engine in one thread, with the requests of a number of clients."""
    from gptray.config import load_config
    from gptray.generation.loading import open_engine
    from gptray.generation.sequence import Sequence
    from gptray.generation.settings import Sampling

    config = load_config(None, ["generate.precision=bf16"])
    engine, _ = open_engine(model_dir, config, max_batch_size=BATCH_SIZE)

    def measure(clients: int) -> dict[str, Any]:
        window, requests = Window(seconds), asks()
        running: dict[Sequence, Answer] = {}
        while window.left:
            while len(running) < clients:
                ask = next(requests)
                sampling = Sampling(
                    max_new_tokens=ask.new_tokens, top_k=TOP_K, seed=ask.seed, ignore_eos=True
                )
                generation = engine.submit(Sequence(ask.prompt, sampling))
                running[generation] = window.new_answer()
            for generation in engine.step():
                ended = generation.finish_reason is not None
                window.got(running[generation], len(generation.drawn), ended=ended)
                if ended:
                    del running[generation]
        for generation in running:
            engine.cancel(generation)
        return window.report()

    return measure


@contextmanager
def running_server(
    system: str, model_dir: str, *, weights: str = "none", **settings: Any
) -> Iterator[int]:
    """Run a server in its own process; yields its port once it answers."""
    port = free_port()
    if system == "gptray":
        settings |= {"model": model_dir, "port": port, "max_batch_size": BATCH_SIZE}
        command = ["jobs/serve.py", "generate.precision=bf16", f"quantize.weights={weights}"]
        command += [f"serve.{key}={value}" for key, value in settings.items()]
    else:
        command = ["benchmarks/serve_peers.py", system, model_dir, str(port)]
    server = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield port
    finally:
        server.terminate()
        server.wait(STOP_S)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while True:
        try:
            direct.open(url, timeout=START_S).close()
            return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{url} does not answer") from None
            time.sleep(0.2)


def contest(system: str, model_dir: str, seconds: float) -> None:
    """One turn of a system: measure whenever asked on stdin."""
    if system == "engine":
        answer(lambda: engine_alone(model_dir, seconds))
        return
    with running_server(system, model_dir) as port:
        answer(lambda: lambda clients: load(port, clients, seconds))


def measure(args: argparse.Namespace, levels: list[int], systems: list[str]) -> dict[str, Any]:
    """Every system's reports, one per round, at each number of clients."""
    reports: dict[str, Any] = {system: {level: [] for level in levels} for system in systems}
    with tempfile.TemporaryDirectory() as folder:
        make_model(args.shape, Path(folder))
        for _ in range(args.rounds):
            for system in systems:
                arguments = ["--model", folder, "--seconds", str(args.seconds)]
                contestant = Contestant(__file__, system, arguments)
                for level in levels:
                    report = contestant.ask(level)
                    print(f"{system}, {level} clients: {report}", file=sys.stderr)
                    reports[system][level].append(report)
                contestant.close()
    return reports


def overload(shape: str, seconds: float) -> dict[str, Any]:
    """Reports with as many clients as fit, with ten times as many, and again as at first."""
    room = 2 * BATCH_SIZE
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        with running_server("gptray", folder, max_waiting=room - BATCH_SIZE) as port:
            for name, clients in (("before", room), ("overload", 10 * room), ("after", room)):
                reports[name] = load(port, clients, seconds)
                print(f"{name}, {clients} clients: {reports[name]}", file=sys.stderr)
    accepted = {name: report["tokens_per_sec"] for name, report in reports.items()}
    peak = (accepted["before"] + accepted["after"]) / 2
    return {"accepted_of_peak": round(accepted["overload"] / peak, 3), "reports": reports}


def adapted(shape: str, seconds: float, rounds: int) -> dict[str, Any]:
    """The throughput of clients that each name an adapter, relative to those naming the model."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = Path(folder, "base"), Path(folder, "adapters")
        make_model(shape, base)
        save_adapters(base, adapters)
        for name, weights in (("bf16", "none"), ("int8", "int8")):
            with running_server("gptray", str(base), weights=weights, adapters=adapters) as port:
                found[name] = in_turns(port, seconds, rounds)
    rates = {name: [one["tokens_per_sec"] for one in of.values()] for name, of in found.items()}
    shares = {name: round(own / plain, 3) for name, (plain, own) in rates.items()}
    return {"adapters_of_base": shares, "reports": found}


def in_turns(port: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Reports of clients that name a server's model, and of as many that each name an adapter."""
    reports: dict[str, list[dict[str, Any]]] = {"base": [], "adapters": []}
    names = adapter_names(port)
    for _ in range(rounds):
        for name, of_clients in (("base", []), ("adapters", names)):
            reports[name].append(load(port, ADAPTERS, seconds, of_clients))
            print(f"{name}: {reports[name][-1]}", file=sys.stderr)
    return {name: middle(of_rounds) for name, of_rounds in reports.items()}


def save_adapters(model_dir: Path, folder: Path) -> None:
    """Save adapters of a model with random weights, each in its own folder."""
    import torch

    from gptray.config import LoraConfig
    from gptray.model.adapter import Base
    from gptray.model.adapter_files import adapted_network, save_adapter

    base, lora = Base.of(str(model_dir)), LoraConfig(rank=RANK)
    rows = base.config.rows
    model = adapted_network(base, lora, base.config, vocab_size=rows, dtype=torch.float32)
    for number in range(ADAPTERS):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        save_adapter(model, folder / f"{number:02}", base, lora)


def adapter_names(port: int) -> list[str]:
    """The names under which a server serves its adapters."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/v1/models", timeout=START_S) as answered:
        names = [one["id"] for one in json.load(answered)["data"]]
    names = [name for name in names if ":" in name]
    assert len(names) == ADAPTERS, names
    return names


def middle(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge several reports into one with every figure's median."""
    merged: dict[str, Any] = {}
    for name, value in reports[0].items():
        values = [report[name] for report in reports if report[name] is not None]
        if isinstance(value, dict):
            merged[name] = middle(values)
        else:
            merged[name] = round(statistics.median(values), 4) if values else None
    return merged


def ratios(reports: dict[str, Any], figure: Callable[[Any], Any]) -> dict[str, dict[int, float]]:
    """gptray's figure divided by each other system's."""
    ours = reports.get("gptray", {})
    return {
        f"gptray/{other}": {
            level: round(figure(ours[level]) / figure(report), 3)
            for level, report in reports[other].items()
            if figure(ours[level]) and figure(report)
        }
        for other in reports
        if ours and other != "gptray"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--clients", default="1,8,32,64")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="of " + " ".join(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--overload", action="store_true", help="ten times what finds room")
    parser.add_argument("--adapters", action="store_true", help="one for each client")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        contest(args.worker, args.model, args.seconds)
        return
    if args.overload:
        print(json.dumps({"shape": args.shape, **overload(args.shape, args.seconds)}))
        return
    if args.adapters:
        result = adapted(args.shape, args.seconds, args.rounds)
        print(json.dumps({"shape": args.shape, "rounds": args.rounds, **result}))
        return
    levels = [int(clients) for clients in args.clients.split(",")]
    measured = measure(args, levels, args.systems.split(","))
    reports = {
        system: {level: middle(rounds) for level, rounds in of_system.items()}
        for system, of_system in measured.items()
    }
    print_table(reports)
    result = {
        "shape": args.shape,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "reports": reports,
        "tokens_per_sec_ratios": ratios(reports, lambda report: report["tokens_per_sec"]),
        "first_token_p99_ratios": ratios(reports, lambda report: report["first_token_s"]["p99"]),
    }
    print(json.dumps(result))


def print_table(reports: dict[str, Any]) -> None:
    columns = ("clients", "requests/s", "tokens/s", "first p50", "p99 s", "token p50", "p99 s")
    print(f"{'system':10}" + "".join(f"{column:>12}" for column in columns))
    for system, levels in reports.items():
        for level, report in levels.items():
            first, token = report["first_token_s"], report["per_token_s"]
            figures = (
                level, report["requests_per_sec"], report["tokens_per_sec"],
                first["p50"], first["p99"], token["p50"], token["p99"],
            )  # fmt: skip
            print(f"{system:10}" + "".join(f"{'-' if f is None else f:>12}" for f in figures))


if __name__ == "__main__":
    main()
