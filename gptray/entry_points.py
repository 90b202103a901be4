"""Runs jobs by name, for all entry points: `gptray JOB`, `python -m gptray JOB` and jobs/JOB.py.

Loads neither torch nor Ray: a job's own modules are imported when it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress

from gptray.cli import DONE, MISTAKE, run_job
from gptray.commands import job_command
from gptray.config.suggest import did_you_mean, nearest
from gptray.standard_output import Unread, write_out

# Each job's text for --help; the first line is its summary.
DOCS = {
    "prepare": """\
Prepare text for training: a tokenizer, token shards and a manifest, built on Ray Data.

  python jobs/prepare.py                                        the builtin text
  python jobs/prepare.py data.source=books/ data.split=80:10:10   a folder of your own
  python jobs/prepare.py data.source='s3://bucket/*.jsonl' data.text_column=body

Training does this itself if needed; the same text and settings are prepared only once.
""",
    "train": """\
Train a GPT on Ray: data-parallel workers, early stopping, the best model in <run>/model.

python jobs/train.py                                     the quick start
python jobs/train.py data.source=book.txt name=book      your own text
python jobs/train.py --config configs/gpt2_124m.yaml compute.use_gpu=true
""",
    "tune": """\
Tune a GPT on Ray: try settings from a search space, stop bad trials early, keep the best.

python jobs/tune.py --config configs/overfitting_sweep.yaml data.source=book.txt name=book-sweep
python jobs/tune.py --config configs/overfitting_demo.yaml       a demonstration: what helps?
python jobs/train.py --config ~/gptray/book-sweep/best.yaml train.max_steps=4000    its winner
""",
    "evaluate": """\
Evaluate a model: losses over whole splits, perplexity, bits per byte, BLEU, memorisation.

python jobs/evaluate.py name=book                          a run, on its own text
python jobs/evaluate.py evaluate.model=gpt2 data.source=book.txt
python jobs/evaluate.py name=book evaluate.source=other.txt evaluate.stride=64
""",
    "generate": """\
Continue prompts: a file of them to Parquet on Ray, or a few right here in the terminal.

python jobs/generate.py 'sample.prompt=Once upon a time'
python jobs/generate.py generate.input_path=prompts.jsonl generate.output_path=out
python jobs/generate.py ... generate.model=gpt2 generate.num_workers=4
""",
    "serve": """\
Serve a model over HTTP, on Ray Serve, to any client that speaks OpenAI's API.

python jobs/serve.py                                     the newest run, http://127.0.0.1:8000
python jobs/serve.py serve.model=<run, model folder or hub id> serve.port=8080
python jobs/serve.py ... serve.num_replicas=2 serve.api_key_file=keys.txt serve.host=0.0.0.0
""",
    "export": """\
Export a model for other programs: a GGUF file for llama.cpp, or a smaller Hugging Face folder.

python jobs/export.py export.model=book export.output_path=book.gguf
python jobs/export.py export.model=book export.precision=q8_0 export.output_path=book-q8_0.gguf
python jobs/export.py export.format=hf export.precision=bf16 export.output_path=book-bf16
""",
    "runs": """\
List the runs and sweeps in storage_path, newest first: state, verdict, losses, next command.

python jobs/runs.py
python jobs/runs.py storage_path=/mnt/runs
""",
    "doctor": """\
Check every node: versions, GPUs, shared storage, disks, ports, clocks; say what to fix.

python jobs/doctor.py                                    this machine
RAY_ADDRESS=10.0.0.1:6379 python jobs/doctor.py storage_path=/mnt/runs
""",
}


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a job by name and return its exit code; argv: by default this process's arguments."""
    doc = re.sub(r"python jobs/(\w+)\.py", lambda script: job_command(script[1]), DOCS[name])
    return run_job(name, doc=doc, argv=argv)


def main(argv: Sequence[str] | None = None) -> int:
    """`gptray JOB ...`: run the job that the first word names and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else ""
    if name in DOCS:
        if argv is None:
            del sys.argv[1]  # leaves the job's own arguments, as for jobs/JOB.py
        return run(name, None if argv is None else words[1:])
    if name in ("--help", "-h"):
        with suppress(Unread):
            write_out(_overview())
        return DONE
    print(_no_job(name) if name else _overview().rstrip("\n"), file=sys.stderr)
    return MISTAKE


def _overview() -> str:
    jobs = [f"  {name:10}{doc.splitlines()[0]}" for name, doc in DOCS.items()]
    usage = "usage: gptray JOB [--config FILE] [section.field=value ...]"
    hint = "gptray JOB --help lists every key, with examples."
    return "\n".join([usage, "", "jobs:", *jobs, "", hint, ""])


def _no_job(name: str) -> str:
    if name.startswith("-") or "=" in name:
        return f"gptray: name the job first, as in gptray train {name}; jobs: {', '.join(DOCS)}"
    close = nearest(name, DOCS)
    what_there_is = did_you_mean(close) if close else f"; jobs: {', '.join(DOCS)}"
    return f"gptray: unknown job {name}{what_there_is}"
