"""The nearest valid name: single typos of every key, other projects' names, wrong sections."""

from __future__ import annotations

import random
import string

import pytest

from gptray.config import Config
from gptray.config.keys import field_specs
from gptray.config.suggest import ALIASES, nearest_keys

KEYS = list(field_specs(Config))


def typos(key: str, rng: random.Random) -> set[str]:
    """Return single-edit typos of a key: one each of a letter lost, swapped, changed, added."""
    letters = string.ascii_lowercase + "_"
    place = rng.randrange(len(key))
    found = {
        key[:place] + key[place + 1 :],
        key[:place] + key[place + 1 : place + 2] + key[place] + key[place + 2 :],
        key[:place] + rng.choice(letters) + key[place + 1 :],
        key[:place] + rng.choice(letters) + key[place:],
    }
    return found.difference(KEYS)


def test_single_typos_find_their_key() -> None:
    rng = random.Random(0)
    cases = [(typo, key) for key in KEYS for typo in sorted(typos(key, rng))]
    missed = [(typo, key) for typo, key in cases if nearest_keys(typo, KEYS) != [key]]
    assert len(cases) > 400
    assert len(missed) <= 0.05 * len(cases), missed


def test_every_alias_finds_its_key() -> None:
    for key, aliases in ALIASES.items():
        assert key in KEYS
        for alias in aliases.split():
            assert nearest_keys(alias, KEYS) == [key], alias
            assert nearest_keys(f"train.{alias}", KEYS) == [key], alias


def test_no_alias_is_a_key_or_stands_twice() -> None:
    aliases = " ".join(ALIASES.values()).split()
    assert len(set(aliases)) == len(aliases)
    assert not {key.rpartition(".")[2] for key in KEYS}.intersection(aliases)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", ["optim.lr"]),
        ("LR", ["optim.lr"]),
        ("train.lr", ["optim.lr"]),
        ("optim.learning_rate", ["optim.lr"]),
        ("learning-rate", ["optim.lr"]),
        ("learning_rat", ["optim.lr"]),
        ("train.batchsize", ["train.global_batch_size"]),
        ("num_worker", ["compute.num_workers"]),
        ("optm.warmup", ["optim.warmup_steps"]),
        ("train.vocab_size", ["data.vocab_size", "model.vocab_size"]),
        ("modl.vocab_size", ["model.vocab_size"]),
        ("qqq.zzz", []),
    ],
)
def test_wrong_key_names_the_likely_ones(typed: str, meant: list[str]) -> None:
    assert nearest_keys(typed, KEYS) == meant
