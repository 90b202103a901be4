"""Networks and tokenizers of other families through GGUF files: written, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers, processors

from gptray.config import UserError
from gptray.data.tokenizer import Tokenizer, char_tokenizer
from gptray.entry_points import run
from gptray.gguf.layout import read_header
from gptray.gguf.tokenizer_json import PRE_TOKENIZERS, end_ids, tokenizer_json
from gptray.model.hf import load_pretrained
from gptray.model.shape import model_folder
from gptray.model.unread import unread_network
from tests.data import foreign
from tests.generation.models import small_tokenizer
from tests.gguf.copies import copying
from tests.model.foreign_models import SHAPES, make_hf

REFUSED = {
    "gpt2 untied, exact GELU": "llama.cpp's gpt2 does not support gelu in the MLP",
    "mistral": "does not support sliding windows, and this model has one of 7 tokens",
    "qwen2 with windows": "does not support sliding windows",
    "gpt_neox in series": "llama.cpp's gptneox does not support layers without a bias",
    "exaone4": "does not support sliding windows",
    "olmo3": "not olmo3; export.format=hf does",
    "olmo2 with biases": "llama.cpp's olmo2 does not support a bias of",
    "smollm3, its first layer without positions": "these layers without positions",
    "phi3": "does not support sliding windows",
    **dict.fromkeys(("gpt_neo", "gpt_neo without windows, exact GELU"), "not gpt_neo; export.for"),
    **dict.fromkeys(("opt", "opt untied, without biases"), "not opt; export.format=hf does"),
    "ernie4_5 with biases": "llama.cpp's ernie4_5 does not support a bias of",
    "gemma with biases": "llama.cpp's gemma does not support a head that is not the embedding",
    "gemma3_text": "sliding windows in other layers than all but every 6th",
}
TEXTS = ("the cat  sees\n\n1234 a dog", "\uc61b\ub0a0 \uc61b\uc801\uc5d0", "<s> it's", " a\t ")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def exported(folder: Path, name: str, tokenizer: Tokenizer, **changes: object) -> Path:
    model = make_hf(name, tokenizer.vocab_size, eos_id=tokenizer.eos_id, **changes)
    model.save_pretrained(folder / "m")
    tokenizer.save(folder / "m")
    words = [f"export.model={folder}/m", f"export.output_path={folder}/m.gguf"]
    assert run("export", [*words, "export.precision=fp32"]) == 0
    return folder / "m.gguf"


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in REFUSED])
def test_every_weight_and_number_comes_back(tmp_path: Path, name: str) -> None:
    path = exported(tmp_path, name, small_tokenizer())
    original, found = (load_pretrained(place).eval() for place in (tmp_path / "m", path))
    for key, weight in original.state_dict().items():
        off = 1e-6 if original.config.centred_norm and weight.dim() == 1 else 0
        assert torch.allclose(found.state_dict()[key], weight, rtol=0, atol=off), key
    idx = torch.arange(40)[None]
    assert torch.allclose(found(idx), original(idx), atol=1e-5)


def test_heads_wider_than_the_network_and_an_equal_head_come_back(tmp_path: Path) -> None:
    changes = {"head_dim": 10, "sliding_window": None, "tie_word_embeddings": True}
    path = exported(tmp_path, "mistral", small_tokenizer(), **changes)
    original, found = (load_pretrained(place).eval() for place in (tmp_path / "m", path))
    idx = torch.arange(40)[None]
    assert found.lm_head is None and torch.allclose(found(idx), original(idx), atol=1e-5)


@pytest.mark.parametrize(("name", "windows"), [("phi3", [7] * 2), ("exaone4", [7, 7])])
def test_a_sliding_window_is_read(tmp_path: Path, name: str, windows: list[int]) -> None:
    changes = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
    path = exported(tmp_path, name, small_tokenizer(), **changes)
    original, found = (load_pretrained(place).eval() for place in (tmp_path / "m", path))
    idx = torch.arange(40)[None]
    assert torch.allclose(found(idx), original(idx), atol=1e-5)
    config = load_pretrained(changed(path, {f"{name}.attention.sliding_window": 7})).config
    assert [config.window(layer) for layer in range(2)] == windows


def test_gemmas_positions_are_read_and_its_other_scores_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, "gemma3_text, six layers", small_tokenizer())
    keys = {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 50.0}
    config = load_pretrained(changed(path, {f"gemma3.{key}": keys[key] for key in keys})).config
    assert [config.window(layer) for layer in range(6)] == [7, None] * 3
    assert (config.local_rope_theta, config.rope_theta) == (50.0, 1000000.0)
    # Of the largest one llama.cpp divides scores by another root than that of a head's width.
    wider = {f"attention.{part}_length": 16 for part in ("key", "value")}
    largest = {"block_count": 62, "rope.dimension_count": 16, **wider}
    with pytest.raises(UserError, match="query_pre_attn_scalar=8 is not supported, only the 16 of"):
        load_pretrained(changed(path, {f"gemma3.{key}": largest[key] for key in largest}))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt_neox", "smollm3"])
def test_a_scaling_for_which_llama_cpp_has_no_tensor_there_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = SHAPES["llama of release 3"][1]["rope_parameters"]
    with pytest.raises(AssertionError):
        exported(tmp_path, name, small_tokenizer(), rope_parameters=scaling)
    assert "does not support rope_scaling of rope_type llama3" in capsys.readouterr().err


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = small_tokenizer()
    make_hf(name, tokenizer.vocab_size).save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    words = [f"export.model={tmp_path}/m", f"export.output_path={tmp_path}/m.gguf"]
    assert run("export", words) == 2
    assert REFUSED[name] in capsys.readouterr().err and not (tmp_path / "m.gguf").exists()


def test_weights_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = exported(tmp_path, "llama", small_tokenizer())
    unread, whole = unread_network(path), load_pretrained(path)
    for (name, one), other in zip(unread.named_parameters(), whole.parameters(), strict=True):
        assert one.is_meta and torch.equal(unread.full_tensor(one), other), name


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    model = make_hf("llama", tokenizer.vocab_size)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    unread = unread_network(tmp_path)
    with pytest.raises(UserError, match="model.norm.weight is not finite"):
        unread.full_tensor(unread.get_parameter("transformer.ln_f.weight"))


def changed(path: Path, fields: Mapping[str, object], rope: list[float] | None = None) -> Path:
    """The file with other fields, and perhaps a scaling of positions."""
    output = path.with_name("changed.gguf")
    with copying(path, output, fields) as (reader, writer):
        if rope:
            writer.add_tensor("rope_freqs.weight", np.array(rope, np.float32))
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    return output


def test_what_old_files_leave_out_follows_from_the_rest(tmp_path: Path) -> None:
    path = exported(tmp_path, "llama", small_tokenizer())
    left_out = ("attention.key_length", "attention.value_length", "rope.freq_base")
    old = changed(path, {f"llama.{key}": None for key in (*left_out, "rope.dimension_count")})
    original, found = load_pretrained(path).config, load_pretrained(old).config
    assert found.head_width == original.head_width and found.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.head_count", [6, 6], "attention.head_count is a list with a number for each"),
        ("attention.head_count", 0, "it has 0 heads"),
        ("attention.head_count", "six", "it has no attention.head_count"),
        ("attention.head_count_kv", 0, "attention.head_count_kv is 0"),
        ("attention.head_count_kv", 1 << 31, "rows, which are not whole heads"),
        ("attention.head_count_kv", 5, "rows, which are not whole heads"),
        ("attention.layer_norm_rms_epsilon", None, "it has no attention.layer_norm_rms_epsilon"),
        ("attention.value_length", 4, "are not as wide as their keys"),
        ("expert_count", 8, "llama.expert_count is 8, which is not supported"),
        ("attention.causal", False, "llama.attention.causal is False, which is not supported"),
        ("attention.scale", 1.0, "llama.attention.scale is 1.0, which is not supported"),
        ("logit_scale", 0.5, "llama.logit_scale is 0.5, which is not supported"),
        (
            "rope.scaling.attn_factor",
            1.5,
            "rope.scaling.attn_factor is 1.5, which is not supported",
        ),
        ("rope.scaling.type", "longrope", "'longrope' is not supported; none, linear and yarn"),
        ("rope.freq_base", -1.0, "do not describe a rotation of 8 numbers"),
        ("rope.dimension_count", 99, "do not describe a rotation of 8 numbers"),
    ],
)
def test_a_network_that_is_not_known_is_one_line(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    path = changed(exported(tmp_path, "llama", small_tokenizer()), {f"llama.{key}": value})
    with pytest.raises(UserError, match=f"{path}: .*{said}"):
        model_folder(path)


@pytest.mark.parametrize("factors", [[1.0, 2.0, 8.0, 8.0], [8.0], [float("inf")] * 4])
def test_a_scaling_that_is_not_llamas_is_refused(tmp_path: Path, factors: list[float]) -> None:
    path = changed(exported(tmp_path, "llama", small_tokenizer()), {}, factors)
    with pytest.raises(UserError, match="rope_freqs.weight is not a scaling like Llama 3's"):
        model_folder(path)


@pytest.mark.parametrize("kind", ["pieces", "characters"])
def test_pieces_and_characters_come_back(tmp_path: Path, kind: str) -> None:
    is_pieces = kind == "pieces"
    tokenizer = (
        foreign.as_tokenizer(foreign.llama()) if is_pieces else char_tokenizer("".join(TEXTS))
    )
    found = Tokenizer.load(exported(tmp_path, "llama", tokenizer))
    assert found.names == tokenizer.names and found.eos_id == tokenizer.eos_id
    # Of pieces a text that begins with a space gets another one in llama.cpp.
    for text in TEXTS[: 3 if is_pieces else 4]:
        assert found.encode(text) == tokenizer.encode(text)


def fields(pre: str, **more: object) -> dict[str, object]:
    """A byte-level tokenizer with three special tokens, in GGUF's terms."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "<s>", "</s>", "<end>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(alphabet) + [3] * 3,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def opened(given: Mapping[str, object]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(given)))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_way_to_cut_text_opens_and_loses_nothing(pre: str) -> None:
    backend = opened(fields(pre, add_bos_token=False))
    for text in (*TEXTS, "caf\u00e9 HTTPServer's 12345\r\n\r\n  x\U0001f600"):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert backend.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "more", "around"),
    [
        ("qwen2", {}, ([], [])),
        ("llama-bpe", {}, ([256], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ([256], [257])),
        ("gpt-2", {"add_bos_token": True, "bos_token_id": 257}, ([257], [])),
    ],
)
def test_special_tokens_stand_around_a_text_as_the_file_says(
    pre: str, more: dict[str, object], around: tuple[list[int], list[int]]
) -> None:
    backend = opened(fields(pre, **more))
    plain = backend.encode("a", add_special_tokens=False).ids
    assert backend.encode("a").ids == [*around[0], *plain, *around[1]]


def test_all_tokens_that_end_a_text_are_known() -> None:
    assert end_ids(fields("gpt-2")) == 257
    assert end_ids(fields("gpt-2", eot_token_id=258, eom_token_id=257)) == [257, 258]
    assert end_ids(fields("gpt-2", eot_token_id=999)) == 257


def test_all_tokens_that_end_a_text_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = small_tokenizer()
    model = make_hf("llama", tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    settings = tmp_path / "m" / "generation_config.json"
    for count, more in enumerate(([9], [9, 7], [9, 7, 8]), 1):
        settings.write_text(json.dumps({"eos_token_id": [*more, tokenizer.eos_id]}))
        path = tmp_path / f"{count}.gguf"
        words = [f"export.model={tmp_path}/m", f"export.output_path={path}"]
        assert run("export", words) == 0
        found = json.loads((model_folder(path) / "generation_config.json").read_text())
        assert found["eos_token_id"] == [tokenizer.eos_id, *more[:2]]
        told = capsys.readouterr().err
        assert ("llama.cpp may continue after" in told) == (count == 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (fields("elvish"), r"its tokenizer \(gpt2, elvish\) is not supported"),
        (fields("gpt-2", model="bert"), r"its tokenizer \(bert, gpt-2\)"),
        (fields("gpt-2", merges=["ab"]), "has a merge 'ab', which is not a pair"),
        (fields("gpt-2", model="llama", token_type=[6] * 259), "its tokens have no scores"),
        (
            fields("gpt-2", model="llama", token_type=[6] * 259, scores=["a"] * 259),
            "its tokens have no scores",
        ),
        (
            fields("x", model="llama", tokens=["ab", "c"], token_type=[1, 1]),
            "no tokens for bytes, but pieces such as 'ab'",
        ),
        (
            fields(
                "x", model="llama", tokens=["a" * 600, "c"], token_type=[1, 6], scores=[0.0, 0.0]
            ),
            "a token of 600 characters",
        ),
    ],
)
def test_a_tokenizer_that_is_not_known_is_one_line(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tokenizer_json(given)


@pytest.mark.parametrize(("single", "adds"), [("$A", False), ("<s> $A", True)])
def test_a_token_before_every_text_comes_back(tmp_path: Path, single: str, adds: bool) -> None:
    backend = foreign.llama()
    special = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    values, _ = read_header(exported(tmp_path, "llama", tokenizer))
    assert values["tokenizer.ggml.add_bos_token"] is adds
    found = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(values)))
    assert found.encode("the cat").ids == backend.encode("the cat").ids


def test_tokens_that_llama_cpp_does_not_put_around_a_text_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = foreign.llama()
    special = [("</s>", backend.token_to_id("</s>"))]
    template = processors.TemplateProcessing(single="</s> </s> $A", special_tokens=special)
    backend.post_processor = template
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    make_hf("llama", tokenizer.vocab_size).save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    words = [f"export.model={tmp_path}/m", f"export.output_path={tmp_path}/m.gguf"]
    assert run("export", words) == 2
    assert "does not put </s>, </s> around a text" in capsys.readouterr().err


@pytest.mark.parametrize(("byte", "code"), [("\u0104", 0), ("a", 2)])
def test_a_byte_without_a_token_may_be_one_that_no_text_has(
    tmp_path: Path, byte: str, code: int
) -> None:
    backend = json.loads(foreign.byte_level().to_str())
    vocab = backend["model"]["vocab"]
    vocab[f"<{byte}>"] = vocab.pop(byte)
    backend["model"]["merges"] = []
    tokenizer = foreign.as_tokenizer(tokenizers.Tokenizer.from_str(json.dumps(backend)))
    make_hf("llama", tokenizer.vocab_size).save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    words = [f"export.model={tmp_path}/m", f"export.output_path={tmp_path}/m.gguf"]
    assert run("export", words) == code
