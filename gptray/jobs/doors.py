"""The jobs by name, for each way to start one: `gptray JOB`, `python -m gptray JOB`, jobs/JOB.py.

Loads neither torch nor Ray: a job's own modules are imported when it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from gptray.cli import DONE, MISTAKE, Plan, line_printer, run_job
from gptray.commands import job_command
from gptray.config import Config
from gptray.config.suggest import did_you_mean, nearest
from gptray.standard_output import Unread, write_out


@dataclass(frozen=True)
class Job:
    """doc: what --help says; its first line names the job. The others: module:function."""

    doc: str
    runner: str
    planner: str

    def run(self, config: Config) -> dict[str, Any] | None:
        """Run the job; its JSON line's facts, or None if it has printed them."""
        result: dict[str, Any] | None = resolve_name(self.runner)(config)
        return result

    def plan(self, config: Config) -> Plan:
        """What --dry-run says."""
        rows: Plan = resolve_name(self.planner)(config)
        return rows


JOBS = {
    "prepare": Job(
        """\
Prepare text for training: a tokenizer, token shards and a manifest, built on Ray Data.

  python jobs/prepare.py                                        the builtin text
  python jobs/prepare.py data.source=books/ data.split=80:10:10   a folder of your own
  python jobs/prepare.py data.source='s3://bucket/*.jsonl' data.text_column=body

Training does this by itself if it was not done; the same text and settings are prepared only once.
""",
        "gptray.jobs.prepare.plan:prepare_and_count",
        "gptray.jobs.prepare.plan:preparation_plan",
    ),
    "train": Job(
        """\
Train a GPT on Ray: data-parallel workers, early stopping, the best model in <run>/model.

python jobs/train.py                                     the quick start
python jobs/train.py data.source=book.txt name=book      your own text
python jobs/train.py --config configs/gpt2_124m.yaml compute.use_gpu=true
""",
        "gptray.jobs.train.run:train",
        "gptray.jobs.train.plan:training_plan",
    ),
    "tune": Job(
        """\
Tune a GPT on Ray: trials of a search space, the worse ones cut early, the best settings kept.

python jobs/tune.py --config configs/overfitting_sweep.yaml data.source=book.txt name=book-sweep
python jobs/tune.py --config configs/overfitting_demo.yaml       a demonstration: what helps?
python jobs/train.py --config ~/gptray/book-sweep/best.yaml train.max_steps=4000    its winner
""",
        "gptray.jobs.tune.run:tune",
        "gptray.jobs.tune.check:sweep_plan",
    ),
    "evaluate": Job(
        """\
Evaluate a model: losses over whole splits, perplexity, bits per byte, BLEU, memorisation.

python jobs/evaluate.py name=book                          a run, on its own text
python jobs/evaluate.py evaluate.model=gpt2 data.source=book.txt
python jobs/evaluate.py name=book evaluate.source=other.txt evaluate.stride=64
""",
        "gptray.jobs.evaluate.run:evaluate",
        "gptray.jobs.evaluate.run:evaluation_plan",
    ),
    "generate": Job(
        """\
Continue prompts: a file of them to Parquet on Ray, or a few right here in the terminal.

python jobs/generate.py 'sample.prompt=Once upon a time'
python jobs/generate.py generate.input_path=prompts.jsonl generate.output_path=out
python jobs/generate.py ... generate.model=gpt2 generate.num_workers=4
""",
        "gptray.jobs.generate.run:generate",
        "gptray.jobs.generate.run:generation_plan",
    ),
    "serve": Job(
        """\
Serve a model over HTTP, on Ray Serve, to any client that speaks OpenAI's completions.

python jobs/serve.py                                     the newest run, http://127.0.0.1:8000
python jobs/serve.py serve.model=<run, model folder or hub id> serve.port=8080
python jobs/serve.py ... serve.num_replicas=2 serve.api_key_file=keys.txt serve.host=0.0.0.0
""",
        "gptray.jobs.doors:_serve",
        "gptray.jobs.serve.check:serving_plan",
    ),
    "runs": Job(
        """\
List the runs and sweeps in storage_path, newest first: state, verdict, losses, next command.

python jobs/runs.py
python jobs/runs.py storage_path=/mnt/runs
""",
        "gptray.jobs.runs.run:runs",
        "gptray.jobs.runs.run:listing_plan",
    ),
}


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a job by name and return its exit code; argv: its words, by default this process's."""
    job = JOBS[name]
    doc = re.sub(r"python jobs/(\w+)\.py", lambda script: job_command(script[1]), job.doc)
    return run_job(job.run, name=name, doc=doc, plan=job.plan, argv=argv)


def main(argv: Sequence[str] | None = None) -> int:
    """`gptray JOB ...`: run the job that the first word names and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else ""
    if name in JOBS:
        if argv is None:
            del sys.argv[1]  # so that a job finds its own words there, as behind jobs/JOB.py
        return run(name, None if argv is None else words[1:])
    if name in ("--help", "-h"):
        with suppress(Unread):
            write_out(_overview())
        return DONE
    print(_no_job(name) if name else _overview().rstrip("\n"), file=sys.stderr)
    return MISTAKE


def _overview() -> str:
    jobs = [f"  {name:10}{job.doc.splitlines()[0]}" for name, job in JOBS.items()]
    usage = "usage: gptray JOB [--config FILE] [section.field=value ...]"
    hint = "gptray JOB --help lists every key, with examples."
    return "\n".join([usage, "", "jobs:", *jobs, "", hint, ""])


def _no_job(name: str) -> str:
    if name.startswith("-") or "=" in name:
        return f"gptray: name the job first, as in gptray train {name}; jobs: {', '.join(JOBS)}"
    close = nearest(name, JOBS)
    what_there_is = did_you_mean([close]) if close else f"; jobs: {', '.join(JOBS)}"
    return f"gptray: unknown job {name}{what_there_is}"


def _serve(config: Config) -> None:
    from gptray.jobs.serve.run import serve

    serve(config, answers=line_printer())
