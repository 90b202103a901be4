"""keys.txt lists every key with its default, so that none changes in passing."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config
from gptray.config.keys import field_specs, shown

LIST = Path(__file__).with_name("keys.txt")
WHAT_TO_DO = """\
The keys of the config and tests/config/keys.txt differ. Users type these keys and their saved
configs hold them, so a change must be meant. If it is, write the lines above with + into keys.txt,
in their places, delete those with -, and tell of it in CHANGELOG.md."""


def test_every_key_and_its_default_has_a_line_in_the_list() -> None:
    keys = [f"{key}={shown(spec.default)}" for key, spec in field_specs(Config).items()]
    listed = LIST.read_text(encoding="utf-8").splitlines()
    changes = [f"+ {line}" for line in keys if line not in listed]
    changes += [f"- {line}" for line in listed if line not in keys]
    assert not changes, "\n".join([*changes, WHAT_TO_DO])
    assert listed == keys, "tests/config/keys.txt must list the keys in the order of --help"
