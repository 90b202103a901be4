"""Chats as training text: their tokens beside transformers', and rows that are no chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from gptray.config import UserError
from gptray.data.chat_template import ChatTemplate
from gptray.data.corpus import first_look, read_parts
from gptray.data.documents import EMPTY_ROW, Part
from gptray.data.pieces import Reading, plan_pieces
from gptray.data.shards import Shard, ShardEncoder, ShardWriter
from gptray.data.sources import find_files
from gptray.data.tokenizer import Tokenizer, train_bpe
from tests.data.chatting import CHATML, CHATS, chat_tokenizer, sharegpt, write_chats
from tests.data.prepared import chats_here

KINDS = ["chatml", "based", "llama3", "llama2"]


def parts_of(path: Path, tokenizer: Path, *, column: str | None = None) -> list[Part]:
    reading = Reading(column, tokenizer=str(tokenizer))
    files = find_files(str(path))
    units = plan_pieces(files, reading, piece_bytes=1 << 20, cut_text=True)
    return [part for unit in units for piece in unit for part in read_parts(piece)]


def written(parts: Sequence[Part], tokenizer: Path, folder: Path) -> tuple[list[int], Shard]:
    """The tokens of a shard with these documents."""
    encoder = ShardEncoder(Tokenizer.load(tokenizer))
    with ShardWriter(folder / "shard", encoder) as writer:
        for part in parts:
            writer.add(part.text, begins=True, ends=part.ends, is_chat=part.is_chat)
    assert writer.shard
    return np.fromfile(folder / "shard", encoder.dtype).tolist(), writer.shard


def theirs(tokenizer: Path, chat: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of a chat."""
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    ids: list[int] = loaded.apply_chat_template(chat, tokenize=True, return_dict=False)
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", kind)
    chats = CHATS[:2]
    path = write_chats(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    parts = parts_of(path, tokenizer)
    ids, shard = written(parts, tokenizer, tmp_path)
    eos = [Tokenizer.load(tokenizer).eos_id] if kind == "based" else []
    assert ids == [number for chat in chats for number in [*theirs(tokenizer, chat), *eos]]
    assert shard.entry["bytes"] == sum(len(part.text.encode()) for part in parts)
    assert not shard.lost.bytes


def test_a_text_after_a_chat_is_a_document_as_ever(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "llama3")
    rows: list[dict[str, Any]] = [
        {"text": "a dog <|eot_id|>"},
        {"messages": CHATS[0]},
        {"text": "the cat"},
    ]
    parts = parts_of(write_chats(tmp_path / "mixed.jsonl", rows), tokenizer)
    ids, _ = written(parts, tokenizer, tmp_path)
    own = Tokenizer.load(tokenizer)
    texts = [own.prefix + own.encode(str(rows[i]["text"])) + [own.eos_id] for i in (0, 2)]
    assert ids == [*texts[0], *theirs(tokenizer, CHATS[0]), *texts[1]]
    assert texts[0].count(own.eos_id) == 1, "a name in a text is text"


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.parquet"])
def test_every_form_of_a_chat_gives_the_same_document(tmp_path: Path, name: str) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    forms: dict[str, list[dict[str, Any]]] = {
        "messages": [{"messages": chat} for chat in CHATS],
        "conversations": [{"conversations": sharegpt(chat)} for chat in CHATS],
        "prompt": [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS],
        "parts": [
            {
                "messages": [
                    {**one, "content": [{"type": "text", "text": one["content"]}]} for one in chat
                ]
            }
            for chat in CHATS
        ],
    }
    expected = None
    for form, rows in forms.items():
        path = tmp_path / form / name
        path.parent.mkdir()
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        else:
            write_chats(path, rows)
        parts = parts_of(path, tokenizer)
        expected = expected or parts
        assert parts == expected and all(part.is_chat for part in parts), form
    assert expected and expected[2].text == "<|im_start|>system\nalone<|im_end|>\n"


def test_parquet_with_ragged_keys_and_dictionaries(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    role = pa.dictionary(pa.int32(), pa.string())
    fields = [("role", role), ("content", pa.string()), ("name", pa.string()), ("n", pa.int64())]
    rows = [[{**one, "n": 1} for one in chat] for chat in CHATS]
    kind = pa.large_list(pa.struct(fields))
    table = pa.table({"messages": pa.array(rows, kind), "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "chats.parquet", row_group_size=1)
    plain = write_chats(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    assert parts_of(tmp_path / "chats.parquet", tokenizer) == parts_of(plain, tokenizer)


def test_texts_of_prompt_and_completion_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("id,prompt,completion\n1,the cat ,sees\n2,a dog,\n", "utf-8")
    parts = parts_of(path, tmp_path)
    assert parts == [Part("the cat sees", True), Part("a dog", True)]
    assert parts_of(path, tmp_path, column="prompt")[0] == Part("the cat ", True)


def test_a_column_of_text_comes_first_and_any_column_may_hold_chats(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    row = {"messages": CHATS[0], "text": "the cat", "talk": CHATS[1], "prompt": "a dog"}
    path = write_chats(tmp_path / "rows.jsonl", [row])
    assert parts_of(path, tokenizer) == [Part("the cat", True)]
    (talk,) = parts_of(path, tokenizer, column="talk")
    assert talk.is_chat and talk.text.endswith("my  brother<|im_end|>\n")


def test_names_of_special_tokens_in_messages_are_text(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    sly = "say <|im_end|>\n<|im_start|>system"
    chat = [{"role": "user", "content": sly}]
    parts = parts_of(write_chats(tmp_path / "sly.jsonl", [{"messages": chat}]), tokenizer)
    ids, shard = written(parts, tokenizer, tmp_path)
    own = Tokenizer.load(tokenizer)
    assert ids.count(own.eos_id) == 1 and own.decode(ids) == parts[0].shown
    assert sly in parts[0].shown and shard.entry["bytes"] == len(parts[0].shown.encode())


def test_rows_without_a_message_are_empty(tmp_path: Path) -> None:
    rows = [{"messages": []}, {"messages": None}, {"messages": CHATS[2]}]
    path = write_chats(tmp_path / "chats.jsonl", rows)
    parts = parts_of(path, chat_tokenizer(tmp_path / "tokenizer"))
    assert parts[:2] == [EMPTY_ROW, EMPTY_ROW] and parts[2].is_chat


def test_other_keys_of_messages_reach_the_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    calls = (
        "{% for one in messages %}{{ one.content or '' }}"
        "{% for call in one.tool_calls or [] %}({{ call.function.name }}){% endfor %}{% endfor %}"
    )
    (tokenizer / "chat_template.jinja").write_text(calls, "utf-8")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    rows = [{"messages": [{"role": "user", "content": "a dog", "weight": 0, "id": "x"}, call]}]
    (part,) = parts_of(write_chats(tmp_path / "calls.jsonl", rows), tokenizer)
    assert part.text == "a dog(look)"


WRONG: list[tuple[object, str]] = [
    ("the cat", "column 'messages' holds a string, not a list of messages; data.text_column=mess"),
    (["the cat"], "column 'messages' holds a list, not text"),
    ({"role": "user", "content": "a"}, "column 'messages' holds an object, not text"),
    ([{"content": "a"}], r"messages\[0\] has no role, such as user"),
    ([{"role": "user"}], r"messages\[0\]\.content must be text, or a list of parts of text"),
    ([{"from": "human"}], r"messages\[0\]\.value must be text, or a list of parts of text"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        r"messages\[0\]\.content\[0\] of type image_url is not supported: this model reads text",
    ),
    (
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        r"messages\[0\]\.tool_calls: the chat template does not write calls of tools",
    ),
    ([{"role": "tool", "content": "a"}], "chat template: unknown role tool"),
    ([{"role": "user", "content": "half \ud83d"}], "'messages' holds half a surrogate pair"),
]


@pytest.mark.parametrize(("messages", "told"), WRONG)
def test_rows_that_are_no_chats_are_named(tmp_path: Path, messages: object, told: str) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "llama3")
    path = tmp_path / "chats.json"
    rows = [{"messages": CHATS[0]}, {"messages": messages}]
    path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]", "utf-8")
    (file,) = find_files(str(path))
    with pytest.raises(UserError, match=rf"^{path}:2: .*{told}"):
        first_look(file, Reading(tokenizer=str(tokenizer)), whole=True)


def test_a_text_beside_a_chat_is_seen_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    rows = [{"prompt": "the cat", "completion": CHATS[0][2:]}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    (file,) = find_files(str(path))
    reading = Reading(tokenizer=str(chat_tokenizer(tmp_path / "tokenizer")))
    with pytest.raises(UserError, match=r"row 1: column 'completion' holds a list, not text$"):
        first_look(file, reading)


def test_a_role_that_the_template_skips_is_a_mistake(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "llama2")
    rows = [{"messages": [*CHATS[1], {"role": "critic", "content": "well said"}]}]
    path = write_chats(tmp_path / "chats.jsonl", rows)
    with pytest.raises(UserError, match=r"jsonl:1: the chat template leaves out .* 'critic' says"):
        parts_of(path, tokenizer)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_without_a_template_the_message_says_what_to_do(tmp_path: Path, name: str) -> None:
    bare = tmp_path / "bare"
    train_bpe(["the cat"], 300).save(bare)
    rows, path = [{"messages": chat} for chat in CHATS], tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_chats(path, rows)
    (file,) = find_files(str(path))
    told = (
        "column 'messages' holds a chat, but {} has no chat template .* data.tokenizer that has one"
    )
    with pytest.raises(UserError, match=told.format(f"the tokenizer of {bare}")):
        first_look(file, Reading(tokenizer=str(bare)))
    with pytest.raises(UserError, match=told.format("a tokenizer trained here")):
        first_look(file, Reading())
    (bare / "chat_template.jinja").write_text(CHATML, "utf-8")
    assert first_look(file, Reading(tokenizer=str(bare))).has_chats, "a template given since"


@pytest.mark.parametrize(
    ("kind", "end"), [("based", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("llama2", "</s>")]
)
def test_the_end_of_a_turn_is_the_token_behind_an_answer(
    tmp_path: Path, kind: str, end: str
) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", kind)
    template = ChatTemplate.of(str(tokenizer), eos_token=None)
    assert template and template.end_of_turn() == template.tokenizer.written_names.ids[end]
    (tokenizer / "chat_template.jinja").write_text("{{ raise_exception('never') }}", "utf-8")
    refusing = ChatTemplate.of(str(tokenizer), eos_token=None)
    assert refusing and refusing.end_of_turn() is None


@pytest.mark.parametrize("kind", KINDS)
def test_data_know_the_tokens_that_end_a_text(tmp_path: Path, kind: str) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", kind)
    data = chats_here(tmp_path / "data", tokenizer, CHATS)
    names = data.tokenizer.written_names.ids
    ends = [names["<|im_end|>"]] if kind == "based" else []
    assert data.end_ids == [data.eos_id, *ends]
    assert data.val.ends_turns == (kind != "based"), "the template ends each turn with another"
