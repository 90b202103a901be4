"""The Hugging Face hub: what is downloaded from it, and in one sentence why something is not.

Its client retries for a minute where there is no network, so whether the hub answers is asked
first, once a minute and for some seconds at most. Neither torch nor Ray here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from gptray.config import UserError

# Of one request, and of all that asking takes: looking up the hub's name has no limit of its own.
REQUEST_S, ASKING_S = 2.0, 3.0
ANSWER_HOLDS_S = 60.0


class NotOnHub(UserError):
    """A model that the hub does not give; `reason` completes a sentence about it.

    It is empty for what can be no name on the hub.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[NotOnHub], tuple[str, str]]:
        return type(self), (str(self), self.reason)


def why_unreachable() -> str | None:
    """Why nothing can be downloaded now, as a clause; None if the hub answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _silence(int(time.monotonic() // ANSWER_HOLDS_S))


@lru_cache(maxsize=1)
def _silence(period: int) -> str | None:
    """What the hub does instead of answering; asked once a period: a replica lives for days."""
    from huggingface_hub import constants

    reasons = ["no answer"]
    thread = threading.Thread(target=_ask, args=(constants.ENDPOINT, reasons), daemon=True)
    thread.start()
    thread.join(ASKING_S)
    return f"the hub ({constants.ENDPOINT}) does not answer: {reasons[-1]}" if reasons else None


def _ask(endpoint: str, reasons: list[str]) -> None:
    """Empty `reasons` if the hub answers, whatever it says; else add why not."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=REQUEST_S)
    except Exception as error:  # the client's own errors, and those of its settings
        reasons.append(_first_line(error))
    else:
        reasons.clear()


def download_model(hub_id: str, patterns: Sequence[str]) -> Path:
    """The folder with a hub model's files of these patterns; without a network, those in the cache.

    Raises NotOnHub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    away = why_unreachable()
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=[*patterns], local_files_only=away is not None)
        )
    except GatedRepoError:
        reason = "the hub has it behind conditions that the owner of HF_TOKEN has not accepted"
    except (RepositoryNotFoundError, HFValidationError):
        reason = "the hub has no model of that name, or a private one (set HF_TOKEN)"
    except (OSError, ValueError) as error:
        reason = f"it is not in the cache, and {away}" if away else f"the hub: {_first_line(error)}"
    raise NotOnHub(f"{hub_id}: no such folder, and {reason}", reason)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
