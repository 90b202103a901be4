"""Every config that is shipped loads, and holds only what differs from the defaults."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from gptray.config import Config, flatten, load_config, override
from gptray.model.hf_config import family_of
from gptray.model.parameters import parameter_count
from gptray.tuning.sweep_record import rungs
from gptray.tuning.trial_plan import plan_trials

FOLDER = Path(__file__).resolve().parent.parent / "configs"
# serve.yaml is Ray Serve's: tests/jobs/test_serve.py deploys it.
PATHS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "serve")


def test_the_named_configs_are_there() -> None:
    names = "continue_pretraining gpt2_124m little_text llama_small shakespeare_cpu verdict"
    assert set(names.split()) <= {path.stem for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_loads_and_starts_with_what_it_is(path: Path) -> None:
    assert load_config(str(path), []) != Config()
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_holds_differences_only(path: Path) -> None:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = [
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in given.items()
        for key in (value if isinstance(value, dict) else [name])
    ]
    defaults, config = flatten(Config()), flatten(load_config(str(path), []))
    assert [key for key in keys if config[key] == defaults[key]] == []


def test_shakespeare_is_the_published_recipe() -> None:
    config = load_config(str(FOLDER / "shakespeare_cpu.yaml"), ["data.source=input.txt"])
    model, optim, train = config.model, config.optim, config.train
    assert (model.n_layer, model.n_head, model.n_embd, model.dropout) == (4, 4, 128, 0.0)
    assert (train.block_size, train.global_batch_size, train.max_steps) == (64, 12, 2000)
    assert (optim.lr, optim.min_lr, optim.schedule, optim.warmup_steps) == (
        1e-3,
        1e-4,
        "cosine",
        100,
    )
    assert (optim.betas, optim.weight_decay, optim.max_grad_norm) == ((0.9, 0.99), 0.1, 1.0)
    assert (config.data.tokenizer, config.data.split) == ("char", (0.9, 0.1))
    assert (train.patience, train.eval_interval) == (None, 250)


def test_the_small_llama_is_one_that_transformers_opens() -> None:
    model = load_config(str(FOLDER / "llama_small.yaml"), []).model
    assert family_of(model) == "llama"
    assert parameter_count(model, 2048) == 631_424


def test_gpt2_124m_has_the_published_shape() -> None:
    config = load_config(str(FOLDER / "gpt2_124m.yaml"), [])
    model = config.model
    assert (model.n_layer, model.n_head, model.n_embd) == (12, 12, 768)
    assert (model.n_positions, model.vocab_size, config.train.block_size) == (1024, 50304, 1024)
    assert config.tokens_per_step == 2**19
    for workers in (1, 2, 4, 8, 16):
        shared = load_config(str(FOLDER / "gpt2_124m.yaml"), [f"compute.num_workers={workers}"])
        assert shared.grad_accum_steps * shared.micro_batch_size * workers == 512
    assert config.data.split == pytest.approx((0.9995, 0.0005))


def test_the_sweep_for_ones_own_text_trains_each_trial_on_all_of_it() -> None:
    config = load_config(str(FOLDER / "overfitting_sweep.yaml"), ["data.source=book.txt"])
    trials = plan_trials(config, "/runs/book-sweep", drawn=[], known=[])
    assert len(trials) == 12 and trials[0].values == {}
    texts = {(one.config.data.fraction, one.config.data.split) for one in trials}
    assert texts == {(1.0, config.data.split)}
    steps = [config.train.max_steps, *rungs(config)]
    assert len({str(trial.values) for trial in trials}) == 12 and min(steps) < max(steps) / 3
    # Or a trial would be compared at a rung while it still warms up, with some that do no more.
    assert len({one.config.optim.warmup_steps for one in trials}) == 1


def test_the_sweep_of_fine_tuning_trains_adapters_and_all_weights_at_rates_of_their_own() -> None:
    config = load_config(str(FOLDER / "finetune_sweep.yaml"), [])
    baseline, *trials = plan_trials(config, "/runs/finetune", drawn=[], known=[])
    assert not baseline.values and len(trials) == config.tune.num_samples
    whole = [one for one in trials if one.config.lora.rank is None]
    assert len(whole) >= len(trials) // 4
    assert all(set(one.values) == {"lora.rank", "optim.lr"} for one in whole)
    adapters = [one for one in trials if one not in whole]
    assert {one.config.lora.rank for one in adapters} == {2, 8, 32}
    assert len({one.config.optim.lr for one in trials}) == len(trials)


def test_the_sweep_over_the_amount_of_text_measures_settings_where_the_curve_goes_on() -> None:
    config = load_config(str(FOLDER / "data_sweep.yaml"), ["data.source=book.txt"])
    trials = plan_trials(config, "/runs/book-data", drawn=[], known=[])
    assert rungs(override(config, {"train.eval_interval": 1})) == []
    assert config.optim.lands and config.train.patience
    noisy = [one for one in trials if one.config.data.token_replacement or one.config.model.dropout]
    plain = Counter(one.config.data.fraction for one in trials if one not in noisy)
    assert set(plain.values()) == {3} and len({one.config.seed for one in trials}) == 3
    shares = {one.config.data.fraction for one in noisy}
    assert len(plain) == 4 and min(plain) < min(shares) <= max(shares) < max(plain) == 1


def test_the_demonstration_trains_on_parts_of_the_text() -> None:
    config = load_config(str(FOLDER / "overfitting_demo.yaml"), [])
    trials = plan_trials(config, "/runs/demo", drawn=[], known=[])
    assert len(trials) == 16 and max(trial.config.data.fraction for trial in trials) < 1
