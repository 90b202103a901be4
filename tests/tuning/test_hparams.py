"""A sweep in TensorBoard's HParams."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from gptray.tuning.hparams import write_hparams
from gptray.tuning.sweep_record import Record
from tests.tuning.sweeps import Made, sweep_config, write_metrics, write_sweep

SPACE: list[dict[str, Any]] = [
    {"path": "model.dropout", "uniform": [0.05, 0.3]},
    {"path": "model.residual", "choice": [True, False]},
    {"path": "data.split", "choice": ["90:10", "80:10:10"]},
]
VALUES = {"model.dropout": 0.25, "model.residual": False, "data.split": "80:10:10"}
CURVE = [(2.5, 0.1), (2.25, 0.25), (2.75, 0.5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = [
        Made("0000", {}, CURVE),
        Made("0001", VALUES, CURVE, None),
        Made("0002", VALUES, CURVE, "diverged"),
        Made("0003", VALUES, [], None, started=False),
    ]
    return write_sweep(tmp_path / "sweep", sweep_config(SPACE), made)


def events(folder: Path) -> list[Event]:
    """The events of a folder's files, in TensorBoard's order."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def session(folder: Path, trial: str) -> tuple[list[HParamsPluginData], dict[str, float]]:
    """What the plugin is told of a trial, and its scalars."""
    told, scalars = [], {}
    for event in events(folder / "trials" / trial / "tensorboard" / trial):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                told.append(HParamsPluginData.FromString(value.metadata.plugin_data.content))
            else:
                scalars[value.tag] = value.simple_value
    return told, scalars


def test_every_trial_that_began_is_a_session(folder: Path) -> None:
    write_hparams(folder)
    (start, end), scalars = session(folder, "0000")
    assert start.session_start_info.hparams["model.residual"].bool_value is True
    assert start.session_start_info.hparams["model.dropout"].number_value == 0
    assert scalars == {"best_bpb": 2.25, "best_loss": 5.625, "best_step": 20}
    assert end.session_end_info.status == 1  # STATUS_SUCCESS
    (start,), scalars = session(folder, "0001")
    assert start.session_start_info.hparams["data.split"].string_value == "80:10:10"
    assert scalars == {}
    assert session(folder, "0002")[0][1].session_end_info.status == 2  # STATUS_FAILURE
    assert session(folder, "0003") == ([], {})


def test_nothing_is_told_twice_and_a_retried_trial_ends_anew(folder: Path) -> None:
    record = Record(folder)
    for _ in range(2):
        write_hparams(folder)
    record.write("ended", trial="0001", outcome="failed", step=30, passing=True)
    write_hparams(folder)
    record.write("retried", trial="0001")
    write_hparams(folder)
    record.write("ended", trial="0001", outcome="finished", step=30)
    write_hparams(folder)
    (_, end), scalars = session(folder, "0001")
    assert end.session_end_info.status == 1 and scalars["best_bpb"] == 2.25


def test_a_trial_that_went_on_from_a_rung_has_its_last_end(folder: Path) -> None:
    record = Record(folder)
    record.write("ended", trial="0001", outcome="stopped", step=30)
    write_hparams(folder)
    record.write("promoted", trial="0001")
    write_metrics(folder, sweep_config(SPACE), Made("0001", VALUES, [*CURVE, (2.0, 0.5)]))
    record.write("ended", trial="0001", outcome="finished", step=40)
    write_hparams(folder)
    assert session(folder, "0001")[1]["best_bpb"] == 2.0


def test_tensorboard_lists_the_sessions(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import backend_context

    write_hparams(folder)
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider))
    asked, found = RequestContext(), context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(asked, "", True, found, None)
    assert {info.name for info in experiment.hparam_infos} == set(VALUES)
    assert "best_bpb" in {info.name.tag for info in experiment.metric_infos}
