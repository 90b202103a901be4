"""What writes says where there is no room, and leaves what was there as it was."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import save_file

from gptray.config import RunFailed, UserError
from gptray.storage.files import (
    append,
    check_writable,
    open_lock,
    remove,
    replacing,
    sha256_of,
    storing,
)
from gptray.storage.stored import MAX_BYTES, Unreadable, read_bytes
from tests.full_disk import files_up_to


def test_full_device_is_told_with_path_reason_and_room() -> None:
    pattern = (
        r"cannot write /dev/full: No space left on device \([\d,]+ bytes free\); "
        "the same command resumes once there is room"
    )
    with pytest.raises(RunFailed, match=pattern), storing(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"x")


def test_tensors_that_find_no_room_are_told_in_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with (
        pytest.raises(RunFailed, match=f"cannot write {path}: File too large "),
        storing(path),
        files_up_to(1000),
    ):
        save_file({"weights": torch.zeros(10_000)}, path)


def test_copied_folder_is_told_by_the_first_file_that_failed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "big").write_bytes(b"x" * 5000)
    target = tmp_path / "target"
    with (
        pytest.raises(RunFailed, match=rf"cannot write {target}: File too large"),
        storing(target),
        files_up_to(1000),
    ):
        shutil.copytree(source, target)


def test_path_that_cannot_be_replaced_stays_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text("before", "utf-8")
    with pytest.raises(OSError), files_up_to(1000), replacing(path) as draft:
        draft.write_bytes(b"x" * 5000)
    assert path.read_text("utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_path_each_have_a_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to be moved
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_looked_at_by_many_at_once(tmp_path: Path) -> None:
    def look(_: int) -> None:
        check_writable(tmp_path / "new", key="storage_path")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(400)))
    assert list(tmp_path.iterdir()) == []


def test_appended_piece_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    append(path, b"first\n")
    with pytest.raises(OSError), files_up_to(10):
        append(path, b"second that finds room for some of it\n")
    assert path.read_bytes() == b"first\n"
    append(path, b"second\n", sync=True)
    assert path.read_bytes() == b"first\nsecond\n"


def test_line_that_a_crash_cut_off_is_dropped_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"first\nsec")
    append(path, b"second\n", cut_torn=True)
    assert path.read_bytes() == b"first\nsecond\n"


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("file/run", "file is not a folder"),
        ("file", "file is not a folder"),
        ("n" * 300, "is too long"),
        ("/".join(["n" * 200] * 20), "is too long"),
        ("/proc/nothing", "cannot be written"),
        ("link/run", "link is a broken link"),
        ("s3:/bucket", "s3:/ does not begin a URI; write s3://bucket/folder"),
        ("file:/run", "file:/ does not begin a URI; write file:///folder"),
    ],
)
def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, folder: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"storage_path=x: .*{reason}"):
        check_writable(tmp_path / folder, key="storage_path=x")


def test_looking_at_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "run", key="storage_path")
    assert not list(tmp_path.iterdir())


def test_arrow_files_that_find_no_room_are_told_in_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    stream = LocalFileSystem().open_output_stream(str(path), buffer_size=0)
    told = pytest.raises(RunFailed, match=rf"cannot write {path}: File too large \(")
    with told, storing(path), files_up_to(10):
        stream.write(b"x" * 5000)
    stream.close()


@pytest.mark.parametrize("kind", [TimeoutError, ConnectionError])
def test_only_the_systems_timeouts_are_the_storages(tmp_path: Path, kind: type[OSError]) -> None:
    with pytest.raises(kind, match="^no answer$"), storing(tmp_path):
        raise kind("no answer")
    told = pytest.raises(RunFailed, match=f"^cannot write {tmp_path}: Connection timed out")
    with told, storing(tmp_path):
        raise kind(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))  # of a share


@pytest.mark.parametrize("write", [lambda path: append(path, b"x\n"), open_lock])
def test_neither_a_log_nor_a_lock_is_written_through_a_link_or_a_pipe(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunFailed, match="link: it is a link"), storing(tmp_path / "link"):
        write(tmp_path / "link")
    with pytest.raises(RunFailed, match="pipe: it is not a regular"), storing(tmp_path / "pipe"):
        write(tmp_path / "pipe")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("read", [read_bytes, sha256_of])
def test_only_regular_files_are_read(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(__file__)
    assert read(tmp_path / "link") == read(Path(__file__))
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises((OSError, Unreadable), match="it is not a regular file"):
            read(path)
    with pytest.raises((OSError, Unreadable), match="embedded null"):
        read(tmp_path / "a\0b")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere")


def test_a_link_is_removed_without_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dead").symlink_to("nowhere")
    for name in ("link", "dead", "never there"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "precious").exists()


@pytest.mark.parametrize("size", [0, 10, MAX_BYTES + 1])
def test_a_small_file_is_read_and_a_large_one_refused_unread(tmp_path: Path, size: int) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    if size > MAX_BYTES:
        with pytest.raises(Unreadable, match="it is too large"):
            read_bytes(tmp_path / "sparse")
    else:
        assert read_bytes(tmp_path / "sparse") == b"\0" * size
