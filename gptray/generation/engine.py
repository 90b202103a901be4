"""Continuous batching: sequences join a running batch at the next step and leave when they end.

One step of the network carries one token of every sequence that decodes and pieces of the prompts
that wait. Knows nothing of Ray or HTTP; one thread at a time may use an engine.

Yu et al. 2022, Orca (scheduling by steps); Agrawal et al. 2023, Sarathi (prompts in pieces that
ride along with decoding).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gptray.data.tokenizer import Tokenizer
from gptray.generation.build import pick_backend
from gptray.generation.decoder import Decoder, Network, Piece
from gptray.generation.detokenize import TextStream
from gptray.generation.native import NativeDecoder
from gptray.generation.sampling import Drawn, Row, Top, draw, score
from gptray.generation.settings import Sampling, check_context
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained
from gptray.model.memory import keep_freed_memory
from gptray.model.precision import pick_dtype

# Prompts are cut at multiples of this, wherever they stand in the queue: same numbers at any load.
PIECE_TOKENS = 128
# A step begins no further piece after so many tokens of prompts, so that decoding never stalls.
PREFILL_TOKENS = 512

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt's token ids and how to go on from it.

    row: which of several outputs of one prompt this is; each has a random stream of its own.
    live_text: keep `Generation.text` up to date at every token, not only at the end.
    prompt_logprobs: how many of the likeliest tokens to report at each of the prompt's; None
    reports none. With it `sampling.max_new_tokens` may be 0: the prompt is read, no more.
    """

    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    row: int = 0
    live_text: bool = False
    prompt_logprobs: int | None = None


class Generation:
    """What there is of a request's output so far; iterating runs the engine until it is whole.

    prompt: with `Request.prompt_logprobs` the prompt's tokens, whole as soon as there is a new
    one; the first has no log-probability. end: the end-of-text token if that ended the output.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self.prompt: list[Drawn] = []
        self.drawn: list[Drawn] = []
        self.end: Drawn | None = None
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._engine = engine

    @property
    def tokens(self) -> list[int]:
        """The new tokens, end of text not among them."""
        return [drawn.token for drawn in self.drawn]

    def __iter__(self) -> Iterator[Drawn]:
        given = 0
        while True:
            for drawn in self.drawn[given:]:
                given += 1
                yield drawn
            if self.finish_reason is not None and given == len(self.drawn):
                return
            if given == len(self.drawn):
                self._engine.step()


class Engine:
    """Generates from one model for up to `max_batch_size` sequences at a time; more wait in line.

    dtype: what the network computes in. quantize: "none" or "int8" weights. backend: "native" where
    `gptray.generation.build` finds that it can be had, else "torch". Memory: the cache takes up to
    2 x n_layer x max_batch_size x n_positions x n_embd numbers of `dtype`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int = 32,
        dtype: torch.dtype = torch.float32,
        quantize: str = "none",
        backend: str = "torch",
    ) -> None:
        self.max_batch_size, self.n_positions = max_batch_size, model.config.n_positions
        self.vocab_size, self.eos_id = model.valid_vocab_size, tokenizer.eos_id
        self._tokenizer = tokenizer
        decoder = NativeDecoder if backend == "native" else Decoder
        self._network: Network = decoder(model, max_batch_size, dtype=dtype, quantize=quantize)
        self._waiting: deque[_Sequence] = deque()
        # Decoding sequences stand in slots 0, 1, ...; one whose prompt is partly read comes after.
        self._decoding: list[_Sequence] = []
        self._reading: _Sequence | None = None

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._decoding or self._waiting or self._reading)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._decoding) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Raise ValueError if a request can never run, naming what is wrong. Any thread may."""
        sampling = request.sampling
        check_context(request.prompt, sampling, self.n_positions)
        if not sampling.max_new_tokens and request.prompt_logprobs is None:
            raise ValueError("max_new_tokens=0 must be at least 1 without prompt_logprobs")
        last = self.vocab_size - 1
        if not all(0 <= token <= last for token in request.prompt):
            raise ValueError(f"the prompt holds a token outside 0 .. {last}")
        if not all(token <= last for token, _ in sampling.logit_bias):
            raise ValueError(f"logit_bias names a token outside 0 .. {last}")

    def submit(self, request: Request) -> Generation:
        """Queue a request. Raises ValueError as `check`."""
        self.check(request)
        generation = Generation(self, request)
        self._waiting.append(_Sequence(generation, self._tokenizer))
        return generation

    def run(self, requests: Sequence[Request]) -> list[Generation]:
        """Queue requests and step until nothing is left to do. Raises ValueError as `submit`."""
        generations = [self.submit(request) for request in requests]
        while self.busy:
            self.step()
        return generations

    def cancel(self, generation: Generation) -> None:
        """End a generation where it stands; its slot is free at once."""
        if generation.finish_reason is not None:
            return
        generation.finish_reason = "cancelled"
        for waiting in self._waiting:
            if waiting.generation is generation:
                self._waiting.remove(waiting)
                return
        self._release()

    def step(self) -> list[Generation]:
        """Run the network once; return the generations that got a token or ended."""
        reading = self._take_pieces()
        decoding = [(s.history[-1], len(s.history) - 1) for s in self._decoding]
        if not decoding and not reading:
            return []
        logits = self._network.step(decoding, [piece for _, piece in reading])
        logits = self._take_prompts(logits, reading)
        rows = [sequence.row() for sequence in self._decoding]
        tokens = draw(logits, rows, self._network.top)
        for sequence, drawn in zip(self._decoding, tokens, strict=True):
            sequence.take(drawn, self.n_positions)
        touched = [sequence.generation for sequence in self._decoding]
        self._release()
        return touched

    def _take_pieces(self) -> list[tuple[_Sequence, Piece]]:
        """This step's pieces of prompts, and whose they are.

        Prompts are read in turn: only the last of the pieces can leave its prompt unfinished.
        """
        taken: list[tuple[_Sequence, Piece]] = []
        slot, tokens = len(self._decoding), 0
        while tokens < PREFILL_TOKENS and slot < self.max_batch_size:
            sequence = self._reading
            if sequence is None:
                if not self._waiting:
                    break
                sequence = self._waiting.popleft()
            piece = sequence.next_piece(slot)
            taken.append((sequence, piece))
            tokens += len(piece.tokens)
            if sequence.is_reading:
                self._reading = sequence
                break
            self._reading = None
            slot += 1
        return taken

    def _take_prompts(self, logits: Tensor, reading: list[tuple[_Sequence, Piece]]) -> Tensor:
        """Take in what a step says of prompts. Returns the rows that draw a token."""
        drawing, row = list(range(len(self._decoding))), len(self._decoding)
        for sequence, piece in reading:
            if piece.scored:
                sequence.score(piece, logits[row : row + piece.logits], self._network.top)
            row += piece.logits
            if not sequence.is_reading:
                self._decoding.append(sequence)
                drawing.append(row - 1)
        is_start = drawing == list(range(len(drawing)))
        return logits[: len(drawing)] if is_start else logits[drawing]

    def _release(self) -> None:
        """Take ended sequences out; those in the last slots move into the free ones."""
        if self._reading is not None and self._reading.ended:
            self._reading = None
        slot = 0
        while slot < len(self._decoding):
            if not self._decoding[slot].ended:
                slot += 1
                continue
            last = self._decoding.pop()
            if slot < len(self._decoding):
                self._decoding[slot] = last
                self._network.move(len(self._decoding), slot, len(last.history))
            if self._reading is not None:
                self._network.move(len(self._decoding) + 1, len(self._decoding), self._reading.read)


class _Sequence:
    """A request on its way through the engine."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        request = generation.request
        self.generation = generation
        self.history = list(request.prompt)
        self.read = 0  # tokens of the prompt that are in the cache
        if request.prompt_logprobs is not None:
            generation.prompt = [Drawn(request.prompt[0])]
        self._tokenizer = tokenizer
        self._text: TextStream | None = None
        if request.live_text or request.sampling.stop:
            self._text = TextStream(tokenizer.decode, request.sampling.stop)

    @property
    def ended(self) -> bool:
        return self.generation.finish_reason is not None

    def row(self) -> Row:
        request = self.generation.request
        return Row(
            request.sampling,
            len(request.prompt),
            self.history,
            self._tokenizer.eos_id,
            request.row,
        )

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt is not in the cache yet."""
        return self.read < len(self.generation.request.prompt)

    def next_piece(self, slot: int) -> Piece:
        """The part of the prompt that is read next, and counts as read from now on."""
        start, request = self.read, self.generation.request
        part = self.history[start : start + PIECE_TOKENS]
        self.read += len(part)
        return Piece(slot, start, part, scored=request.prompt_logprobs is not None)

    def score(self, piece: Piece, logits: Tensor, top: Top) -> None:
        """Take in the log-probabilities of the prompt's tokens after each of a piece's."""
        count = self.generation.request.prompt_logprobs
        follow = self.history[piece.start + 1 : piece.start + 1 + len(piece.tokens)]
        if follow:
            self.generation.prompt += score(logits[: len(follow)], follow, count or 0, top)

    def take(self, drawn: Drawn, n_positions: int) -> None:
        """Add a token and end the generation where it is to end."""
        generation = self.generation
        sampling = generation.request.sampling
        if not sampling.max_new_tokens:
            self._end("length")
            return
        self.history.append(drawn.token)
        if drawn.token == self._tokenizer.eos_id and not sampling.ignore_eos:
            generation.end = drawn
            self._end("stop")
            return
        generation.drawn.append(drawn)
        if self._text is not None:
            self._text.add(drawn.token)
            generation.text = self._text.text
            if self._text.stopped:
                self._end("stop")
                return
        new = len(self.history) - len(generation.request.prompt)
        if new >= sampling.max_new_tokens or len(self.history) >= n_positions:
            self._end("length")

    def _end(self, reason: FinishReason) -> None:
        generation = self.generation
        if self._text is None:
            generation.text = self._tokenizer.decode(generation.tokens)
        else:
            self._text.finish()
            generation.text = self._text.text
        generation.finish_reason = reason


def load_engine(
    folder: str | Path,
    *,
    max_batch_size: int,
    precision: str,
    quantize: str,
    device: str,
    backend: str = "auto",
) -> tuple[Engine, Tokenizer]:
    """The engine of a model folder and its tokenizer.

    precision auto | fp32 | bf16; backend auto | native | torch. Raises UserError naming what is
    wrong with the folder, or why there is no such backend.
    """
    keep_freed_memory()
    model = load_pretrained(folder).eval().to(device)
    tokenizer = Tokenizer.load(folder)
    engine = Engine(
        model,
        tokenizer,
        max_batch_size=max_batch_size,
        dtype=pick_dtype(precision, device),
        quantize=quantize,
        backend=pick_backend(backend, use_gpu=torch.device(device).type != "cpu"),
    )
    return engine, tokenizer
