"""How a model is meant to be used, by its folder: copied along with weights and tokenizer.

Without torch, so a job can read it before it starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gptray.config import UserError
from gptray.storage.files import replacing
from gptray.storage.stored import is_whole, read_foreign
from gptray.storage.template_file import TEMPLATE, template_in

GENERATION = "generation_config.json"
_CONFIG = "config.json"


@dataclass(frozen=True)
class Usage:
    """generation: the contents of generation_config.json. eos_ids: the tokens that end a text.

    chat_template: turns messages into a prompt; the default one if there are several. model_type:
    the family to save the network as, if it still has its shape.
    """

    generation: Mapping[str, object] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    model_type: str | None = None

    @classmethod
    def of(cls, folder: Path) -> Usage:
        """Read the usage of a model folder. Raises UserError, naming an unreadable file."""
        generation = {}
        if (folder / GENERATION).is_file():
            generation = read_foreign(folder / GENERATION)
        config = read_foreign(folder / _CONFIG)
        given = config.get("model_type")
        model_type = given if isinstance(given, str) else None
        eos_ids = _eos_ids(folder, generation, config)
        return cls(generation, eos_ids, template_in(folder), model_type)

    def bos_id(self, default: int | None) -> int | None:
        """The token that begins a text, by generation_config.json."""
        given = self.generation.get("bos_token_id")
        return given if is_whole(given) else default

    def save(self, folder: Path, *, bos_id: int | None, eos_ids: list[int]) -> None:
        """Write generation_config.json, and the chat template if there is one."""
        ids = {"bos_token_id": bos_id, "eos_token_id": one_or_all(eos_ids)}
        with replacing(folder / GENERATION) as path:
            path.write_text(json.dumps({**self.generation, **ids}, indent=2) + "\n", "utf-8")
        if self.chat_template is not None:
            with replacing(folder / TEMPLATE) as path:
                path.write_text(self.chat_template, "utf-8", newline="")


def one_or_all(ids: list[int]) -> int | list[int] | None:
    """Token ids in the format of Hugging Face's files."""
    return ids if len(ids) > 1 else next(iter(ids), None)


def _eos_ids(
    folder: Path, generation: Mapping[str, object], config: Mapping[str, object]
) -> tuple[int, ...]:
    """The end-of-text ids, from generation_config.json or else config.json."""
    path, given = folder / GENERATION, generation.get("eos_token_id")
    if given is None:
        path, given = folder / _CONFIG, config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(map(is_whole, ids)):
        raise UserError(
            f"{path}: eos_token_id={given!r:.60} is neither a token id nor a list of them"
        )
    return tuple(dict.fromkeys(ids))
