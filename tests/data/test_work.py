"""Scan, plan and tokenise in one process, against whole texts encoded one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import UserError
from gptray.data.pieces import Reading, plan_pieces
from gptray.data.roundtrip import RoundTrip
from gptray.data.shards import ShardEncoder, ShardWriter, split_entry
from gptray.data.sources import find_files
from gptray.data.split_plan import PiecePlan, ScannedText, SplitPlan, plan_split
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.data.tokens import TokenSplit
from gptray.data.work import UnitScan, sample, scan, tokenise
from gptray.storage.files import sha256_of
from tests.data import foreign
from tests.data.chatting import CHATS, chat_tokenizer, write_chats
from tests.data.reference import expected_runs, expected_tokens
from tests.data.texts import ENGLISH, KOREAN, many_documents, write_bytes, write_rows

TEXTS = many_documents(70)
NAMES = ("train", "val", "test")


def planned(
    path: Path,
    piece_bytes: int,
    *,
    split: tuple[float, ...] = (0.8, 0.1, 0.1),
    fraction: float = 1.0,
    cut_text: bool = True,
    reading: Reading | None = None,
) -> tuple[SplitPlan, list[UnitScan]]:
    files = find_files(str(path))
    reading = reading or Reading()
    units = plan_pieces(files, reading, piece_bytes=piece_bytes, cut_text=cut_text)
    scans = [scan(unit, alphabet=True) for unit in units]
    text = ScannedText(units, [unit.pieces for unit in scans], dict(enumerate(split)))
    return plan_split([text], fraction=fraction, seed=1), scans


def tokenised(plan: SplitPlan, tokenizer: Tokenizer, folder: Path) -> dict[str, list[int]]:
    """Tokens of each split, from the files that the units wrote."""
    tokenizer.save(folder / "tokenizer")
    tokens: dict[str, list[int]] = {name: [] for name in NAMES[: len(plan.documents)]}
    for number, unit in enumerate(plan.units):
        for label, shard in tokenise(unit, folder=folder, number=number).items():
            ids = np.fromfile(folder / shard.entry["file"], dtype="<u2")
            assert len(ids) == shard.entry["tokens"]
            tokens[NAMES[label]] += ids.tolist()
    return tokens


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "char":
        return char_tokenizer("".join(TEXTS))
    return train_bpe(TEXTS, 400)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet", "r.jsonl.zst"])
@pytest.mark.parametrize("piece_bytes", [100, 1 << 20])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_documents_reach_their_split_token_for_token(
    tmp_path: Path, tokenizer: Tokenizer, name: str, piece_bytes: int, fraction: float
) -> None:
    rows = [text for one in TEXTS for text in (one, "")]  # every other row is empty
    path = write_rows(tmp_path / name, rows)
    plan, scans = planned(path, piece_bytes, fraction=fraction)
    runs = expected_runs(TEXTS, (0.8, 0.1, 0.1), seed=1, fraction=fraction)
    assert tokenised(plan, tokenizer, tmp_path) == expected_tokens(runs, tokenizer)
    assert plan.documents == [len(runs[name]) for name in NAMES]
    assert plan.total_documents == len(TEXTS)
    assert plan.total_bytes == len("".join(TEXTS).encode())
    assert sum(piece.empty_rows for unit in scans for piece in unit.pieces) == len(TEXTS)


@pytest.mark.parametrize("piece_bytes", [50, 1 << 20])
def test_text_files_over_several_units_stay_whole_documents(
    tmp_path: Path, tokenizer: Tokenizer, piece_bytes: int
) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        write_bytes(tmp_path / "texts" / f"{number:03d}.txt", text.encode())
    plan, _ = planned(tmp_path / "texts", piece_bytes)
    runs = expected_runs(TEXTS, (0.8, 0.1, 0.1), seed=1)
    assert tokenised(plan, tokenizer, tmp_path) == expected_tokens(runs, tokenizer)


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "one.jsonl"])
@pytest.mark.parametrize("piece_bytes", [60, 1 << 20])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_only_document_is_cut_by_position(
    tmp_path: Path, tokenizer: Tokenizer, name: str, piece_bytes: int, fraction: float
) -> None:
    text = "".join(TEXTS)
    plan, _ = planned(
        write_rows(tmp_path / name, [text]), piece_bytes, split=(0.9, 0.1), fraction=fraction
    )
    cut = int(len(text) * 0.9)
    assert plan.cut_documents == 1
    assert tokenised(plan, tokenizer, tmp_path) == {
        "train": tokenizer.encode(text[: int(cut * fraction)]),
        "val": [*tokenizer.encode(text[cut:]), tokenizer.eos_id],
    }


def test_long_document_is_encoded_in_parts_with_the_same_tokens(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "".join(TEXTS) * 60
    assert len(text) > 300_000
    rows = write_rows(tmp_path / "r.jsonl", [text, text + KOREAN])
    plan, _ = planned(rows, 1 << 20, split=(0.5, 0.5))
    assert not plan.cut_documents
    tokens = tokenised(plan, tokenizer, tmp_path)
    assert [*tokenizer.encode(text), tokenizer.eos_id] in tokens.values()


def test_scan_reports_the_alphabet_and_each_files_sha256(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.txt", KOREAN.encode())
    write_bytes(tmp_path / "b.txt", ENGLISH.encode() * 20)
    _, scans = planned(tmp_path, 100, split=(0.5, 0.5))
    assert {c for unit in scans for piece in unit.pieces for c in piece.alphabet} == set(
        KOREAN + ENGLISH
    )
    assert sorted(Path(name).name for unit in scans for name in unit.sha256) == ["a.txt", "b.txt"]


def test_files_without_text_among_others_are_scanned_too(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.json", "d.txt.gz"):
        write_bytes(tmp_path / name, b"")
    schema = pa.schema([("text", pa.string())])
    parquet.ParquetWriter(tmp_path / "e.parquet", schema).close()  # without a row group
    write_bytes(tmp_path / "f.txt", ENGLISH.encode())
    plan, scans = planned(tmp_path, 1 << 20)
    names = [Path(name).name for unit in scans for name in unit.sha256]
    assert sorted(names) == ["a.txt", "b.jsonl", "c.json", "d.txt.gz", "e.parquet", "f.txt"]
    assert plan.total_documents == 1


def test_sample_is_training_text_only_and_a_share_of_it(tmp_path: Path) -> None:
    texts = [f"{n} " + "some words " * 9000 for n in range(60)]
    plan, _ = planned(write_rows(tmp_path / "r.jsonl", texts), 1 << 20, split=(0.5, 0.5))
    train = "".join(run.text for run in expected_runs(texts, (0.5, 0.5), seed=1)["train"])
    units = list(enumerate(plan.units))
    whole = [t for n, u in units for t in sample(u, share=1.0, seed=1, number=n)]
    assert "".join(whole) == train
    part = [t for n, u in units for t in sample(u, share=0.5, seed=1, number=n)]
    assert 0.2 < len("".join(part)) / len(train) < 0.8
    assert all(text in train for text in part)
    other = [t for n, u in units for t in sample(u, share=0.5, seed=2, number=n)]
    assert part != other


def test_source_without_text_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no text"):
        planned(write_rows(tmp_path / "r.jsonl", ["", " "]), 1 << 20)
    with pytest.raises(UserError, match="holds no text"):
        planned(write_bytes(tmp_path / "t.txt", b""), 1 << 20)


def rows_of(path: Path, texts: list[str]) -> list[list[PiecePlan]]:
    plan, _ = planned(write_rows(path, texts), 1 << 20, split=(0.5, 0.5))
    return plan.units


@pytest.mark.parametrize("kind", ["wordpiece", "dropping_bpe", "llama", "composed"])
def test_shards_count_what_their_documents_lose(tmp_path: Path, kind: str) -> None:
    more = {"composed": True} if kind == "composed" else {}
    backend = getattr(foreign, "byte_level" if more else kind)(**more)
    tokenizer = foreign.as_tokenizer(backend)
    tokenizer.save(tmp_path / "tokenizer")
    texts = ["the cat", "The Cat", "the e\u0301 dog e\u0301", "\ud55c\uad6d dog", "a dog.\n"]
    trip = RoundTrip(tokenizer)
    expected = [trip.lost(text, tokenizer.encode(text)) for text in texts]
    shards = [
        shard
        for number, unit in enumerate(rows_of(tmp_path / "r.jsonl", texts))
        for shard in tokenise(unit, folder=tmp_path, number=number).values()
    ]
    assert sum(shard.lost.bytes for shard in shards) == sum(one.bytes for one in expected if one)
    assert sum(shard.entry["lost_bytes"] for shard in shards) > 0 or kind == "llama"


def test_text_that_the_tokenizer_cannot_read_names_its_file(tmp_path: Path) -> None:
    foreign.as_tokenizer(foreign.word_level()).save(tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat sees a dog")
    (tmp_path / "texts" / "b.txt").write_text("the cat sees zebra")
    plan, _ = planned(tmp_path / "texts", 1 << 20, split=(0.5, 0.5), cut_text=False)
    with pytest.raises(UserError, match=r"^\S+/b\.txt: the tokenizer .* not know 'zebra'"):
        for number, unit in enumerate(plan.units):
            tokenise(unit, folder=tmp_path, number=number)


def test_a_unit_of_which_nothing_is_kept_counts_as_lost(tmp_path: Path) -> None:
    tokenizer = foreign.as_tokenizer(foreign.dropping_bpe())
    korean, english = "\ud55c\uad6d\n" * 30, "the cat sees\n" * 60
    encoder = ShardEncoder(tokenizer)
    shards = []
    for number, text in enumerate((korean, english)):
        with ShardWriter(tmp_path / f"{number}.bin", encoder) as writer:
            writer.add(text, begins=False, ends=False)
        assert writer.shard
        shards.append(writer.shard.entry)
    assert shards[0]["tokens"] == 0
    assert shards[0]["lost_bytes"] == shards[0]["bytes"] == len(korean.encode())
    split = TokenSplit(tmp_path, "uint16", split_entry(1, shards))
    split.check()
    assert {path: sha256_of(path) for path in split.sha256} == split.sha256
    assert split.slice(0, 2).tolist() == tokenizer.encode("the cat")
    with ShardWriter(tmp_path / "empty.bin", encoder) as writer:
        pass
    assert writer.shard is None and not (tmp_path / "empty.bin").exists()


def test_a_chat_is_not_cut_within_the_name_of_a_special_token(tmp_path: Path) -> None:
    saved = chat_tokenizer(tmp_path / "chatml")
    tokenizer, reading = Tokenizer.load(saved), Reading(tokenizer=str(saved))
    path = write_chats(tmp_path / "one.jsonl", [{"messages": CHATS[0][:1]}])
    whole = "<|im_start|>system\nYou see the cat.<|im_end|>\n"
    for percent in range(10, 95, 5):
        share = percent / 100
        plan, _ = planned(path, 1000, split=(share, 1 - share), reading=reading)
        tokens = tokenised(plan, tokenizer, tmp_path)
        names = tokenizer.written_names.ids
        ids = tokens["train"] + tokens["val"]
        assert tokenizer.decode(ids) == whole
        assert [ids.count(names[name]) for name in ("<|im_start|>", "<|im_end|>")] == [1, 1]
