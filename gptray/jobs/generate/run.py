"""The generate job: prompts to Parquet in bulk, or to the terminal."""

from __future__ import annotations

from typing import Any

from gptray.jobs.generate.checked import CheckedBatch, CheckedModel


def run(checked: CheckedModel | CheckedBatch) -> dict[str, Any]:
    """Continue every prompt of `generate.input_path`, or those of `sample.prompt` in the terminal.

    Returns the JSON line. Raises like `generate_in_bulk` and `generate_here`.
    """
    if isinstance(checked, CheckedModel):
        from gptray.jobs.generate.terminal import generate_here  # loads torch, but not Ray

        return generate_here(checked)
    from gptray.jobs.generate.bulk import generate_in_bulk

    return generate_in_bulk(checked)
