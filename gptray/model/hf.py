"""Saves and loads weights in Hugging Face's layout; refuses damaged files and other networks.

`gptray.model.shape` reads config.json. Only safetensors are written or read, never a pickle. Files
are written atomically: under another name, then renamed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.config import ModelConfig, UserError
from gptray.model.families import FAMILIES
from gptray.model.gpt import GPT
from gptray.model.header import check_weights
from gptray.model.hf_config import family_in, family_of, hf_config
from gptray.model.parameters import HEAD, IGNORED, WTE, Part, stored_name, stored_parts
from gptray.model.quantized_linear import quantized_layers
from gptray.model.rounding import read_weight
from gptray.model.shape import WEIGHTS, model_folder, read_shape
from gptray.model.stored_weights import stored_weights
from gptray.model.tensor_file import write_tensors
from gptray.model.usage import Usage
from gptray.storage.files import replacing

# Parameters with one row per token.
BY_TOKEN = (WTE, HEAD)


def save_pretrained(
    model: GPT,
    folder: str | Path,
    *,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
) -> None:
    """Write config.json and model.safetensors (fp32) in the network's family's format, and the
    files of `model.usage`.

    Padding of the vocabulary is left out, so no reader can sample it. eos_token_id: ends a text, in
    addition to those of `model.usage`; one token or several. bos_token_id: begins a text; None: the
    usage's, else the first of eos_token_id.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = model.valid_vocab_size
    usage = model.usage
    more = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    ends = list(dict.fromkeys([*usage.eos_ids, *more]))
    if bos_token_id is None:
        bos_token_id = usage.bos_id(next(iter(more), None))
    model_type = family_of(model.config, usage.model_type)
    config = hf_config(model.config, rows, model_type, bos_token_id=bos_token_id, eos_ids=ends)
    family = FAMILIES[model_type]
    parts = {part.name: part for part in stored_parts(model.config, family, rows)}
    parameters = dict(model.named_parameters())

    def stored(name: str) -> Tensor:
        part = parts[name]
        weight = model.full_tensor(parameters[part.parameter])
        return to_file(weight[part.start : part.start + part.rows], part, model.config)

    shapes = {name: torch.Size(part.dims) for name, part in parts.items()}
    with replacing(folder / WEIGHTS) as path:
        write_tensors(path, shapes, stored, {"format": "pt"})
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    usage.save(folder, bos_id=bos_token_id, eos_ids=ends)


def load_pretrained(source: str | Path) -> GPT:
    """The network in a model folder, a run folder or on the hub; on the CPU, in fp32.

    Raises UserError, naming the file and what is wrong with it.
    """
    folder = model_folder(source)
    model = network_of(folder, device="cpu")
    load_weights(model, folder)
    return model


def network_of(folder: Path, *, device: str) -> GPT:
    """The network in a model folder, its weights checked but not read; "meta" takes no memory.

    Raises UserError as `load_pretrained` does.
    """
    shape = read_shape(folder)
    check_weights(folder, shape)
    with torch.device(device):
        config = shape.model_copy(update={"vocab_size": None})
        return GPT(config, vocab_size=shape.rows, seed=None)


@dataclass(frozen=True)
class Rows:
    """How to make a network's embedding from a file's.

    kept: for each of the network's tokens, its row in the file; -1: a new row. known: rows of the
    file that are tokens, not padding. seed: of the new rows.
    """

    kept: Sequence[int]
    known: int
    seed: int

    def of(self, stored: Tensor) -> Tensor:
        """Make the rows (tokens, width) from the stored ones.

        New rows are the mean of the known ones plus noise of a tenth of their spread: the model
        then gives a new token about an average probability, whereas rows near zero would take
        probability from all others. (Hewitt 2021)
        """
        stored = stored.float()
        kept = torch.tensor(self.kept)
        rows = stored[kept.clamp(min=0)]
        is_new = kept < 0
        known = stored[: self.known]
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(int(is_new.sum()), stored.size(1), generator=generator)
        rows[is_new] = known.mean(0) + 0.1 * known.std(0, correction=0) * noise
        return rows


@torch.no_grad()
def load_weights(
    model: GPT, folder: str | Path, *, stored_rows: int | None = None, rows: Rows | None = None
) -> None:
    """Copy a folder's weights, and its `Usage`, into a network of the same shape.

    stored_rows: how many rows the file's embedding has, if more than the network has tokens. Rows
    of the network beyond the file's are padding, and zeroed. rows: how to make embedding and head,
    if not the file's. Raises UserError, naming the file and the first weight that is missing,
    unknown or misshapen.
    """
    folder = Path(folder)
    family, config = family_in(folder), model.config
    model.usage = Usage.of(folder)
    parameters, quantized = dict(model.named_parameters()), quantized_layers(model)
    stored_rows = stored_rows or model.valid_vocab_size
    missing = {part.name: part for part in stored_parts(config, family, stored_rows)}
    embedding = head = None
    for stored in stored_weights(folder):
        path, key = stored.path, stored.key
        if key.endswith(IGNORED):
            continue
        tensor = read_weight(stored)
        name = stored_name(key, family)
        if name == HEAD and config.tie_word_embeddings:
            head = tensor
            continue
        if name not in missing:
            raise UserError(f"{path}: {key} is not a weight of this network, or is stored twice")
        part = missing.pop(name)
        if part.parameter == WTE:
            embedding = tensor
        if rows and part.parameter in BY_TOKEN:
            tensor = rows.of(tensor)
        if list(tensor.shape) != part.dims:
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)}, but config.json says {part.dims}"
            )
        place, weight = slice(part.start, part.start + part.rows), from_file(tensor, part, config)
        if layer := quantized.get(part.parameter):
            layer.put(place, weight)
        else:
            parameters[part.parameter][place].copy_(weight)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: {next(iter(missing))} is missing from the weights{more}")
    assert embedding is not None
    if head is not None and not torch.equal(head.float(), embedding.float()):
        raise UserError(
            f"{folder}: lm_head.weight is not the embedding, but config.json ties them "
            "(tie_word_embeddings)"
        )
    for name in parameters.keys() & BY_TOKEN:
        parameters[name][stored_rows:].zero_()


def to_file(weight: Tensor, part: Part, config: ModelConfig) -> Tensor:
    """A part's weight in the layout of its file."""
    if part.layout == "by_head":
        return _turned(weight, 1, 3, config.n_head)
    if part.layout == "by_pair":
        return _turned(weight, part.rows // config.head_width, 2, config.head_width // 2)
    if part.layout == "transposed":
        return weight.t()
    unused = part.dims[0] - part.rows
    return F.pad(weight, (0, 0, unused, 0)) if unused else weight


def from_file(stored: Tensor, part: Part, config: ModelConfig) -> Tensor:
    """A file's tensor in the layout of the network's parameter."""
    if part.layout == "by_head":
        return _turned(stored, 1, config.n_head, 3)
    if part.layout == "by_pair":
        return _turned(stored, part.rows // config.head_width, config.head_width // 2, 2)
    return stored.t() if part.layout == "transposed" else stored[-part.rows :]


def _turned(weight: Tensor, times: int, outer: int, inner: int) -> Tensor:
    """A weight with rows (times, outer, inner, ...) as one with rows (times, inner, outer, ...)."""
    return weight.view(times, outer, inner, -1).transpose(1, 2).reshape(weight.shape)
