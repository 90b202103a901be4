"""Safetensors written one tensor at a time, against the library's own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from gptray.model.tensor_file import write_tensors


def test_the_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5).t(),
        "a": torch.tensor(7.0),
        "a.b": torch.zeros(0, 4),
        "B": torch.randn(11),
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    theirs = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for metadata in (None, {"format": "pt"}):
        write_tensors(tmp_path / "ours", shapes, tensors.__getitem__, metadata)
        save_file(theirs, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
