"""The inside of a model on one page: how it reads one text. What is shown is computed in model/inside.py.

`inside_data` packs the numbers for the browser; assets/inside.js draws them, here and on the server's page. Attention has
one byte for each weight, and logits are sent for the likeliest ids; so a page stays below a few megabytes.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from npgpt.generation.decode import check_finite
from npgpt.generation.sampling import log_probabilities
from npgpt.model.gpt import GPT
from npgpt.model.inside import inside
from npgpt.report.page import data_script, document, tag, visible_controls
from npgpt.text.tokenizer import Tokenizer

SCRIPTS = ("inside.js", "inside_start.js")
MOST_WEIGHTS = 1_500_000  # of attention on a page; with more, only the last tokens are shown
MOST_LOGITS = 256  # of each position, the largest; the others are counted in bins
TAIL_STEP = 0.25  # the width of a bin
IN_LENS = 5  # likeliest tokens of each layer
LONGEST_TOKEN = 60  # characters of a token that are shown


def inside_page(name: str, model: GPT, tokenizer: Tokenizer, prompt: str) -> str:
    """The page as HTML. name: of the checkpoint. Raises RequestError for a prompt that the tokenizer does not know."""
    data = inside_data(model, tokenizer, prompt)
    body = tag(
        "main",
        tag("h1", f"Inside {name}"),
        tag("div", id="inside"),
        tag("noscript", tag("p", "This page needs JavaScript.")),
        data_script("inside-data", data),
    )
    return document(f"Inside {name}", [body], SCRIPTS)


def inside_data(model: GPT, tokenizer: Tokenizer, prompt: str) -> dict[str, Any]:
    """What assets/inside.js draws, as values for JSON. Only the last block_size tokens of the prompt are read.

    Raises RequestError for a prompt that the tokenizer does not know, and FloatingPointError if the logits are not finite.
    """
    given, config = tokenizer.encode(prompt) if prompt else tokenizer.start_ids, model.config
    ids = np.asarray(given)[-config.block_size :]
    found = inside(model, ids)
    most = math.isqrt(2 * MOST_WEIGHTS // (config.n_layer * config.n_head))
    first = max(0, len(ids) - max(8, most))  # the first token that is shown
    shown = slice(first, None)
    layers = []
    for n in range(config.n_layer + 1):
        logits = found.logits_of(n, shown)[:, : tokenizer.vocab_size]
        check_finite(logits)
        layers.append(_likeliest(logits))
    # `logits` are those of the last layer now. What the first token that is shown had is said by the position before it.
    start = max(0, first - 1)
    before = found.logits_of(config.n_layer, slice(start, len(ids) - 1))[:, : tokenizer.vocab_size].astype(np.float64)
    bits = -log_probabilities(before, ids[start + 1 :]) / math.log(2) if len(before) else np.zeros(0)
    top_ids, top_logits, tails = _largest(logits)
    lens_ids, lens_p = (np.stack(each) for each in zip(*layers, strict=True))
    attention = np.concatenate([_triangles(found.attention_of(n)[:, shown, shown]) for n in range(config.n_layer)])
    used = sorted({*ids[shown].tolist(), *np.unique(top_ids).tolist(), *np.unique(lens_ids).tolist()})
    return {
        "tokens": ids[shown].tolist(),
        "text": {i: shown_token(tokenizer, i) for i in used},
        "surprisal": [*([None] if first == 0 else []), *np.round(bits, 3).tolist()],
        "nGiven": len(given),
        "nRead": len(ids),
        "nLayer": config.n_layer,
        "nHead": config.n_head,
        "vocabSize": tokenizer.vocab_size,
        "topIds": _packed(top_ids.astype("<u4")),
        "topLogits": _packed(top_logits.astype("<f4")),
        "nTop": top_ids.shape[1],
        "tails": tails,
        "lensIds": _packed(lens_ids.astype("<u4")),
        "lensP": _packed(np.rint(lens_p * 255).astype(np.uint8)),
        "nLens": lens_ids.shape[2],
        "attention": _packed(attention),
    }


def shown_token(tokenizer: Tokenizer, i: int) -> str:
    """A token as text that can be read. Bytes that are not valid UTF-8 become hexadecimal numbers. A long token is cut off."""
    raw = tokenizer.token_bytes(i)
    try:
        text = visible_controls(raw.decode("utf-8"))
    except UnicodeDecodeError:
        text = "".join(f"<{byte:02X}>" for byte in raw)
    return text if len(text) <= LONGEST_TOKEN else text[:LONGEST_TOKEN] + "…"


def _largest(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[list[tuple[float, int]]]]:
    """logits (T, V) -> the ids and values of the largest, (T, n) each, in descending order; and for each position, the other
    logits, counted in steps of TAIL_STEP, as (logit, number)."""
    ids = _top(logits, MOST_LOGITS)
    rest = logits.copy()
    np.put_along_axis(rest, ids, np.nan, axis=1)
    tails = []
    for row in rest:
        steps, counts = np.unique(np.rint(row[~np.isnan(row)] / TAIL_STEP), return_counts=True)
        tails.append(list(zip((steps * TAIL_STEP).tolist(), counts.tolist(), strict=True)))
    return ids, np.take_along_axis(logits, ids, axis=1), tails


def _likeliest(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """logits (T, V) -> the likeliest ids of the logit lens and their probabilities, (T, n) each."""
    ids = _top(logits, IN_LENS)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return ids, np.take_along_axis(p, ids, axis=1) / p.sum(axis=1, keepdims=True)


def _top(logits: np.ndarray, n: int) -> np.ndarray:
    """(T, V) -> the ids of the n largest logits, (T, n), in descending order."""
    n = min(n, logits.shape[1])
    ids = np.argpartition(-logits, n - 1, axis=1)[:, :n]
    order = np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)


def _triangles(attention: np.ndarray) -> np.ndarray:
    """attention (H, T, T) -> the lower triangles, row by row, as bytes. A byte b stands for the weight (b / 255)^2, so that
    small weights are told apart."""
    rows, columns = np.tril_indices(attention.shape[-1])
    return np.rint(255 * np.sqrt(attention[:, rows, columns])).astype(np.uint8)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
