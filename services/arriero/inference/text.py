"""From token pieces to text: whole UTF-8 characters, stopped at stop strings.

Responsibility: hold back bytes that may still become a character or a stop
string. Does not know tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns bytes as they come into text that may be shown.

    Args:
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = [text.encode() for text in stop if text]
        self._held = b""
        # A byte sequence that can't become UTF-8 is shown as U+FFFD, as llama.cpp's server does.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Take the bytes of one token; return the text that is safe to show now."""
        if self.stopped:
            return ""
        self._held += piece
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], b""
            return self._decoder.decode(ready, True)
        keep = self._suffix_that_may_stop()
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return self._decoder.decode(ready)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        ready, self._held = self._held, b""
        return "" if self.stopped else self._decoder.decode(ready, True)

    def _suffix_that_may_stop(self) -> int:
        """Length of the longest end of what is held that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
