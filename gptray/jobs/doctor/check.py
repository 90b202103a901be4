"""Checks what the doctor is asked to look at."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config, UserError
from gptray.files import is_uri
from gptray.jobs.base import Plan
from gptray.jobs.models import storage_of


def check(config: Config) -> Path:
    """Resolve storage_path. Raises UserError for an object store or an unknown user's home."""
    if is_uri(config.storage_path):
        raise UserError(
            f"storage_path={config.storage_path}: the doctor checks only folders that the nodes "
            "share; leave storage_path out to check everything else"
        )
    return storage_of(config)


def plan(storage_path: Path) -> Plan:
    """What the job would do."""
    return [("checks", f"every node, and {storage_path}; changes nothing")]
