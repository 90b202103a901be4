"""One text on its way from prompt to tokens: the request, the result so far, and its progress."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gptray.data.tokenizer import Tokenizer
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.choosing import Top
from gptray.generation.decoder import Piece
from gptray.generation.detokenize import Decode, TextStream, decode_after, left_context
from gptray.generation.sampling import Drawn, score
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import INVALID, START, Mask, Utf8

FinishReason = Literal["stop", "length", "cancelled", "error"]
NOT_FINITE = "the model's logits are not finite for this text and these settings"


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt's token ids, how to continue it, and what an engine has made of it so far.

    An engine takes a sequence once; `dataclasses.replace` makes a new one of the same prompt.

    sample: which of several outputs of one prompt this is; each has a random stream of its own.
    live_text: keep `text` up to date at every token, not only at the end.
    prompt_logprobs: how many of the likeliest tokens to report at each of the prompt's; None
    reports none. With it `sampling.max_new_tokens` may be 0: the prompt is read, no more.
    adapter: of the engine's model, packed by the engine.

    scored: with `prompt_logprobs` the prompt's tokens, complete as soon as there is a new one; the
    first has no log-probability. drawn: the new tokens. end: the end-of-text token if that ended
    the output. error: why, where finish_reason is "error". history: the prompt's tokens and the
    new ones. read: how many of the prompt's are in the cache. lead: the prompt's last tokens,
    which the text continues (see `left_context`), or in which its first character begins.
    """

    prompt: abc.Sequence[int]
    sampling: Sampling = Sampling()
    sample: int = 0
    live_text: bool = False
    prompt_logprobs: int | None = None
    adapter: PackedAdapter | None = None

    scored: list[Drawn] = field(init=False, default_factory=list)
    drawn: list[Drawn] = field(init=False, default_factory=list)
    end: Drawn | None = field(init=False, default=None)
    text: str = field(init=False, default="")
    finish_reason: FinishReason | None = field(init=False, default=None)
    error: str | None = field(init=False, default=None)

    is_checked: bool = field(init=False, default=False)
    prompt_tokens: int = field(init=False)
    history: list[int] = field(init=False, default_factory=list)
    read: int = field(init=False, default=0)
    lead: list[int] = field(init=False, default_factory=list)
    # For the sampler: the tokens that end the text, and what would break a character now.
    eos_ids: abc.Sequence[int] = field(init=False, default=())
    mask: Mask | None = field(init=False, default=None)

    _longest: int = field(init=False, default=0)
    _decode: Decode = field(init=False)
    _utf8: Utf8 | None = field(init=False, default=None)
    _state: int = field(init=False, default=START)
    _stream: TextStream | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.prompt)

    def begin(
        self, tokenizer: Tokenizer, n_positions: int, utf8: Utf8 | None, eos_ids: abc.Sequence[int]
    ) -> None:
        """Get ready for an engine whose context has n_positions tokens; eos_ids end the text."""
        assert not self.history, "an engine takes a sequence once"
        sampling = self.sampling
        self.history = list(self.prompt)
        self.eos_ids, self._decode = eos_ids, tokenizer.decode
        self._longest = min(self.prompt_tokens + sampling.max_new_tokens, n_positions)
        if self.prompt_logprobs is not None:
            self.scored = [Drawn(self.prompt[0])]
        self._utf8 = utf8 if sampling.utf8 else None
        if self._utf8:
            # The end of a prompt that stops inside a character.
            self.lead = self._utf8.open_end(self.prompt)
            self._state = self._utf8.state_after(self.lead)
        self.lead = self.lead or left_context(tokenizer, self.prompt)
        if self.live_text or sampling.stop:
            self._stream = TextStream(
                self._decode,
                sampling.stop,
                lead=self.lead,
                unstopped=sampling.min_new_tokens,
            )

    @property
    def tokens(self) -> list[int]:
        """The new tokens, end of text not among them."""
        return [drawn.token for drawn in self.drawn]

    @property
    def new_tokens(self) -> int:
        """How many tokens were drawn, end of text among them."""
        return len(self.history) - self.prompt_tokens

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt is not in the cache yet."""
        return self.read < self.prompt_tokens

    def next_piece(self, slot: int, tokens: int) -> Piece:
        """The part of the prompt that is read next, at most so many tokens; it counts as read."""
        start = self.read
        part = self.history[start : start + tokens]
        self.read += len(part)
        scored = self.prompt_logprobs is not None
        return Piece(slot, start, part, scored=scored, adapter=self.adapter)

    def last_piece(self, slot: int) -> Piece:
        """The last token alone, after which the next is drawn."""
        return Piece(slot, len(self.history) - 1, self.history[-1:], adapter=self.adapter)

    def score(self, piece: Piece, logits: Tensor, top: Top) -> None:
        """Take in the log-probabilities of the prompt's tokens after each of a piece's."""
        follow = self.history[piece.start + 1 : piece.start + 1 + len(piece.tokens)]
        if not follow:
            return
        try:
            self.scored += score(logits[: len(follow)], follow, self.prompt_logprobs or 0, top)
        except ValueError as error:
            self.fail(str(error))
        except Exception as error:  # one text's fault is not its neighbours'
            self.fail(f"{type(error).__name__}: {error}")

    def set_mask(self) -> None:
        """Note which tokens would break a character, before the next one is drawn."""
        if self._utf8:
            left = self._longest - len(self.history) - 1
            self.mask = self._utf8.mask(self._state, left)

    def take(self, drawn: Drawn | None) -> None:
        """Add a token and end the text if it is complete; None: no token could be drawn."""
        if self.ended:
            return
        if drawn is None:
            self.fail(NOT_FINITE)
            return
        sampling = self.sampling
        if not sampling.max_new_tokens:
            self._end("length")
            return
        self.history.append(drawn.token)
        if self._utf8:
            self._state = self._utf8.next(self._state, drawn.token)
            if self._state == INVALID:  # no valid token was left to draw
                self._state = self._utf8.state_after(self.history)
        if drawn.token in self.eos_ids and not sampling.ignore_eos:
            self.end = drawn
            self._end("stop")
            return
        self.drawn.append(drawn)
        if self._stream is not None:
            self._stream.add(drawn.token)
            self.text = self._stream.text
            if self._stream.stopped:
                self._end("stop")
                return
        if len(self.history) >= self._longest:
            self._end("length")

    def fail(self, reason: str) -> None:
        """End with an error; other sequences are not affected."""
        self.error = reason
        self.finish_reason = "error"  # last: from then on another thread may look at it

    def _end(self, reason: FinishReason) -> None:
        if self._stream is None:
            self.text = decode_after(self._decode, self.lead, self.tokens)
        else:
            self._stream.finish()
            self.text = self._stream.text
            reason = "stop" if self._stream.stopped else reason
        self.finish_reason = reason
