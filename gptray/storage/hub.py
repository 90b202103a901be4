"""Downloads models from the Hugging Face hub, or says in one sentence why it cannot.

Without a network, the hub's client retries for a minute. So this first checks, at most once a
minute and for a few seconds, whether the hub answers. Needs neither torch nor Ray.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from gptray.config import UserError
from gptray.wording import first_line

# Timeouts of one request and of the whole check, because the DNS lookup has none of its own.
REQUEST_S, ASKING_S = 2.0, 3.0
ANSWER_HOLDS_S = 60.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class NotOnHub(UserError):
    """Neither a local folder nor a model on the hub.

    reason: the answer of the hub or its cache, such as "no such model on the hub"; empty for a name
    that cannot be a hub id.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[NotOnHub], tuple[str, str]]:
        return type(self), (str(self), self.reason)


def why_unreachable() -> str | None:
    """Why the hub cannot be reached now; None if it answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _silence(int(time.monotonic() // ANSWER_HOLDS_S))


@lru_cache(maxsize=1)
def _silence(period: int) -> str | None:
    """Why the hub does not answer; cached per period, because a replica lives for days."""
    from huggingface_hub import constants

    reasons = [f" within {ASKING_S:.0f} s"]
    thread = threading.Thread(target=_ask, args=(constants.ENDPOINT, reasons), daemon=True)
    thread.start()
    thread.join(ASKING_S)
    return f"{constants.ENDPOINT} does not answer{reasons[-1]}" if reasons else None


def _ask(endpoint: str, reasons: list[str]) -> None:
    """Clear `reasons` if the hub answers, whatever it says; else add the reason."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=REQUEST_S)
    except Exception as error:  # the client's own errors, and those of its settings
        reasons.append(f": {first_line(error)}")
    else:
        reasons.clear()


def download_model(hub_id: str, patterns: Sequence[str]) -> Path:
    """The folder with a hub model's files that match these patterns; from the cache if offline.

    Raises NotOnHub.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise NotOnHub(f"{hub_id}: no such folder", "")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    away = why_unreachable()
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=[*patterns], local_files_only=away is not None)
        )
    except GatedRepoError:
        reason = "gated on the hub: accept its conditions there and set HF_TOKEN"
    except (RepositoryNotFoundError, HFValidationError):
        private = " (a private one needs HF_TOKEN)" if "/" in hub_id else ""
        reason = f"no such model on the hub{private}"
    except (OSError, ValueError) as error:
        reason = (
            f"not in the hub's cache ({away})" if away else f"the hub failed: {first_line(error)}"
        )
    raise NotOnHub(f"{hub_id}: no such folder here and {reason}", reason)


def cached_model(hub_id: str) -> Path | None:
    """The folder of a hub model in the cache, if any; works offline."""
    from huggingface_hub import snapshot_download

    if not _HUB_ID.fullmatch(hub_id):
        return None
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):
        return None
