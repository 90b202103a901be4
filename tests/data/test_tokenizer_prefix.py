"""What a tokenizer puts before a text, as transformers does it; it comes once, and is no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from gptray.config import UserError, load_config
from gptray.data.request import make_request
from gptray.data.tokenizer import Tokenizer
from tests.data import foreign
from tests.data.reference import expected_runs, expected_tokens
from tests.data.test_work import planned, tokenised
from tests.data.texts import KOREAN, many_documents, write_rows

Make = Callable[[], tokenizers.Tokenizer]
TEXTS = ["the cat sees a dog", " the  cat\n", "", KOREAN]


def llama() -> tokenizers.Tokenizer:
    """Llama 2's."""
    return foreign.beginning(foreign.llama(), "<s> $A")


def llama3() -> tokenizers.Tokenizer:
    """Llama 3's: byte-level, one step after the other."""
    made = foreign.beginning(foreign.byte_level(), "<|begin|> $A")
    steps = [processors.ByteLevel(trim_offsets=False), made.post_processor]
    made.post_processor = processors.Sequence(steps)
    return made


def glm() -> tokenizers.Tokenizer:
    """GLM's."""
    return foreign.beginning(foreign.byte_level(), "[gMASK] <sop> $A")


def bert() -> tokenizers.Tokenizer:
    made = foreign.wordpiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def opt() -> tokenizers.Tokenizer:
    """OPT's: the end of text comes before every text."""
    return foreign.beginning(foreign.byte_level(), "<|endoftext|> $A")


def stored(make: Make, folder: Path, **more: object) -> Path:
    backend = make()
    eos = foreign.as_tokenizer(backend).eos_token
    return foreign.save(backend, folder, {"eos_token": eos, **more})


@pytest.mark.parametrize("make", [llama, llama3, glm, bert, opt, foreign.byte_level])
def test_prompts_are_read_as_transformers_reads_them(make: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = stored(make, tmp_path / "theirs")
    own, theirs = (
        Tokenizer.load(folder),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    own.save(tmp_path / "own")
    saved = AutoTokenizer.from_pretrained(tmp_path / "own", trust_remote_code=False)
    behind = 1 if make is bert else 0  # [SEP] ends a text, and a prompt has not ended
    for text in TEXTS[:2] if make is bert else TEXTS:
        ids = theirs(text).input_ids
        expected = ids[: len(ids) - behind] or [own.eos_id]
        assert own.prompt_ids(text) == expected
        assert saved(text).input_ids == ids
        assert own.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_what_transformers_makes_of_add_bos_token_counts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    # Where there is a tokenizer.json its post-processor says it all.
    bos = {"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}
    for name, make, flag in (("without", foreign.llama, True), ("with", llama, False)):
        folder = stored(make, tmp_path / name, add_bos_token=flag, **bos)
        own, theirs = (
            Tokenizer.load(folder),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )
        assert own.prompt_ids("the cat") == theirs("the cat").input_ids


def test_the_prefix_comes_once() -> None:
    tokenizer = foreign.as_tokenizer(llama())
    bos = tokenizer.prefix
    assert tokenizer.prompt_ids("") == bos and len(bos) == 1
    assert tokenizer.prompt_ids("<s>the cat") == [*bos, *tokenizer.encode("the cat")]
    assert tokenizer.prompt_ids("<s>") == bos
    assert tokenizer.prompt_ids("a <s>") == [*bos, *tokenizer.encode("a <s>")]
    bare = tokenizer.prompt_ids("the cat", add_prefix=False)
    assert bare == tokenizer.encode("the cat")
    assert tokenizer.prompt_ids("<s>the cat", add_prefix=False) == [*bos, *bare]
    both = tokenizer.prompt_ids("<s>a</s>b", parse_special=True)
    rest = [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]
    assert both == [*bos, *rest]


def test_names_of_special_tokens_are_these_where_they_are_parsed(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def chat() -> tokenizers.Tokenizer:
        made = llama3()
        made.add_special_tokens(["<|im_start|>", "<|im|>", "<|im|>|>"])
        return made

    folder = stored(chat, tmp_path / "chat")
    own = Tokenizer.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = "<|im_start|>user\nthe cat<|im|>|><|im|><|endoftext|>\n<|im_start|>"
    assert own.prompt_ids(text, parse_special=True) == theirs(text).input_ids
    assert own.prompt_ids(text) == [*own.prefix, *own.encode(text)]


def test_a_prompt_that_is_cut_keeps_the_prefix() -> None:
    tokenizer = foreign.as_tokenizer(llama())
    ids = tokenizer.prompt_ids("the cat sees a dog and a bird")
    assert len(ids) > 6
    assert tokenizer.last_ids(ids, 6) == [*tokenizer.prefix, *ids[-5:]]
    assert tokenizer.last_ids(ids, len(ids)) == ids
    assert tokenizer.last_ids(ids[1:], 4) == ids[-4:]
    assert tokenizer.last_ids(ids, 1) == tokenizer.prefix
    plain = foreign.as_tokenizer(foreign.byte_level())
    assert plain.last_ids([5, 6, 7], 2) == [6, 7]


@pytest.mark.parametrize("piece_bytes", [100, 1 << 20])
@pytest.mark.parametrize("name", ["r.jsonl", "one.txt"])
def test_documents_begin_with_the_prefix_and_parts_of_them_do_not(
    tmp_path: Path, name: str, piece_bytes: int
) -> None:
    texts = many_documents(20)
    if name == "one.txt":
        texts = ["".join(texts)]
        (tmp_path / name).write_text(texts[0], "utf-8", newline="")
        path = tmp_path / name
    else:
        path = write_rows(tmp_path / name, texts)
    tokenizer = foreign.as_tokenizer(llama3())
    plan, _ = planned(path, piece_bytes)
    runs = expected_runs(texts, (0.8, 0.1, 0.1), seed=1)
    tokens = tokenised(plan, tokenizer, tmp_path)
    assert tokens == expected_tokens(runs, tokenizer)
    begun = sum(ids.count(tokenizer.prefix[0]) for ids in tokens.values())
    assert begun == len(texts)


def test_an_end_of_text_that_opens_texts_stands_once_between_documents() -> None:
    tokenizer = foreign.as_tokenizer(opt())
    assert tokenizer.prefix == [tokenizer.eos_id] and tokenizer.document_prefix == []


def identity(tokenizer: str | Path, folder: Path) -> dict[str, object]:
    """What of a tokenizer tells prepared data apart."""
    (folder / "text.txt").write_text("the cat sees a dog. " * 20)
    words = [f"data.source={folder / 'text.txt'}", f"data.tokenizer={tokenizer}"]
    request = make_request(load_config(None, [*words, f"storage_path={folder}"]))
    found = request.identity["tokenizer"]
    assert isinstance(found, dict)
    return found


def test_only_data_of_a_tokenizer_with_a_prefix_is_prepared_anew(tmp_path: Path) -> None:
    plain = identity(stored(foreign.byte_level, tmp_path / "plain"), tmp_path)
    assert plain.keys() == {"kind", "sha256"}
    begun = identity(stored(llama, tmp_path / "llama"), tmp_path)
    assert begun["prefix"] == foreign.as_tokenizer(llama()).prefix


def test_the_same_holds_for_tokenizers_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, make in (("plain", foreign.byte_level), ("llama", llama)):
        repository = tmp_path / "hub" / f"models--some--{name}"
        stored(make, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    assert identity("some/plain", tmp_path) == {"kind": "hub", "id": "some/plain"}
    assert identity("some/never-fetched", tmp_path).keys() == {"kind", "id"}
    prefix = foreign.as_tokenizer(llama()).prefix
    assert identity("some/llama", tmp_path) == {"kind": "hub", "id": "some/llama", "prefix": prefix}


def test_a_prefix_that_is_no_token_is_refused(tmp_path: Path) -> None:
    folder = stored(llama, tmp_path / "torn")
    path = folder / "tokenizer.json"
    parts = json.loads(path.read_text("utf-8"))
    parts["post_processor"]["special_tokens"]["<s>"]["ids"] = [4000]
    path.write_text(json.dumps(parts), "utf-8")
    with pytest.raises(UserError, match=r"puts token 4,000 before every text, but has only"):
        Tokenizer.load(folder)
