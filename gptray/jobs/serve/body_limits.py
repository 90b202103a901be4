"""The limits of requests' bodies, from the driver to Serve's proxy through Ray's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gptray.config import ServeConfig

BODY_LIMITS = "GPTRAY_BODY_LIMITS"


def environment(limits: ServeConfig) -> Mapping[str, str]:
    """What Ray must find in its environment when it starts, for its proxy to apply the limits."""
    return {BODY_LIMITS: f"{limits.max_body_bytes} {limits.body_timeout_s}"}


def body_limits() -> tuple[int, float] | None:
    """Most bytes and seconds of a body; None in another's Ray, where only replicas apply them."""
    if BODY_LIMITS not in os.environ:
        return None
    max_bytes, timeout_s = os.environ[BODY_LIMITS].split()
    return int(max_bytes), float(timeout_s)
