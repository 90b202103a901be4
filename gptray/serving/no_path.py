"""The answer to a path that does not exist: what to call instead."""

from __future__ import annotations

from collections.abc import Sequence

from gptray.config.suggest import did_you_mean, nearest

INSTEAD = "call POST /v1/completions, with `prompt`"
# What clients of OpenAI and others call besides completions, by the end of the path.
ENDS = {
    "/messages": "there is no such API here: call POST /v1/chat/completions, with `messages`",
    "/responses": f"there is no responses API here: {INSTEAD} instead of `input`",
    "/embeddings": "there are no embeddings here, only text: call POST /v1/completions",
}


def no_path(path: str, paths: Sequence[str]) -> str:
    """One sentence for a path that is not in `paths`."""
    for end, sentence in ENDS.items():
        if path.rstrip("/").endswith(end):
            return sentence
    near = nearest(path, paths)
    meant = did_you_mean(near) if near else f"; to complete text, {INSTEAD}"
    return f"there is no {path[:100]} here{meant}"
