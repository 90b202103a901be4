"""What to try after a run, ordered by how well the numbers support it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gptray.config import Config
from gptray.reports.run.diagnosis import Diagnosis
from gptray.reports.run.findings import noise_of
from gptray.wording import count


@dataclass(frozen=True)
class Advice:
    """One thing to try, and the numbers that support it; the stronger, the higher `weight`.

    keys: the config keys to set for it, if any. resumes: whether the same run can resume with them
    rather than a new one.
    """

    change: str
    reason: str
    weight: float
    keys: Mapping[str, object] = field(default_factory=dict)
    resumes: bool = False


def advise(diagnosis: Diagnosis, config: Config) -> tuple[Advice, ...]:
    """What to try, the best supported first; empty if there is nothing to go by."""
    sources = {
        "overfitting": _against_overfitting,
        "unsure": _to_be_sure,
        "unstable": _against_instability,
        "harmed": _to_gain,
        "stuck": _against_being_stuck,
        "falling": _to_fall_further,
        "level": _to_get_lower,
        "single": _to_see_more,
    }
    source = sources.get(diagnosis.verdict)
    found = source(diagnosis, config) if source else iter(())
    return tuple(sorted(found, key=lambda advice: -advice.weight))


def _against_overfitting(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    yield from _regularise(config)
    yield from _land(config)
    yield from _average_seeds(config)
    yield from _more_text(diagnosis)
    yield from _whole_text(config)
    yield from _gentler(config)
    if config.train.patience is None:
        yield Advice(
            "early stopping",
            "train.patience is null; train.patience=5 stops after 5 evaluations without a new best",
            1.5,
            {"train.patience": 5},
        )


def _gentler(config: Config) -> Iterator[Advice]:
    """The default rate for a given model, if the run's own is far above it."""
    lr = config.tuning_lr
    if config.model.init_from and config.optim.lr > 2 * lr:
        trained = "an adapter" if config.lora.rank else "all weights"
        reason = (
            f"optim.lr is {config.optim.lr:g}; the default for {trained} of this model is {lr:.2g}"
        )
        yield Advice("a lower learning rate", reason, 3.0, _lr(config, lr))


def _to_gain(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    """Nothing was gained on the model that training began with."""
    lr = config.optim.lr
    lower = Advice("a lower learning rate", f"optim.lr is {lr:g}", 3.0, _lr(config, lr / 3))
    yield next(_gentler(config), lower)
    yield from _to_see_more(diagnosis, config)


def _regularise(config: Config) -> Iterator[Advice]:
    """Token replacement or dropout (together they gain nothing), and weight decay if it is 0.

    Token replacement was compared with dropout only in training from scratch.
    """
    dropout, is_new = config.model.dropout, config.model.init_from is None
    if config.data.token_replacement == 0:
        if is_new:
            reason = "data.token_replacement is 0; 0.1 did more than dropout on two small texts"
            yield Advice("token replacement", reason, 4.5, {"data.token_replacement": 0.1})
        if dropout == 0:
            reason = "model.dropout is 0; 0.1 to 0.3 is usual for small texts"
            yield Advice("dropout", reason, 4.0, {"model.dropout": 0.1})
        elif dropout < 0.4:
            more = {"model.dropout": round(dropout + 0.1, 2)}
            yield Advice("more dropout", f"model.dropout is {dropout:g}", 3.0 - 5 * dropout, more)
    if config.optim.weight_decay == 0:
        reason = "optim.weight_decay is 0; models that overfit usually gain from 0.1 or more"
        yield Advice("weight decay", reason, 2.2, {"optim.weight_decay": 0.1})


def _land(config: Config) -> Iterator[Advice]:
    """With a schedule that decays up to max_steps, the best step comes far before its end."""
    schedule = config.optim.schedule
    if schedule in ("linear", "cosine"):
        reason = (
            f"optim.schedule is {schedule}: the learning rate was still high at the best step; "
            "wsd goes back to that step and cools down"
        )
        yield Advice("a landing", reason, 4.2, {"optim.schedule": "wsd"})


def _average_seeds(config: Config) -> Iterator[Advice]:
    """Only for training from scratch, where it was measured."""
    if config.model.init_from is None and not config.train.teachers:
        reason = (
            "three runs with different seeds predict better together (evaluate.model), and can "
            "teach one model most of what they gain (train.teachers)"
        )
        split = config.seed if config.data.seed is None else config.data.seed
        another = {"seed": config.seed + 1, "data.seed": split}
        yield Advice("several seeds", reason, 2.8, another)


def _whole_text(config: Config) -> Iterator[Advice]:
    if config.data.fraction < 1:
        reason = f"data.fraction is {config.data.fraction:g}"
        yield Advice("all of the text", reason, 6.0, {"data.fraction": 1.0})


def _lr(config: Config, lr: float) -> dict[str, object]:
    """The keys that set another learning rate, scaling a given optim.min_lr in proportion."""
    rates = {"optim.lr": lr, "optim.min_lr": (config.optim.min_lr or 0) * lr / config.optim.lr}
    return {key: float(f"{rate:.2g}") for key, rate in rates.items() if rate}


def _more_text(diagnosis: Diagnosis) -> Iterator[Advice]:
    """More data, depending on how often the text was read."""
    epochs = diagnosis.epochs_at_best
    if epochs and epochs > 1:
        yield Advice(
            "more data",
            f"by its best step the model had read the training text {epochs:.1f} times",
            2.0 + min(3.0, epochs / 10),
        )
    elif epochs is None:
        yield Advice("more data", "more text is harder to learn by heart", 1.0)


def _to_be_sure(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    if diagnosis.ended is None:
        return  # more evaluations are coming
    interval = config.train.eval_interval
    if interval > 1:
        yield Advice(
            "more frequent evaluations",
            f"train.eval_interval is {interval}; it takes three evaluations well above the best "
            "to tell a turn",
            3.0,
            {"train.eval_interval": -(-interval // 3)},
        )
    patience = config.train.patience
    if diagnosis.ended == "patience" and patience and patience < 3:
        reason = f"train.patience is {patience}; three evaluations tell more"
        longer = diagnosis.landed is None
        yield Advice("more patience", reason, 4.0, {"train.patience": 5}, resumes=longer)


def _against_instability(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    optim, steps = config.optim, config.train.max_steps
    lower = _lr(config, min(optim.lr / 3, 3e-3))  # a third of a huge rate would still be too high
    yield Advice("a lower learning rate", f"optim.lr is {optim.lr:g}", 3.0, lower)
    if optim.warmup_steps < 0.05 * steps:
        warmup = f"optim.warmup_steps is {optim.warmup_steps:,}; the run has {count(steps, 'step')}"
        longer = {"optim.warmup_steps": -(-steps // 20)}
        yield Advice("a longer warm-up", warmup, 2.0, longer)
    if optim.max_grad_norm is None:
        reason = "optim.max_grad_norm is null; 1.0 is usual"
        yield Advice("clipping", reason, 4.0, {"optim.max_grad_norm": 1.0})


def _against_being_stuck(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    optim, steps = config.optim, config.train.max_steps
    if optim.warmup_steps > 0.5 * steps:
        yield _shorter_warmup(config)
        return  # the rate was hardly tried
    change, lr = "a higher learning rate", max(3 * optim.lr, 1e-4)
    if optim.lr >= 1e-2:
        change, lr = "a lower learning rate", optim.lr / 10
    usual = "" if 1e-4 <= optim.lr <= 2e-3 else "; 1e-4 to 2e-3 is usual"
    yield Advice(change, f"optim.lr is {optim.lr:g}{usual}", 3.0, _lr(config, lr))


def _shorter_warmup(config: Config) -> Advice:
    return Advice(
        "a shorter warm-up",
        f"optim.warmup_steps is {config.optim.warmup_steps:,}; the run has "
        f"{count(config.train.max_steps, 'step')}",
        5.0,
        {"optim.warmup_steps": -(-config.train.max_steps // 20)},
    )


def _to_fall_further(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    if diagnosis.ended is None:
        return
    steps = config.train.max_steps
    more = {"train.max_steps": 2 * steps}
    resumes = diagnosis.landed is None
    yield Advice("more steps", f"train.max_steps is {steps:,}", 4.0, more, resumes=resumes)
    if config.optim.warmup_steps > 0.5 * config.train.max_steps:
        yield _shorter_warmup(config)


def _to_get_lower(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    last, noise = diagnosis.last, noise_of(config)
    assert last
    is_close = last.gap < 0.05 * last.val_loss
    if is_close and noise:  # noise raises training loss, so it does not show what was learnt
        yield from _average_seeds(config)
        yield from _whole_text(config)
        reason = f"whether the model has room left is not known: training has {noise} on"
        yield Advice("more data", reason, 3.5)
    elif is_close:
        yield Advice(
            "more parameters",
            f"training loss ({last.train_loss:.2f}) is close to validation loss "
            f"({last.val_loss:.2f}): the model could still learn more from the training text",
            3.0,
            {} if config.model.init_from else {"model.n_embd": 2 * config.model.n_embd},
        )
    else:
        yield from _regularise(config)
        yield from _average_seeds(config)
        yield from _whole_text(config)
        yield Advice(
            "more data",
            f"training loss ({last.train_loss:.2f}) is well below validation loss "
            f"({last.val_loss:.2f})",
            3.5,
        )


def _to_see_more(diagnosis: Diagnosis, config: Config) -> Iterator[Advice]:
    if diagnosis.ended is None:
        return
    interval, steps = config.train.eval_interval, config.train.max_steps
    often = min(-(-interval // 3), steps // 3)
    if often:
        told = f"train.eval_interval is {interval:,}"
        yield Advice("more frequent evaluations", told, 3.0, {"train.eval_interval": often})
    else:
        more = {"train.max_steps": 3 * interval}
        resumes = diagnosis.landed is None
        yield Advice("more steps", f"train.max_steps is {steps:,}", 3.0, more, resumes=resumes)
