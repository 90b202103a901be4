"""What is looked at before a model generates in this process, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptray.config import Config
from gptray.jobs.cluster import check_resources
from gptray.jobs.generate.output import with_backend
from gptray.jobs.models import find_model


@dataclass(frozen=True)
class CheckedModel:
    """A model that exists, for a machine that can run it.

    asked: the config as given; config: with the backend that it means here. name: what the model
    was called.
    """

    asked: Config
    config: Config
    folder: Path
    name: str


def check_model(config: Config) -> CheckedModel:
    """Find generate.model. Raises UserError if it is not there, or this machine cannot run it."""
    check_resources(config.compute)
    picked = with_backend(config)
    folder, name = find_model(config, config.generate.model, key="generate.model")
    return CheckedModel(config, picked, folder, name)
