"""Scalings of rotary positions, in the format of Hugging Face's rope_scaling."""

from __future__ import annotations

_MSCALES = ("mscale", "mscale_all_dim")
_YARN = ("attention_factor", "beta_fast", "beta_slow", *_MSCALES, "truncate")
# Scalings' lists, with a number for each pair of rotated dimensions.
BY_PAIR = ("short_factor", "long_factor")
# By rope_type: the other keys that a scaling requires, and those that it allows.
ROPE_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (("factor", "original_max_position_embeddings"), _YARN),
    "longrope": ((*BY_PAIR, "factor", "attention_factor", "original_max_position_embeddings"), ()),
}
RopeScaling = dict[str, str | bool | int | float | list[float]]


def known_scaling(scaling: RopeScaling | None) -> RopeScaling | None:
    """Check a scaling of rotary positions."""
    if scaling is None:
        return None
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_SCALINGS)}")
    needed, optional = ROPE_SCALINGS[kind]
    given = scaling.keys() - {"rope_type"}
    if missing := [key for key in needed if key not in given]:
        raise ValueError(f"rope_type {kind} also needs {', '.join(missing)}")
    if unknown := sorted(given - {*needed, *optional}):
        raise ValueError(
            f"rope_type {kind} takes {', '.join((*needed, *optional))}, not {unknown[0]}"
        )
    for key in given - {"truncate"}:
        value = scaling[key]
        if isinstance(value, list) is not (key in BY_PAIR):
            raise ValueError(f"{key} must be a {'list' if key in BY_PAIR else 'number'}")
        for number in value if isinstance(value, list) else [value]:
            is_off = number == 0 and key in _MSCALES  # YaRN then goes by the factor alone
            if isinstance(number, (bool, str)) or not (is_off or 1e-6 <= number <= 1e10):
                raise ValueError(f"{key} must be a number from 1e-6 to 1e10")
    if not isinstance(scaling.get("truncate", True), bool):
        raise ValueError("truncate must be true or false")
    return scaling
