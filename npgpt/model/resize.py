"""A model with the weights of another one that has a different vocabulary or context length. Nothing is trained here."""

from __future__ import annotations

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig
from npgpt.engine.backend import CPU, Backend, to_numpy
from npgpt.model.gpt import GPT

MAY_DIFFER = ("vocab_size", "block_size", "dropout")


def resized(model: GPT, config: GPTConfig, n_known: int, seed: int, backend: Backend = CPU) -> GPT:
    """A model of shape `config` with the weights of `model`.

    n_known: how many ids of `model` keep their rows. The rows of all other ids are random, drawn with this seed. Learned
    positions past the end of a shorter block_size are left out.

    Raises RequestError if `config` differs in more than vocab_size, block_size and dropout, or has more learned positions than
    `model`.
    """
    check_resizable(model.config, config)
    new, old = GPT(config, seed=seed, backend=backend), dict(model.named_parameters())
    n_known = min(n_known, model.config.vocab_size, config.vocab_size)
    for name, p in new.named_parameters():
        rows = slice(n_known if name == "wte.weight" else None)
        columns = slice(n_known if name == "lm_head.weight" else None)
        if name == "wpe.weight":
            rows = slice(config.block_size)
        kept = (rows, columns)[: p.ndim]
        p.data[kept] = backend.asarray(to_numpy(old[name].data)[kept], dtype=p.dtype)
    return new


def check_resizable(before: GPTConfig, after: GPTConfig) -> None:
    """Raise RequestError if a model of shape `before` cannot become one of shape `after`."""
    differing = [name for name, value in vars(before).items() if vars(after)[name] != value and name not in MAY_DIFFER]
    if differing:
        shown = ", ".join(f"{name} was {vars(before)[name]} and is now {vars(after)[name]}" for name in differing)
        raise RequestError(f"a trained model keeps its shape: {shown}; only block_size and dropout may change")
    if before.position == "learned" and after.block_size > before.block_size:
        raise RequestError(
            f"the model has learned {before.block_size} positions, so block_size cannot be {after.block_size}; use at most "
            f"{before.block_size}"
        )
