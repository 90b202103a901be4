"""TensorBoard's file: records that its reader takes, also after a disk was full."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter, masked_crc32c
from tensorboardX.summary import scalar, text

from gptray.config import RunFailed
from gptray.training.board import Board, Boards
from tests.full_disk import files_up_to


def records(folder: Path) -> list[Event]:
    """The events of the only file, their checksums checked."""
    (path,) = folder.iterdir()
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        sums = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length :][:4])
        assert sums == (masked_crc32c(data[:8]), masked_crc32c(body))
        events.append(Event.FromString(body))
        data = data[16 + length :]
    return events


def test_curves_and_texts_are_events_of_their_steps(tmp_path: Path) -> None:
    board = Board(tmp_path, step=20)
    board.add(21, scalar("train_loss", 2.5))
    board.add(21, scalar("lr", 0.125))
    board.add(21, text("samples", "once upon"))
    board.flush()
    version, start, *shown = records(tmp_path)
    assert version.file_version == "brain.Event:2" and "tfevents" in next(tmp_path.iterdir()).name
    assert start.step == 21 and start.session_log.status == SessionLog.START
    assert [one.step for one in shown] == [21, 21, 21]
    values = {one.summary.value[0].tag: one.summary.value[0] for one in shown}
    assert values["train_loss"].simple_value == 2.5 and values["lr"].simple_value == 0.125
    assert values["samples/text_summary"].tensor.string_val == [b"once upon"]


def test_both_losses_have_one_tag_in_two_folders_named_after_the_run(tmp_path: Path) -> None:
    boards = Boards(tmp_path, "book", step=0)
    boards.add_scalars(
        5, {"train_loss": 2.0, "lr": 0.1, "val_loss": 3.0, "val_bpb": 1.5, "gap": 1.0}
    )
    boards.add_text(5, "samples", "once upon")
    boards.flush()
    shown = {
        name: {
            one.summary.value[0].tag: one.summary.value[0].simple_value
            for one in records(tmp_path / "book" / name)[2:]
        }
        for name in ("train", "val")
    }
    assert shown["train"] == pytest.approx({"loss": 2.0, "lr": 0.1})
    assert shown["val"] == {"loss": 3.0, "bpb": 1.5, "gap": 1.0, "samples/text_summary": 0.0}


def test_tensorboard_reads_both(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_multiplexer")
    boards = Boards(tmp_path / "tensorboard", "book", step=0)
    boards.add_scalars(5, {"train_loss": 2.0, "val_loss": 3.0})
    boards.flush()
    found = reader.EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    losses = {run: found.Scalars(run, "loss")[0].value for run in found.Runs()}
    assert losses == {"book/train": 2.0, "book/val": 3.0}


def test_records_are_those_of_the_library(tmp_path: Path) -> None:
    board = Board(tmp_path / "ours", step=0)
    board.flush()
    (ours,) = (tmp_path / "ours").iterdir()
    writer = RecordWriter(str(tmp_path / "theirs"))
    for event in records(tmp_path / "ours"):
        writer.write(event.SerializeToString())
    writer.close()
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_points_wait_for_room(tmp_path: Path) -> None:
    board = Board(tmp_path, step=0)
    board.flush()
    board.add(1, scalar("train_loss", 2.0))
    size = next(tmp_path.iterdir()).stat().st_size
    with files_up_to(size + 10), pytest.raises(RunFailed, match="cannot write .*tfevents"):
        board.flush()
    assert len(records(tmp_path)) == 2
    board.add(2, scalar("train_loss", 1.0))
    board.flush()
    assert [one.step for one in records(tmp_path)[2:]] == [1, 2]
