"""Loading: precedence, strictness, what people type, and every mistake in one go."""

from __future__ import annotations

import pickle
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gptray
from gptray.config import (
    Config,
    ConfigError,
    ModelConfig,
    UserError,
    differences,
    dump,
    load_config,
    override,
)
from gptray.config.keys import field_specs

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_yaml(text: str) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_yaml


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def problems_of(path: str | None, *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, arguments)
    return caught.value.problems


def test_nothing_given_is_the_defaults() -> None:
    assert load_config(None, []) == Config()


def test_command_line_goes_before_file_goes_before_defaults(write: Write) -> None:
    path = write("optim:\n  lr: 2e-3\n  min_lr: 2e-4\n")
    config = load_config(path, ["optim.lr=3e-3"])
    assert (config.optim.lr, config.optim.min_lr, config.optim.eps) == (3e-3, 2e-4, 1e-8)


@pytest.mark.parametrize("text", ["", "# nothing\n", "optim:\n", "null\n", "{}\n"])
def test_empty_file_or_section_changes_nothing(write: Write, text: str) -> None:
    assert load_config(write(text), []) == Config()


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("train.max_steps=1e4", "train.max_steps", 10000),
        ("optim.betas=[0.9, 0.95]", "optim.betas", (0.9, 0.95)),
        ("train.patience=null", "train.patience", None),
        ("train.compile=true", "train.compile", True),
        ("model.norm=none", "model.norm", "none"),
        ("data.split=80:10:10", "data.split", (0.8, 0.1, 0.1)),
        ("data.split=[0.8,0.1,0.1]", "data.split", (0.8, 0.1, 0.1)),
        ("data.split=[90, 10]", "data.split", (0.9, 0.1)),
        ("name=123", "name", "123"),
        ("name=1e3", "name", "1e3"),
        ("name=2_1", "name", "2_1"),
        ("name=null", "name", None),
        ("name=true", "name", "true"),
        ("data.source=*.txt", "data.source", "*.txt"),
        ("data.source=@foo", "data.source", "@foo"),
        ("data.source=s3://b/a?x=1#y", "data.source", "s3://b/a?x=1#y"),
        ("data.source=[a.txt, 12]", "data.source", ["a.txt", "12"]),
        ("data.source=['*.txt', b]", "data.source", ["*.txt", "b"]),
        ("data.source=- a", "data.source", "- a"),
        ("sample.prompt=Once upon a time", "sample.prompt", "Once upon a time"),
        ("sample.prompt=Hello: world", "sample.prompt", "Hello: world"),
        ("sample.prompt={a: b}", "sample.prompt", "{a: b}"),
        ("sample.prompt=[x", "sample.prompt", "[x"),
        ("sample.prompt=# head", "sample.prompt", "# head"),
        ("sample.prompt=a # b", "sample.prompt", "a # b"),
        ("sample.prompt= two  spaces ", "sample.prompt", " two  spaces "),
        ("sample.prompt=a\nb", "sample.prompt", "a\nb"),
        ('sample.prompt="123"', "sample.prompt", "123"),
        ("sample.prompt='it''s'", "sample.prompt", "it's"),
        ('sample.prompt="a" and b', "sample.prompt", '"a" and b'),
        ('sample.prompt="a" # b', "sample.prompt", '"a" # b'),
        ("sample.prompt=null # b", "sample.prompt", "null # b"),
        ('sample.prompt=""', "sample.prompt", ""),
        ('sample.prompt="null"', "sample.prompt", "null"),
        ("sample.prompt=x=y", "sample.prompt", "x=y"),
        ("sample.prompt=\ud55c\uae00", "sample.prompt", "\ud55c\uae00"),
    ],
)
def test_argument_means_what_was_typed(argument: str, key: str, value: Any) -> None:
    found = value_at(load_config(None, [argument]), key)
    assert found == pytest.approx(value) if key == "data.split" else found == value
    assert type(found) is type(value)


def test_text_in_yaml_stays_as_written(write: Write) -> None:
    path = write("name: 2026\ndata:\n  source: [1.txt, 12]\n  split: 90:10\nsample: {prompt: on}\n")
    config = load_config(path, [])
    assert (config.name, config.data.source, config.sample.prompt) == (
        "2026",
        ["1.txt", "12"],
        "on",
    )
    assert config.data.split == (0.9, 0.1)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.max_steps=true", "a whole number, got true"),
        ("train.max_steps=1.5", "a whole number, got 1.5"),
        ("train.max_steps=12abc", "a whole number, got '12abc'"),
        ('train.max_steps="3"', "a whole number, got '3'"),
        ("train.max_steps=0", "must be above 0, got 0"),
        ("train.max_steps=" + "9" * 5000, "a whole number"),
        ("train.compile=1", "true or false, got 1"),
        ("train.compile=yes", "true or false, got 'yes'"),
        ("optim.lr=.nan", "finite number, got nan"),
        ("optim.weight_decay=.inf", "finite number, got inf"),
        ("optim.lr=1e999", "finite number, got inf"),
        ("optim.lr=fast", "a number, got 'fast'"),
        ("optim.lr=true", "a number, got true"),
        ("optim.lr=null", "a number, got null"),
        ("optim.betas=[0.9]", "a list of 2 numbers, got [0.9]"),
        ("optim.betas=[0.9, x]", "a list of 2 numbers, got [0.9, 'x']"),
        ("optim.betas=[0.9, 1.5]", "must be below 1"),
        ("optim.lr=[1", "not valid YAML"),
        ("optim.schedule=cosin", "did you mean cosine?"),
        ("data.split=90", "train:val"),
        ("data.split=90:0", "above 0"),
        ("data.split=90:1_0", "train:val"),
        ("data.split=[90, 1_0]", "train:val"),
        ("data.split=\uff19:1", "train:val"),
        ("train.max_steps=1_000", "a whole number, got '1_000'"),
        ("optim.lr=1_0e-4", "a number, got '1_0e-4'"),
        ("model.n_positions=1", "must be at least 2, got 1"),
        ("data.source=[*.txt]", "quote the items"),
        ("name=a/b", "letters and digits"),
        ("name=", "name has no value"),
        ("=1e-3", "=1e-3: no key before ="),
        ("data.vocab_size=1000000000", "at most 1048576"),
        ("seed", "seed has no value, such as seed=1337"),
        ("sample.prompt=", "sample.prompt has no value, such as sample.prompt='\"\"'"),
        ("optim=3", "optim is a section"),
        ("lr=3", "did you mean optim.lr?"),
        ("train.lr=3", "did you mean optim.lr?"),
        ("configs/a.yaml", "did you mean --config configs/a.yaml?"),
        ("name=\udcff", "not UTF-8"),
    ],
)
def test_wrong_argument_is_one_problem(argument: str, words: str) -> None:
    problems = problems_of(None, argument)
    assert len(problems) == 1
    assert problems[0].startswith("command line: ")
    assert words in problems[0]
    assert "pydantic" not in problems[0]


def test_every_whole_number_has_an_upper_bound() -> None:
    keys = [key for key, spec in field_specs(Config).items() if int in (*spec.kinds, *spec.items)]
    problems = problems_of(None, *(f"{key}=1e23" for key in keys))
    refused = {line.removeprefix("command line: ").partition(": ")[0] for line in problems}
    assert refused >= {key for key in keys if float not in field_specs(Config)[key].kinds}
    assert problems_of(None, "tune.num_samples=1e8") == [
        "command line: tune.num_samples: must be at most 10000, got 100000000"
    ]


def test_an_empty_text_names_nothing() -> None:
    specs = {key: spec for key, spec in field_specs(Config).items() if not spec.choices}
    given = [f"{key}=''" for key, spec in specs.items() if str in spec.kinds]
    problems = "\n".join(problems_of(None, *given))
    columns = {"data.text_column", "generate.prompt_column", "generate.id_column"}
    named = {key for key in specs if f"{key}: " in problems}
    taken = {word.partition("=")[0] for word in given} - named
    assert taken == {*columns, "generate.adapter_column", "sample.prompt"}
    assert "data.source: " in problems_of(None, "data.source=['', a.txt]")[0]


def test_key_given_twice_is_refused(write: Write) -> None:
    assert problems_of(None, "seed=1", "seed=2") == ["command line: seed is given twice"]
    path = write("optim:\n  lr: 1e-3\n  eps: 1e-8\n  lr: 2e-3\n")
    assert problems_of(path) == [f"{path}:4: optim.lr is given twice (first on line 2)"]
    path = write("optim:\n  lr: 1e-3\ntrain:\n  max_steps: 3\noptim:\n  eps: 1e-8\n")
    assert problems_of(path) == [f"{path}:5: optim is given twice (first on line 1)"]


def test_all_mistakes_show_at_once_with_their_places(write: Write) -> None:
    path = write(
        "optm:\n"
        "  lrr: 3\n"
        "learning_rate: 3\n"
        "train:\n"
        "  max_steps: soon\n"
        "  block_size: 512\n"
        "model: {n_embd: 250, norm: layernrm}\n"
    )
    problems = problems_of(path, "bath=3", "compute.max_failures=-2", "train.max_steps=1.5")
    assert problems == [
        f"{path}:1: unknown section optm; did you mean optim?",
        f"{path}:2: unknown key optim.lrr; did you mean optim.lr?",
        f"{path}:3: unknown key learning_rate; did you mean optim.lr?",
        f"{path}:6: train.block_size=512 must not be above model.n_positions=128",
        f"{path}:7: model.norm: expects layernorm, rmsnorm or none, got 'layernrm'; did you mean "
        "layernorm?",
        f"{path}:7: model.n_embd=250 must be divisible by model.n_head=4, such as 248",
        "command line: unknown key bath; did you mean train.global_batch_size?",
        "command line: train.max_steps: expects a whole number, got 1.5",
        "command line: compute.max_failures: must be at least -1, got -2",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model.n_embd=130"], ["model.n_embd=130", "model.n_head=4", "such as 128"]),
        (["train.block_size=300"], ["train.block_size=300", "model.n_positions=128"]),
        (["model.no_rope_layers=[1, 0]"], ["model.no_rope_layers", "model.positions=rotary"]),
        (["model.local_rope_theta=50"], ["model.local_rope_theta", "model.positions=rotary"]),
        (["model.wide_qk_norm=true"], ["model.wide_qk_norm", "model.qk_norm=true"]),
        (
            ["model.embedding_multiplier=2", "model.scale_embedding=true"],
            ["model.embedding_multiplier", "model.scale_embedding"],
        ),
        (
            ["model.residual_multiplier=0.5", "model.sandwich_norm=true"],
            ["model.residual_multiplier", "model.sandwich_norm"],
        ),
        (["model.logits_scaling=8", "model.norm=none"], ["model.logits_scaling", "model.norm"]),
        (
            ["model.attention_scale=2", "model.qk_norm=true"],
            ["model.attention_scale", "model.qk_norm"],
        ),
        (["model.centred_norm=true"], ["model.centred_norm", "model.norm=rmsnorm"]),
        (
            ["model.post_norm=true", "model.sandwich_norm=true"],
            ["model.sandwich_norm", "model.post_norm"],
        ),
        (["optim.min_lr=1"], ["optim.min_lr=1", "optim.lr=0.002"]),
        (
            ["train.global_batch_size=30", "train.micro_batch_size=4", "compute.num_workers=2"],
            ["train.global_batch_size=30", "train.micro_batch_size=4", "compute.num_workers=2"],
        ),
        (["train.global_batch_size=7", "compute.num_workers=2"], ["global_batch_size=7", "8"]),
    ],
)
def test_bad_combination_names_its_keys(arguments: list[str], named: list[str]) -> None:
    (problem,) = problems_of(None, *arguments)
    assert all(name in problem for name in named)


def test_rule_on_a_wrong_value_stays_silent() -> None:
    (problem,) = problems_of(None, "model.n_head=many", "model.n_embd=250")
    assert "model.n_head: expects a whole number" in problem


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("- a\n", 1, "expects sections"),
        ("just text\n", 1, "expects sections"),
        ("seed: 1\noptim: 3\n", 2, "optim is a section"),
        ("seed: 1\noptim: [1]\n", 2, "optim is a section"),
        ("optim:\n  lr:\n    fast\n", 2, "expects a number, got 'fast'"),
        ("optim:\n  lr: {a: 1}\n", 2, "expects a number, got keys of its own"),
        ("? [a, b]\n: 1\n", 1, "plain name"),
        ("data:\n  source: {a: 1}\n", 2, "text or a list of texts"),
        ("serve:\n  adapters: {a:/tmp}\n", 2, "'a:/tmp' has no value; put a space after the colon"),
        ("serve:\n  adapters: {a: 3}\n", 2, "serve.adapters: 'a' cannot be 3"),
        ("optim:\n\tlr: 1\n", 2, "tab"),
    ],
)
def test_wrong_file_names_its_line(write: Write, text: str, line: int, words: str) -> None:
    path = write(text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:{line}: ")
    assert words in problem


def test_broken_file_and_wrong_argument_show_together(write: Write) -> None:
    problems = problems_of(write("a: b: c\n"), "lr=3", "seed=x")
    assert len(problems) == 3


def test_a_file_below_the_home_folder_is_found(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = Path(write("seed: 1\n")).relative_to(tmp_path)
    assert load_config(f"~/{name}", []).seed == 1


def test_missing_file_names_the_nearest(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    right = write("seed: 1\n")
    (problem,) = problems_of(right.replace("my.yaml", "mi.yaml"))
    assert problem.endswith(f"no such file; did you mean {right}?")
    (problem,) = problems_of(str(tmp_path / "quite_other.yaml"))
    assert problem.endswith("has my.yaml")
    (problem,) = problems_of(str(tmp_path / "nowhere" / "other.yaml"))
    assert "there is no folder" in problem
    (problem,) = problems_of(str(tmp_path))
    assert problem == f"{tmp_path}: is a folder"
    (tmp_path / "config.yaml").touch()
    (problem,) = problems_of(str(tmp_path))
    assert problem == f"{tmp_path}: is a folder; did you mean {tmp_path}/config.yaml?"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text("")
    (problem,) = problems_of("small")
    assert problem == "small: no such file; did you mean configs/small.yaml?"
    (problem,) = problems_of(str(tmp_path / "small.yaml"))
    assert problem.endswith(f"did you mean {right}?")  # in the folder that was named


def test_shipped_configs_are_found_without_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/lora.yaml", []).lora.rank
    (problem,) = problems_of("lora")
    assert problem == "lora: no such file; did you mean configs/lora.yaml?"
    (problem,) = problems_of("configs/little_txt.yaml")
    assert problem.endswith("did you mean configs/little_text.yaml?")
    (problem,) = problems_of("configs/qqqqqq")
    assert "; configs has continue_pretraining.yaml, " in problem
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lora.yaml").write_text("seed: 5\n")
    assert load_config("configs/lora.yaml", []).seed == 5  # one's own goes first


def test_typos_in_a_file_are_refused_with_line_and_right_name(write: Write) -> None:
    rng = random.Random(1)
    missed = []
    keys = [key for key in field_specs(Config) if "." in key]
    for key in keys:
        section, _, name = key.partition(".")
        place = rng.randrange(len(name))
        wrong = name[:place] + name[place + 1 :]
        path = write(f"seed: 1\n{section}:\n  # why\n  {wrong}: 1\n")
        (problem,) = problems_of(path)
        assert problem.startswith(f"{path}:4: unknown key {section}.{wrong}")
        if not problem.endswith(f"did you mean {key}?"):
            missed.append(problem)
    assert len(missed) <= 0.05 * len(keys), missed


def test_section_typos_are_refused_with_line_and_right_name(write: Write) -> None:
    for section in ("data", "model", "optim", "train", "compute", "sample"):
        for place in range(len(section)):
            path = write(f"seed: 1\n{section[:place]}{section[place + 1 :]}: {{}}\n")
            (problem,) = problems_of(path)
            assert problem.startswith(f"{path}:2: unknown section")
            assert problem.endswith(f"did you mean {section}?")


def test_problems_survive_a_process_border() -> None:
    error = ConfigError(["a", "b"])
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ConfigError)
    assert copy.problems == ["a", "b"]


def test_override_sets_dotted_keys_and_leaves_the_source() -> None:
    config = Config()
    changed = override(config, {"optim.lr": 3e-4, "name": "a", "optim.betas": [0.8, 0.9]})
    assert (changed.optim.lr, changed.name, changed.optim.betas) == (3e-4, "a", (0.8, 0.9))
    assert config == Config()
    assert override(changed, {}) == changed


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim.lrr": 1.0}, "did you mean optim.lr?"),
        ({"optim.lr": "fast"}, "expects a number"),
        ({"train.max_steps": 1.5}, "expects a whole number"),
        ({"model.n_embd": 250}, "must be divisible"),
    ],
)
def test_override_validates(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(Config(), values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nme": "book"}, "unknown key nme; did you mean name?"),
        ({"model": {"n_layr": 3}}, "unknown key model.n_layr; did you mean model.n_layer?"),
        ({"model": ModelConfig(n_layer=3), "seed": -1}, "seed: must be at least 0, got -1"),
        ({"train": {"block_size": 999}}, "train.block_size=999 must not be above model.n_posi"),
    ],
)
def test_a_config_made_in_python_tells_mistakes_as_a_file_does(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**given)
    (problem,) = caught.value.problems
    assert problem.startswith(message)
    made = Config(model=ModelConfig(n_layer=3), seed=5)
    assert made == load_config(None, ["model.n_layer=3", "seed=5"])


def test_dump_is_a_config_file_of_an_equal_config(write: Write) -> None:
    rng = random.Random(0)
    texts = ["123", "1e3", "3e-4", "null", "~", "on", "yes", "true", "90:10", "0o17", "2026-11-22"]
    texts += ["a: b", "# c", "*x", "&x", "- a", "[x", "{", " lead", "trail ", "two\nlines", "\t"]
    texts += [
        "\ud55c\uae00",
        "\U0001f600",
        "'",
        '"',
        "\\n",
        "",
        "=",
        "!x",
        "%",
        "@",
        "`",
        "\x85",
        "\u2028",
        "\r",
    ]
    texts += ["".join(rng.choices(string.printable, k=12)) for _ in range(200)]
    for start in range(0, len(texts), 20):
        config = override(
            Config(),
            {
                "sample.prompt": texts[start : start + 20],
                "storage_path": texts[start],
                "data.source": texts[start + 1],
                "optim.lr": rng.random(),
                "optim.min_lr": 10.0 ** -rng.randint(3, 300),
                "optim.eps": rng.random() * 1e-12,
                "data.split": (rng.random(), rng.random(), rng.random()),
                "train.patience": None,
            },
        )
        assert load_config(write(dump(config)), []) == config


def test_a_path_of_python_is_a_file(write: Write) -> None:
    assert load_config(Path(write("optim:\n  lr: 3e-3\n"))).optim.lr == 3e-3


WRONG: Any = ["optim.lr=0.1", {"optim.lr": 0.1}, None, 3]


@pytest.mark.parametrize("wrong", WRONG)
def test_overrides_that_are_no_list_are_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"a list, such as \['optim.lr=0.1'"):
        load_config(None, wrong)


@pytest.mark.parametrize("wrong", ["", 3, {"optim": {"lr": 0.1}}])
def test_a_path_that_names_nothing_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="path must name a YAML file or be None, not "):
        load_config(wrong)


@pytest.mark.parametrize("job", [gptray.train, gptray.tune, gptray.evaluate])
@pytest.mark.parametrize("wrong", [None, "my.yaml", {"name": "first"}, Config])
def test_jobs_take_only_a_config(job: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(UserError, match=r"must be a gptray.Config, as gptray.load_config\(\)"):
        job(wrong)


def test_every_default_can_be_written_out(write: Write) -> None:
    text = dump(Config())
    assert load_config(write(text), []) == Config()
    for key in field_specs(Config):
        assert f"{key.rpartition('.')[2]}: " in text or f"{key.rpartition('.')[2]}:\n" in text


def test_a_learning_rate_given_beside_an_adapter_is_shown_even_where_it_is_the_default() -> None:
    adapter = ["lora.rank=4", "model.init_from=base"]
    assert "optim.lr" not in differences(load_config(None, adapter))
    assert differences(load_config(None, [*adapter, "optim.lr=2e-3"]))["optim.lr"] == 2e-3
    assert differences(load_config(None, ["optim.lr=2e-3"])) == {}
