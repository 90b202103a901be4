"""Why engines have ended: left in Ray's key-value store by replicas, told by the job."""

from __future__ import annotations

_KEYS = b"gptray.serve.ended."


def leave_ending(replica: str, reason: str) -> None:
    """Leave the reason why a replica's engine has ended. Needs Ray."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_KEYS + replica.encode(), reason)


def take_endings() -> list[str]:
    """The reasons left since the last call. Needs Ray."""
    from ray.experimental import internal_kv

    found = {}
    for key in internal_kv._internal_kv_list(_KEYS):
        found[key] = internal_kv._internal_kv_get(key)
        internal_kv._internal_kv_del(key)
    return [reason.decode() for reason in found.values() if reason is not None]
