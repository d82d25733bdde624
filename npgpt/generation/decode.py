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

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.engine.graph import no_grad
from npgpt.model.cache import KVCache
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import blas_threads


def window_for(model: GPT, window: str | None) -> str:
    """The window that is used if the settings say `window`. Raises RequestError for "slide" with learned positions."""
    rotary = model.config.position == "rotary"
    if window == "slide" and not rotary:
        raise RequestError("window slide needs a model with rotary positions, this one's are learned; use exact or half")
    return window or ("slide" if rotary else "exact")


class NextLogits:
    """The logits of the next token of each of some texts. Call it again each time all texts have grown by one token."""

    def __init__(self, model: GPT, window: str | None, threads: int) -> None:
        """window: "exact", "half", "slide" or None; see GenerateConfig. threads: the number of BLAS threads.

        Raises RequestError for "slide" with learned positions.
        """
        self._model, self._window, self._threads = model, window_for(model, window), threads
        self._cache: KVCache | None = None

    def select(self, rows: list[int]) -> None:
        """Go on with these texts only, given by their numbers."""
        if self._cache:
            self._cache.select(rows)

    @no_grad()
    def __call__(self, texts: list[list[int]]) -> np.ndarray:
        """texts: B lists of ids, all of the same length -> (B, V), float64.

        Raises FloatingPointError if the logits are not finite.
        """
        model = self._model
        with blas_threads(self._threads), np.errstate(over="ignore", invalid="ignore"):  # checked below
            full = self._cache is not None and self._cache.length >= model.config.block_size and self._window != "slide"
            if self._cache is None or full:
                logits = self._start(texts)
            elif model.backend.is_cpu:
                logits = model.decode(np.array([ids[-1] for ids in texts]), self._cache, self._threads)
            else:
                logits = model(np.array([ids[-1:] for ids in texts]), cache=self._cache)[0].numpy()[:, 0]
        logits = logits.astype(np.float64)
        if not np.isfinite(logits).all():
            raise FloatingPointError("the model's logits are not finite: its weights are damaged, or training diverged")
        return logits

    def _start(self, texts: list[list[int]]) -> np.ndarray:
        """Compute the logits from a whole window, and fill a new cache with it if a later token can use it."""
        model, block_size = self._model, self._model.config.block_size
        past_window = len(texts[0]) > block_size
        length = max(1, block_size // 2) if past_window and self._window == "half" else block_size
        windows = [ids[-length:] for ids in texts]
        same = all(ids == windows[0] for ids in windows)  # at first, when each text is the prompt
        if same:
            windows = windows[:1]
        self._cache = None if past_window and self._window == "exact" else model.new_cache(len(windows))
        logits, _ = model(np.array(windows), cache=self._cache, last_only=True)
        rows = [0] * len(texts) if same else list(range(len(texts)))
        if self._cache and same:
            self._cache.select(rows)
        return logits.numpy()[rows, 0]
