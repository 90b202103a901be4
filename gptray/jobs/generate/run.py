"""The generate job: prompts to Parquet in bulk, or to the terminal.

A bulk job's input is cut into parts of consecutive rows. Each part becomes one output file, by
rename, so a restarted job only needs to know which files exist.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gptray.commands import reading, retyped
from gptray.data.parts import read_whole
from gptray.data.prompts import output_schema
from gptray.files import is_uri
from gptray.jobs.base import Job, Plan
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.cluster.shared_storage import check_shared
from gptray.jobs.engine_plan import build_engine_backend, planned_backend, planned_memory
from gptray.jobs.generate.check import CheckedBatch, CheckedModel, check
from gptray.jobs.generate.output import scan_input
from gptray.jobs.generate.remote_output import output_kind
from gptray.jobs.next_steps import resumable, tell
from gptray.jobs.progress.doing import doing
from gptray.wording import count, size_words

log = logging.getLogger("gptray")


def run(checked: CheckedModel | CheckedBatch) -> dict[str, Any]:
    """Continue every prompt of `generate.input_path`, or those of `sample.prompt` in the terminal.

    Returns the JSON line. Raises UserError if the job cannot start, RunFailed if engines keep
    failing or a file cannot be written.
    """
    if isinstance(checked, CheckedModel):
        from gptray.jobs.generate.terminal import generate_here  # loads torch

        return generate_here(checked)
    return _run_batch(checked)


def _run_batch(job: CheckedBatch) -> dict[str, Any]:
    build_engine_backend(job.config)
    folder, kind = job.folder, output_kind(job)
    again = retyped("generate") or "the same command"
    with (
        resumable(folder, lambda: again, begun=folder, seen=job.output),
        ExitStack() as stack,
    ):
        with doing("reading the input"):
            output = stack.enter_context(kind.opened(job))
        missing = output.missing_parts()
        speed: dict[str, Any] = {"tokens_per_sec": 0.0}
        if missing and not output.rows:
            # The only file, which has just the columns.
            schema = read_whole(output.staged(0)).schema
            output.add(output_schema(schema, output.samples, output.metadata()).empty_table())
        elif missing:
            rows = sum(map(output.rows_of, missing))
            log.info("%s: %s of %s rows to do", job.full_name, f"{rows:,}", f"{output.rows:,}")
            with ray_cluster(wait_s=job.config.compute.wait_s):
                from gptray.jobs.generate.engines import Engines  # loads Ray and torch

                shared = {} if is_uri(job.output) else {f"generate.output_path={folder}": folder}
                adapters = [Path(one) for one in (job.config.generate.adapters or {}).values()]
                check_shared(
                    written=shared,
                    read={"generate.model": [Path(job.model)], "generate.adapters": adapters},
                    use_gpu=job.config.compute.use_gpu,
                )
                speed = Engines(job.config, output, missing).run()
        summary = output.finish()
    reasons = ", ".join(f"{why}: {number:,}" for why, number in summary["finish_reasons"].items())
    log.info(
        f"ended by {reasons}"
        if reasons
        else "the input has no rows, so the output has only columns"
    )
    tell([reading(job.output)])
    return {**summary, **speed}


def plan(checked: CheckedModel | CheckedBatch) -> Plan:
    """What the job would do. Reads a batch job's whole input; raises UserError as the job would."""
    if isinstance(checked, CheckedModel):
        return [
            ("model", str(checked.folder)),
            ("backend", planned_backend(checked.config)),
            ("memory", planned_memory(checked.config, checked.folder, 1)),
            ("output", "this terminal"),
        ]
    job, config = checked, checked.config
    output_kind(job).plan_there(job)
    found, samples = scan_input(job), config.generate.num_samples
    size = size_words(sum(file.size for file in job.files))
    columns = output_schema(found.schema, samples).names
    return [
        ("model", job.model),
        ("input", f"{count(len(job.files), 'file')}, {size}, {found.rows:,} rows"),
        ("engines", f"{config.generate.num_workers} of {config.generate.max_batch_size} sequences"),
        ("backend", planned_backend(config)),
        ("memory", planned_memory(config, job.model_dir, config.generate.max_batch_size)),
        ("output", job.output),
        ("rows", f"{found.rows * samples:,}"),
        ("columns", ", ".join(columns)),
        ("files", "part-*.parquet _manifest.json _SUCCESS"),
    ]


JOB = Job(check, plan, run)
