"""The loss on held-out text past block_size, for each setting of `--window`.

    python past_window.py model.npz data/tinyshakespeare.txt

Some long spans of the held-out text are read token by token, as generation does. Each token past the first block_size ones is
predicted. The settings see the same tokens, so their losses differ only by what a window keeps. This is not a test.
"""

import argparse
import math
import time

import numpy as np

import npgpt
from npgpt.generation.decode import NextLogits
from npgpt.text.dataset import length_to_train_on
from npgpt.text.reading import read_ids


def losses_past_the_window(model, spans, window):
    """(losses (spans, tokens past block_size) in nats, tokens per second)."""
    first, n = model.config.block_size, spans.shape[1]
    next_logits, losses, started = NextLogits(model, window, threads=1), [], time.perf_counter()
    for at in range(first, n):
        logits = next_logits({k: span[:at].tolist() for k, span in enumerate(spans)})
        logits -= logits.max(axis=1, keepdims=True)
        log_total = np.log(np.exp(logits).sum(axis=1))
        losses.append(log_total - logits[np.arange(len(spans)), spans[:, at]])
    return np.array(losses).T, len(spans) * (n - first) / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("text", help="the text that the model was trained on")
    parser.add_argument("--spans", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="tokens past block_size in each span")
    args = parser.parse_args()
    checkpoint = npgpt.load(args.ckpt)
    model = checkpoint.model
    _, ids = read_ids(args.text, checkpoint.tokenizer)
    held_out = ids[length_to_train_on(len(ids), checkpoint.train_config.val_fraction) :].astype(np.int64)
    length = model.config.block_size + args.tokens
    starts = np.linspace(0, len(held_out) - length, args.spans).astype(int)
    spans = np.stack([held_out[start : start + length] for start in starts])
    for window in ("exact", "half", *(["slide"] if model.config.position == "rotary" else [])):
        losses, speed = losses_past_the_window(model, spans, window)
        means = losses.mean(axis=1)
        stderr = means.std(ddof=1) / math.sqrt(len(means))
        print(f"{window:6} loss {means.mean():.4f} ± {stderr:.4f}, {speed:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
