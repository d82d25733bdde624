"""How well a model predicts a text: the exact loss over every token of it, not over a random sample."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np

from npgpt import ops
from npgpt.config import RequestError
from npgpt.data import window_starts, windows_at
from npgpt.gpt import GPT
from npgpt.parallel import Workers
from npgpt.tensor import no_grad

TOKENS_AT_ONCE = 1024  # what a worker evaluates at a time


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
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)


def evaluate(model: GPT, ids: np.ndarray, workers: Workers | None = None, max_tokens: int | None = None) -> Loss:
    """The mean over every token but the first, each predicted once, in side-by-side windows of block_size
    (the last one shorter); or over evenly spread windows of `max_tokens` tokens, for a quick look at a text
    that has more. The same ids and weights give the same number, whatever the workers.

    workers: threads already at work, to spread the windows over; None starts and ends its own. Raises
    RequestError when there are fewer than two ids.
    """
    ids = np.asarray(ids)
    if len(ids) < 2:
        raise RequestError(f"evaluation needs at least 2 tokens, got {len(ids)}")
    block_size = model.config.block_size
    if max_tokens is not None and max_tokens >= len(ids) - 1:
        max_tokens = None
    starts = window_starts(len(ids), block_size, max_tokens)

    def losses(starts: np.ndarray, size: int = block_size) -> np.ndarray:
        """The sum of the losses of each window."""
        x, y = windows_at(ids, starts, size)
        with no_grad(), np.errstate(over="ignore", invalid="ignore"):  # a loss that is no number says it itself
            logits, _ = model(x)
        each = ops.cross_entropy(logits.detach(), model.backend.asarray(y), reduction="none").numpy()
        return each.sum(axis=1, dtype=np.float64)

    rows = max(1, TOKENS_AT_ONCE // block_size)
    window_sizes = np.full(len(starts), block_size)
    with contextlib.nullcontext(workers) if workers else Workers() as crew:
        sums = crew.map(losses, [starts[i : i + rows] for i in range(0, len(starts), rows)])
    rest = (len(ids) - 1) % block_size
    if rest and (max_tokens is None or not sums):
        sums.append(losses(np.array([len(ids) - 1 - rest]), rest))
        window_sizes = np.append(window_sizes, rest)
    window_sums = np.concatenate(sums)
    n_targets, n_windows = int(window_sizes.sum()), len(window_sums)
    loss = float(window_sums.sum() / n_targets)
    stderr = None
    if n_windows > 1:  # of a ratio of sums: with equal windows, the usual deviation / sqrt(n)
        residuals = window_sums - loss * window_sizes
        stderr = float(np.sqrt(n_windows / (n_windows - 1) * np.sum(residuals**2)) / n_targets)
    return Loss(loss, stderr, n_targets)
