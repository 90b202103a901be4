"""Learning-rate schedules and which parameters decay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gptray.config import ModelConfig, OptimConfig, load_config
from gptray.model.gpt import GPT
from gptray.training.landing import Landing
from gptray.training.optim import (
    learning_rate,
    load_optimizer,
    make_optimizer,
    save_optimizer,
    set_rates,
    weight_decay,
)
from gptray.training.stopping import EarlyStopping
from gptray.training.trainer_state import TrainerState


def rates(max_steps: int = 100, **settings: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **settings})
    return [learning_rate(step, max_steps, config) for step in range(max_steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_warmup_rises_linearly_to_the_peak(schedule: str) -> None:
    values = rates(schedule=schedule)
    assert values[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert values[10] == 1.0


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_linear_is_halfway_in_the_middle_and_ends_at_min_lr() -> None:
    values = rates(schedule="linear")
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)


def test_cosine_falls_slowly_first_and_ends_at_min_lr() -> None:
    values = rates(schedule="cosine")
    assert values[55] == pytest.approx(0.55)
    assert values[32] > 0.1 + 0.9 * (1 - 22 / 90)
    assert values[100] == pytest.approx(0.1)


def test_step_multiplies_by_gamma_and_stops_at_min_lr() -> None:
    values = rates(schedule="step", step_size=20, gamma=0.5)
    assert [values[step] for step in (10, 29, 30, 50, 70)] == [1.0, 1.0, 0.5, 0.25, 0.125]
    assert values[90] == 0.1


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates(schedule="cosine", warmup_steps=0)[0] == 1.0


def test_warmup_longer_than_the_run_never_divides_by_zero() -> None:
    assert rates(max_steps=5, schedule="cosine")[5] == pytest.approx(6 / 11)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [("constant", [3.2, 3.2, 3.2]), ("falling", [3.2, 1.6, 0.0]), ("rising", [3.2, 4.0, 4.8])],
)
def test_weight_decay_goes_as_its_schedule_says(schedule: str, values: list[float]) -> None:
    given = {"weight_decay": 3.2, "weight_decay_schedule": schedule}
    config = OptimConfig.model_validate(given)
    assert [weight_decay(cooled, config) for cooled in (0.0, 0.5, 1.0)] == pytest.approx(values)
    optimizer = make_optimizer(
        [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], config
    )
    set_rates(optimizer, lr=0.25, weight_decay=values[1])
    groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(0.25, values[1]), (0.25, 0.0)]


def test_the_way_on_which_the_learning_rate_falls_is_from_warm_up_to_end_or_the_landing() -> None:
    def cooled(schedule: str, step: int, landing: Landing | None = None) -> float:
        keys = [f"optim.schedule={schedule}", "optim.warmup_steps=10", "train.max_steps=110"]
        state = TrainerState(step, EarlyStopping(), "", landing=landing)
        return state.cooled(load_config(None, keys))

    assert [cooled("cosine", step) for step in (0, 10, 60, 110, 120)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert cooled("wsd", 60) == 0.0
    landing = Landing(start=60, back_to=40, steps=8, reason="patience")
    assert [cooled("wsd", step, landing) for step in (62, 68)] == [0.25, 1.0]


def test_weight_decay_spares_biases_and_norms() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=8), vocab_size=11)
    optimizer = make_optimizer(model.parameters(), OptimConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(decay) == len(names)
    for name, value in decay.items():
        assert value == (0.0 if name.endswith("bias") or ".ln_" in name else 0.3), name


def test_stored_moments_come_back_each_to_its_parameter(tmp_path: Path) -> None:
    def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = make_optimizer(layer.parameters(), OptimConfig())
        step(layer, optimizer)
        return layer, optimizer

    def step(layer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(torch.arange(6.0).view(2, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = trained()
    save_optimizer(tmp_path / "o.safetensors", layer, optimizer)
    other, fresh = trained()
    fresh.state.clear()
    load_optimizer(tmp_path / "o.safetensors", other, fresh)
    step(layer, optimizer)
    step(other, fresh)
    for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def updated(optimizer: torch.optim.Optimizer, layer: torch.nn.Module) -> list[torch.Tensor]:
    """The weights after three updates."""
    for scale in (1.0, -2.0, 0.5):
        optimizer.zero_grad(set_to_none=True)
        layer(scale * torch.arange(6.0).view(2, 3)).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in layer.parameters()]


def test_updates_are_those_of_torchs_adamw() -> None:
    torch.manual_seed(0)
    layer, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(layer.state_dict())
    config = OptimConfig(lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    groups = [
        {"params": [other.weight], "weight_decay": 0.2},
        {"params": [other.bias], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, fused=True)
    ours = updated(make_optimizer(layer.parameters(), config), layer)
    for one, two in zip(ours, updated(theirs, other), strict=True):
        assert torch.equal(one, two)


def test_an_update_spares_the_seconds_of_importing_torch_dynamo() -> None:
    code = """
import sys, torch
from gptray.config import OptimConfig
from gptray.training.optim import make_optimizer
layer = torch.nn.Linear(3, 2)
optimizer = make_optimizer(layer.parameters(), OptimConfig())
layer(torch.ones(3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
