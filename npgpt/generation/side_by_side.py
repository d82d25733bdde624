"""Texts that are drawn side by side: each gets one token in a step. Texts may join and leave between two steps.

Each text is what it would be alone, to the last token. The model computes all texts in one product. A product with more rows
rounds differently, in the sixth digit of a logit. That could change a token only if its draw falls very close to the boundary
between two tokens. Then the logits are computed again for this text alone, from its prompt on, and from there on the text is
drawn alone.

This holds for vocabularies of up to EXACT_VOCABULARY tokens. In larger ones, most tokens are less likely than the rounding, so
most draws are close to a boundary, and drawing side by side would save nothing. There, a text among others may differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.engine.streams import Stream, generator
from npgpt.generation.decode import NextLogits
from npgpt.generation.sampling import likeliest_ids, log_probabilities, sample_ids
from npgpt.model.gpt import GPT

EXACT_VOCABULARY = 4096
# A logit differs, alone and among others, by some roundings of the largest logit. Their number grows as the square root of the
# width. The largest that tests/benchmarks/rounding.py has found is 0.96 times this root, in models of widths from 128 to 1024.
ROUNDINGS = 2.0


@dataclass(frozen=True)
class Token:
    """One new token of a text, which is one of the samples of a prompt.

    `logprob` is the natural logarithm of its probability in the model, before temperature and all restrictions.
    """

    sample: int
    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()  # (id, logprob) of the likeliest tokens, if the text asked for them


@dataclass
class _Text:
    ids: list[int]
    n_context: int
    settings: GenerateConfig  # without the fields that do not affect the drawn id
    rng: np.random.Generator = field(repr=False)
    n_likeliest: int
    seen: set[int]  # the ids that occur in it
    was_among_others: bool = False
    alone: NextLogits | None = None  # after a draw that was close to a boundary


class SideBySide:
    """Texts of one model that grow by one token in each step."""

    def __init__(self, model: GPT, window: str | None = None, threads: int = 1, vocab_size: int | None = None) -> None:
        """window and threads: see GenerateConfig. vocab_size: ids from here on are padding and are never drawn.

        Raises RequestError for a window that the model cannot have.
        """
        self._model, self._window, self._threads, self._vocab_size = model, window, threads, vocab_size
        self._next_logits = NextLogits(model, window, threads)
        self._texts: dict[int, _Text] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(
        self,
        key: int,
        context_ids: Sequence[int],
        settings: GenerateConfig,
        entropy: int,
        sample: int = 0,
        n_likeliest: int = 0,
    ) -> None:
        """Add a text under a new key.

        entropy: the seed. sample: its number among the samples with this seed. n_likeliest: how many of the likeliest ids each
        Token lists.

        Raises RequestError for an empty context, or an id outside the vocabulary.
        """
        context = np.asarray(context_ids, dtype=np.int64).tolist()  # a copy, as plain integers
        if not context:
            raise RequestError("the context must have at least one token, got none")
        vocab_size = self._model.config.vocab_size
        if min(context) < 0 or max(context) >= vocab_size:
            raise RequestError(f"context ids must lie in 0..{vocab_size - 1}, got {min(context)}..{max(context)}")
        # Texts with equal settings are sampled in one call.
        settings = dataclasses.replace(settings, seed=None, max_new_tokens=0, num_samples=1)
        rng = generator(entropy, Stream.SAMPLE, sample)
        self._texts[key] = _Text(context, len(context), settings, rng, n_likeliest, set(context))

    def remove(self, key: int) -> None:
        """Remove a text. The other texts do not change."""
        del self._texts[key]

    def step(self) -> list[Token]:
        """Draw one token for each text. The number of a token's sample is the key of its text.

        Raises FloatingPointError if the logits are not finite.
        """
        texts = list(self._texts.values())
        for text in texts:
            text.was_among_others |= len(texts) > 1
        logits = self._logits()
        ids = np.zeros(len(texts), dtype=np.int64)
        groups: dict[GenerateConfig, list[int]] = {}
        for row, text in enumerate(texts):
            groups.setdefault(text.settings, []).append(row)
        for settings, rows in groups.items():
            ids[rows] = self._drawn(logits[rows], settings, [texts[row] for row in rows])
        for text, new_id in zip(texts, ids.tolist(), strict=True):
            text.ids.append(new_id)
            text.seen.add(new_id)
        logprobs = log_probabilities(logits, ids)
        likeliest = [likeliest_ids(row, text.n_likeliest) for row, text in zip(logits, texts, strict=True)]
        return list(map(Token, self._texts, ids.tolist(), logprobs.tolist(), likeliest))

    def _logits(self) -> np.ndarray:
        """(B, V): the logits of the next token of each text."""
        is_alone = np.array([text.alone is not None for text in self._texts.values()])
        logits = np.empty((len(is_alone), self._model.config.vocab_size))
        together = {key: text.ids for key, text in self._texts.items() if text.alone is None}
        if together:
            logits[~is_alone] = self._next_logits(together)
        for row, text in enumerate(self._texts.values()):
            if text.alone:
                logits[row] = text.alone({0: text.ids})[0]
        return logits[:, : self._vocab_size]

    def _drawn(self, logits: np.ndarray, settings: GenerateConfig, texts: list[_Text]) -> np.ndarray:
        """(B,): the ids drawn for some texts with the same settings."""
        draws, seen = [text.rng.random() for text in texts], [text.seen for text in texts]
        may_differ = [text.was_among_others and text.alone is None for text in texts]
        if not any(may_differ) or logits.shape[1] > EXACT_VOCABULARY:
            return sample_ids(logits, settings, draws, seen)[0]
        roundings = ROUNDINGS * math.sqrt(self._model.config.n_embd) * np.finfo(np.float32).eps
        ids, is_close = sample_ids(logits, settings, draws, seen, roundings * np.abs(logits).max(axis=1))
        for row in np.flatnonzero(is_close & may_differ).tolist():
            alone = self._draw_alone(texts[row])[None, : self._vocab_size]
            ids[row] = sample_ids(alone, settings, draws[row : row + 1], seen[row : row + 1])[0][0]
        return ids

    def _draw_alone(self, text: _Text) -> np.ndarray:
        """Draw a text alone from now on. Returns (V,), the logits as if it had been alone from its first token on."""
        next_logits = text.alone = NextLogits(self._model, self._window, self._threads)
        n = len(text.ids)
        for length in range(n if next_logits.forgets(n) else text.n_context, n):
            next_logits({0: text.ids[:length]})
        return next_logits({0: text.ids})[0]
