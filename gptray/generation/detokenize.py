"""Decodes tokens to text as they arrive: whole characters only, cut at a stop string.

Text that was returned never changes: a character whose bytes are spread over several tokens is held
back until it is complete, and so is text that may turn out to begin a stop string. All pieces
together equal the text of all tokens decoded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gptray.data.tokenizer import Tokenizer

Decode = Callable[[Sequence[int]], str]
# What tokenizers decode incomplete or invalid bytes to.
REPLACEMENT = "\ufffd"
# The most bytes that a character takes.
UTF8_BYTES = 4


def left_context(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The prompt's last token, or the byte tokens of its last character, as context to decode with.

    Tokenizers like Llama's drop the leading space of a text's first token. Empty after a special
    token, where a new text begins.
    """
    if not prompt or prompt[-1] in tokenizer.written_names.ids.values():
        return []
    ends = (list(prompt[-count:]) for count in range(1, UTF8_BYTES + 1))
    whole = (end for end in ends if not tokenizer.decode(end).endswith(REPLACEMENT))
    return next(whole, [])


def decode_after(decode: Decode, lead: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that follow `lead`; a character that begins in `lead` comes whole."""
    if not lead or not tokens:
        return decode(tokens)
    return decode([*lead, *tokens])[len(decode(lead).rstrip(REPLACEMENT)) :]


class TextStream:
    """The text of one sequence as its tokens arrive.

    stop: the text ends before the first of these strings or, with `keeps_stop`, after it. lead: the
    tokens before the first, see `left_context`; a character that begins in them is returned whole.
    unstopped: a stop string does not count if it ends within the text of this many first tokens.
    """

    def __init__(
        self,
        decode: Decode,
        stop: Sequence[str] = (),
        *,
        lead: Sequence[int] = (),
        unstopped: int = 0,
        keeps_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._stop, self._keeps_stop = tuple(stop), keeps_stop
        self._stoppable_at = len(lead) + unstopped + 1  # tokens
        self._tokens: list[int] = list(lead)
        self._settled = 0  # tokens before this are not decoded again
        self._begin = 0  # where the newest tokens begin
        # How many characters of tokens[settled:] were taken already.
        self._taken = len(decode(lead).rstrip(REPLACEMENT)) if lead else 0
        self._held = ""  # whole characters that may begin a stop string
        self._unstopped = 0  # how many of them a stop string must not end within
        self.text = ""
        self.found: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def add(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        assert not self.stopped
        self._tokens.append(token)
        return self._release(self._new_text())

    def finish(self) -> str:
        """Return the text held back, as no token will follow; nothing once a stop string was found.

        Text held back with a character that was never completed may hold a stop string.
        """
        if self.stopped:
            return ""
        window = self._decode(self._tokens[self._settled :])
        fresh, self._taken = window[self._taken :], len(window)
        ready = self._release(fresh)
        rest, self._held = self._held, ""
        self.text += rest
        return ready + rest

    def _new_text(self) -> str:
        """The text that the newest tokens add; empty while their last character is incomplete."""
        window = self._decode(self._tokens[self._settled :])
        if window.endswith(REPLACEMENT):
            return ""
        fresh = window[self._taken :]
        # Tokenizers may drop a leading space: the newest tokens stay as left context of the next.
        self._settled, self._begin = self._begin, len(self._tokens)
        self._taken = len(self._decode(self._tokens[self._settled :]))
        return fresh

    def _release(self, fresh: str) -> str:
        """Add whole characters; return what can no longer become part of a stop string."""
        self._held += fresh
        if len(self._tokens) < self._stoppable_at:
            self._unstopped = len(self._held)
        found = [(at, len(stop), stop) for stop in self._stop if (at := self._find(stop)) >= 0]
        if found:
            at, length, self.found = min(found)
            ready, self._held = self._held[: at + self._keeps_stop * length], ""
        else:
            sure = len(self._held) - self._stop_overlap()
            ready, self._held = self._held[:sure], self._held[sure:]
            self._unstopped = max(0, self._unstopped - sure)
        self.text += ready
        return ready

    def _find(self, stop: str) -> int:
        """Where a stop string begins in the held text; -1 if it is not there, or ends too early."""
        return self._held.find(stop, max(0, self._unstopped - len(stop) + 1))

    def _stop_overlap(self) -> int:
        """The length of the longest suffix of the held text that begins a stop string."""
        most = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
