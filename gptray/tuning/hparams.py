"""A sweep for TensorBoard's HParams plugin: each trial's settings and best result.

A trial is a session of the plugin, in the folder above its curves. Its files have fixed names, so
that each is written once, however often the sweep is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.summary import scalar

from gptray.config import load_config
from gptray.storage.files import replacing, storing
from gptray.storage.record import METRICS
from gptray.training.board import VERSION, record
from gptray.tuning.levels import Space, value_text
from gptray.tuning.sweep_record import Trial, load_trials, trial_dir

PLUGIN = "hparams"
# TensorBoard reads the files of a folder in the order of their names.
START, END = "events.out.tfevents.0000000001.hparams", "events.out.tfevents.0000000002.hparams"


def write_hparams(folder: Path) -> None:
    """Write a sweep's missing HParams files; rewrite the ends of trials that have continued."""
    space = Space(load_config(str(folder / "config.yaml"), []))
    for trial in load_trials(folder):
        if not trial.started:
            continue
        session = trial_dir(folder, trial.name) / "tensorboard" / trial.name
        start = _start(space.settings(trial))
        _write(session / START, _summary("session_start_info", session_start_info=start))
        rows = trial_dir(folder, trial.name) / METRICS
        end = session / END
        is_old = rows.exists() and end.exists() and rows.stat().st_mtime >= end.stat().st_mtime
        if not trial.outcome or is_old:
            end.unlink(missing_ok=True)
        if trial.outcome:
            _write(end, *_end(trial))


def _start(values: Mapping[str, object]) -> SessionStartInfo:
    info = SessionStartInfo(start_time_secs=time.time())
    for path, value in values.items():
        if isinstance(value, bool):
            info.hparams[path].bool_value = value
        elif isinstance(value, (int, float)):
            info.hparams[path].number_value = value
        else:
            info.hparams[path].string_value = value_text(value)
    return info


def _end(trial: Trial) -> list[Summary]:
    is_good = trial.outcome not in ("diverged", "failed")
    status = Status.Value("STATUS_SUCCESS" if is_good else "STATUS_FAILURE")
    info = SessionEndInfo(status=status, end_time_secs=time.time())
    best = trial.best
    found = [
        scalar("best_bpb", best["val_bpb"]),
        scalar("best_loss", best["val_loss"]),
        scalar("best_step", best["step"]),
    ] if best else []  # fmt: skip
    return [*found, _summary("session_end_info", session_end_info=info)]


def _summary(tag: str, **content: object) -> Summary:
    data = HParamsPluginData(version=0, **content).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=data)
    value = Summary.Value(tag=f"_hparams_/{tag}", metadata=SummaryMetadata(plugin_data=plugin))
    return Summary(value=[value])


def _write(path: Path, *summaries: Summary) -> None:
    """Write an event file atomically, unless it exists."""
    if path.exists():
        return
    events = [Event(file_version=VERSION), *(Event(summary=one) for one in summaries)]
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_bytes(b"".join(map(record, events)))
