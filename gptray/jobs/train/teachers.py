"""Whether models can teach a run, and are those that it began with. No torch, no Ray."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config, UserError, load_config
from gptray.data.request import tokenizer_name
from gptray.data.tokenizer import Tokenizer
from gptray.hub import NotOnHub
from gptray.jobs.evaluate.evaluated_model import held_out, run_of
from gptray.jobs.models import CONFIG, open_model, unknown
from gptray.jobs.places import with_whole_paths
from gptray.model.parameters import parameter_count
from gptray.model.shape import model_folder, read_shape, weights_sha256
from gptray.record import read_events, teachers_of

KEY = "train.teachers"


def check_teachers(config: Config, folder: Path) -> None:
    """Refuse teachers that are no models, named twice, of tokens that the text cannot have, too
    short, or other ones than the run in `folder` had, and those that have seen its validation text.

    Raises UserError.
    """
    block_size = config.train.block_size
    folders = list[Path]()
    for one in config.train.teachers:
        try:
            opened = open_model(one, key=KEY).resolve()
        except NotOnHub as error:
            raise unknown(config, one, error.reason, key=KEY) from None
        if opened in folders:
            raise UserError(f"{KEY}: {one} is named twice; name it once")
        folders.append(opened)
        n_positions = read_shape(opened).n_positions
        if n_positions < block_size:
            raise UserError(
                f"{KEY}: {one} reads {n_positions} tokens at most, fewer than "
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
    """Refuse a run on the same text that held out other parts of it. Raises UserError."""
    run = run_of(model_folder(teacher))
    if run is None:
        return
    its = held_out(with_whole_paths(load_config(str(run / CONFIG), [])))
    ours = held_out(with_whole_paths(config))
    if its["source"] == ours["source"] and its != ours:
        raise UserError(
            f"{KEY}: {run} was trained on another split of this text, so it has seen some of the "
            f"validation text; data.seed={its['seed']} and the same data.split give its split"
        )


def _check_tokens(config: Config) -> None:
    """Refuse teachers of different tokenizers, and of more tokens than the text's will have.

    Raises UserError.
    """
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


def check_same_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Refuse teachers whose tokens are not the text's. Raises UserError."""
    for one in config.train.teachers:
        if Tokenizer.load(model_folder(one)).sha256 != tokenizer.sha256:
            raise _of_other_tokens(one)


def _of_other_tokens(teacher: str) -> UserError:
    return UserError(
        f"{KEY}: {teacher} has another tokenizer than the text; data.tokenizer={teacher} reads the "
        "text with that of the teacher"
    )


def teacher_bytes(config: Config) -> int:
    """Of the teachers' weights, which each worker keeps in the precision that it computes in."""
    each = 2 if config.train.precision == "bf16" or config.compute.use_gpu else 4
    return each * sum(_parameters(one) for one in config.train.teachers)


def _parameters(source: str) -> int:
    shape = read_shape(source)
    return parameter_count(shape, shape.rows)
