"""Continues a file of prompts in bulk, to Parquet, with engines on Ray.

The input is cut into parts of consecutive rows. Each part becomes one output file, by rename, so a
restarted job only needs to know which files exist.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gptray.commands import reading, retyped
from gptray.data.parts import read_whole
from gptray.data.prompts import output_schema
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.cluster.shared_storage import check_shared
from gptray.jobs.engine_plan import build_engine_backend
from gptray.jobs.generate.checked import CheckedBatch
from gptray.jobs.generate.engines import Engines
from gptray.jobs.generate.remote_output import output_kind
from gptray.jobs.next_steps import resumable, tell
from gptray.jobs.progress.doing import doing
from gptray.storage.files import is_uri

log = logging.getLogger("gptray")


def generate_in_bulk(job: CheckedBatch) -> dict[str, Any]:
    """Continue every prompt of the input; return the JSON line.

    Raises UserError if the job cannot start, RunFailed if engines keep failing or a file cannot be
    written.
    """
    build_engine_backend(job.config)
    folder, kind = job.folder, output_kind(job)
    again = retyped("generate") or "the same command"
    with (
        resumable(folder, lambda: again, begun=folder, place=job.output),
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
