"""A request, what there is of its output, and how it goes through the engine token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gptray.data.tokenizer import Tokenizer
from gptray.generation.choosing import Top
from gptray.generation.decoder import PIECE_TOKENS, Piece
from gptray.generation.detokenize import TextStream, decode_after
from gptray.generation.sampling import Drawn, Row, score
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import INVALID, START, Utf8

FinishReason = Literal["stop", "length", "cancelled", "error"]
NOT_FINITE = "the model's logits are not finite for this text and these settings"


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
    error: why, where finish_reason is "error".
    """

    def __init__(self, step: Callable[[], object], request: Request) -> None:
        self.request = request
        self.prompt: list[Drawn] = []
        self.drawn: list[Drawn] = []
        self.end: Drawn | None = None
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._step = step

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
                self._step()


class ActiveSequence:
    """A request on its way through an engine whose context has n_positions tokens."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        n_positions: int,
        utf8: Utf8 | None = None,
    ) -> None:
        request = generation.request
        self._longest = min(len(request.prompt) + request.sampling.max_new_tokens, n_positions)
        self.generation = generation
        self.history = list(request.prompt)
        self.read = 0  # tokens of the prompt that are in the cache
        if request.prompt_logprobs is not None:
            generation.prompt = [Drawn(request.prompt[0])]
        self._tokenizer = tokenizer
        self._utf8 = utf8 if request.sampling.utf8 else None
        # The end of a prompt that stops inside a character.
        self._lead = self._utf8.open_end(request.prompt) if self._utf8 else []
        self._state = self._utf8.state_after(self._lead) if self._utf8 else START
        self._row = Row(
            request.sampling, len(request.prompt), self.history, tokenizer.eos_id, request.row
        )
        self._text: TextStream | None = None
        if request.live_text or request.sampling.stop:
            self._text = TextStream(tokenizer.decode, request.sampling.stop, lead=self._lead)

    @property
    def ended(self) -> bool:
        return self.generation.finish_reason is not None

    def row(self) -> Row:
        """What drawing the next token needs."""
        if self._utf8:
            left = self._longest - len(self.history) - 1
            self._row.mask = self._utf8.mask(self._state, left)
        return self._row

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
        if not follow:
            return
        try:
            self.generation.prompt += score(logits[: len(follow)], follow, count or 0, top)
        except ValueError as error:
            self.fail(str(error))
        except Exception as error:  # one text's fault is not its neighbours'
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, reason: str) -> None:
        """End the generation with an error; other sequences are not affected."""
        self.generation.finish_reason, self.generation.error = "error", reason

    def take(self, drawn: Drawn | None) -> None:
        """Add a token and end the generation where it is to end; None: none could be drawn."""
        if self.ended:
            return
        if drawn is None:
            self.fail(NOT_FINITE)
            return
        generation = self.generation
        sampling = generation.request.sampling
        if not sampling.max_new_tokens:
            self._end("length")
            return
        self.history.append(drawn.token)
        if self._utf8:
            self._follow(self._utf8, drawn.token)
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
        if len(self.history) >= self._longest:
            self._end("length")

    def _follow(self, utf8: Utf8, token: int) -> None:
        self._state = utf8.next(self._state, token)
        if self._state == INVALID:  # no valid token was left to draw
            self._state = utf8.state_after(self.history)

    def _end(self, reason: FinishReason) -> None:
        generation = self.generation
        if self._text is None:
            decode = self._tokenizer.decode
            generation.text = decode_after(decode, self._lead, generation.tokens)
        else:
            self._text.finish()
            generation.text = self._text.text
            reason = "stop" if self._text.stopped else reason
        generation.finish_reason = reason
