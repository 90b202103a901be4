"""The endpoint under a thousand slow clients of one kind at a time, next to a few good ones.

Kinds: headers (a request's headers never end), body (half a body, then a byte at a time), unread (a
stream is requested and never read), idle (kept alive after one answer). A slow client that is
disconnected reconnects at once. Good clients request short completions in a loop; the 99th
percentile of their latencies is compared with that before and after, without slow clients.

    python benchmarks/slow_clients.py [--connections 1000] [--kinds headers,body,unread,idle]

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from generate import make_model
from serve import running_server

KINDS = ("headers", "body", "unread", "idle")
GOOD_CLIENTS, NEW_TOKENS = 4, 16
# Connections opened per second, and seconds between two bytes.
OPENED_PER_S, DRIP_S = 100, 5.0
SPARE_FILES = 100


def request(path: str, body: dict[str, Any] | None = None) -> bytes:
    content = json.dumps(body).encode() if body else b""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


async def slow_client(kind: str, port: int) -> None:
    """Open one connection after another, each held as long as the server allows."""
    body = {"prompt": [1] * 250, "max_tokens": 1, "stream": True}
    completion = request("/v1/completions", body)
    first = {
        "headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        "body": completion[:-400],
        "unread": completion,
        "idle": request("/v1/models"),
    }[kind]
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionError):
            writer.write(first)
            if kind == "unread":
                await asyncio.Event().wait()
            ended = asyncio.ensure_future(_until_end(reader))
            while not ended.done():
                await asyncio.wait([ended], timeout=DRIP_S)
                if kind in ("headers", "body"):
                    writer.write(b"x")
        writer.close()


async def _until_end(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while await reader.read(4096):
            pass


def slow_clients(kind: str, port: int, connections: int, opened: Event) -> None:
    """Run all slow clients, in their own process, which is killed in the end."""

    async def run() -> None:
        running = set()
        for number in range(connections):
            running.add(asyncio.create_task(slow_client(kind, port)))
            if number % (OPENED_PER_S // 10) == 0:
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)
        opened.set()
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    asyncio.run(run())


@contextmanager
def slow(kind: str, port: int, connections: int) -> Iterator[None]:
    opened = multiprocessing.Event()
    process = multiprocessing.Process(target=slow_clients, args=(kind, port, connections, opened))
    process.start()
    try:
        while not opened.wait(1.0):
            if not process.is_alive():
                raise RuntimeError(f"the slow clients ({kind}) could not connect")
        wait_for_idle_engine(port)
        yield
        if not process.is_alive():
            raise RuntimeError(f"the slow clients ({kind}) ended")
    finally:
        process.kill()
        process.join()


def wait_for_idle_engine(port: int) -> None:
    """Wait until no sequence runs or waits, so that all unread answers have been written."""
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        names = ("gptray_sequences_running", "gptray_sequences_waiting")
        if not sum(float(line.split()[-1]) for line in lines if line.startswith(names)):
            return
        time.sleep(0.5)


def good_clients(port: int, seconds: float) -> dict[str, Any]:
    """Counts and latencies (seconds) of good clients' answers, and the slowest /health."""
    took: list[float] = []
    health: list[float] = []
    refused = 0
    end = time.monotonic() + seconds

    async def ask(data: bytes) -> tuple[float, bytes]:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = await reader.read()
        writer.close()
        return time.monotonic() - began, answer

    async def client() -> None:
        nonlocal refused
        body = {"prompt": [1, 2, 3], "max_tokens": NEW_TOKENS, "ignore_eos": True}
        while time.monotonic() < end:
            seconds, answer = await ask(request("/v1/completions", body))
            if answer.startswith(b"HTTP/1.1 429"):
                refused += 1
                await asyncio.sleep(1.0)
                continue
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer[:500].decode())
            took.append(seconds)

    async def prober() -> None:
        while time.monotonic() < end:
            seconds, answer = await ask(request("/health"))
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer[:500].decode())
            health.append(seconds)
            await asyncio.sleep(1.0)

    async def run() -> None:
        await asyncio.gather(prober(), *(client() for _ in range(GOOD_CLIENTS)))

    asyncio.run(run())
    p50, p99 = (round(float(np.quantile(took, q)), 4) for q in (0.5, 0.99))
    return {
        "answers": len(took),
        "refused": refused,
        "p50_s": p50,
        "p99_s": p99,
        "health_max_s": round(max(health), 4),
    }


def measure(port: int, kinds: list[str], connections: int, seconds: float) -> dict[str, Any]:
    """Reports for each kind and for the quiet periods around it."""
    good_clients(port, 3.0)
    reports = {"quiet": [good_clients(port, seconds)]}
    for kind in kinds:
        with slow(kind, port, connections):
            reports[kind] = [good_clients(port, seconds)]
        time.sleep(2.0)  # lets the server notice that they are gone
        reports["quiet"].append(good_clients(port, seconds))
    return reports


def room_for(connections: int) -> None:
    """Raise the open file limit for this process and the server, which inherits it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < connections + SPARE_FILES:
        sys.exit(f"{connections} connections need more files than the {most} of `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + " ".join(KINDS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--shape", default="10m", help="of the model, see benchmarks/generate.py")
    args = parser.parse_args()
    room_for(args.connections)
    kinds = args.kinds.split(",")
    with tempfile.TemporaryDirectory() as folder:
        make_model(args.shape, Path(folder))
        with running_server("gptray", folder) as port:
            reports = measure(port, kinds, args.connections, args.seconds)
    ratios = {}
    columns = ("answers", "refused", "p50_s", "p99_s", "health_max_s")
    print(f"{'slow clients':14}" + "".join(f"{column:>14}" for column in columns))
    for place, kind in enumerate(kinds):
        around = reports["quiet"][place : place + 2]
        ratios[kind] = round(
            reports[kind][0]["p99_s"] / float(np.mean([quiet["p99_s"] for quiet in around])), 2
        )
        for name, report in (("(none)", around[0]), (kind, reports[kind][0])):
            print(f"{name:14}" + "".join(f"{report[column]:>14}" for column in columns))
    last = reports["quiet"][-1]
    print(f"{'(none)':14}" + "".join(f"{last[column]:>14}" for column in columns))
    print(json.dumps({"connections": args.connections, "p99_ratios": ratios, "reports": reports}))


if __name__ == "__main__":
    main()
