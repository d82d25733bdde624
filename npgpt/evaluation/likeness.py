"""How like its training text a sampled text is: rates of characters, known words, copied spans. Plain counting; no model.

The numbers answer two questions a loss does not: has it learned the text's surface, and is it writing or
reciting?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_TEXT = 4_000_000  # characters of the training text that spans are looked for in: a few seconds
NGRAM = 8
WORD = re.compile("\\w+(?:['\u2019]\\w+)*")  # with apostrophes, straight and curly
PUNCTUATION = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class Likeness:
    """Of `characters` sampled ones and the first `of` of the training text. `rates`: kind of character -> (share of the
    sample, share of the training text). `known_words`: share of the sample's words that occur in the training text.
    `longest_copy`: the longest span of the sample that stands in it. `new_ngrams`: share of the sample's different spans
    of 8 characters that do not. Shares are None where there is nothing to count."""

    characters: int
    of: int
    rates: dict[str, tuple[float, float]]
    known_words: float | None
    longest_copy: str
    new_ngrams: float | None


def likeness(samples: Sequence[str], training: str) -> Likeness:
    """Compare samples, each for itself, with the training text, or with its first four million characters. The last
    word of a sample, which may have been cut off, is not counted as one."""
    training = training[:LARGEST_TEXT]
    n = sum(map(len, samples))
    ours, theirs = _rates("".join(samples)), _rates(training)
    words = [word for sample in samples for word in WORD.findall(re.sub(r"\S+$", "", sample))]
    vocabulary = set(WORD.findall(training))
    ngrams = {sample[i : i + NGRAM] for sample in samples for i in range(len(sample) - NGRAM + 1)}
    longest = ""
    for sample in samples:
        longest = _longest_copy(sample, training, longest)
    return Likeness(
        n,
        len(training),
        {kind: (ours[kind], theirs[kind]) for kind in ours},
        sum(word in vocabulary for word in words) / len(words) if words else None,
        longest,
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


def _longest_copy(sample: str, training: str, longest: str) -> str:
    """The longest span of the sample that stands in the training text, or `longest` if none is longer."""
    for i in range(len(sample)):
        while i + len(longest) < len(sample) and sample[i : i + len(longest) + 1] in training:
            longest = sample[i : i + len(longest) + 1]
    return longest
