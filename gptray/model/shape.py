"""Models on disk: finds a model's folder, its config.json and its weight files.

Without torch, so a dry run answers at once. `gptray.model.hf` reads the weights.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from gptray.config import ModelConfig, UserError
from gptray.gguf.conversion import SUFFIX, is_gguf, opened_gguf
from gptray.model.hf_config import family_of, read_config
from gptray.model.usage import GENERATION
from gptray.storage.files import expanded, is_uri, sha256_of
from gptray.storage.hub import download_model
from gptray.storage.node_cache import fetched_holder
from gptray.storage.stored import read_foreign
from gptray.storage.template_file import TEMPLATE

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# In a folder that a URI names: the file that makes it a model, and the files to fetch.
_HOLDING = re.compile(r"config\.json")
_FETCHED = re.compile(r"(?!manifest\.json)[\w-][\w.-]*\.(json|txt|model|safetensors|jinja)")


def model_folder(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder with config.json for a model or run folder, a GGUF file or a hub id.

    A URI is fetched to this node's cache, and a GGUF file is converted there. For a hub id,
    config.json is downloaded, and with `weights` also the safetensors, the tokenizer, the
    generation config and the chat template. Raises NotOnHub if it is neither a folder nor on the
    hub, UserError for a folder without a model.
    """
    if is_uri(source):
        what = "no config.json in it or in its model/, so this is not a model"
        return fetched_holder(str(source), ("model",), _HOLDING, _FETCHED, what=what)
    folder = expanded(source)
    if is_gguf(folder):
        return opened_gguf(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if folder.is_file():
        what = f"a file, but not a model: a model is a folder or a file ending in {SUFFIX}"
        raise UserError(f"{folder}: {what}")
    if folder.exists():
        what = "no config.json in it or in its model/, so this is not a model"
        files = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
        raise UserError(f"{folder}: {what}{f'; name a file in it: {files[0]}' if files else ''}")
    return _download(str(source), weights=weights)


def _download(hub_id: str, *, weights: bool) -> Path:
    wanted = ["config.json"]
    if weights:
        wanted += ["*.safetensors", "*.safetensors.index.json"]
        wanted += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        wanted += [GENERATION, TEMPLATE]
    folder = download_model(hub_id, wanted)
    if not (folder / "config.json").is_file():
        raise UserError(f"{hub_id}: this hub repository has no config.json")
    return folder


def read_shape(source: str | Path) -> ModelConfig:
    """The network in a folder or on the hub, from its config.json alone.

    Its vocab_size is the number of rows in the file. Raises UserError unless it is a network of a
    known family.
    """
    return read_config(model_folder(source, weights=False) / "config.json")[1]


def saved_type(config: ModelConfig) -> str:
    """The model_type that a run of this network saves: that of `init_from` if it still can."""
    preferred = None
    if config.init_from:
        folder = model_folder(config.init_from, weights=False)
        preferred = read_config(folder / "config.json")[0]
    return family_of(config, preferred)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file of a model folder, or its shards. Raises UserError if there is none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in _shard_names(folder / INDEX)]
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder}: only pickled weights (.bin), which gptray does not open; convert them once "
            "with transformers: AutoModelForCausalLM.from_pretrained(X).save_pretrained(Y)"
        )
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no {INDEX}, which says what its .safetensors files hold")
    raise UserError(f"{folder}: no {WEIGHTS}")


def weights_sha256(model_dir: Path) -> str:
    """The sha256 of the weight file, or of the shards' digests in order. Raises UserError."""
    digests = []
    for path in weight_files(model_dir):
        if not path.is_file():
            raise UserError(f"{path} is missing")
        digests.append(sha256_of(path))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


def _shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises UserError, also for files in other folders."""
    names = read_foreign(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map in it")
    files = list(names.values())
    for name in files:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            shown = f"{name!r:.60}"
            raise UserError(f"{index}: {shown} is not the name of a .safetensors file next to it")
    return sorted(set(files))
