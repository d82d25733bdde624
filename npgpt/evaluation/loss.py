"""How well a model predicts a text: the exact loss over every token, not over random batches. No training."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.engine import ops
from npgpt.engine.graph import no_grad
from npgpt.model.gpt import GPT
from npgpt.parallel.workers import Mapper, Workers
from npgpt.text.dataset import window_starts, windows_at
from npgpt.text.tokenizer import Tokenizer, text_size

TOKENS_AT_ONCE_CPU = 1024  # tokens that one worker evaluates at a time
TOKENS_AT_ONCE_GPU = 16_384  # the same on a GPU, which is one worker


@dataclass(frozen=True)
class Loss:
    """The mean cross-entropy over `n_targets` tokens, in nats per token.

    `stderr` is its standard error, computed from the differences between windows. It says how far the loss on another text
    of this kind and length may be from this one. It is None if there is only one window.

    n_characters and n_bytes: the size of the predicted text, in UTF-8; None if no tokenizer was given. Bits per character and
    per byte compare models with different tokenizers.
    """

    loss: float
    stderr: float | None
    n_targets: int
    n_characters: int | None = None
    n_bytes: int | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def bits_per_character(self) -> float | None:
        return self.bits_per_token * self.n_targets / self.n_characters if self.n_characters else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.bits_per_token * self.n_targets / self.n_bytes if self.n_bytes else None


def evaluate(
    model: GPT,
    ids: np.ndarray,
    workers: Mapper | None = None,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Loss:
    """The loss of a model on a text, `ids` (n,).

    Every token but the first is predicted once, in windows of block_size side by side; the last window may be shorter. The
    same ids and weights give the same number, whatever the workers.

    workers: Workers, or what else spreads the windows over threads. None: start new ones, and end them.
    max_tokens: for a longer text, evaluate only this many tokens, in windows that are spread evenly.
    tokenizer: to know how many characters and bytes the predicted tokens have.

    Raises RequestError for fewer than two ids.
    """
    loss = mean_over(*window_losses(model, ids, workers, max_tokens))
    if tokenizer is None:
        return loss
    predicted = np.asarray(ids)[1:]
    if loss.n_targets < len(predicted):
        starts = window_starts(len(ids), model.config.block_size, max_tokens)
        predicted = windows_at(np.asarray(ids), starts, model.config.block_size)[1].reshape(-1)
    n_characters, n_bytes = text_size(tokenizer, predicted)
    return dataclasses.replace(loss, n_characters=n_characters, n_bytes=n_bytes)


def mean_over(sums: np.ndarray, sizes: np.ndarray) -> Loss:
    """The loss from the summed loss and the number of tokens of each window."""
    n, n_targets = len(sums), int(sizes.sum())
    loss = float(sums.sum() / n_targets)
    if n == 1:
        return Loss(loss, None, n_targets)
    # The standard error of a ratio of sums. With equal windows it is the usual standard deviation / sqrt(n).
    return Loss(loss, float(np.sqrt(n / (n - 1) * np.sum((sums - loss * sizes) ** 2)) / n_targets), n_targets)


def window_losses(model: GPT, ids: np.ndarray, workers: Mapper | None, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(the summed loss of each window, the number of tokens of each window)."""
    ids = np.asarray(ids)
    if len(ids) < 2:
        raise RequestError(f"evaluation needs at least 2 tokens, got {len(ids)}")
    block_size = model.config.block_size
    if max_tokens is not None and max_tokens >= len(ids) - 1:
        max_tokens = None
    starts = window_starts(len(ids), block_size, max_tokens)

    def losses(starts: np.ndarray, size: int = block_size) -> np.ndarray:
        x, y = windows_at(ids, starts, size)
        with no_grad(), np.errstate(over="ignore", invalid="ignore"):  # the caller checks for a loss that is not finite
            logits, _ = model(x)
            each = ops.cross_entropy(logits, y, reduction="none").numpy()
        return each.sum(axis=1, dtype=np.float64)

    on_cpu = model.backend.is_cpu
    rows = max(1, (TOKENS_AT_ONCE_CPU if on_cpu else TOKENS_AT_ONCE_GPU) // block_size)
    window_sizes = np.full(len(starts), block_size)
    with contextlib.nullcontext(workers) if workers else Workers(None if on_cpu else 1) as threads:
        sums = threads.map(losses, [starts[i : i + rows] for i in range(0, len(starts), rows)])
    rest = (len(ids) - 1) % block_size
    if rest and (max_tokens is None or not sums):
        sums.append(losses(np.array([len(ids) - 1 - rest]), rest))
        window_sizes = np.append(window_sizes, rest)
    return np.concatenate(sums), window_sizes
