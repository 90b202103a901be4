"""Passes the limits of request bodies from the driver to Serve's proxy in Ray's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gptray.config import ServeConfig

BODY_LIMITS = "GPTRAY_BODY_LIMITS"


def environment(limits: ServeConfig) -> Mapping[str, str]:
    """The environment that Ray must start with, so that its proxy applies the limits."""
    return {BODY_LIMITS: f"{limits.max_body_bytes} {limits.body_timeout_s}"}


def body_limits() -> tuple[int, float] | None:
    """The most bytes and seconds of a body; None in a Ray that the job did not start.

    Then only the replicas apply the limits.
    """
    if BODY_LIMITS not in os.environ:
        return None
    max_bytes, timeout_s = os.environ[BODY_LIMITS].split()
    return int(max_bytes), float(timeout_s)
