"""Adapters on the models of jobs: the text of the merged model, and what is refused at once."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptray.config import LoraConfig, UserError, load_config
from gptray.data.batch_requests import RowRequest
from gptray.data.parts import part_name, write_part
from gptray.data.prompts import scan, staged
from gptray.data.tokenizer import Tokenizer
from gptray.entry_points import run
from gptray.jobs.adapters import name_with
from gptray.jobs.evaluate.check import check as check_evaluation
from gptray.jobs.generate.checked import check_batch
from gptray.jobs.generate.output_plan import job_identity
from gptray.jobs.generate.worker import EngineWorker, GenerateTask
from gptray.jobs.next_steps import of_model
from gptray.jobs.serve.check import check as check_endpoint
from gptray.jobs.serve.check import plan as plan_endpoint
from gptray.jobs.train.check import check as check_training
from gptray.jobs.train.check import plan
from gptray.model.adapter import CONFIG, WEIGHTS, Base
from gptray.model.adapter_files import adapted_network, load_merged, save_adapter
from gptray.model.adapter_folder import open_adapter
from gptray.model.hf import save_pretrained
from tests.jobs.generating import generate
from tests.model.damaged_adapters import edit_config, edit_weights, only_pickle


@pytest.fixture(scope="module")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a run called story."""
    folder = tmp_path_factory.mktemp("runs") / "story" / "adapter"
    base, lora = Base.of(str(model_dir)), LoraConfig(rank=2)
    rows = base.config.rows
    model = adapted_network(base, lora, base.config, vocab_size=rows, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    save_adapter(model, folder, base, lora)
    return folder


def texts(*words: str) -> list[str]:
    fixed = ["generate.precision=fp32", "generate.backend=torch", "sample.temperature=0"]
    config = load_config(None, [*fixed, "sample.prompt=[the cat, a dog]", *words])
    outputs = generate(config)["outputs"]
    return [one["output"] for one in outputs]


def test_a_model_with_an_adapter_writes_what_the_merged_one_does(
    model_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    base = Base.of(str(model_dir))
    tokenizer = Tokenizer.load(model_dir)
    merged = load_merged(base, open_adapter(adapter, base))
    save_pretrained(merged, tmp_path, eos_token_id=tokenizer.eos_id)
    tokenizer.save(tmp_path)
    expected = texts(f"generate.model={tmp_path}")
    assert expected != texts(f"generate.model={model_dir}")
    # By its folder with the model that it was trained on, or by the name of its run.
    assert texts(f"generate.adapter={adapter}") == expected
    named = ("generate.adapter=story", f"storage_path={adapter.parent.parent}")
    assert texts(f"generate.model={model_dir}", *named) == expected


def test_a_batch_with_another_adapter_is_another_job(model_dir: Path, adapter: Path) -> None:
    plain = load_config(None, [])
    with_one = load_config(None, [f"generate.adapter={adapter}"])
    ours, others = (job_identity(config, model_dir, []) for config in (with_one, plain))
    differing = {key for key in ours if ours[key] != others[key]}
    assert differing == {"generate.adapter"} and others["generate.adapter"] is None
    assert name_with("book", str(adapter)) == "book:story" and name_with("x", None) == "x"


def test_an_endpoint_finds_its_adapters_and_their_base(adapter: Path, model_dir: Path) -> None:
    words = [f"serve.adapters={{one: story, two: {adapter}}}", "serve.port=54321"]
    words.append(f"storage_path={adapter.parent.parent}")
    checked = check_endpoint(load_config(None, words))
    assert checked.model == {"model": str(model_dir), "served_model_name": model_dir.name}
    assert checked.config.serve.adapters == {"one": str(adapter), "two": str(adapter)}
    told = dict(plan_endpoint(checked))["with adapters"]
    assert told == f"{model_dir.name}:one, {model_dir.name}:two"
    folder = adapter.parent.parent
    checked = check_endpoint(load_config(None, [f"serve.adapters={folder}", *words[1:]]))
    assert dict(plan_endpoint(checked))["with adapters"].startswith(f"those in {folder}, ")
    with pytest.raises(UserError, match=r"is an adapter, not a folder of them; .*{adapter:"):
        check_endpoint(load_config(None, [f"serve.adapters={adapter}"]))
    with pytest.raises(UserError, match="serve.adapters: .*nowhere: no such folder"):
        check_endpoint(load_config(None, ["serve.adapters={one: nowhere}"]))


def test_rows_of_a_batch_name_their_adapters(
    model_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, str | None]] = [{"prompt": "the cat"}]  # without the key
    rows += [{"prompt": "the cat", "style": style} for style in ("tales", "", None, "news")]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        f"generate.model={model_dir}", f"generate.input_path={source}",
        f"generate.adapters={{tales: {adapter}}}", "generate.adapter_column=style",
        "generate.backend=torch", "generate.precision=fp32", "sample.temperature=0",
        "sample.max_new_tokens=9",
        f"generate.output_path={tmp_path / 'out'}",
    ]  # fmt: skip
    job = check_batch(load_config(None, words))
    generate = job.config.generate
    found = scan(job.files, generate)
    (part,) = staged(job.files, found, 9, lambda _: RowRequest("", {}, None))
    write_part(part, tmp_path / "staged")
    task = GenerateTask(job.config, 1, job.model, job.full_name, str(tmp_path), {})
    worker = EngineWorker(task)
    fed = worker.feed(0, str(tmp_path / "staged"))
    assert fed == [] and worker.finish() == [0], fed
    made = pq.read_table(tmp_path / part_name(0)).to_pylist()
    alone = texts(f"generate.adapter={adapter}", "sample.max_new_tokens=9")[0]
    plain = texts(f"generate.model={model_dir}", "sample.max_new_tokens=9")[0]
    assert [row["output"] for row in made] == [plain, alone, plain, plain, None]
    name = job.full_name
    assert [row["model"] for row in made] == [name, f"{name}:tales", name, name, f"{name}:news"]
    assert made[4]["error"] == "the adapter 'news' is not in generate.adapters (tales)"
    assert [row["style"] for row in made] == [None, "tales", "", None, "news"]
    other = [word.replace("column=style", "column=styl") for word in words]
    with pytest.raises(UserError, match=r"'styl'; columns: style.*generate.adapter_column"):
        scan(job.files, load_config(None, other).generate)
    with pytest.raises(UserError, match="adapters and adapter_column need each other"):
        load_config(None, ["generate.adapter_column=style"])


def test_results_with_an_adapter_have_a_folder_of_their_own(
    model_dir: Path, adapter: Path, source: Path, tmp_path: Path
) -> None:
    words = [f"evaluate.source={source}", f"storage_path={tmp_path}", "train.block_size=16"]
    plain = check_evaluation(load_config(None, [*words, f"evaluate.model={model_dir}"]))
    checked = check_evaluation(load_config(None, [*words, f"evaluate.adapter={adapter}"]))
    assert checked.found.folder == plain.found.folder and checked.folder != plain.folder
    assert "story" in checked.folder.name and checked.model_sha256 != plain.model_sha256


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("generate.adapter=nowhere", "generate.adapter: .*nowhere: no such folder"),
        ("generate.adapter={model}", "generate.adapter: .*: there is no adapter_config.json in it"),
        ("generate.adapter=s3://bucket/one", "must be in a local folder, not at a URI"),
    ],
)
def test_what_is_no_adapter_is_refused(word: str, told: str, model_dir: Path) -> None:
    given = [f"generate.model={model_dir}", "sample.prompt=x", word.format(model=model_dir)]
    with pytest.raises(UserError, match=told):
        generate(load_config(None, given))


QUERIES = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


def of_another_base(folder: Path) -> None:
    path = folder / WEIGHTS
    save_file(load_file(path), path, {"base_sha256": "0" * 64})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            of_another_base,
            "was trained on another model than {model}: one whose weights have sha256 000",
        ),
        (edit_config(r=9), "lora_A.weight has shape [2, "),
        (edit_config(rank_pattern={".*": 9}), "lora_A.weight has shape [2, "),
        (edit_config(use_dora=True), "use_dora=True is not supported, only plain LoRA"),
        (edit_config(bias="all"), "bias='all' is not supported, only 'none'"),
        (edit_config(peft_type="IA3"), "peft_type='IA3' is not supported, only LORA"),
        (edit_config(target_modules=3), "target_modules=3 is not a list of names"),
        (edit_weights(lambda x: x.pop(QUERIES)), f"{QUERIES} is missing"),
        (
            edit_weights(lambda x: x.update({QUERIES: x[QUERIES].to(torch.int32)})),
            f"{QUERIES} is stored as I32; weights are F64, F32, F16",
        ),
        (only_pickle, "no adapter_model.safetensors but pickled weights"),
        (lambda folder: os.truncate(folder / WEIGHTS, 900), "adapter_model.safetensors: damaged"),
        (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json: cannot be read"),
    ],
)
def test_a_wrong_adapter_is_one_line_and_exit_code_2_in_every_job(
    damage: Callable[[Path], object], told: str, model_dir: Path, adapter: Path, source: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wrong = tmp_path / "wrong"
    shutil.copytree(adapter, wrong)
    damage(wrong)
    for job, words in {
        "generate": [f"generate.adapter={wrong}", "sample.prompt=x"],
        "evaluate": [f"evaluate.adapter={wrong}", f"evaluate.source={source}"],
        "serve": [f"serve.adapters={{one: {wrong}}}"],
    }.items():
        given = [f"{job}.model={model_dir}", f"storage_path={tmp_path}", *words]
        assert run(job, given) == 2, job
        (line,) = capsys.readouterr().err.splitlines()
        assert str(wrong) in line and told.format(model=model_dir) in line


@pytest.mark.parametrize(
    ("job", "named", "told"),
    [
        ("generate", "generate.model={run}", "generate.model: {run}/adapter is an adapter, not a "
         "model; generate.adapter={run} adds it to its base"),
        ("evaluate", "evaluate.model={run}/adapter", "evaluate.adapter={run}/adapter adds it"),
        ("serve", "serve.model={run}", "serve.adapters={{name: {run}}} serves it"),
        ("export", "export.model={run}", "; its run's model/ has it merged in"),
        ("train", "model.init_from={run}", "model.init_from: {run}/adapter is an adapter, not a"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_named_as_a_model_is_told_its_key(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    job: str, named: str, told: str,
) -> None:  # fmt: skip
    words = [named.format(run=adapter.parent), f"storage_path={tmp_path}"]
    more = {"generate": ["sample.prompt=x"], "export": [f"export.output_path={tmp_path}/x.gguf"]}
    assert run(job, [*words, *more.get(job, [])]) == 2
    assert told.format(run=adapter.parent) in capsys.readouterr().err


def test_the_commands_that_come_next_use_the_adapter_too(
    model_dir: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = tmp_path / "it's, {mine}"
    shutil.copytree(adapter, moved)
    for folder, name in ((adapter, "story"), (moved, moved.name)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "gptray"):
            texts(f"generate.adapter={folder}")
        command = shlex.split(caplog.messages[-1])
        config = load_config(None, command[command.index("jobs/serve.py") + 1 :])
        assert config.serve.model == str(model_dir)
        assert config.serve.adapters == {name: str(folder)}
    for job, key in (("evaluate", "evaluate.adapter"), ("generate", "generate.adapter")):
        words = shlex.split(of_model(model_dir, adapter=str(adapter))[job])
        assert words[-1] == f"{key}={adapter}"


def test_a_dry_run_tells_what_is_trained(model_dir: Path, source: Path, tmp_path: Path) -> None:
    words = [
        f"storage_path={tmp_path}", f"data.source={source}", f"model.init_from={model_dir}",
        "train.block_size=16", "name=x",
    ]  # fmt: skip
    rows = dict(plan(check_training(load_config(None, [*words, "lora.rank=2"]))))
    assert rows["trained"].endswith("%), an adapter of rank 2") and "adapter/" in rows["files"]
    assert "trained" not in dict(plan(check_training(load_config(None, words))))
    with pytest.raises(UserError, match=r"lora.targets: .* no linear layer c_atn"):
        check_training(load_config(None, [*words, "lora.rank=2", "lora.targets=[c_atn]"]))
