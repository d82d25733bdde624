"""How well a model predicts a text: the exact loss over every token of it, not over a random sample."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.engine import ops
from npgpt.engine.graph import no_grad
from npgpt.model.gpt import GPT
from npgpt.parallel.workers import Workers
from npgpt.text.dataset import window_starts, windows_at

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 16_384}  # what a worker evaluates at a time; a GPU is one worker


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
    return _mean_over(*_window_losses(model, ids, workers, max_tokens))


@dataclass(frozen=True)
class Difference:
    """How much higher the loss of one model is than another's on the same tokens, in nats per token, and the standard
    error of that: far smaller than those of the losses, since what is hard for one is hard for the other."""

    difference: float
    stderr: float | None


def compare(runs: Sequence[tuple[GPT, np.ndarray]], workers: Workers | None = None) -> list[tuple[Loss, Difference | None]]:
    """The loss of each model, and how it differs from the first one's, over spans of the longest of their windows. Each
    comes with the same text in ids of its own vocabulary. Raises RequestError when these differ in length."""
    if len({len(ids) for _, ids in runs}) > 1:
        raise RequestError(f"the same text must have as many ids for each model, got {[len(ids) for _, ids in runs]}")
    span, n = max(model.config.block_size for model, _ in runs), len(runs[0][1]) - 1
    starts = np.arange(0, n, span)
    sizes = np.diff(np.append(starts, n))
    results: list[tuple[Loss, Difference | None]] = []
    first = None
    for model, ids in runs:
        window_sums, window_sizes = _window_losses(model, ids, workers, None)
        # Each window's loss is spread over its tokens, and collected again in spans that all have.
        sums = np.add.reduceat(np.repeat(window_sums / window_sizes, window_sizes), starts)
        loss = _mean_over(sums, sizes)
        if first is None:
            first, difference = sums, None
        else:
            mean = _mean_over(sums - first, sizes)
            difference = Difference(mean.loss, mean.stderr)
        results.append((loss, difference))
    return results


def _mean_over(sums: np.ndarray, sizes: np.ndarray) -> Loss:
    """From the sum over each window, and its number of tokens."""
    n, n_targets = len(sums), int(sizes.sum())
    loss = float(sums.sum() / n_targets)
    if n == 1:
        return Loss(loss, None, n_targets)
    # Of a ratio of sums; with equal windows, the usual deviation / sqrt(n).
    return Loss(loss, float(np.sqrt(n / (n - 1) * np.sum((sums - loss * sizes) ** 2)) / n_targets), n_targets)


def _window_losses(
    model: GPT, ids: np.ndarray, workers: Workers | None, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The summed loss of each window, and its number of tokens."""
    ids = np.asarray(ids)
    if len(ids) < 2:
        raise RequestError(f"evaluation needs at least 2 tokens, got {len(ids)}")
    block_size = model.config.block_size
    if max_tokens is not None and max_tokens >= len(ids) - 1:
        max_tokens = None
    starts = window_starts(len(ids), block_size, max_tokens)

    def losses(starts: np.ndarray, size: int = block_size) -> np.ndarray:
        x, y = windows_at(ids, starts, size)
        with no_grad(), np.errstate(over="ignore", invalid="ignore"):  # a loss that is no number says it itself
            logits, _ = model(x)
            each = ops.cross_entropy(logits, y, reduction="none").numpy()
        return each.sum(axis=1, dtype=np.float64)

    device = model.backend.name
    rows = max(1, TOKENS_AT_ONCE[device] // block_size)
    window_sizes = np.full(len(starts), block_size)
    with contextlib.nullcontext(workers) if workers else Workers(None if device == "cpu" else 1) as crew:
        sums = crew.map(losses, [starts[i : i + rows] for i in range(0, len(starts), rows)])
    rest = (len(ids) - 1) % block_size
    if rest and (max_tokens is None or not sums):
        sums.append(losses(np.array([len(ids) - 1 - rest]), rest))
        window_sizes = np.append(window_sizes, rest)
    return np.concatenate(sums), window_sizes
