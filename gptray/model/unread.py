"""A network whose weights stay in their files until each is asked for, one at a time.

So that what is made of them is all that memory holds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gptray.config import UserError
from gptray.model.gpt import GPT
from gptray.model.hf import from_file, network_of
from gptray.model.parameters import Part, stored_parts
from gptray.model.rounding import check_tied, read_weight
from gptray.model.shape import model_folder
from gptray.model.stored_weights import StoredModel, stored_model
from gptray.model.usage import Usage


def unread_network(source: str | Path) -> GPT:
    """The network of a model folder: `GPT.whole` reads a parameter, in fp32 on the CPU.

    Raises UserError as `load_pretrained`; `GPT.whole` too, for numbers that are not finite.
    """
    folder = model_folder(source)
    model, stored = network_of(folder, device="meta").eval(), stored_model(folder)
    model.usage = Usage.of(folder)
    check_tied(stored)
    model.whole = _Reader(model, stored).read
    return model


class _Reader:
    def __init__(self, model: GPT, stored: StoredModel) -> None:
        self._stored, self._config = stored, model.config
        self._names: dict[Tensor, str] = {one: name for name, one in model.named_parameters()}
        self._parts: dict[str, list[Part]] = {}
        for part in stored_parts(model.config, stored.family, model.valid_vocab_size):
            self._parts.setdefault(part.parameter, []).append(part)

    def read(self, parameter: Tensor) -> Tensor:
        """The numbers of one of the network's parameters."""
        whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        for part in self._parts[self._names[parameter]]:
            stored = self._stored.weights[part.name]
            rows = from_file(read_weight(stored), part, self._config)
            if not bool(torch.isfinite(rows.float().sum())):
                raise UserError(
                    f"{stored.path}: {stored.key} is not finite: the weights are damaged, or "
                    "training diverged"
                )
            whole[part.start : part.start + part.rows] = rows
        return whole
