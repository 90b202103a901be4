"""A run's folder: the resolved config and the run's results.

Imports neither torch nor Ray: every mistake is reported before anything expensive starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from gptray.config import Config, EvaluateConfig, RunFailed, UserError, flatten, override
from gptray.config.keys import shown
from gptray.config.names import slug
from gptray.evaluation.forgetting import also_scores, changes_of
from gptray.evaluation.model_commands import home_of
from gptray.gguf.conversion import is_gguf, named_as_given
from gptray.jobs.models import locate, not_adapter, unknown, with_tokenizer
from gptray.model.families import SHAPE
from gptray.model.header import check_weights
from gptray.model.shape import model_folder, read_shape
from gptray.model.usage import Usage
from gptray.storage.files import absolute, expanded, is_uri, storing
from gptray.storage.hub import NotOnHub
from gptray.storage.node_cache import storage_folder
from gptray.storage.record import METRICS, last_event, read_events, read_metrics, teachers_of
from gptray.storage.remote_folder import RemoteFolder
from gptray.storage.stored import Unreadable, read_object
from gptray.training.landing import landing_gain, why_stopped

# Keys that do not change what is trained, so a run may resume with other values.
FREE_KEYS = (
    "name",
    "storage_path",
    "compute.",
    "model.checkpoint_blocks",
    "track.",
    "sample.",
    "generate.",
    # The texts of evaluate.also are scored before the first step, and at every evaluation.
    *(f"evaluate.{name}" for name in EvaluateConfig.model_fields if name != "also"),
    "quantize.",
    "serve.",
    "export.",
    "tune.",
    "train.resume",
)
SWEEP_FREE_KEYS = (
    *(key for key in FREE_KEYS if key != "tune."),
    "tune.max_concurrent_trials",
    "tune.retry_failed",
)
INIT_FROM = "model.init_from"


def free_keys(config: Config, *, sweep: bool = False) -> tuple[str, ...]:
    """The keys that may have other values when a run, or a sweep, resumes.

    With an adapter, quantize.weights is not free, since it changes the base.
    """
    keys = SWEEP_FREE_KEYS if sweep else FREE_KEYS
    return keys if config.lora.rank is None else tuple(key for key in keys if key != "quantize.")


def resolve(config: Config, *, sweep: bool = False) -> Config:
    """Complete the config: shape, tokenizer, storage path and, for a run or a sweep, name.

    Raises UserError if model.init_from is not a model, or a given key contradicts its shape.
    """
    config = with_tokenizer(config)
    values: dict[str, object] = {
        "storage_path": config.storage_path.rstrip("/")
        if is_uri(config.storage_path)
        else str(absolute(config.storage_path, key="storage_path"))
    }
    if config.model.init_from:
        values |= _shape_of(config, config.model.init_from)
        if config.derives_lr:
            width = {"n_embd": values["model.n_embd"]}
            sized = config.model_copy(update={"model": config.model.model_copy(update=width)})
            values["optim.lr"] = float(f"{sized.tuning_lr:.2g}")
    elif config.data.tokenizer is None:
        values["data.tokenizer"] = "bpe"
    key = "train.teachers"
    values[key] = [_absolute(locate(config, one, key=key)) for one in config.train.teachers]
    resolved = override(config, values)
    if resolved.name:
        return resolved
    return override(resolved, {"name": _free_name(resolved, sweep=sweep)})


def run_dir(config: Config) -> Path:
    """The folder of a resolved config's run; for an object store, the local one."""
    assert config.name, "resolve the config first"
    return storage_folder(config.storage_path) / config.name


def run_place(config: Config) -> str:
    """Where users find a resolved config's run: its folder or its URI."""
    return home_of(config) or str(run_dir(config))


def set_ray_snapshot_aside(folder: Path) -> str | None:
    """Move Ray Train's own record of a run out of the way; returns a line if it was damaged.

    Ray writes `checkpoint_manager_snapshot.json` in place and fails to start with an empty,
    truncated or outdated one. gptray resumes from its own verified checkpoints without it.
    """
    snapshot = folder / "checkpoint_manager_snapshot.json"
    is_torn = False
    try:
        read_object(snapshot, most=None)
    except FileNotFoundError:
        return None
    except Unreadable:
        is_torn = True
    with storing(snapshot):
        os.replace(snapshot, folder / ".checkpoint_manager_snapshot.before.json")
    return f"Ray's {snapshot.name} was torn; resuming without it" if is_torn else None


def outcome(config: Config) -> dict[str, object]:
    """The run's results from its metrics: the job's JSON line.

    `train_loss` and `val_*` belong to `best_step`, the model in `model_dir`; `last_*` to the last
    evaluation, and `base_*` to the weights of model.init_from. `also` has bits per byte of the
    texts of evaluate.also, by name, under those weights and under the model. `val_lost` is the
    share of the validation text that the tokenizer loses. `landed`: whether the model is from the
    cool-down; `landing_gain`: see `gptray.training.landing`. `teachers`: the sha256 of each
    teacher's weights.
    """
    folder = run_dir(config)
    rows, events = read_metrics(folder), read_events(folder)
    evaluations = [row for row in rows if "val_loss" in row]
    if not evaluations:
        raise RunFailed(f"{folder / METRICS} has no evaluation")
    best, last = min(evaluations, key=lambda row: row["val_loss"]), evaluations[-1]
    rates = sorted(row["tokens_per_sec"] for row in rows)
    base = last_event(events, "base")
    return {
        "run_dir": run_place(config),
        "model_dir": f"{run_place(config)}/model",
        "step": last["step"],
        "best_step": best["step"],
        "train_loss": best["train_loss"],
        "val_loss": best["val_loss"],
        "base_val_loss": base and base["val_loss"],
        "base_val_bpb": base and base.get("val_bpb"),
        "also": also_scores(changes_of(rows, events)),
        "val_ppl": best["val_ppl"],
        "val_bpb": best["val_bpb"],
        "val_lost": best.get("val_lost", 0.0),
        "last_train_loss": last["train_loss"],
        "last_val_loss": last["val_loss"],
        "stopped": why_stopped(rows, config),
        "landed": best.get("phase") == "landing",
        "landing_gain": landing_gain(rows),
        "teachers": teachers_of(events),
        "tokens_per_sec": rates[len(rates) // 2],
    }


def _shape_of(config: Config, init_from: str) -> dict[str, object]:
    init_from = locate(config, init_from, key=INIT_FROM)
    try:
        folder = model_folder(init_from, weights=False)
        with named_as_given(folder, init_from):
            network = read_shape(folder)
            if is_uri(init_from) or expanded(init_from).exists():
                check_weights(folder, network)
                Usage.of(folder)
    except NotOnHub as error:
        raise unknown(config, init_from, error.reason, key=INIT_FROM) from None
    except UserError as error:
        raise UserError(f"{INIT_FROM}: {not_adapter(init_from, key=INIT_FROM) or error}") from None
    rows = set() if config.model.resize_vocab else {"vocab_size"}  # null: the tokenizer's
    shape = network.model_dump(include={*SHAPE} | rows)
    given = config.model.model_fields_set
    free = {"dropout"}
    if network.positions == "rotary" and config.model.n_positions <= network.n_positions:
        free.add("n_positions")  # rotary angles can also serve a shorter context
    wrong = [
        f"model.{key}={_bare(getattr(config.model, key))} but {init_from} has {_bare(value)}"
        for key, value in shape.items()
        if key in given and key not in free and getattr(config.model, key) not in (value, None)
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    keys = {key: value for key, value in shape.items() if key not in free & given}
    values: dict[str, object] = {f"model.{key}": value for key, value in keys.items()}
    values["model.init_from"] = _absolute(init_from)
    if config.data.tokenizer is None:
        values["data.tokenizer"] = values["model.init_from"]
    return values


def _absolute(source: str) -> str:
    """A model's name that is valid in any working folder: a URI, an absolute path or a hub id."""
    if is_uri(source):
        return source
    if is_gguf(expanded(source)):
        return str(absolute(source))
    return str(model_folder(source).resolve()) if expanded(source).exists() else source


def _bare(value: object) -> str:
    """A value as typed on the command line."""
    return shown(value).strip("'")


def _free_name(config: Config, *, sweep: bool) -> str:
    """A name that is always the same for the config or, with train.resume=never, an unused one.

    Keys at their defaults don't count, so that the name stays when a later version adds keys.
    """
    source = config.data.source if isinstance(config.data.source, str) else config.data.source[0]
    label = slug(Path(source).stem, 24) or "run"
    free = free_keys(config, sweep=sweep)
    defaults = flatten(Config())
    identity = {
        key: value
        for key, value in flatten(config).items()
        if value != defaults[key] and not key.startswith(free)
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()
    name = unique = f"{label}{'-sweep' if sweep else ''}-{digest[:6]}"
    if config.train.resume != "never":
        return name
    number, storage = 1, config.storage_path
    remote = RemoteFolder(storage).folders() if is_uri(storage) else []
    while (Path(storage) / unique).exists() or unique in remote:
        number += 1
        unique = f"{name}-{number}"
    return unique
