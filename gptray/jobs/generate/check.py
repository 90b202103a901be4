"""Checks the generate job, and says what it would do, without torch or Ray."""

from __future__ import annotations

from gptray.config import Config, UserError
from gptray.data.prompts import output_schema
from gptray.jobs.base import Plan
from gptray.jobs.engine_plan import planned_backend, planned_memory
from gptray.jobs.generate.checked import CheckedBatch, CheckedModel, check_batch, check_model
from gptray.jobs.generate.output import scan_input
from gptray.jobs.generate.remote_output import output_kind
from gptray.wording import count, size_words


def check(config: Config) -> CheckedModel | CheckedBatch:
    """Check the job. Raises UserError with every mistake."""
    settings = config.generate
    if settings.input_path is not None or config.sample.prompt is None:
        return check_batch(config)
    if settings.output_path is not None:
        raise UserError(
            f"generate.output_path={settings.output_path} needs generate.input_path: "
            "the text of sample.prompt is only printed"
        )
    return check_model(config)


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
        ("input", f"{count(len(job.files), 'file')}, {size}, {count(found.rows, 'row')}"),
        ("engines", f"{config.generate.num_workers} of {config.generate.max_batch_size} sequences"),
        ("backend", planned_backend(config)),
        ("memory", planned_memory(config, job.model_dir, config.generate.max_batch_size)),
        ("output", job.output),
        ("rows", f"{found.rows * samples:,}"),
        ("columns", ", ".join(columns)),
        ("files", "part-*.parquet _manifest.json _SUCCESS"),
    ]
