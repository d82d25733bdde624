"""Stop texts: where the growing text of a sample ends. No tokens are drawn here."""

from __future__ import annotations

from collections.abc import Sequence

from npgpt.text.tokenizer import TextStream


class StopFinder:
    """Looks for stop texts in the growing text of one sample.

    A stop text may begin in one token and end in another. So the finder holds back as many characters as could be the
    beginning of the longest stop text.
    """

    def __init__(self, stop: Sequence[str], stream: TextStream) -> None:
        self._stop, self._stream, self._held = stop, stream, ""
        self._longest = max(map(len, stop), default=1)

    def add(self, i: int) -> tuple[str, bool]:
        """Add the text of an id. Returns (text that is safe to show, whether a stop text was found after it)."""
        text, found = self._search(self._stream.add(i))
        if not found:
            safe = max(0, len(text) - (self._longest - 1))
            text, self._held = text[:safe], text[safe:]
        return text, found

    def end(self) -> tuple[str, bool]:
        """The text that was held back, up to a stop text; and True, because the sample ends here."""
        return self._search(self._stream.end())[0], True

    def _search(self, text: str) -> tuple[str, bool]:
        text = self._held + text
        positions = [at for s in self._stop if (at := text.find(s)) >= 0]
        return (text[: min(positions)], True) if positions else (text, False)
