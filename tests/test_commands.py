"""Commands that jobs name for a reader to type."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from subprocess import check_output

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from gptray.commands import reading


@pytest.mark.parametrize("name", ["out", "my out", "It's", 'say "so"', "back\\slash", "이야"])
def test_command_that_reads_an_output_works_as_typed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    parquet.write_table(pa.table({"output": ["a cat"]}), tmp_path / name / "part-0.parquet")
    python, *words = shlex.split(reading(str(tmp_path / name)))
    assert python == "python"
    assert "a cat" in check_output([sys.executable, *words], text=True)


def test_command_that_reads_an_output_is_easy_to_read() -> None:
    told = "python -c 'import pandas; print(pandas.read_parquet(\"/my out\"))'"
    assert reading("/my out") == told
