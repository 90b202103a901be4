"""Checks what the doctor is asked to look at."""

from __future__ import annotations

from gptray.config import Config
from gptray.jobs.base import Plan
from gptray.jobs.models import storage_of
from gptray.storage.files import is_uri


def check(config: Config) -> str:
    """storage_path: a URI, or a folder in full. Raises UserError for an unknown user's home."""
    return config.storage_path if is_uri(config.storage_path) else str(storage_of(config))


def plan(storage_path: str) -> Plan:
    """What the job would do."""
    return [("checks", f"every node, and {storage_path}; changes nothing")]
