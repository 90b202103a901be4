"""Reads an adapter's settings from PEFT's adapter_config.json; only plain LoRA is supported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gptray.config import LoraConfig, UserError
from gptray.storage.stored import is_whole

# Keys of adapter_config.json that are read, and those without effect on a trained adapter.
_READ = {
    "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "peft_type",
    "base_model_name_or_path", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "bias", "rank_pattern", "alpha_pattern",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
# Initialisations that leave the base's weights unchanged.
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


def settings_of(path: Path, raw: Mapping[str, object]) -> LoraConfig:
    """The settings of an adapter. Raises UserError for anything but plain LoRA."""
    if raw.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type={raw.get('peft_type')!r:.60} is not supported, only LORA"
        )
    if (begun := raw.get("init_lora_weights", True)) not in _BEGINNINGS:
        raise UserError(
            f"{path}: init_lora_weights={begun!r:.60} changed the weights of the base; PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) converts it"
        )
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias={raw['bias']!r:.60} is not supported, only 'none'")
    for key, value in raw.items():
        if value and key not in _READ | _WITHOUT_EFFECT:
            raise UserError(f"{path}: {key}={value!r:.60} is not supported, only plain LoRA")
    return LoraConfig(
        rank=_rank(path, "r", raw.get("r")),
        alpha=_alpha(path, "lora_alpha", raw.get("lora_alpha")),
        use_rslora=bool(raw.get("use_rslora", False)),
    )


def _rank(path: Path, key: str, given: object) -> int:
    if is_whole(given, least=1):
        return given
    raise UserError(f"{path}: {key}={given!r:.60} is not a rank")


def _alpha(path: Path, key: str, given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < 1e9:
        raise UserError(f"{path}: {key}={given!r:.60} is not a number above 0")
    return given


def own_settings(
    path: Path, raw: Mapping[str, object], lora: LoraConfig, modules: Iterable[str]
) -> dict[str, LoraConfig]:
    """The settings of modules with their own rank_pattern or alpha_pattern. Raises UserError."""
    ranks = _by_pattern(path, raw, "rank_pattern", _rank)
    alphas = _by_pattern(path, raw, "alpha_pattern", _alpha)
    found = {}
    for module in modules:
        own = {"rank": _first_match(ranks, module), "alpha": _first_match(alphas, module)}
        if changes := {key: value for key, value in own.items() if value is not None}:
            found[module] = lora.model_copy(update=changes)
    return found


def _by_pattern(
    path: Path, raw: Mapping[str, object], key: str, read: Callable[[Path, str, object], float]
) -> dict[re.Pattern[str], float]:
    """Numbers by regular expressions for the ends of module names, as in PEFT."""
    given = raw.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: {key}={given!r:.60} is not a JSON object")
    found = {}
    for name, number in given.items():
        try:
            pattern = re.compile(rf"(.*\.)?({name})$")
        except re.error as error:
            raise UserError(f"{path}: {key}: {name!r:.60}: {error}") from None
        found[pattern] = read(path, f"{key}[{name!r:.60}]", number)
    return found


def _first_match(numbers: Mapping[re.Pattern[str], float], module: str) -> float | None:
    return next((one for pattern, one in numbers.items() if pattern.match(module)), None)
