"""How well a model predicts a text: the exact loss over every token of it, not over a random sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from npgpt import ops
from npgpt.config import RequestError
from npgpt.data import windows
from npgpt.gpt import GPT
from npgpt.tensor import no_grad

TOKENS_AT_ONCE = 4096  # bounds the memory of an evaluation


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy in nats per token over `n_targets` tokens.

    `stderr` is its standard error over windows (how far another text of this kind and length may be from
    this one); None when there is one window only.
    """

    loss: float
    stderr: float | None
    n_targets: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)


@no_grad()
def evaluate(model: GPT, ids: np.ndarray) -> Loss:
    """The mean over every token but the first, each predicted once, in side-by-side windows of block_size
    (the last one shorter). The same ids and weights give the same number.

    Raises RequestError when there are fewer than two ids.
    """
    if len(ids) < 2:
        raise RequestError(f"evaluation needs at least 2 tokens, got {len(ids)}")
    block_size = model.config.block_size
    sums, sizes = [], []
    for x, y in windows(ids, block_size, max(1, TOKENS_AT_ONCE // block_size)):
        logits, _ = model(x)
        losses = ops.cross_entropy(logits, model.backend.asarray(y), reduction="none").numpy()
        sums.append(losses.sum(axis=1, dtype=np.float64))
        sizes.append(np.full(len(x), x.shape[1]))
    window_sums, window_sizes = np.concatenate(sums), np.concatenate(sizes)
    n_targets, n_windows = int(window_sizes.sum()), len(window_sums)
    loss = float(window_sums.sum() / n_targets)
    stderr = None
    if n_windows > 1:  # of a ratio of sums: with equal windows, the usual deviation / sqrt(n)
        residuals = window_sums - loss * window_sizes
        stderr = float(np.sqrt(n_windows / (n_windows - 1) * np.sum(residuals**2)) / n_targets)
    return Loss(loss, stderr, n_targets)
