"""Every setting of npgpt: its name, default, range and help text. No arrays, no files.

There are three configurations: `GPTConfig` for the model, `TrainConfig` for training and `GenerateConfig` for
generation. fields.py says how a setting is declared and checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npgpt.config.fields import RequestError, Settings, required, setting


@dataclass(frozen=True)
class GPTConfig(Settings):
    """The shape of a model. With it and the weights, a checkpoint rebuilds the model."""

    vocab_size: int = required("number of different tokens", at_least=1)
    block_size: int = setting(128, "context length: the largest number of tokens the model sees at once", at_least=1)
    n_layer: int = setting(4, "number of transformer blocks", at_least=1)
    n_head: int = setting(4, "attention heads in each block; n_head must divide n_embd", at_least=1)
    n_embd: int = setting(256, "width of the model: the size of each token's vector", at_least=1)
    d_ff: int | None = setting(None, "hidden width of the feed-forward network (default: 4 * n_embd)", at_least=1)
    dropout: float = setting(0.1, "dropout probability: embeddings, attention, residual branches", at_least=0, below=1)
    position: str = setting(
        "learned",
        "how the model knows positions: a learned table, or rotary: queries and keys are turned (Su et al., 2021)",
        choices=("learned", "rotary"),
    )
    activation: str = setting("gelu", "activation function of the feed-forward network", choices=("gelu", "relu"))
    bias: bool = setting(True, "use biases in linear layers and layer norms")
    tie_weights: bool = setting(False, "use the token embedding as the output layer, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise RequestError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and n_head={self.n_head}")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise RequestError(
                f"rotary positions need an even n_embd / n_head, got n_embd={self.n_embd} and n_head={self.n_head}"
            )
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.n_embd)

    def num_parameters(self) -> int:
        """The number of parameters of a model of this shape."""
        assert self.d_ff is not None  # __post_init__ fills it in
        c, d_ff = self.n_embd, self.d_ff
        norm = c * (1 + self.bias)
        matrices, biases = c * 3 * c + c * c + 2 * c * d_ff, 3 * c + c + d_ff + c
        block = 2 * norm + matrices + self.bias * biases
        positions = self.block_size if self.position == "learned" else 0
        tables = (self.vocab_size * (1 if self.tie_weights else 2) + positions) * c
        return tables + self.n_layer * block + norm


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How a model is trained."""

    steps: int = setting(1000, "number of optimiser steps", at_least=1)
    batch_size: int = setting(32, "windows of block_size tokens in each step", at_least=1, at_most=100_000)
    lr: float = setting(1e-3, "peak learning rate", above=0)
    min_lr: float | None = setting(
        None, "learning rate of the last step with the cosine schedule (default: lr / 10)", at_least=0
    )
    warmup_steps: int = setting(100, "number of steps in which the learning rate rises to its peak", at_least=0)
    schedule: str = setting("cosine", "learning-rate schedule after the warm-up", choices=("cosine", "constant"))
    optimizer: str = setting(
        "adamw",
        "adamw, or muon for the matrices inside the blocks (Jordan et al., 2024) and adamw for the rest",
        choices=("adamw", "muon"),
    )
    muon_lr: float = setting(
        0.02, "with optimizer muon: the peak learning rate of Muon; it follows the schedule of lr", above=0
    )
    beta1: float = setting(0.9, "AdamW: decay rate of the mean of gradients", at_least=0, below=1)
    beta2: float = setting(0.99, "AdamW: decay rate of the mean of squared gradients", at_least=0, below=1)
    weight_decay: float = setting(0.1, "weight decay; it acts on matrices only", at_least=0)
    grad_clip: float = setting(1.0, "clip the gradient to this norm; 0: no clipping", at_least=0)
    eval_interval: int = setting(
        100, "steps between evaluations; each evaluation also writes a sample and a checkpoint", at_least=1
    )
    eval_tokens: int = setting(131_072, "number of held-out tokens in an evaluation, evenly spread; 0: all", at_least=0)
    patience: int = setting(5, "stop after this many evaluations without a lower validation loss; 0: never", at_least=0)
    log_interval: int = setting(10, "steps between lines in the log file", at_least=1)
    sample_tokens: int = setting(200, "length of the sample at each evaluation, in tokens; 0: no sample", at_least=0)
    val_fraction: float = setting(0.1, "fraction of the text that is held out for validation", at_least=0, below=1)
    seed: int = setting(1337, "random seed of weights, batches and dropout", at_least=0)
    threads: int | None = setting(
        None, "number of workers (default: one for each core this process may use)", at_least=1, at_most=1024
    )
    processes: bool | None = setting(
        None,
        "run workers as processes instead of threads; this is faster, most of all for small models (default: switch after "
        "ten steps if more than ten seconds remain)",
    )
    micro_batch: int | None = setting(
        None,
        "windows in a micro-batch, which a worker computes at once (default: about 1024 tokens; on a GPU the whole batch)",
        at_least=1,
    )
    device: str = setting("auto", "device to train on", choices=("auto", "cpu", "cuda"))
    tf32: bool = setting(
        False, "GPU only: compute matrix products with 10 instead of 23 bits of mantissa; several times faster"
    )
    bf16: bool = setting(
        False, "bfloat16: activations on a GPU, operands of products on a CPU with AVX512-BF16; weights stay float32"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr is None:
            object.__setattr__(self, "min_lr", self.lr / 10)
        elif self.min_lr > self.lr:
            raise RequestError(f"min_lr must not be above lr, got min_lr={self.min_lr} and lr={self.lr}")


# Complete configurations by name. A setting that is missing here has its default.
PRESETS: dict[str, dict[str, Any]] = {
    # Of several depths, widths, windows, numbers of heads and learning rates, these reached the lowest loss in a quarter of a
    # minute. In so few steps one block learns fastest. More blocks need a lower learning rate.
    "quick": {
        "n_layer": 1,
        "n_head": 8,
        "n_embd": 128,
        "block_size": 128,
        "dropout": 0.0,
        "position": "rotary",
        "optimizer": "muon",
        "batch_size": 8,
        "steps": 900,
        "lr": 2e-2,
        "muon_lr": 0.03,
        "min_lr": 0.0,
        "warmup_steps": 30,
        "eval_interval": 450,
    },
    # nanoGPT's configurations for a CPU and for a GPU: https://github.com/karpathy/nanoGPT, its README and
    # config/train_shakespeare_char.py.
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
    """How text is sampled from a model."""

    max_new_tokens: int = setting(500, "number of tokens to generate", at_least=0)
    temperature: float = setting(0.8, "below 1: safer text; above 1: wilder text; 0: always the likeliest token", at_least=0)
    top_k: int | None = setting(None, "sample only from the k likeliest tokens", at_least=1)
    top_p: float | None = setting(
        None, "sample only from the likeliest tokens whose probabilities add up to this", above=0, at_most=1
    )
    min_p: float | None = setting(
        None, "drop tokens whose probability is below this fraction of the likeliest token's", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(
        1.0, "above 1: tokens that are already in the text become less likely", at_least=0.01, at_most=100
    )
    window: str | None = setting(
        None,
        "context past block_size tokens: exact computes each token from the last block_size tokens alone (slow); half drops "
        "the older half when the window is full (much faster); slide replaces the oldest token and keeps what the others have "
        "seen of it (fast; rotary positions only) (default: slide with rotary positions, else exact)",
        choices=("exact", "half", "slide"),
    )
    num_samples: int = setting(1, "number of texts to generate, side by side", at_least=1, at_most=10_000)
    threads: int = setting(
        1,
        "threads that compute a token, at most one for each core; more than one helps many samples on an idle machine, and can "
        "be several times slower on a busy one",
        at_least=1,
        at_most=1024,
    )
    seed: int | None = setting(
        None, "random seed: the same seed gives the same text (default: a new seed each time)", at_least=0
    )
    device: str = setting("cpu", "device to generate on; a GPU is worth it for many samples", choices=("auto", "cpu", "cuda"))
