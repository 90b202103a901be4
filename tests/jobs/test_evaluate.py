"""The evaluate job on a real Ray: the numbers that training saw, whoever counts, and refusals."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gptray.config import Config, ModelConfig, RunFailed, UserError, load_config
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.jobs.evaluate.check import check, plan
from gptray.jobs.evaluate.run import evaluate
from gptray.jobs.folders.resuming import save_config
from gptray.jobs.folders.run_folder import outcome, resolve, run_dir
from gptray.jobs.prepare.run import prepare
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained
from gptray.training.loop import fit
from tests.generation.models import random_gpt
from tests.processes import ray_workers
from tests.tiny import tiny_config, tiny_text


def config_of(storage: Path, *overrides: str) -> Config:
    values = {"storage_path": str(storage), "evaluate.passages": "12", "sample.seed": "1234567"}
    values |= dict(pair.split("=", 1) for pair in overrides)
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


def save(model: GPT, tokenizer: Tokenizer, folder: Path) -> Path:
    save_pretrained(model, folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A storage path with a run in it, of a text with a test split, and the run's outcome."""
    storage = tmp_path_factory.mktemp("trained")
    config = resolve(tiny_config(text_file, storage, "name=run", "data.split=80:10:10"))
    run_dir(config).mkdir()
    save_config(config, run_dir(config))
    data = prepare(config)
    fit(
        config,
        data,
        run_dir(config),
        report=lambda metrics, checkpoint: None,
        sample=lambda model: [],
        device=torch.device("cpu"),
    )
    return storage, outcome(config)


@pytest.fixture(scope="module")
def evaluated(trained: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """The run's evaluation by one worker."""
    return evaluate(config_of(trained[0], "name=run"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that is no run: random weights, another tokenizer."""
    tokenizer = train_bpe([tiny_text(200)], 300)
    return save(random_gpt(tokenizer, n_positions=48), tokenizer, tmp_path_factory.mktemp("m"))


def test_validation_loss_is_the_one_that_training_reported(
    trained: tuple[Path, dict[str, Any]], evaluated: dict[str, Any]
) -> None:
    storage, result = trained
    for key in ("val_loss", "val_ppl", "val_bpb"):
        assert evaluated[key] == pytest.approx(result[key], abs=1e-6)
    assert evaluated["model_dir"] == result["model_dir"]
    assert evaluated["gap"] == pytest.approx(evaluated["val_loss"] - evaluated["train_loss"])
    assert evaluated["memorised_50"] < 0.01
    assert {"test_loss", "test_ppl", "test_bpb", "bleu"} <= set(evaluated)
    assert Path(evaluated["report"]).parent == storage / "run"
    saved = json.loads((storage / "run" / "evaluation.json").read_text())
    assert saved["splits"]["test"]["loss"] == evaluated["test_loss"]
    assert saved["bleu"]["greedy"]["score"] == evaluated["bleu"]
    assert saved["how"]["distinct_2"].endswith(
        "temperature=0.7 top_k=40 seed=1234567"
    )  # top_p is off
    json.dumps(evaluated, allow_nan=False)


def test_neither_workers_nor_batch_size_nor_stops_change_a_number(
    trained: tuple[Path, dict[str, Any]], evaluated: dict[str, Any]
) -> None:
    stops = ("sample.stop=e", "sample.stop_token_ids=[3, 5]")
    batch = ("compute.num_workers=2", "evaluate.micro_batch_size=1")
    again = evaluate(config_of(trained[0], "name=run", *batch, *stops))
    for key, value in evaluated.items():
        if isinstance(value, float):
            assert again[key] == pytest.approx(value, abs=1e-6), key


def test_weights_in_fewer_bits_are_compared_on_the_same_text(
    trained: tuple[Path, dict[str, Any]], evaluated: dict[str, Any], tmp_path: Path
) -> None:
    storage = trained[0]
    words = ("quantize.weights=int8", "evaluate.quantized=[int8, int4]", "evaluate.passages=0")
    result = evaluate(config_of(storage, f"evaluate.model={storage / 'run'}", *words))
    full, int8, int4 = result["quantized"]
    assert full["loss"] == pytest.approx(evaluated["test_loss"], abs=1e-5)
    assert int8["loss"] == pytest.approx(result["test_loss"], abs=1e-5)
    assert 0 < abs(int8["loss"] - full["loss"]) < 0.01
    assert int8["loss_change"] == pytest.approx(int8["loss"] - full["loss"], abs=1e-9)
    assert (full["agreement"], full["loss_change"]) == (1.0, 0.0)
    assert 0.9 < int8["agreement"] <= 1.0
    assert int8["weight_bytes"] < 0.6 * full["weight_bytes"]
    assert int4["weight_bytes"] < 0.6 * int8["weight_bytes"]
    assert int4["agreement"] < int8["agreement"]
    assert 0 < abs(int4["loss_change"]) < 0.1
    # The run keeps the evaluation of its own weights.
    folder = Path(result["report"]).parent
    assert folder != storage / "run" and "-int8-" in folder.name
    assert "Greedy tokens that agree" in Path(result["report"]).read_text()
    saved = json.loads((folder / "evaluation.json").read_text())
    assert (saved["weights"], saved["quantized"]) == ("int8", result["quantized"])


def kill_next_scorer(before: set[int]) -> None:
    """SIGKILL the first scorer that comes up. It still loads what its first task needs."""
    deadline = time.monotonic() + 60
    while not (new := ray_workers("Scorer") - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(new.pop(), signal.SIGKILL)


@pytest.mark.parametrize("max_failures", [1, 0])
def test_scorer_that_is_killed_is_replaced_as_often_as_it_may(
    trained: tuple[Path, dict[str, Any]], evaluated: dict[str, Any], max_failures: int
) -> None:
    killer = threading.Thread(target=kill_next_scorer, args=(ray_workers("Scorer"),))
    killer.start()
    config = config_of(trained[0], "name=run", f"compute.max_failures={max_failures}")
    if max_failures:
        assert evaluate(config) == evaluated
    else:
        with pytest.raises(
            RunFailed, match=r"died 1 time, more often than compute\.max_failures=0"
        ):
            evaluate(config)
    killer.join()


def test_any_text_is_scored_by_a_folder_that_is_no_run(
    ray_cluster: None, folder: Path, tmp_path: Path
) -> None:
    texts = [tiny_text(9, seed=seed) for seed in range(4)]
    source = tmp_path / "other.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    names = [f"evaluate.model={folder}", f"evaluate.source={source}", "evaluate.stride=12"]
    result = evaluate(config_of(tmp_path, *names, "evaluate.passages=0", "name=other"))
    tokenizer = Tokenizer.load(folder)
    tokens = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert result["test_loss"] == pytest.approx(plain_loss(folder, tokens, 48, 12), abs=1e-5)
    nats = result["test_loss"] * (len(tokens) - 1)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert result["test_bpb"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert result["val_loss"] is None and result["bleu"] is None and result["gap"] is None
    saved = json.loads((tmp_path / "other" / "evaluation.json").read_text())
    assert saved["splits"]["test"]["documents"] == 4 and saved["splits"]["test"]["stderr"] > 0


@torch.no_grad()
def plain_loss(folder: Path, tokens: list[int], block: int, stride: int) -> float:
    """What a loop over transformers' own model gives, a window at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    model.eval()
    losses: list[float] = []
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + block, len(tokens) - 1)
        logits = model(torch.tensor([tokens[begin:end]])).logits[0]
        each = F.cross_entropy(logits, torch.tensor(tokens[begin + 1 : end + 1]), reduction="none")
        losses += each[len(losses) - begin :].tolist()
        if end == len(tokens) - 1:
            break
    return math.fsum(losses) / len(losses)


def test_a_model_that_recites_its_training_text_is_caught(
    ray_cluster: None, tmp_path: Path
) -> None:
    rng = random.Random(2)
    text = "".join(chr(0x4E00 + rng.randrange(600)) for _ in range(700))
    (tmp_path / "text.txt").write_text(text)
    tokenizer = char_tokenizer(text)
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=64, n_positions=32, initializer_range=0.1)
    model = GPT(shape, vocab_size=tokenizer.vocab_size)
    learn_by_heart(model, tokenizer.encode(text[:630]))
    save(model, tokenizer, tmp_path / "parrot")
    result = evaluate(
        config_of(
            tmp_path, f"evaluate.model={tmp_path / 'parrot'}", f"data.source={tmp_path}/text.txt"
        )
    )
    assert result["memorised_50"] > 0.9 and result["memorised_20"] > 0.9
    assert result["gap"] > 1
    assert Path(result["evaluation"]).parent.parent == tmp_path


def learn_by_heart(model: GPT, tokens: list[int]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.tensor(tokens)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(9.0)
    for _ in range(400):
        starts = torch.randint(len(ids) - 32, (16,), generator=generator)
        windows = ids[starts[:, None] + torch.arange(33)]
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.05:
            return
    raise AssertionError(f"not learnt: {loss.item()}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.model={tmp}"], "evaluate.model: .*no config.json"),
        (["evaluate.model={tmp}/nowhere"], "evaluate.model=.*no such folder"),
        (["name=nobody"], "name=nobody: no such run in "),
        (["evaluate.model={folder}", "evaluate.stride=49"], "evaluate.stride=49 must not be above"),
        (["evaluate.model={folder}", "train.block_size=64"], "train.block_size=64 is more than"),
        (["evaluate.model={folder}", "evaluate.source={tmp}/x.txt"], "evaluate.source=.*x.txt"),
        (
            ["evaluate.model={folder}", "data.tokenizer={other}"],
            "do not belong together: .*sha256 [0-9a-f]{64}.*sha256 [0-9a-f]{64}",
        ),
        (["evaluate.model={misfit}"], "do not belong together: .*sha256 .* 300 .*sha256 .* 315"),
        (["evaluate.model={folder}", "evaluate.source={empty}"], "evaluate.source is empty"),
        (["evaluate.model={folder}", "name=run"], "is not an evaluation of"),
    ],
)
def test_mistakes_are_told_before_ray_starts(
    trained: tuple[Path, dict[str, Any]],
    folder: Path,
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    storage = trained[0]
    train_bpe([tiny_text(300, seed=3)], 350).save(tmp_path / "other")
    shutil.copytree(folder, tmp_path / "misfit")
    shutil.copytree(tmp_path / "other", tmp_path / "misfit", dirs_exist_ok=True)
    places = {"tmp": tmp_path, "folder": folder, "run": storage / "run"}
    (tmp_path / "empty.txt").touch()
    places |= {"empty": tmp_path / "empty.txt"}
    places |= {name: tmp_path / name for name in ("other", "misfit")}
    config = config_of(storage, *(text.format(**places) for text in overrides))
    with pytest.raises(UserError, match=message):
        check(config)


def test_results_are_kept_with_the_run_and_those_of_a_checkpoint_apart(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    storage = trained[0]
    for source, place in (
        ("run", "run"),
        ("run/model", "run"),
        ("run/checkpoint_000010", "run-checkpoint-000010-[0-9a-f]{6}"),
    ):
        rows = dict(plan(check(config_of(storage, f"evaluate.model={storage / source}"))))
        assert re.match(f"{storage}/{place}/: evaluation.json", rows["files"])
        assert "windows" in rows["test"]  # the run's own text, prepared for its training


def test_several_models_are_scored_by_the_average_of_their_probabilities(
    trained: tuple[Path, dict[str, Any]], evaluated: dict[str, Any], folder: Path
) -> None:
    storage, run = trained[0], trained[0] / "run"
    before = f"{run}/checkpoint_000010"
    pair = evaluate(config_of(storage, f"evaluate.model=[run, {before}]", "name=pair"))
    old = evaluate(config_of(storage, f"evaluate.model={before}", "evaluate.passages=0"))
    # Jensen: the average is better than the mean of both.
    assert pair["val_loss"] < (evaluated["val_loss"] + old["val_loss"]) / 2
    assert pair["model_dir"] == f"{run}/model, {before}/model" and pair["bleu"] is None
    saved = json.loads((storage / "pair" / "evaluation.json").read_text())
    assert "an ensemble" in saved["how"]["bleu"] and "an ensemble" in saved["how"]["memorised_20"]
    twice = check(config_of(storage, "evaluate.model=[run, run]"))
    assert re.fullmatch("ensemble-of-2-[0-9a-f]{6}", twice.folder.name)
    with pytest.raises(UserError, match="different tokenizers; only models with the same one"):
        check(config_of(storage, f"evaluate.model=[run, {folder}]"))
    other = shutil.copytree(run, storage / "other-split")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("name: run", "name: other-split"))
    check(config_of(storage, "evaluate.model=[run, other-split]"))
    (other / "config.yaml").write_text(re.sub("(?m)^seed: .*", "seed: 99", config))
    with pytest.raises(UserError, match="other-split was trained on another text or split"):
        check(config_of(storage, "evaluate.model=[run, other-split]"))


def test_text_that_is_too_short_or_not_the_models_is_refused(
    trained: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("the cat sees a dog.\n")
    short = [f"evaluate.model={folder}", f"evaluate.source={tmp_path / 'short.txt'}"]
    with pytest.raises(UserError, match="fewer than one block of 48; .*train.block_size"):
        evaluate(config_of(tmp_path, *short))
    (tmp_path / "empty.txt").write_text("\n")
    empty = [f"evaluate.model={folder}", f"evaluate.source={tmp_path / 'empty.txt'}"]
    with pytest.raises(UserError, match="evaluate.source holds no text"):
        evaluate(config_of(tmp_path, *empty))
    # A character tokenizer is made anew of another text: it is not the one of the run.
    named = [f"evaluate.model={trained[0] / 'run'}", "data.tokenizer=char", "train.block_size=16"]
    (tmp_path / "other.txt").write_text("quite other words, with Zebras & more. " * 40)
    with pytest.raises(UserError, match="do not belong together: .*sha256 .*sha256"):
        evaluate(config_of(trained[0], *named, f"data.source={tmp_path / 'other.txt'}"))


def test_text_that_has_changed_since_training_is_refused(
    trained: tuple[Path, dict[str, Any]], text_file: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained[0] / "run", tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(seed=9))
    config = (run / "config.yaml").read_text().replace(str(text_file), str(text))
    (run / "config.yaml").write_text(config)
    with pytest.raises(UserError, match="has changed since it was trained: .*[0-9a-f]{64}"):
        evaluate(config_of(tmp_path, "name=run"))
