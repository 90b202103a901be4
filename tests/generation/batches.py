"""Runs a file of rows as a batch job does, engines' processes and Ray left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import Config, load_config
from gptray.data.parts import write_whole
from gptray.data.prompts import ReadRequest, scan, staged
from gptray.data.sources import find_files
from gptray.data.tokenizer import Tokenizer
from gptray.generation.batch import PartWriter
from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling


class Batch:
    """One engine, and a folder for what it is to run and what comes of it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, folder: Path) -> None:
        self.engine, self.tokenizer, self.folder = engine, tokenizer, folder
        self.runs = 0

    def __call__(
        self, path: Path, *overrides: str, read_request: ReadRequest | None = None
    ) -> pa.Table:
        config = config_of(*overrides)
        generate, folder = config.generate, self.folder / f"run{self.runs}"
        self.runs += 1
        (folder / "staged").mkdir(parents=True)
        files = find_files(str(path))
        writer = PartWriter(
            self.engine,
            self.tokenizer,
            config.sample,
            folder,
            num_samples=generate.num_samples,
            model="tiny",
            metadata={"mine": "1"},
        )
        read = read_request or (lambda row: pytest.fail("not an OpenAI batch file"))
        found = scan(files, generate)
        for number, part in enumerate(staged(files, found, generate.rows_per_file, read)):
            write_whole(part, folder / "staged" / f"{number}.parquet")
            writer.feed(number, folder / "staged" / f"{number}.parquet")
        writer.finish()
        parts = sorted(folder.glob("*.parquet"))
        self.progress = writer.progress
        return pa.concat_tables([parquet.ParquetFile(part).read() for part in parts])

    def alone(self, prompt: str, seed: int, *overrides: str) -> str:
        """What a request of its own gives."""
        sampling = Sampling.of(config_of(*overrides).sample, seed=seed)
        request = Sequence(self.tokenizer.prompt_ids(prompt), sampling)
        return self.engine.run([request])[0].text


def config_of(*overrides: str) -> Config:
    values = {"sample.max_new_tokens": "8", "generate.rows_per_file": "64"}
    values |= dict(word.split("=", 1) for word in overrides)
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
