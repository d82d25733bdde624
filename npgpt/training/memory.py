"""How much memory training takes, how much there is, and what to lower when that is less. Estimates for a CPU; nothing is
measured here."""

from __future__ import annotations

import dataclasses
import os

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig, TrainConfig
from npgpt.kernels.cpu import QUERY_BLOCK
from npgpt.parallel.step import micro_batches
from npgpt.parallel.workers import Workers


def estimate_memory(model: GPTConfig, config: TrainConfig) -> int:
    """Roughly how many bytes training takes at its peak on a CPU, beyond Python itself and the text.

    Weights, the two AdamW means, and gradients for each worker; the arrays that the forward pass of each
    worker's micro-batch keeps for the way back, counted operation by operation, in float32; and the
    temporaries of the largest operation.
    """
    c, d_ff, v = model.n_embd, model.d_ff, model.vocab_size
    assert d_ff is not None  # filled in by GPTConfig
    rows, workers = _rows_at_once(model, config)
    per_block = 12 * c + 2 * d_ff  # biases and norms
    parameters = (2 * v + model.block_size) * c + model.n_layer * (c * (4 * c + 2 * d_ff) + per_block)
    masks = 1 if model.dropout > 0 else 0
    # Per token and block: inputs of layer norms, qkv, attention output, residual masks; fc's output and
    # GELU's slope and output; the attention's exponentials up to the diagonal, with and without dropout.
    attention = model.n_head * (model.block_size + QUERY_BLOCK) / 2 * (1 + masks)
    kept = model.n_layer * (8 * c + 2 * masks * c + 3 * d_ff + attention) + (2 + masks) * c + 2 * v
    temporaries = max(3 * d_ff, 2 * model.n_head * model.block_size, 4 * v)
    return int(4 * ((3 + workers) * parameters + workers * rows * model.block_size * (kept + temporaries)))


def check_memory(model: GPTConfig, config: TrainConfig) -> None:
    """Raises RequestError when training would take more memory than the machine has, where that is known: systems promise
    more than they have, and end the process when it comes to use it."""
    have = physical_memory()
    if have is not None and estimate_memory(model, config) > have:
        raise RequestError(f"this machine has {have / 2**30:.1f} GiB of memory, {memory_advice(model, config)}")


def memory_advice(model: GPTConfig, config: TrainConfig) -> str:
    """Which setting to lower, and what that would save."""
    need = estimate_memory(model, config)
    text = f"this run needs roughly {need / 2**30:.1f} GiB"
    rows, workers = _rows_at_once(model, config)
    for flag, value, smaller in [
        ("--micro-batch", rows, dataclasses.replace(config, micro_batch=max(1, rows // 2))),
        ("--threads", workers, dataclasses.replace(config, threads=1)),
    ]:
        less = estimate_memory(model, smaller)
        if value > 1 and less < 0.7 * need:
            new = max(1, rows // 2) if flag == "--micro-batch" else 1
            return f"{text}; lower {flag} first ({new} instead of {value}: {less / 2**30:.1f} GiB), then --n-embd or --n-layer"
    return f"{text}; lower --n-embd (now {model.n_embd}), --n-layer or --block-size"


def _rows_at_once(model: GPTConfig, config: TrainConfig) -> tuple[int, int]:
    """(sequences in a micro-batch, workers busy at the same time)."""
    pieces = micro_batches(config.batch_size, model.block_size, config.micro_batch)
    return pieces[-1].stop - pieces[-1].start, min(len(pieces), Workers(config.threads).threads)


def physical_memory() -> int | None:
    """Bytes of memory this machine has; None where the system does not tell."""
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not hasattr(os, "sysconf") or not set(names) <= os.sysconf_names.keys():
        return None
    return os.sysconf(names[0]) * os.sysconf(names[1])
