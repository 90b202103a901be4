"""A sequence: a prompt with its sampling settings, its output so far, and its progress."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor

from gptray.data.tokenizer import Tokenizer
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.choosing import Top
from gptray.generation.decoder import Piece
from gptray.generation.detokenize import (
    REPLACEMENT,
    Decode,
    TextStream,
    decode_after,
    left_context,
)
from gptray.generation.sampling import Drawn, score
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import INVALID, START, Mask, Utf8

FinishReason = Literal["stop", "length", "cancelled", "error"]
NOT_FINITE = "the model's logits are not finite for this text and these settings"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A prompt's token ids, how to continue it, and what an engine has made of it so far.

    An engine takes a sequence once; `dataclasses.replace` makes a new one from the same prompt.

    sample: which of several outputs of one prompt this is; each has its own random stream.
    live_text: update `text` with every token, not only at the end.
    prompt_logprobs: how many of the likeliest tokens to report at each prompt token; None scores no
    prompt. With it, `sampling.max_new_tokens` may be 0: the prompt is scored, nothing generated.
    adapter: one of the engine's model, packed by the engine.

    scored: with `prompt_logprobs`, the prompt's tokens, complete once the first token is drawn; the
    first has no log-probability. drawn: the new tokens, without end. end: the token that ended the
    output and is not part of it, if there is one. stop_reason: the stop string, or the token of
    `stop_token_ids`, that ended the output. error: the reason if finish_reason is "error". history:
    the prompt's tokens and the new ones, end included. prefilled: how many of the prompt's are in
    the KV cache. lead: the prompt's last tokens, as context to decode with (see `left_context`), or
    those in which the text's first character begins.
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
    stop_reason: str | int | None = field(init=False, default=None)
    error: str | None = field(init=False, default=None)

    is_checked: bool = field(init=False, default=False)
    prompt_tokens: int = field(init=False)
    history: list[int] = field(init=False, default_factory=list)
    prefilled: int = field(init=False, default=0)
    lead: list[int] = field(init=False, default_factory=list)
    decode: Decode = field(init=False)
    # For the sampler, see `Row`.
    ends: abc.Sequence[int] = field(init=False, default=())
    mask: Mask | None = field(init=False, default=None)

    _longest: int = field(init=False, default=0)
    _eos_ids: abc.Sequence[int] = field(init=False, default=())
    _utf8: Utf8 | None = field(init=False, default=None)
    _state: int = field(init=False, default=START)
    _stream: TextStream | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.prompt)

    def begin(
        self, tokenizer: Tokenizer, n_positions: int, utf8: Utf8 | None, eos_ids: abc.Sequence[int]
    ) -> None:
        """Prepare for an engine with a context of n_positions tokens; eos_ids: end of text."""
        assert not self.history, "an engine takes a sequence once"
        sampling = self.sampling
        self.history = list(self.prompt)
        self._eos_ids = eos_ids
        self.decode = partial(tokenizer.decode, skip_special=sampling.skip_special_tokens)
        self.ends = [*eos_ids, *sampling.stop_token_ids]
        self._longest = min(self.prompt_tokens + sampling.max_new_tokens, n_positions)
        if self.prompt_logprobs is not None:
            self.scored = [Drawn(self.prompt[0])]
        self._utf8 = utf8 if sampling.utf8 else None
        if self._utf8:
            # A prompt may end inside a character.
            self.lead, self._state = self._utf8.open_end(self.prompt)
        self.lead = self.lead or left_context(tokenizer, self.prompt)
        if self.live_text or sampling.stop:
            self._stream = self._text_stream()

    @property
    def tokens(self) -> list[int]:
        """The new tokens, without `end`."""
        return [drawn.token for drawn in self.drawn]

    @property
    def new_tokens(self) -> int:
        """How many tokens were drawn, `end` included."""
        return len(self.history) - self.prompt_tokens

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_prefilling(self) -> bool:
        """Whether the prompt is still in prefill: some of it is not in the KV cache yet."""
        return self.prefilled < self.prompt_tokens

    def next_piece(self, slot: int, tokens: int) -> Piece:
        """The next piece of the prompt, at most `tokens` long."""
        part = self.history[self.prefilled : self.prefilled + tokens]
        scored = self.prompt_logprobs is not None
        return Piece(slot, self.prefilled, part, scored=scored, adapter=self.adapter)

    def last_piece(self, slot: int) -> Piece:
        """The last token alone: what a decoding step reads."""
        return Piece(slot, len(self.history) - 1, self.history[-1:], adapter=self.adapter)

    def score(self, piece: Piece, logits: Tensor, top: Top) -> None:
        """Score the prompt token after each of a piece's, given the piece's logits (T, V)."""
        follow = self.history[piece.start + 1 : piece.start + 1 + len(piece.tokens)]
        if not follow:
            return
        try:
            self.scored += score(logits[: len(follow)], follow, self.prompt_logprobs or 0, top)
        except ValueError as error:
            self.fail(str(error))
        except Exception as error:  # one sequence's fault must not end the others
            self.fail(f"{type(error).__name__}: {error}")

    def set_mask(self) -> None:
        """Set which tokens would break a character, before the next one is drawn."""
        if self._utf8:
            left = self._longest - len(self.history) - 1
            self.mask = self._utf8.mask(self._state, left)

    def take(self, drawn: Drawn | None) -> None:
        """Add a token, and end if the output is complete. None: no token could be drawn."""
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
                _, self._state = self._utf8.open_end(self.history)
        is_eos = drawn.token in self._eos_ids and not sampling.ignore_eos
        if drawn.token in sampling.stop_token_ids and not is_eos:
            self.stop_reason = drawn.token
        if is_eos or (self.stop_reason is not None and not sampling.include_stop_str_in_output):
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
        if self.stop_reason is not None:
            self._end("stop")
        elif len(self.history) >= self._longest:
            self._end("length")

    def fail(self, reason: str) -> None:
        """End with an error; other sequences are not affected."""
        self.error = reason
        self.finish_reason = "error"  # last, because other threads may read the rest from then on

    def _end(self, reason: FinishReason) -> None:
        if self._stream is None:
            self.text = decode_after(self.decode, self.lead, self.tokens)
            if REPLACEMENT in self.text:
                # Byte fallback decodes bytes otherwise once broken ones follow, too late for a
                # stream: the text is the stream's, whether or not there was one.
                self._stream = self._text_stream()
                for token in self.tokens:
                    self._stream.add(token)
        if self._stream is not None:
            self._stream.finish()
            self.text = self._stream.text
            if self._stream.found is not None:
                reason, self.stop_reason = "stop", self._stream.found
        if self._utf8 and isinstance(self.stop_reason, int):
            self.text = self.text.rstrip(REPLACEMENT)  # the token may be part of a character
        self.finish_reason = reason

    def _text_stream(self) -> TextStream:
        sampling = self.sampling
        return TextStream(
            self.decode,
            sampling.stop,
            lead=self.lead,
            unstopped=sampling.min_new_tokens,
            keeps_stop=sampling.include_stop_str_in_output,
        )
