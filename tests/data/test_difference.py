from __future__ import annotations

import pytest

from gptray.data.difference import Lost, Tally, loses, measure


@pytest.mark.parametrize(
    ("text", "back", "kinds"),
    [
        ("same", "same", {}),
        ("Hello World", "hello world", {"case": 2}),
        ("ALL OF IT", "all of it", {"case": 7}),
        ("A Big A B", "a big a b", {"case": 4}),
        ("한국어 안녕 end", "[UNK] [UNK] end", {"unknown": 15}),
        ("한국어 end", " end", {"unknown": 9}),
        ("a\n\nb c", "a b c", {"white_space": 2}),
        ("don't", "don ' t", {"white_space": 2}),
        ("trail \n", "trail", {"white_space": 2}),
        ("café", "cafe", {"other": 2}),
        ("", "more", {"other": 4}),
        ("lost", "", {"unknown": 4}),
    ],
)
def test_each_kind_of_loss_counts_the_bytes_that_do_not_come_back(
    text: str, back: str, kinds: dict[str, int]
) -> None:
    lost = measure(text, back, "[UNK]")
    assert dict(lost.kinds) == kinds
    assert lost.bytes == sum(kinds.values())


def test_a_text_that_holds_the_unknown_tokens_name_is_no_loss() -> None:
    assert measure("an [UNK] and É", "an [UNK] and é", "[UNK]").kinds == {"case": 2}


def test_examples_show_whole_words_a_few_of_each_kind() -> None:
    lost = measure("Hello Big World 안녕", "hello big world [UNK]", "[UNK]")
    assert lost.examples == [
        ("case", "Hello", "hello"),
        ("case", "Big", "big"),
        ("unknown", "안녕", "[UNK]"),
    ]


def test_losses_add_up_and_read_as_a_sentence() -> None:
    parts = [measure("Hello", "hello", None), measure("안녕 Big", "[UNK] big", "[UNK]")]
    lost = Lost.joined(parts)
    assert lost.bytes == 8
    assert loses(lost.entry(), 100) == (
        "the tokenizer loses 8.0% of the text (unknown characters 6.0%, changed case 2.0%), "
        "such as '안녕' -> '[UNK]', 'Hello' -> 'hello'"
    )
    assert loses(Lost().entry(), 100) == ""


def test_a_long_text_that_differs_everywhere_is_counted_from_a_part_of_it() -> None:
    lost = measure("Ab" * 100_000, "ab" * 100_000, None)
    assert lost.bytes == pytest.approx(100_000, rel=0.01)


def test_texts_that_never_agree_are_lost_whole() -> None:
    lost = measure("가나다라" * 5_000, "xyz " * 9_000, None)
    assert lost.bytes == 60_000


def test_much_text_that_differs_is_counted_from_a_part_of_it() -> None:
    tally = Tally()
    for _ in range(40_000):
        tally.compare(
            "A Text of Some Kind, of fifty characters in all ...",
            "a text of some kind, of fifty characters in all ...",
            None,
        )
    assert tally.lost.bytes == pytest.approx(4 * 40_000, rel=0.01)
    assert tally.lost.examples == [("case", "A Text", "a text"), ("case", "Some", "some")]
