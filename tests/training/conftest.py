"""The tiny text's tokens, prepared without Ray: the loop does not know it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.data.tokenizer import char_tokenizer
from gptray.data.tokens import TokenData
from tests.data.prepared import prepared_here


@pytest.fixture(scope="session")
def tiny_data(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    text = text_file.read_text()
    cut = len(text) * 9 // 10
    folder = tmp_path_factory.mktemp("tokens")
    return prepared_here(folder, char_tokenizer(text), train=text[:cut], val=text[cut:])
