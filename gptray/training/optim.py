"""AdamW's parameter groups and stored state, and the learning-rate schedules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gptray.config import OptimConfig, RunFailed
from gptray.model.tensor_file import write_tensors
from gptray.training.sharding import placed_as

# AdamW's state for each parameter: a step count and two tensors of its shape.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which updates nothing any more once `found_inf` is 1, as in GradScaler.

    Without torch's decorators, which import torch._dynamo, and that takes a second: they only keep
    torch.compile out of these methods.
    """

    found_inf: Tensor

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> AdamW:
    """AdamW that decays matrices but not biases and norms (Loshchilov & Hutter 2019).

    The groups, in order: parameters of two or more dimensions, then the others. Frozen ones are
    left out.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {
            "params": [parameter for parameter in trained if (parameter.dim() >= 2) == decays],
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
        }
        for decays in (True, False)
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    optimizer.found_inf = torch.zeros((), device=trained[0].device)
    return optimizer


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """The learning rate of the update that takes the run from `step` to `step + 1`.

    Warm-up rises linearly and reaches `lr` at `warmup_steps`. Then `constant` stays there, as does
    `wsd` until it lands (see `gptray.training.landing`); `linear` and `cosine` (Loshchilov & Hutter
    2017) fall to `final_lr` at `max_steps`; `step` multiplies by `gamma` every `step_size` steps
    but never goes below `final_lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    since = step - config.warmup_steps
    if config.schedule in ("constant", "wsd"):
        return config.lr
    if config.schedule == "step":
        return max(config.final_lr, config.lr * config.gamma ** (since // config.step_size))
    progress = min(1.0, since / max(1, max_steps - config.warmup_steps))
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + left * (config.lr - config.final_lr)


def weight_decay(cooled: float, config: OptimConfig) -> float:
    """The weight decay of an update, when `cooled` (0 to 1) of the learning rate's fall is over.

    falling: linearly to 0, as in nanochat; rising: to 1.5 times itself, as NanoGPT Slowrun does at
    its end, where the learning rate also falls.
    """
    factors = {"constant": 1.0, "falling": 1.0 - cooled, "rising": 1.0 + 0.5 * cooled}
    return config.weight_decay * factors[config.weight_decay_schedule]


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the next update's learning rate, and the weight decay of the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay


def save_optimizer(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    full_tensor: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Write the optimizer's moments as `<parameter>.<moment>` to a safetensors file.

    full_tensor: gathers a tensor that is sharded over workers.
    """
    moments = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    shapes = {name: moment.shape for name, moment in moments.items()}
    write_tensors(path, shapes, lambda name: full_tensor(moments[name]))


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the moments in a file; for a sharded parameter, only this worker's shard.

    Raises RunFailed if they are not AdamW's for this model, naming the first wrong one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                moments = {}
                for key in _MOMENTS:
                    stored = f"{name}.{key}"
                    moment = file.get_tensor(stored) if stored in names else None
                    dims = torch.Size() if key == "step" else parameter.shape
                    if moment is None or moment.shape != dims or not bool(moment.isfinite().all()):
                        raise RunFailed(
                            f"{path} does not hold the moments of this model ({stored}); remove "
                            f"the folder {path.parent} to resume from the checkpoint before it"
                        )
                    if key == "step":
                        moments[key] = moment.to(parameter.device)
                    else:
                        moments[key] = placed_as(parameter, moment)
                optimizer.state[parameter] = moments
    except SafetensorError as error:
        raise RunFailed(f"{path} is damaged: {error}; restore it from a copy") from None
