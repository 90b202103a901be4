"""Text out of a growing list of tokens: whole characters only, cut before a stop string.

What has been given out never changes: a character whose bytes are spread over tokens is held back
until it is whole, and so is text that may yet turn out to be the beginning of a stop string. All
pieces together equal the tokens decoded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gptray.data.tokenizer import Tokenizer

Decode = Callable[[Sequence[int]], str]
# How decoders show bytes that are no character, or none yet.
REPLACEMENT = "\ufffd"
# The most bytes of a character.
UTF8_BYTES = 4


def left_context(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The prompt's last token, or character of byte tokens, if what follows continues its text.

    With tokenizers like Llama's, a text's first token loses its leading space.
    """
    if not prompt or prompt[-1] in tokenizer.written_names.ids.values():
        return []
    ends = (list(prompt[-count:]) for count in range(1, UTF8_BYTES + 1))
    whole = (end for end in ends if not tokenizer.decode(end).endswith(REPLACEMENT))
    return next(whole, [])


def decode_after(decode: Decode, lead: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind `lead`, those before; a character that begins there is whole."""
    if not lead or not tokens:
        return decode(tokens)
    return decode([*lead, *tokens])[len(decode(lead).rstrip(REPLACEMENT)) :]


class TextStream:
    """The text of one sequence as its tokens arrive.

    lead: tokens before these, see `left_context`; a character that begins in them is passed on
    whole. unstopped: a stop string does not count within the text of this many first tokens.
    """

    def __init__(
        self,
        decode: Decode,
        stop: Sequence[str] = (),
        *,
        lead: Sequence[int] = (),
        unstopped: int = 0,
    ) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._stoppable_at = len(lead) + unstopped + 1  # tokens
        self._tokens: list[int] = list(lead)
        self._settled = 0  # what comes before is not decoded again
        self._begin = 0  # where the newest tokens begin
        # Characters of tokens[settled:] that were passed on.
        self._given = len(decode(lead).rstrip(REPLACEMENT)) if lead else 0
        self._held = ""  # passed on by the decoder, but may begin a stop string
        self._unstopped = 0  # characters at the start of it at which no stop string ends
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        assert not self.stopped
        self._tokens.append(token)
        return self._pass_on(self._whole())

    def finish(self) -> str:
        """Return what was held back: no token will follow. Nothing after a stop string.

        A stop string may be in the text held back for a character that was never completed.
        """
        if self.stopped:
            return ""
        window = self._decode(self._tokens[self._settled :])
        fresh, self._given = window[self._given :], len(window)
        ready = self._pass_on(fresh)
        rest, self._held = self._held, ""
        self.text += rest
        return ready + rest

    def _whole(self) -> str:
        """The new text, if its last character is whole."""
        window = self._decode(self._tokens[self._settled :])
        if window.endswith(REPLACEMENT):
            return ""
        fresh = window[self._given :]
        # Decoders may drop a leading space: the tokens before these stay as left context.
        self._settled, self._begin = self._begin, len(self._tokens)
        self._given = len(self._decode(self._tokens[self._settled :]))
        return fresh

    def _pass_on(self, fresh: str) -> str:
        self._held += fresh
        if len(self._tokens) < self._stoppable_at:
            self._unstopped = len(self._held)
        found = [at for at in map(self._find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
        else:
            sure = len(self._held) - self._possible_stop()
            ready, self._held = self._held[:sure], self._held[sure:]
            self._unstopped = max(0, self._unstopped - sure)
        self.text += ready
        return ready

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._unstopped - len(stop) + 1))

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        most = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
