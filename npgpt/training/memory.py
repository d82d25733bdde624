"""How much memory training on a CPU takes, and which setting to lower if it is too much. Estimates; nothing is measured."""

from __future__ import annotations

import dataclasses

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig, TrainConfig
from npgpt.kernels.cpu import QUERY_BLOCK
from npgpt.parallel.limits import memory_limit
from npgpt.parallel.step import micro_batches
from npgpt.parallel.workers import Workers


def estimate_memory(model: GPTConfig, config: TrainConfig) -> int:
    """An estimate of the memory that training takes at its peak on a CPU, in bytes, without Python itself and the text.

    It counts, in float32: the weights, the optimiser's two means, and the gradients of each worker; for each worker's
    micro-batch, the arrays that each operation saves for the backward pass; and the temporary arrays of the largest operation.
    These are the arrays of the kernels in NumPy. The kernels in C take less.
    """
    c, d_ff, v = model.n_embd, model.d_ff, model.vocab_size
    assert d_ff is not None  # GPTConfig fills it in
    rows, workers = _rows_at_once(model, config)
    masks = 1 if model.dropout > 0 else 0
    # For each token and block: the normalised x and the output of both layer norms, qkv, the output of attention, the residual
    # masks; the output of fc, and GELU's slope and output; the exponentials of attention up to the diagonal, with and without
    # dropout.
    attention = model.n_head * (model.block_size + QUERY_BLOCK) / 2 * (1 + masks)
    turned = 2 * c if model.position == "rotary" else 0
    kept = model.n_layer * (8 * c + turned + 2 * masks * c + 3 * d_ff + attention) + (2 + masks) * c + 2 * v
    temporaries = max(3 * d_ff, 2 * model.n_head * model.block_size, 4 * v)
    return int(4 * ((3 + workers) * model.num_parameters() + workers * rows * model.block_size * (kept + temporaries)))


def check_memory(model: GPTConfig, config: TrainConfig, processes: int = 1) -> None:
    """Raise RequestError if training needs more memory than this process may take. If that is unknown, nothing is checked.

    processes: how many such processes share this machine.

    Operating systems promise more memory than there is, and kill the process when it uses too much.
    """
    limit = memory_limit(processes)
    if limit is not None and estimate_memory(model, config) > limit.value:
        raise RequestError(f"{limit.source}, but {memory_advice(model, config)}")


def memory_advice(model: GPTConfig, config: TrainConfig) -> str:
    """How much memory the run needs, and which setting to lower first, in one sentence."""
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
    """(sequences in a micro-batch, number of workers that are busy at the same time)."""
    pieces = micro_batches(config.batch_size, model.block_size, config.micro_batch)
    return pieces[-1].stop - pieces[-1].start, min(len(pieces), Workers(config.threads).threads)
