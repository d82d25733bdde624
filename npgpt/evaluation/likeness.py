"""How similar samples are to the training text: rates of characters, known words, copied spans. Only counting; no model.

The numbers answer two questions that a loss does not answer. Has the model learned the look of the text? And does it write
new text or copy?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_TEXT = 4_000_000  # characters of the training text to search; the search takes a few seconds
NGRAM = 8  # characters in an n-gram
WORD = re.compile("\\w+(?:['\u2019]\\w+)*")  # a word may have apostrophes, straight or curly
PUNCTUATION = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class Likeness:
    """A comparison of samples with the training text. A share is None if there is nothing to count."""

    characters: int  # in the samples
    of: int  # characters of the training text, from its beginning, that they were compared with
    rates: dict[str, tuple[float, float]]  # kind of character -> (share in the samples, share in the training text)
    known_words: float | None  # share of the samples' words that occur in the training text
    longest_copy: str  # the longest span of a sample that occurs in the training text
    new_ngrams: float | None  # share of the samples' different 8-grams that do not occur in the training text


def likeness(samples: Sequence[str], training: str) -> Likeness:
    """Compare samples with the training text, or with its first four million characters.

    The last word of each sample is not counted, because it may be cut off.
    """
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


def copied_spans(sample: str, training: str, shortest: int) -> list[tuple[int, int]]:
    """The (start, end) of spans of the sample that occur in the training text, from left to right, none over another.

    A span begins as early and ends as late as it can, and has `shortest` characters or more.
    """
    spans, start = [], 0
    while start + shortest <= len(sample):
        end = start + shortest
        if sample[start:end] not in training:
            start += 1
            continue
        last = len(sample)
        while end < last:  # the longest copy ends between these two
            middle = (end + last + 1) // 2
            end, last = (middle, last) if sample[start:middle] in training else (end, middle - 1)
        spans.append((start, end))
        start = end
    return spans


def _rates(text: str) -> dict[str, float]:
    n = max(1, len(text))
    return {
        "line breaks": text.count("\n") / n,
        "spaces": text.count(" ") / n,
        "punctuation": len(PUNCTUATION.findall(text)) / n,
        "capitals": sum(map(str.isupper, text)) / n,
    }


def _longest_copy(sample: str, training: str, longest: str) -> str:
    """The longest span of the sample that occurs in the training text, or `longest` if no span is longer."""
    for i in range(len(sample)):
        while i + len(longest) < len(sample) and sample[i : i + len(longest) + 1] in training:
            longest = sample[i : i + len(longest) + 1]
    return longest
