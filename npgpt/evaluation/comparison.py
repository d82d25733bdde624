"""The losses of several models on one text, side by side, and whether they differ. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.evaluation.loss import Loss, mean_over, window_losses
from npgpt.model.gpt import GPT
from npgpt.parallel.workers import Workers
from npgpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Difference:
    """How much higher the loss of one model is than that of another on the same text, in the same unit.

    Its standard error is far smaller than those of the two losses, because text that is hard for one model is hard for the
    other too.
    """

    difference: float
    stderr: float | None


def compare(
    runs: Sequence[tuple[GPT, np.ndarray]], workers: Workers | None = None, tokenizers: Sequence[Tokenizer] | None = None
) -> list[tuple[Loss, Difference | None]]:
    """The loss of each model on one text, and its difference from the loss of the first model.

    runs: for each model, the model and the text as ids of its own tokenizer.
    tokenizers: of the models, if they cut the text into different tokens. The losses are then in nats per byte of UTF-8, and
    `n_targets` is the number of bytes that all models predict.

    Raises RequestError if the ids differ in length, or with tokenizers, if the texts differ in length.
    """
    if tokenizers is None:
        lengths = [np.ones(len(ids), dtype=np.int64) for _, ids in runs]
    else:
        lengths = [tokenizer.byte_lengths[ids] for (_, ids), tokenizer in zip(runs, tokenizers, strict=True)]
    ends = [np.cumsum(each) for each in lengths]  # the offset at which each token ends
    totals = [int(end[-1]) if len(end) else 0 for end in ends]
    if len(set(totals)) > 1:
        what = "number of ids" if tokenizers is None else "length in bytes"
        raise RequestError(f"the text must have the same {what} for every model, got {totals}")
    losses = [_cumulative(model, ids, workers) for model, ids in runs]
    # No model predicts its first token. Models with different block_size have different windows. All losses are added up over
    # spans of the longest window.
    first = max(int(end[0]) for end in ends)
    span = max(round(model.config.block_size * totals[0] / len(ids)) for model, ids in runs)
    edges = np.append(np.arange(first, totals[0], span), totals[0])
    sums = [np.diff(np.interp(edges, end, loss)) for end, loss in zip(ends, losses, strict=True)]
    results: list[tuple[Loss, Difference | None]] = []
    for own in sums:
        mean = mean_over(own - sums[0], np.diff(edges))
        difference = Difference(mean.loss, mean.stderr) if results else None
        results.append((mean_over(own, np.diff(edges)), difference))
    return results


def _cumulative(model: GPT, ids: np.ndarray, workers: Workers | None) -> np.ndarray:
    """(n,): the summed loss of the first n tokens. The loss of each window is spread over its tokens."""
    sums, sizes = window_losses(model, ids, workers, None)
    return np.cumsum(np.append(0.0, np.repeat(sums / sizes, sizes)))
