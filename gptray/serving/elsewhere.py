"""What a path that does not exist is answered: what to call instead."""

from __future__ import annotations

from collections.abc import Sequence

from gptray.suggest import did_you_mean, nearest

INSTEAD = "call POST /v1/completions, with `prompt`"
# What clients of OpenAI and others ask for besides completions, by how the path ends.
ENDS = {
    "/chat/completions": f"there is no chat here: {INSTEAD} in place of `messages`",
    "/messages": f"there is no chat here: {INSTEAD} in place of `messages`",
    "/responses": f"there are no responses here: {INSTEAD} in place of `input`",
    "/embeddings": "there are no embeddings here, only text: POST /v1/completions",
}


def no_path(path: str, paths: Sequence[str]) -> str:
    """One sentence for a path that is none of `paths`."""
    for end, sentence in ENDS.items():
        if path.rstrip("/").endswith(end):
            return sentence
    near = nearest(path, paths)
    meant = did_you_mean([near]) if near else f"; to complete text, {INSTEAD}"
    return f"there is no {path[:100]} here{meant}"
