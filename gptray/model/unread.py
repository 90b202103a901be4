"""A network whose weights are read from their files lazily, one at a time.

So memory holds only what is made from them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gptray.model.gpt import GPT
from gptray.model.hf import from_file, network_of
from gptray.model.parameters import Part, stored_parts
from gptray.model.rounding import check_tied, rounded
from gptray.model.shape import model_folder
from gptray.model.stored_weights import stored_model
from gptray.model.usage import Usage


def unread_network(source: str | Path) -> GPT:
    """The network of a model folder; its `GPT.full_tensor` reads a parameter, in fp32 on the CPU.

    Raises UserError as `load_pretrained` does, and in `GPT.full_tensor` for numbers that are not
    finite.
    """
    folder = model_folder(source)
    model, stored = network_of(folder, device="meta").eval(), stored_model(folder)
    model.usage = Usage.of(folder)
    check_tied(stored)
    config, weights = model.config, stored.weights
    names: dict[Tensor, str] = {one: name for name, one in model.named_parameters()}
    parts = dict[str, list[Part]]()
    for part in stored_parts(config, stored.family, model.valid_vocab_size):
        parts.setdefault(part.parameter, []).append(part)

    def read(parameter: Tensor) -> Tensor:
        whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        for part in parts[names[parameter]]:
            rows = from_file(rounded(weights[part.name], torch.float32), part, config)
            whole[part.start : part.start + part.rows] = rows
        return whole

    model.full_tensor = read
    return model
