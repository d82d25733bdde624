"""How like its training text a sampled text is: rates of characters, known words, copied spans. Plain counting; no model.

The numbers answer two questions a loss does not: has it learned the text's surface, and is it writing or
reciting?
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LARGEST_TEXT = 4_000_000  # characters of the training text that spans are looked for in: a second or two
NGRAM = 8
WORD = re.compile("\\w+(?:['\u2019]\\w+)*")  # with apostrophes, straight and curly
PUNCTUATION = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class Likeness:
    """`rates`: kind of character -> (share of the sample, share of the training text). `known_words`: share of the
    sample's words that occur in the training text. `longest_copy`: the longest span of the sample that stands in it.
    `new_ngrams`: share of the sample's different spans of 8 characters that do not. Shares are None where there is
    nothing to count."""

    rates: dict[str, tuple[float, float]]
    known_words: float | None
    longest_copy: str
    new_ngrams: float | None


def likeness(sample: str, training: str) -> Likeness:
    """Compare a sample with the training text, or with its first four million characters."""
    training = training[:LARGEST_TEXT]
    ours, theirs = _rates(sample), _rates(training)
    words = WORD.findall(sample)
    vocabulary = set(WORD.findall(training))
    ngrams = {sample[i : i + NGRAM] for i in range(len(sample) - NGRAM + 1)}
    return Likeness(
        {kind: (ours[kind], theirs[kind]) for kind in ours},
        sum(word in vocabulary for word in words) / len(words) if words else None,
        _longest_copy(sample, training),
        sum(ngram not in training for ngram in ngrams) / len(ngrams) if ngrams else None,
    )


def _rates(text: str) -> dict[str, float]:
    n = max(1, len(text))
    return {
        "line breaks": text.count("\n") / n,
        "spaces": text.count(" ") / n,
        "punctuation": len(PUNCTUATION.findall(text)) / n,
        "capitals": sum(map(str.isupper, text)) / n,
    }


def _longest_copy(sample: str, training: str) -> str:
    start = length = 0
    for i in range(len(sample)):
        while i + length < len(sample) and sample[i : i + length + 1] in training:
            start, length = i, length + 1
    return sample[start : start + length]
