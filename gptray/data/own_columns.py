"""Columns of a batch job's output: its own, those of the input, and clashes between their names.

No input column is renamed or dropped silently: one whose name the job needs is refused, or gets
the prefix that the user chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from gptray.config import GenerateConfig, UserError
from gptray.config.limits import SAMPLING
from gptray.config.suggest import ALIASES, did_you_mean, nearest
from gptray.config.use_sections import ROW_SETTINGS

OWN_COLUMNS = (
    "id", "sample", "prompt", "output", "finish_reason", "prompt_tokens", "output_tokens", "seed",
    "error", "model",
)  # fmt: skip

# Other projects' names for settings, of a row or of the job.
_MEANT = {
    alias: key.partition(".")[2] if key.startswith("sample.") else key
    for key, aliases in ALIASES.items()
    if key.partition(".")[2] in ROW_SETTINGS or key == "generate.num_samples"
    for alias in aliases.split()
}
# Settings over HTTP or in other projects that a row cannot have.
_OF_NO_ROW = {
    *SAMPLING, "ignore_eos", "bad_words", "length_penalty", "typical_p",
    "no_repeat_ngram_size", "num_beams", "do_sample",
} - {*ROW_SETTINGS}  # fmt: skip


def setting_columns(names: Sequence[str], settings: GenerateConfig) -> list[str]:
    """The columns that hold sampling settings for their row."""
    chosen = settings.settings_from_columns
    if isinstance(chosen, bool):
        chosen = list(ROW_SETTINGS) if chosen else []
    return [name for name in names if name in chosen]


def passed_names(
    names: Sequence[str],
    settings: GenerateConfig,
    id_column: str | None,
    prompt_column: str | None,
) -> dict[str, str]:
    """The output's name for each input column, except those that become the output's own columns.

    Those are the id, the prompt and the seed if their columns have these names. Raises UserError,
    naming every other column whose name clashes with the job's own.
    """
    prefix = settings.prefix
    shown = {own for own, name in (("id", id_column), ("prompt", prompt_column)) if own == name}
    if prefix is None and prompt_column and "seed" in setting_columns(names, settings):
        shown.add("seed")
    own = [name for name in OWN_COLUMNS if name != "sample" or settings.num_samples > 1]
    meeting = [name for name in names if name in own and name not in shown]
    if meeting and prefix is None:
        listed = ", ".join(map(repr, meeting))
        prefixes = (f"input{number or ''}_" for number in count())
        free = next(one for one in prefixes if not {one + name for name in meeting} & {*names})
        raise UserError(
            f"generate.input_path: the output has columns of its own named {listed}; rename them "
            f"in the input, or pass them through under other names: generate.prefix={free} turns "
            f"{meeting[0]!r} into {free}{meeting[0]}"
        )
    passed = {
        name: f"{prefix}{name}" if name in meeting else name for name in names if name not in shown
    }
    clashing = [name for name in meeting if passed[name] in {*names, *own}]
    if clashing:
        raise UserError(
            f"generate.prefix={prefix}: {clashing[0]!r} would become {passed[clashing[0]]!r}, "
            "which also exists; choose another prefix"
        )
    return passed


def near_misses(names: Sequence[str], settings: GenerateConfig) -> list[str]:
    """Messages about columns that pass through but are named like a setting, or almost."""
    if settings.settings_from_columns is not True:
        return []
    told = []
    known = {*ROW_SETTINGS, *OWN_COLUMNS, settings.prompt_column, settings.id_column}
    for name in names:
        meant = _MEANT.get(name.lower()) or nearest(name.lower(), ROW_SETTINGS, cutoff=0.8)
        if name not in known and meant:
            told.append(f"column {name!r} is passed through{did_you_mean(meant)}")
    without_effect = [name for name in names if name in _OF_NO_ROW - known]
    if without_effect:
        told.append(
            "columns that are passed through without effect, since a row cannot set them: "
            f"{', '.join(without_effect)}"
        )
    return told
