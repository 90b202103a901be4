"""The generate job as the command line calls it: in the terminal, or in bulk on Ray."""

from __future__ import annotations

from gptray.jobs.base import Job
from gptray.jobs.generate.run import generate, generation_plan

JOB = Job(lambda config: config, generation_plan, generate)
