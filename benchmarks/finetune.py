"""What fine-tuning gains on its text and loses on another: adapter, all weights, from scratch.

    python benchmarks/finetune.py MODEL TEXT... [--other FILE] [--folder runs/finetune] [--save]

MODEL is a value of model.init_from. Of the first 100 kB of each TEXT, the last tenth is scored and
the rest trained on; 8 kB of documentation unseen by all runs (README.md, or FILE) are also scored.
The adapter has rank 16 and ten times the learning rate of training all weights; both take 24 steps
of 4 x 128 tokens. From scratch, the quick start's model with a vocabulary of 512 takes 500 steps of
16 x 128. Runs are kept in FOLDER, and finished runs are not repeated, so a benchmark that was
stopped continues. Prints a table of bits per byte and, last, one JSON line; --save writes both to
benchmarks/results/finetune.txt.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from gpu_parts.machine import describe
from made_tokens import split_tokens

from gptray.config import Config, load_config
from gptray.data.tokenizer import Tokenizer, train_bpe
from gptray.data.tokens import TokenData
from gptray.evaluation.forgetting import changes_of
from gptray.jobs.folders.run_folder import resolve
from gptray.model.shape import model_folder
from gptray.storage.record import read_events, read_metrics
from gptray.training.loop import fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "finetune.txt"
TEXT_BYTES, OTHER_BYTES = 100_000, 8_000
TUNED = [
    "model.n_positions=256", "train.block_size=128", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.max_steps=24", "train.eval_interval=12",
    "optim.warmup_steps=4",
]  # fmt: skip
WAYS = {
    "adapter": [*TUNED, "lora.rank=16", "optim.lr=1e-3"],
    "full": [*TUNED, "optim.lr=1e-4"],
    "scratch": [
        "data.vocab_size=512", "model.dropout=0.2", "train.max_steps=500", "train.eval_interval=50",
    ],
}  # fmt: skip
# Marks the folder of a finished run.
ENDED = "ended"
# Bits per byte on the training text's held-out part and on the other text, by way.
Scores = dict[str, dict[str, float]]


def main() -> None:
    given = arguments()
    folder: Path = given.folder.absolute()
    other = beginning(given.other, OTHER_BYTES)
    scores = {}
    for text in given.texts:
        own = {way: folder / f"{text.stem}-{way}" for way in WAYS}
        for way, place in own.items():
            train(way, given.model, beginning(text, TEXT_BYTES), other, place)
        scores[text.stem] = scores_of(own)
    lines = [
        *table(scores),
        json.dumps({"machine": describe(torch.device("cpu")), "bits_per_byte": scores}),
    ]
    if given.save:
        RESULTS.write_text("\n".join([heading(given), *lines]) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path, metavar="text")
    parser.add_argument("--other", type=Path, default=ROOT / "README.md")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    return parser.parse_args()


def beginning(text: Path, most: int) -> str:
    """At most the first `most` bytes of a text, in whole characters."""
    return text.read_bytes()[:most].decode("utf-8", errors="ignore")


def train(way: str, model: str, text: str, other: str, folder: Path) -> None:
    """Train with jobs/train.py's loop, without Ray; a stopped run resumes."""
    if (folder / ENDED).is_file():
        return
    words = [*WAYS[way], f"storage_path={folder.parent}", f"name={folder.name}"]
    if way != "scratch":
        words.append(f"model.init_from={model}")
    config = resolve(load_config(None, words))
    result = fit(
        config, tokens(config, text, other, folder / "tokens"), folder,
        report=lambda metrics, checkpoint: print(f"{folder.name}: {metrics}", file=sys.stderr),
        sample=lambda model: [], device=torch.device("cpu"),
    )  # fmt: skip
    if result["stopped"] not in ("max_steps", "patience"):
        raise SystemExit(f"{folder.name}: {result}")
    (folder / ENDED).touch()


def tokens(config: Config, text: str, other: str, folder: Path) -> TokenData:
    """Tokenize the text, its last tenth for validation, and the other text."""
    cut = text.index("\n", len(text) * 9 // 10)
    source = config.data.tokenizer
    if config.model.init_from:
        tokenizer = Tokenizer.load(model_folder(str(source), weights=False))
    else:
        tokenizer = train_bpe([text[:cut]], config.data.vocab_size)
    split_tokens(folder / "other", tokenizer, test=other)
    split_tokens(folder, tokenizer, train=text[:cut], val=text[cut:])
    return TokenData.open(folder, also={"other": folder / "other"})


def scores_of(runs: dict[str, Path]) -> Scores:
    """The scores of each way's best model, and of the given model (zero-shot)."""
    scores: Scores = {}
    for way, folder in runs.items():
        own, other = changes_of(read_metrics(folder), read_events(folder))
        scores[way] = {"text": own.after, "other": other.after}
        if own.before and other.before:
            scores["zero-shot"] = {"text": own.before, "other": other.before}
    return {way: scores[way] for way in ("zero-shot", *WAYS)}


def table(scores: dict[str, Scores]) -> list[str]:
    """A line for each way, and one for an adapter's gain over training from scratch."""
    lines = [f"{'bits per byte':14}" + "".join(f"{name:>18}   other" for name in scores)]
    for way in ("zero-shot", *WAYS):
        pairs = [f"{of[way]['text']:18.3f} {of[way]['other']:7.3f}" for of in scores.values()]
        lines.append(f"{way:14}" + "".join(pairs))
    gains = [1 - of["adapter"]["text"] / of["scratch"]["text"] for of in scores.values()]
    lines.append("adapter's gain" + "".join(f"{gain:18.0%}        " for gain in gains).rstrip())
    return lines


def heading(given: argparse.Namespace) -> str:
    """The command, with bare file names."""
    names = [Path(given.model).name, *(text.name for text in given.texts)]
    return f"python benchmarks/finetune.py {' '.join(names)} --other {given.other.name}"


if __name__ == "__main__":
    main()
