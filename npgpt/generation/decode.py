"""The logits of the next token. The choice of the token is in sampling.py.

While a text fits into block_size, a KV cache holds the keys and values, so the model computes only one position for each
new token. Past block_size, the setting `window` says what happens:

    exact    each token is computed from the last block_size tokens, without a cache
    half     when the window is full, the older half of it is dropped, and the cache starts again with the rest
    slide    the new token takes the place of the oldest one in the cache

Learned positions do not allow `slide`: when the oldest token leaves, every other token gets a new position, and every key
changes. With rotary positions a key stays as it is, because only the distance to the query matters. Each position then attends
to the last block_size positions. A kept key has been computed from tokens before it. So a token also depends on older tokens,
indirectly: with L blocks on up to L * (block_size - 1) tokens before it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.engine.graph import no_grad
from npgpt.model.gpt import GPT
from npgpt.parallel.limits import available_cores
from npgpt.parallel.machine import blas_threads


def window_for(model: GPT, window: str | None) -> str:
    """The window that is used if the settings say `window`. Raises RequestError for "slide" with learned positions."""
    rotary = model.config.position == "rotary"
    if window == "slide" and not rotary:
        raise RequestError("window slide needs a model with rotary positions, this one's are learned; use exact or half")
    return window or ("slide" if rotary else "exact")


def check_finite(logits: np.ndarray) -> None:
    """Raise FloatingPointError if a logit is not finite."""
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite: its weights are damaged, or training diverged")


class NextLogits:
    """The logits of the next token of each of some texts. Call it again each time all texts have grown by one token.

    From one call to the next, texts may join, and others may be left out.
    """

    def __init__(self, model: GPT, window: str | None, threads: int) -> None:
        """window: "exact", "half", "slide" or None; see GenerateConfig. threads: at most one for each core is used.

        Raises RequestError for "slide" with learned positions.
        """
        self._model, self._window = model, window_for(model, window)
        self._threads = min(threads, available_cores())  # threads that wait for a core make each other many times slower
        self._cache = model.new_cache(0)
        self._in_cache: list[int] = []  # the key of the text that each row of the cache belongs to

    @no_grad()
    def __call__(self, texts: Mapping[int, list[int]]) -> np.ndarray:
        """texts: B lists of ids, each under a key that stays the same -> (B, V), float64.

        On a GPU, all texts must have one length. Raises FloatingPointError if the logits are not finite.
        """
        model = self._model
        logits = np.empty((len(texts), model.config.vocab_size))
        row_of = {key: row for row, key in enumerate(texts)}
        self._remove_from_cache(texts)
        with blas_threads(self._threads), np.errstate(over="ignore", invalid="ignore"):  # checked below
            starting: dict[int, list[int]] = {}  # by the length of the window
            for key, ids in texts.items():
                if key not in self._in_cache:
                    starting.setdefault(self._window_length(ids), []).append(key)
            if self._in_cache:
                newest = np.array([texts[key][-1:] for key in self._in_cache])
                if model.backend.is_cpu:
                    decoded = model.decode(newest[:, 0], self._cache)
                else:
                    decoded = model(newest, cache=self._cache)[0].numpy()[:, 0]
                logits[[row_of[key] for key in self._in_cache]] = decoded
            for length, keys in starting.items():
                logits[[row_of[key] for key in keys]] = self._start({key: texts[key] for key in keys}, length)
        check_finite(logits)
        return logits

    def forgets(self, n: int) -> bool:
        """Whether the next token after `n` tokens is computed from the window alone, without what was computed before."""
        return self._window == "exact" and n > self._model.config.block_size

    def _remove_from_cache(self, texts: Mapping[int, list[int]]) -> None:
        """Remove texts that are left out, and texts that fill their window, unless it slides."""
        room = self._model.config.block_size
        for row in reversed(range(len(self._in_cache))):
            full = self._cache.lengths[row] >= room and self._window != "slide"
            if full or self._in_cache[row] not in texts:
                self._cache.remove(row)
                self._in_cache[row] = self._in_cache[-1]
                self._in_cache.pop()

    def _window_length(self, ids: list[int]) -> int:
        """How many of the last ids a text that is not in the cache is computed from."""
        block_size = self._model.config.block_size
        past_window = len(ids) > block_size
        return max(1, block_size // 2) if past_window and self._window == "half" else min(len(ids), block_size)

    def _start(self, texts: dict[int, list[int]], length: int) -> np.ndarray:
        """Compute the logits from whole windows, and add them to the cache if a later token can use them."""
        model = self._model
        windows = [ids[-length:] for ids in texts.values()]
        same = all(ids == windows[0] for ids in windows)  # at first, when each text is the prompt
        if same:
            windows = windows[:1]
        rows = [0] * len(texts) if same else list(range(len(texts)))
        cache = None if self.forgets(max(map(len, texts.values()))) else model.new_cache(len(windows), length)
        logits, _ = model(np.array(windows), cache=cache, last_only=True)
        if cache:
            self._cache.append(cache, rows)
            self._in_cache += texts
        return logits.numpy()[rows, 0]
