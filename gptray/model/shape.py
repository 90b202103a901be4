"""The shape of a network on disk: find its folder, read its config.json, count its parameters.

No torch here, so that a dry run answers at once. Weights are `gptray.model.hf`'s.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

from pydantic import ValidationError

from gptray.config import ModelConfig, UserError
from gptray.files import expanded, is_uri
from gptray.gguf_source import is_gguf, opened_gguf
from gptray.hub import download_model
from gptray.node_cache import fetched_holder
from gptray.stored import is_whole, read_foreign

# A network that GPT-2's classes would load and compute differently says so by its model_type.
MODEL_TYPES: dict[tuple[str, bool], str] = {
    ("layernorm", True): "gpt2",
    ("none", True): "gptray-gpt2-nonorm",
    ("layernorm", False): "gptray-gpt2-noresidual",
    ("none", False): "gptray-gpt2-nonorm-noresidual",
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
# Of a folder that a URI names: what makes it a model, and what is fetched of it.
_HOLDING = re.compile(r"config\.json")
_FETCHED = re.compile(r"(?!manifest\.json)[\w-][\w.-]*\.(json|txt|model|safetensors)")
# Of a dimension; what is beyond is no network.
_MOST = 2**31 - 1
# What this network always does, under HF's names, with HF's default first.
FIXED: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# Of HF's GPT2Config, for files that leave a field out.
DEFAULTS: dict[str, object] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
}


def model_folder(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder with config.json for a model or run folder, a GGUF file or a hub id.

    What a URI names is fetched to this node's cache; of a GGUF file one is made there. A hub id is
    downloaded: config.json, and with `weights` the safetensors and tokenizer files. Raises NotOnHub
    for what is no folder and not there; UserError for a folder without a model.
    """
    if is_uri(source):
        what = "no config.json in it or in its model/, so this is no model"
        return fetched_holder(str(source), ("model",), _HOLDING, _FETCHED, what=what)
    folder = expanded(source)
    if is_gguf(folder):
        return opened_gguf(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if folder.exists():
        raise UserError(f"{folder}: no config.json in it or in its model/, so this is no model")
    return _download(str(source), weights=weights)


def _download(hub_id: str, *, weights: bool) -> Path:
    wanted = ["config.json"]
    if weights:
        wanted += ["*.safetensors", "*.safetensors.index.json"]
        wanted += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    folder = download_model(hub_id, wanted)
    if not (folder / "config.json").is_file():
        raise UserError(f"{hub_id}: this hub repository has no config.json")
    return folder


class NetworkShape(TypedDict):
    """ModelConfig's fields that shape a network; vocab_size: rows of the embedding."""

    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int | None
    n_positions: int
    vocab_size: NotRequired[int]
    dropout: float
    norm: Literal["layernorm", "none"]
    residual: bool
    layer_norm_epsilon: float
    initializer_range: float


def read_shape(source: str | Path, *, weights: bool = False) -> NetworkShape:
    """ModelConfig's fields of the network in a folder or on the hub, from its config.json alone.

    Every field that shapes a network is there; vocab_size is the number of rows in the file.
    Raises UserError for a file that is no GPT-2 that this network can be.
    """
    path = model_folder(source, weights=weights) / "config.json"
    raw = read_foreign(path)
    kinds = {name: kind for kind, name in MODEL_TYPES.items()}
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in kinds:
        raise UserError(f"{path}: model_type {model_type!r:.60} is not one of {', '.join(kinds)}")
    for key, allowed in FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:  # a list or an object is simply not in it
            raise UserError(f"{path}: {key}={raw[key]!r:.60} is not supported, only {allowed[0]!r}")
    norm, residual = kinds[model_type]
    shape = {key: raw.get(key, default) for key, default in DEFAULTS.items()}
    shape |= {"dropout": raw.get("resid_pdrop", 0.1), "norm": norm, "residual": residual}
    if shape["vocab_size"] is None:
        raise UserError(f"{path}: vocab_size is null; it is the number of rows of the embedding")
    for key, value in shape.items():
        if is_whole(value, least=_MOST + 1):
            raise UserError(f"{path}: {key} is above {_MOST:,}, which no network has")
    try:
        fields = ModelConfig(**shape).model_dump(
            exclude={"init_from", "resize_vocab", "checkpoint_blocks"}
        )
        return cast(NetworkShape, fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key + ': ' if key else ''}{first['msg']}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file of a model folder, or its shards. Raises UserError without one."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in _shard_names(folder / INDEX)]
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder}: only pickled weights (.bin), which gptray does not open; convert them once "
            "with transformers: AutoModelForCausalLM.from_pretrained(X).save_pretrained(Y)"
        )
    raise UserError(f"{folder}: no {WEIGHTS}")


def _shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises UserError, also for names of files elsewhere."""
    names = read_foreign(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map in it")
    files = list(names.values())
    for name in files:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            shown = f"{name!r:.60}"
            raise UserError(f"{index}: {shown} is not the name of a .safetensors file next to it")
    return sorted(set(files))


def hf_config(config: ModelConfig, vocab_size: int, eos_token_id: int | None) -> dict[str, object]:
    """config.json of a network, as HF's GPT2LMHeadModel reads it."""
    model_type = MODEL_TYPES[config.norm, config.residual]
    return {
        **({"architectures": ["GPT2LMHeadModel"]} if model_type == "gpt2" else {}),
        "model_type": model_type,
        "vocab_size": vocab_size,
        **{key: getattr(config, key) for key in DEFAULTS if key != "vocab_size"},
        **{key: config.dropout for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        **{key: allowed[0] for key, allowed in FIXED.items()},
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
    }


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of a network with `vocab_size` rows, the tied head counted once."""
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    norms = (2 * config.n_layer + 1) * 2 * width if config.norm == "layernorm" else 0
    linears = 4 * width * width + 2 * width * inner  # c_attn, attn.c_proj, c_fc, mlp.c_proj
    biases = 3 * width + width + inner + width
    return (vocab_size + config.n_positions) * width + norms + config.n_layer * (linears + biases)
