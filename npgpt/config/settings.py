"""Every setting in one place: its name, default, range and help text. No arrays, no files.

Three frozen dataclasses, for the model, for training and for generation. Each field says what it
accepts; making an object checks it, and the command line's flags are made from the same fields. So a
setting is written down once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


class RequestError(ValueError):
    """What was asked for cannot be done: the message says what was expected, what came and what to do."""


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with its range and its help text."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "choices": choices, "limits": {k: v for k, v in limits.items() if v is not None}}
    return field(default=default, metadata=metadata)


def required(help: str, **limits: Any) -> Any:
    """A field without a default."""
    return field(metadata=setting(None, help, **limits).metadata)


class Settings:
    """Base of the configurations: checks every field against its type and range when made."""

    def __post_init__(self) -> None:
        for f, kind, optional in _fields(type(self)):
            value = getattr(self, f.name)
            if not (optional and value is None):
                object.__setattr__(self, f.name, _checked(f, kind, value))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """The inverse of `dataclasses.asdict`. Raises RequestError for a name that is no setting."""
        unknown = sorted(set(values) - {f.name for f, _, _ in _fields(cls)}, key=str)
        if unknown:
            raise RequestError(f"{cls.__name__} has no setting {', '.join(repr(name)[:60] for name in unknown[:5])}")
        missing = [f.name for f, _, _ in _fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise RequestError(f"{cls.__name__} needs {', '.join(missing)}")
        return cls(**values)


@dataclass(frozen=True)
class GPTConfig(Settings):
    """The shape of a model: what a checkpoint must know to rebuild it."""

    vocab_size: int = required("number of different tokens", at_least=1)
    block_size: int = setting(128, "context length: the most tokens the model sees at once", at_least=1)
    n_layer: int = setting(4, "number of transformer blocks", at_least=1)
    n_head: int = setting(4, "attention heads in a block; must divide n_embd", at_least=1)
    n_embd: int = setting(256, "width of the model", at_least=1)
    d_ff: int | None = setting(None, "width inside the feed-forward network (default: 4 * n_embd)", at_least=1)
    dropout: float = setting(0.1, "probability of dropout, everywhere", at_least=0, below=1)
    activation: str = setting("gelu", "activation of the feed-forward network", choices=("gelu", "relu"))
    bias: bool = setting(True, "biases in linear layers and layer norms")
    tie_weights: bool = setting(False, "use the token embedding as the output layer too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise RequestError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and n_head={self.n_head}")
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.n_embd)

    def num_parameters(self) -> int:
        """The number of parameters of a model of this shape."""
        assert self.d_ff is not None  # filled in when made
        c, d_ff = self.n_embd, self.d_ff
        norm = c * (1 + self.bias)
        matrices, biases = c * 3 * c + c * c + 2 * c * d_ff, 3 * c + c + d_ff + c
        block = 2 * norm + matrices + self.bias * biases
        tables = (self.vocab_size * (1 if self.tie_weights else 2) + self.block_size) * c
        return tables + self.n_layer * block + norm


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How a model is trained."""

    steps: int = setting(1000, "optimiser steps in all", at_least=1)
    batch_size: int = setting(32, "windows of block_size tokens in a step", at_least=1, at_most=100_000)
    lr: float = setting(1e-3, "peak learning rate", above=0)
    min_lr: float | None = setting(None, "learning rate of the last step (default: lr / 10)", at_least=0)
    warmup_steps: int = setting(100, "steps over which the learning rate rises to its peak", at_least=0)
    schedule: str = setting("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    beta1: float = setting(0.9, "AdamW: decay of the mean of gradients", at_least=0, below=1)
    beta2: float = setting(0.99, "AdamW: decay of the mean of squared gradients", at_least=0, below=1)
    weight_decay: float = setting(0.1, "AdamW: weight decay, of matrices alone", at_least=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", at_least=0)
    eval_interval: int = setting(100, "steps between evaluations, each with a sample and a checkpoint", at_least=1)
    eval_tokens: int = setting(131_072, "held-out tokens an evaluation looks at, evenly spread; 0: all of them", at_least=0)
    patience: int = setting(5, "stop after this many evaluations without a better one; 0: never", at_least=0)
    log_interval: int = setting(10, "steps between lines of the log file", at_least=1)
    sample_tokens: int = setting(200, "length of the sample at each evaluation; 0: none", at_least=0)
    val_fraction: float = setting(0.1, "part of the text held out for validation", at_least=0, below=1)
    seed: int = setting(1337, "seed of weights, batches and dropout", at_least=0)
    threads: int | None = setting(None, "worker threads (default: every core this process may use)", at_least=1, at_most=1024)
    processes: bool | None = setting(
        None,
        "workers are processes and not threads: faster, most of all for small models (default: after ten steps, if more "
        "than ten seconds are to come)",
    )
    micro_batch: int | None = setting(None, "windows a worker takes at a time (default: about 1024 tokens)", at_least=1)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    tf32: bool = setting(False, "on a GPU: matrix products with 10 bits of mantissa instead of 23, several times as fast")
    bf16: bool = setting(False, "on a GPU: activations in bfloat16, half the memory and faster still; weights stay float32")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr is None:
            object.__setattr__(self, "min_lr", self.lr / 10)
        elif self.min_lr > self.lr:
            raise RequestError(f"min_lr must not be above lr, got min_lr={self.min_lr} and lr={self.lr}")


# Whole configurations by name; what they leave out has its default.
PRESETS: dict[str, dict[str, Any]] = {
    # Found by trying depths, widths, windows and rates for the least time to nanoGPT's CPU loss: with this little
    # training one block learns fastest, at a rate that more blocks would not bear.
    "quick": {
        "n_layer": 1,
        "n_embd": 128,
        "block_size": 64,
        "dropout": 0.0,
        "batch_size": 12,
        "steps": 1500,
        "lr": 6e-3,
        "min_lr": 0.0,
        "eval_interval": 500,
    },
    # nanoGPT's for a CPU and for a GPU (https://github.com/karpathy/nanoGPT, its README and config/train_shakespeare_char.py).
    "nano": {"n_embd": 128, "block_size": 64, "dropout": 0.0, "batch_size": 12, "steps": 2000, "eval_interval": 250},
    "char": {
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "block_size": 256,
        "dropout": 0.2,
        "batch_size": 64,
        "steps": 5000,
        "eval_interval": 250,
    },
}


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """How text is drawn from a model."""

    max_new_tokens: int = setting(500, "tokens to generate", at_least=0)
    temperature: float = setting(0.8, "below 1: safer, above 1: wilder; 0: always the likeliest token", at_least=0)
    top_k: int | None = setting(None, "draw from the k likeliest tokens alone", at_least=1)
    top_p: float | None = setting(
        None, "draw from the likeliest tokens that together have this probability", above=0, at_most=1
    )
    min_p: float | None = setting(
        None, "leave out tokens below this share of the likeliest one's probability", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(
        1.0, "above 1: what the text already has becomes less likely", at_least=0.01, at_most=100
    )
    window: str = setting(
        "exact",
        "past block_size tokens, look back on: exact, the last block_size of them; half, that many at most, of which half are "
        "forgotten whenever they are full, which is many times as fast",
        choices=("exact", "half"),
    )
    num_samples: int = setting(1, "texts to generate, side by side", at_least=1, at_most=10_000)
    threads: int = setting(
        1,
        "threads for the matrix products; more help a large model or many samples on an idle machine, and make it several "
        "times slower on a busy one",
        at_least=1,
        at_most=1024,
    )
    seed: int | None = setting(None, "the same seed draws the same text (default: a new one each time)", at_least=0)
    device: str = setting("cpu", "where to compute; a GPU pays for many samples", choices=("auto", "cpu", "cuda"))


# ---------------------------------------------------------------- command line


def add_flags(
    parser: argparse.ArgumentParser, cls: type[Settings], skip: Sequence[str] = (), defaults: dict[str, Any] | None = None
) -> None:
    """A `--flag` for every field. A flag not given leaves no attribute, so that what was asked for can be
    told from what is default; `defaults` are shown where a command has its own."""
    group = parser.add_argument_group(cls.__doc__.splitlines()[0].rstrip(".") if cls.__doc__ else cls.__name__)
    for f, kind, _ in _fields(cls):
        if f.name in skip:
            continue
        flag = "--" + f.name.replace("_", "-")
        help = f.metadata["help"]
        default = (defaults or {}).get(f.name, f.default)
        if default not in (None, dataclasses.MISSING):
            help += f" (default: {default})"
        if kind is bool:
            group.add_argument(flag, help=help, dest=f.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        else:
            group.add_argument(
                flag,
                help=help,
                dest=f.name,
                default=argparse.SUPPRESS,
                choices=f.metadata["choices"],
                metavar=None if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind],
                type=_parser_of(f, kind),
            )


def given(cls: type[Settings], namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings of this class that were given on the command line."""
    return {f.name: getattr(namespace, f.name) for f, _, _ in _fields(cls) if hasattr(namespace, f.name)}


# ---------------------------------------------------------------- fields


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field, type, bool]]:
    """(field, type, whether None is allowed)."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        optional = isinstance(hint, types.UnionType)
        yield f, (typing.get_args(hint)[0] if optional else hint), optional


def _parser_of(f: dataclasses.Field, kind: type) -> Callable[[str], Any]:
    """What turns a flag's text into the field's value, for argparse."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text  # refused below, with the words for what was expected
        try:
            return _checked(f, kind, value)
        except RequestError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


_LIMITS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}
_KINDS: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
}


def _checked(f: dataclasses.Field, kind: type, value: Any) -> Any:
    """The value as a plain int, float, bool or str. Raises RequestError when it is another kind of thing or
    out of range."""
    limits, choices = f.metadata["limits"], f.metadata["choices"]
    accepted, noun = _KINDS[kind]
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if fits and kind is float and isinstance(value, int) and abs(value) > 2**1023:
        fits = False  # float() would overflow
    if fits:
        value = kind(value)
        fits = kind is not float or math.isfinite(value)
    fits = fits and all(_LIMITS[name][0](value, limit) for name, limit in limits.items())
    fits = fits and (choices is None or value in choices)
    if not fits:
        if choices:
            noun = " or ".join(repr(c) for c in choices)
        wanted = " and ".join(f"{_LIMITS[name][1]} {limit:g}" for name, limit in limits.items())
        raise RequestError(f"{f.name} must be {noun}{' ' if wanted else ''}{wanted}, got {repr(value)[:60]}")
    return value
