"""Checks that the models given to a run suit it: its initial model, its base, its teachers.

No torch, no Ray.
"""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config, UserError, load_config
from gptray.data.request import tokenizer_name
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import KINDS, opens_at_once, tokenizer_files, tokenizer_path
from gptray.data.vocabulary import differing_ids
from gptray.jobs.folders.places import held_out, run_of, with_absolute_paths
from gptray.jobs.models import CONFIG, open_model, unknown
from gptray.model.adapter import ADAPTER, Base, adapted_parts, trained_count
from gptray.model.adapter_folder import open_adapter
from gptray.model.parameters import parameter_count
from gptray.model.shape import model_folder, read_shape, weights_sha256
from gptray.storage.files import expanded
from gptray.storage.hub import NotOnHub
from gptray.storage.record import read_events, teachers_of

KEY = "train.teachers"
_CURE = (
    "set model.resize_vocab=true, which keeps the rows of tokens that both have and starts new "
    "ones from the mean row"
)


def check_vocabulary(config: Config) -> None:
    """Refuse a tokenizer whose ids do not match the rows of model.init_from's embedding.

    Raises UserError naming both, and model.resize_vocab. The model's own tokenizer is not checked
    if only a download or transformers can open it.
    """
    source = config.model.init_from
    if source is None:
        return
    name = tokenizer_name(config)
    folder = expanded(source)
    has_own = not folder.is_dir() or bool(tokenizer_files(folder))
    if config.model.resize_vocab:
        if not has_own:
            raise UserError(
                f"model.resize_vocab=true: {source} has no tokenizer (tokenizer.json), so it is "
                "unknown which tokens its embedding's rows are"
            )
        return
    if name in KINDS:
        if has_own:
            raise UserError(
                f"data.tokenizer={name}: a new tokenizer's ids are not those of model.init_from="
                f"{source}; leave data.tokenizer out, or {_CURE}"
            )
        return
    rows, path = read_shape(source).rows, tokenizer_path(name)
    is_own = name == source or (path is not None and path == tokenizer_path(source))
    if is_own and (path is None or not opens_at_once(path)):
        return
    tokenizer = Tokenizer.load(name, eos_token=config.data.eos_token)
    if has_own and not is_own:
        others = differing_ids(Tokenizer.load(source), tokenizer)
        if others:
            raise UserError(
                f"data.tokenizer={name}: {others:,} of its {tokenizer.vocab_size:,} ids mean "
                f"other tokens than in model.init_from={source}; leave data.tokenizer out, or "
                f"{_CURE}"
            )
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"data.tokenizer={name}: has {tokenizer.vocab_size:,} tokens, but the embedding of "
            f"model.init_from={source} has only {rows:,} rows; {_CURE}"
        )


def check_teachers(config: Config, folder: Path) -> None:
    """Raise UserError for unsuitable teachers.

    A teacher is unsuitable if it is not a model, is listed twice, has another tokenizer or too
    short a context, has changed since the run in `folder` began, or has seen its validation text.
    """
    block_size = config.train.block_size
    folders = list[Path]()
    for one in config.train.teachers:
        try:
            opened = open_model(one, key=KEY).resolve()
        except NotOnHub as error:
            raise unknown(config, one, error.reason, key=KEY) from None
        if opened in folders:
            raise UserError(f"{KEY}: {one} is listed twice; list it once")
        folders.append(opened)
        n_positions = read_shape(opened).n_positions
        if n_positions < block_size:
            raise UserError(
                f"{KEY}: {one} reads at most {n_positions} tokens, fewer than "
                f"train.block_size={block_size}"
            )
        _check_split(config, one)
    _check_tokens(config)
    for one, began in teachers_of(read_events(folder)).items():
        now = weights_sha256(model_folder(one))
        if now != began:
            raise UserError(
                f"{KEY}: the weights of {one} have changed since the run began (sha256 "
                f"{began[:12]}, now {now[:12]}); restore them, or choose another name"
            )


def _check_split(config: Config, teacher: str) -> None:
    """Raise UserError for a teacher trained on the same text with another split."""
    run = run_of(model_folder(teacher))
    if run is None:
        return
    its = held_out(with_absolute_paths(load_config(str(run / CONFIG), [])))
    ours = held_out(with_absolute_paths(config))
    if its["source"] == ours["source"] and its != ours:
        raise UserError(
            f"{KEY}: {run} was trained on another split of this text, so it has seen some of the "
            f"validation text; to use its split, set data.seed={its['seed']} and the same "
            "data.split"
        )


def _check_tokens(config: Config) -> None:
    """Raise UserError if teachers' tokenizers differ, or have more tokens than the text's will."""
    if not config.train.teachers:
        return
    first, *others = config.train.teachers
    tokenizer = Tokenizer.load(model_folder(first))
    for one in others:
        if Tokenizer.load(model_folder(one)).sha256 != tokenizer.sha256:
            raise UserError(f"{KEY}: {one} has another tokenizer than {first}")
    is_made = tokenizer_name(config) == "bpe"
    if is_made and tokenizer.vocab_size > config.data.vocab_size:
        raise _of_other_tokens(first)


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError for a text's tokenizer beyond model.vocab_size, or other than a teacher's."""
    rows = config.model.vocab_size
    if rows is not None and rows < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={rows} is smaller than the {tokenizer.vocab_size} entries of the "
            f"tokenizer ({config.data.tokenizer})"
        )
    for one in config.train.teachers:
        if Tokenizer.load(model_folder(one)).sha256 != tokenizer.sha256:
            raise _of_other_tokens(one)


def _of_other_tokens(teacher: str) -> UserError:
    return UserError(
        f"{KEY}: {teacher} has another tokenizer than the text; set data.tokenizer={teacher} to "
        "use the teacher's"
    )


def teacher_bytes(config: Config) -> int:
    """Bytes of the teachers' weights, which each worker stores in the compute dtype."""
    each = 2 if config.train.precision == "bf16" or config.compute.use_gpu else 4
    shapes = [read_shape(one) for one in config.train.teachers]
    return each * sum(parameter_count(shape, shape.rows) for shape in shapes)


def check_base(config: Config, checkpoint: Path | None) -> None:
    """Raise UserError for targets that the base lacks, or for a base other than the checkpoint's.

    Without an adapter, also for quantized weights.
    """
    if config.lora.rank is None:
        if (kind := config.quantize.weights) != "none":
            raise UserError(
                f"quantize.weights={kind}: only frozen weights can be quantized in training; set "
                "lora.rank to train an adapter on top of them, or leave quantize.weights out"
            )
        return
    base = _base(config, weights=checkpoint is not None)
    adapted_parts(base, config.lora.targets)
    if checkpoint:
        open_adapter(checkpoint / ADAPTER, base)


def trained_parameters(config: Config) -> int | None:
    """How many parameters an adapter trains; None without an adapter."""
    if config.lora.rank is None:
        return None
    return trained_count(_base(config, weights=False), config.lora)


def trained_facts(config: Config) -> dict[str, int]:
    """The JSON line's fields for an adapter: how many parameters are trained."""
    count = trained_parameters(config)
    return {} if count is None else {"trained_parameters": count}


def _base(config: Config, *, weights: bool) -> Base:
    assert config.model.init_from
    return Base.of(config.model.init_from, weights=weights, quantized=config.quantize.weights)
