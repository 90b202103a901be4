"""Continuous batching: sequences join a running batch at the next step and leave when they end.

One step of the network carries one token of every decoding sequence and pieces of waiting prompts.
The engine knows nothing of Ray or HTTP, and only one thread at a time may use it.

Yu et al. 2022, Orca (scheduling step by step); Agrawal et al. 2023, Sarathi (chunked prefill that
shares steps with decoding).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gptray.data.tokenizer import Tokenizer
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.decoder import PROMPT_TOKENS, Piece, StepRows
from gptray.generation.decoders import make_decoder
from gptray.generation.sequence import Sequence
from gptray.generation.settings import PromptTooLong
from gptray.generation.utf8 import Utf8
from gptray.model.adapter_files import LowRank
from gptray.model.gpt import GPT

# The most bytes of fp32 logits for a scored piece; a step makes less than twice that.
SCORED_BYTES = 1 << 27

# A step's pieces of prompts, each with its sequence.
Prefill = list[tuple[Sequence, Piece]]


class Engine:
    """Generates from one model for up to `max_batch_size` sequences at a time; others queue.

    dtype: what the network computes in. quantize: "none", or how to quantize the weights. backend:
    "native" (C++ on CPUs), "torch", or "graph" (CUDA graphs), which falls back to "torch" where its
    kernels do not compile. takes_adapters: sequences may have adapters from `pack`. Memory: the KV
    cache grows to 2 x n_layer x max_batch_size x n_positions x K x E numbers of `dtype`, for K
    heads of keys and values of width E.
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
        takes_adapters: bool = False,
    ) -> None:
        self.max_batch_size, self.n_positions = max_batch_size, model.config.n_positions
        self.vocab_size = model.valid_vocab_size
        # The tokens that end a text: the tokenizer's first, then those that the model adds.
        known = [number for number in model.usage.eos_ids if number < self.vocab_size]
        self.eos_ids = list(dict.fromkeys([tokenizer.eos_id, *known]))
        self._tokenizer = tokenizer
        self._network = make_decoder(
            backend, model, max_batch_size, dtype, quantize, takes_adapters=takes_adapters
        )
        self.backend = self._network.backend  # the one that runs
        utf8 = Utf8(tokenizer, self.vocab_size, model.device)
        self._utf8 = utf8 if utf8.is_needed else None
        # Decoding sequences hold slots 0, 1, ...; the first that waits, once in prefill, the slot
        # after them.
        self._decoding: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()

    @property
    def busy(self) -> bool:
        """Whether there is work for a step."""
        return bool(self._decoding or self._waiting)

    @property
    def running(self) -> int:
        """How many sequences hold a slot."""
        return len(self._decoding) + (self._prefilling is not None)

    @property
    def waiting(self) -> int:
        """How many sequences wait for a slot."""
        return len(self._waiting) - (self._prefilling is not None)

    @property
    def _prefilling(self) -> Sequence | None:
        """The sequence in the middle of its prompt: the first that waits. For any thread."""
        try:
            first = self._waiting[0]
        except IndexError:
            return None
        return first if first.prefilled else None

    def pack(self, layers: Mapping[str, LowRank]) -> PackedAdapter:
        """Pack an adapter for sequences of this engine, see `Network.pack`."""
        return self._network.pack(layers)

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError naming the fault if a sequence can never run. For any thread.

        A sequence that passes is not checked again when it is submitted.
        """
        sampling, prompt = sequence.sampling, sequence.prompt
        if not prompt:
            raise ValueError("the prompt is empty")
        # max_new_tokens is an upper bound: a sequence that fills the context ends there.
        if len(prompt) + min(sampling.max_new_tokens, 1) > self.n_positions:
            raise PromptTooLong(
                f"the prompt is too long: {len(prompt)} tokens leave no room for a new one in the "
                f"model's context of {self.n_positions}"
            )
        if not sampling.max_new_tokens and sequence.prompt_logprobs is None:
            raise ValueError("max_new_tokens=0 must be at least 1")
        last = self.vocab_size - 1
        if not all(0 <= token <= last for token in prompt):
            raise ValueError(f"the prompt holds a token outside 0 .. {last}")
        named = {
            "logit_bias": [token for token, _ in sampling.logit_bias],
            "stop_token_ids": sampling.stop_token_ids,
        }
        for name, tokens in named.items():
            if not all(token <= last for token in tokens):
                raise ValueError(f"{name} names a token outside 0 .. {last}")
        sequence.is_checked = True

    def submit(self, sequence: Sequence) -> Sequence:
        """Queue a sequence and return it. Raises ValueError like `check`."""
        if not sequence.is_checked:
            self.check(sequence)
        sequence.begin(self._tokenizer, self.n_positions, self._utf8, self.eos_ids)
        self._waiting.append(sequence)
        return sequence

    def run(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Queue sequences and step until all have ended. Raises ValueError like `submit`."""
        submitted = [self.submit(sequence) for sequence in sequences]
        while self.busy:
            self.step()
        return submitted

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence with what it has so far, and free its slot at once."""
        if sequence.ended:
            return
        sequence.finish_reason = "cancelled"
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._release()

    def step(self) -> list[Sequence]:
        """Run the network once; return the sequences that got a token or ended.

        If one sequence makes the network or the sampler raise an exception, it ends with that as
        its error, and the others draw their token at the next step. If no single sequence is to
        blame, or none can run any more, the exception is raised; all sequences then stay queued or
        running, and the next step tries again.
        """
        prefill = self._schedule_prefill()
        if not self._decoding and not prefill:
            return []
        try:
            logits = self._network.step(
                StepRows(
                    [(one.history[-1], len(one.history) - 1) for one in self._decoding],
                    [piece for _, piece in prefill],
                    [one.adapter for one in self._decoding],
                )
            )
        except BaseException as error:
            return self._end_guilty(error, prefill)
        logits = self._take_prefill(logits, prefill)
        for sequence in self._decoding:
            sequence.set_mask()
        try:
            tokens = self._network.draw(logits, self._decoding)
        except Exception as error:
            return self._end_guilty(error, [])
        for sequence, drawn in zip(self._decoding, tokens, strict=True):
            try:
                sequence.take(drawn)
            except Exception as error:  # one sequence's fault must not end the others
                sequence.fail(f"{type(error).__name__}: {error}")
        touched = list(self._decoding)
        if self._prefilling is not None and self._prefilling.ended:
            touched.append(self._prefilling)
        self._release()
        if None in tokens or len(touched) > len(tokens):
            self._scrub()
        return touched

    def _schedule_prefill(self) -> Prefill:
        """The step's pieces, in order of arrival; only the last can leave its prompt unfinished."""
        prefill: Prefill = []
        tokens = scored = 0
        longest, most = self._network.piece_tokens, self._network.prompt_tokens
        # A scored piece needs the logits after every token, which are large.
        longest_scored = max(1, SCORED_BYTES // (4 * self.vocab_size))
        most_scored = min(longest_scored, PROMPT_TOKENS)
        slots = range(len(self._decoding), self.max_batch_size)
        for slot, sequence in zip(slots, self._waiting, strict=False):
            if tokens >= most or scored >= most_scored:
                break
            is_scored = sequence.prompt_logprobs is not None
            size = min(longest, longest_scored) if is_scored else longest
            piece = sequence.next_piece(slot, size)
            prefill.append((sequence, piece))
            tokens += len(piece.tokens)
            scored += len(piece.tokens) if is_scored else 0
            if piece.stop < sequence.prompt_tokens:
                break
        return prefill

    def _take_prefill(self, logits: Tensor, prefill: Prefill) -> Tensor:
        """Score prompts where asked, and let those read to their end decode.

        Returns the rows of logits (D, V) to draw from, one for each sequence that decodes now.
        """
        if not prefill:
            return logits
        drawing, row = list(range(len(self._decoding))), len(self._decoding)
        for sequence, piece in prefill:
            if piece.scored:
                sequence.score(piece, logits[row : row + piece.logits], self._network.top)
            row += piece.logits
            sequence.prefilled = piece.stop
            if not sequence.is_prefilling:
                self._decoding.append(self._waiting.popleft())
                drawing.append(row - 1)
        is_start = drawing == list(range(len(drawing)))
        return logits[: len(drawing)] if is_start else logits[drawing]

    def _end_guilty(self, error: BaseException, prefill: Prefill) -> list[Sequence]:
        """End the sequences that fail even alone; raise the error if none is to blame.

        prefill: the pieces that the failed step was to read. Returns all sequences that have ended,
        including those whose prompt could not be scored in the same step.
        """
        is_common = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_common or not isinstance(error, Exception) or not self._blame(prefill):
            raise error
        ended = [one for one in (*self._decoding, *self._waiting) if one.ended]
        self._waiting = deque(one for one in self._waiting if not one.ended)
        self._release()
        self._scrub()
        return ended

    def _blame(self, prefill: Prefill) -> bool:
        """Fail the sequences that raise an exception alone; whether there are any."""
        pieces = [(one, one.last_piece(slot)) for slot, one in enumerate(self._decoding)]
        guilty = [
            (sequence, piece, fault)
            for sequence, piece in pieces + prefill
            if (fault := self._fault(sequence, piece))
        ]
        # If even the shortest prompt fails, every other will.
        if not guilty or self._fault(None, Piece(guilty[0][1].slot, 0, self.eos_ids[:1])):
            return False
        for sequence, _, fault in guilty:
            sequence.fail(f"{type(fault).__name__}: {fault}")
        return True

    def _fault(self, sequence: Sequence | None, piece: Piece) -> Exception | None:
        """The error that a piece raises if run alone, or the token drawn after it; None if none."""
        try:
            logits = self._network.step(StepRows([], [piece], alone=True))
            if sequence is not None and piece.stop >= sequence.prompt_tokens:
                sequence.set_mask()
                self._network.draw(logits[-1:], [sequence])
        except Exception as error:
            return error
        return None

    def _release(self) -> None:
        """Remove ended sequences; those in the last slots move into the freed ones."""
        if self._waiting and self._waiting[0].ended:
            self._waiting.popleft()
        used = len(self._decoding)
        for slot in reversed(range(used)):
            if self._decoding[slot].ended:
                last = self._decoding.pop()
                if slot < len(self._decoding):
                    self._decoding[slot] = last
                    self._network.move(len(self._decoding), slot, len(last.history))
        if self._prefilling is not None and len(self._decoding) < used:
            self._network.move(used, len(self._decoding), self._prefilling.prefilled)

    def _scrub(self) -> None:
        """Clear what failed sequences left in the cache: a NaN there would reach the next one."""
        prefill = [self._prefilling.prefilled] if self._prefilling else []
        self._network.scrub([*(len(one.history) - 1 for one in self._decoding), *prefill])
