"""Chats, templates of the usual kinds, and folders of small tokenizers that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data import foreign

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "You see the cat."},
        {"role": "user", "content": " the old king? \n"},
        {"role": "assistant", "content": "\ub098\ub78f\ub9d0\uc2f8\ubbf8 \ub4d5\uadc1\uc5d0."},
    ],
    [
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": "it's 10\n\n 20"},
        {"role": "user", "content": "\U0001f468\u200d\U0001f469 the river"},
        {"role": "assistant", "content": "my  brother"},
    ],
    [{"role": "system", "content": "alone"}],
]


def chat_tokenizer(folder: Path, kind: str = "chatml") -> Path:
    """Save a tokenizer with its template.

    Kinds: chatml, whose turns end with the end of text, as Qwen's do; based, whose texts end with
    another token; llama3; llama2, with byte fallback.
    """
    backend = foreign.llama() if kind == "llama2" else foreign.byte_level()
    template, end = CHATML, "<|im_end|>"
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if kind == "based":
        end = "<|endoftext|>"
    elif kind == "llama3":
        template, end, begin = LLAMA_3, "<|eot_id|>", "<|begin_of_text|>"
        backend.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", end])
        backend = foreign.beginning(backend, f"{begin} $A")
        settings["bos_token"] = begin
    elif kind == "llama2":
        template, end = LLAMA_2, "</s>"
        backend = foreign.beginning(backend, "<s> $A")
        settings["bos_token"] = "<s>"
    foreign.save(backend, folder, {**settings, "eos_token": end})
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def write_chats(path: Path, rows: list[Any]) -> Path:
    """Write rows as .jsonl, or as a .json array over several lines."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), "utf-8")
    return path


def sharegpt(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chat in ShareGPT's words."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in chat]
