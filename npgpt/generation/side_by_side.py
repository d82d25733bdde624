"""Texts that are drawn side by side: each gets one token in a step. Texts may join and leave between two steps.

Each text is what it would be alone, to the last token. The model computes all texts in one product, and a product with more
rows rounds differently, in the sixth digit of a logit. That could change a token only if its draw falls very close to the
boundary between two tokens. Then the logits are computed again for this text alone, from its prompt on. This happens
about once in ten thousand tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.engine.streams import Stream, generator
from npgpt.generation.decode import NextLogits
from npgpt.generation.sampling import likeliest_ids, log_probabilities, sample_ids
from npgpt.model.gpt import GPT

# The largest measured difference of a logit, alone and among others, is 5 roundings of the largest logit.
ROUNDINGS = 16


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
    settings: GenerateConfig  # without what has no influence on the choice of an id
    rng: np.random.Generator = field(repr=False)
    n_likeliest: int
    was_among_others: bool = False


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

        entropy: the seed. sample: its number among the samples with this seed. n_likeliest: how many of the likeliest tokens
        each of its tokens tells.

        Raises RequestError for an empty context, or an id outside the vocabulary.
        """
        context = [int(i) for i in context_ids]
        if not context:
            raise RequestError("the context must have at least one token, got none")
        vocab_size = self._model.config.vocab_size
        if not all(0 <= i < vocab_size for i in context):
            raise RequestError(f"context ids must lie in 0..{vocab_size - 1}, got {min(context)}..{max(context)}")
        # Texts with equal settings are sampled in one call.
        settings = dataclasses.replace(settings, seed=None, max_new_tokens=0, num_samples=1)
        self._texts[key] = _Text(context, len(context), settings, generator(entropy, Stream.SAMPLE, sample), n_likeliest)

    def remove(self, key: int) -> None:
        """Remove a text. The others go on as if it had never been there."""
        del self._texts[key]

    def step(self) -> list[Token]:
        """Draw one token for each text. The number of a token's sample is the key of its text.

        Raises FloatingPointError if the logits are not finite.
        """
        logits = self._next_logits({key: text.ids for key, text in self._texts.items()})[:, : self._vocab_size]
        groups: dict[GenerateConfig, list[int]] = {}
        texts = list(self._texts.values())
        for row, text in enumerate(texts):
            groups.setdefault(text.settings, []).append(row)
        for text in texts:
            text.was_among_others |= len(texts) > 1
        ids = np.zeros(len(texts), dtype=np.int64)
        for settings, rows in groups.items():
            draws, own = [texts[row].rng.random() for row in rows], logits[rows]
            tolerance = None
            if any(texts[row].was_among_others for row in rows):
                tolerance = ROUNDINGS * np.finfo(np.float32).eps * np.abs(own).max(axis=1)
            ids[rows], is_close = sample_ids(own, settings, draws, [texts[row].ids for row in rows], tolerance)
            for i in np.flatnonzero(is_close).tolist():
                text = texts[rows[i]]
                alone = self._logits_alone(text)[None, : self._vocab_size]
                ids[rows[i]] = sample_ids(alone, settings, draws[i : i + 1], [text.ids])[0][0]
        for text, new_id in zip(texts, ids.tolist(), strict=True):
            text.ids.append(new_id)
        logprobs = log_probabilities(logits, ids)
        likeliest = [likeliest_ids(row, text.n_likeliest) for row, text in zip(logits, texts, strict=True)]
        return list(map(Token, self._texts, ids.tolist(), logprobs.tolist(), likeliest))

    def _logits_alone(self, text: _Text) -> np.ndarray:
        """(V,): the logits of the next token as they would be if this text had been alone from its first token on."""
        next_logits = NextLogits(self._model, self._window, self._threads)
        n = len(text.ids)
        first = n if next_logits.forgets(n) else text.n_context
        for length in range(first, n):
            next_logits({0: text.ids[:length]})
        return next_logits({0: text.ids})[0]
