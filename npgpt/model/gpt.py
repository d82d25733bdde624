"""The GPT: a decoder-only transformer, from the attention head to the logits, on one page.

The shape is GPT-2's ("Language Models are Unsupervised Multitask Learners", Radford et al., 2019):
layer norms before attention and feed-forward, learned positions, a last layer norm. There is no backward
code here, since every operation knows its own way back; training and sampling are elsewhere.

Shapes: B sequences, T tokens each, C = n_embd channels, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from npgpt.config.settings import GPTConfig
from npgpt.engine import ops
from npgpt.engine.backend import CPU, Backend, Stream, generator
from npgpt.engine.tensor import Tensor
from npgpt.kernels.reference import Array
from npgpt.model.module import Dropout, Embedding, LayerNorm, Linear, Module, Residual


class KVCache:
    """Keys and values of the tokens a model has already seen, so that the next one costs one position instead of all.

    For `batch` sequences of up to block_size tokens; `length` of them have been seen. `model(ids, cache=cache)` takes
    the tokens that follow, and no gradient flows through what is kept.
    """

    def __init__(self, model: GPT, batch: int = 1) -> None:
        c = model.config
        # For each block keys and values, (B, n_head, block_size, head_dim).
        shape = (c.n_layer, 2, batch, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.room: Array = model.backend.xp.empty(shape, dtype=model.wte.weight.dtype)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, n_head, T, head_dim) of one block for the tokens after the first `length`;
        returns those of all tokens up to here, (B, n_head, length + T, head_dim)."""
        stop = self.length + k.shape[2]
        kept = self.room[layer, :, :, :, :stop]
        kept[0, :, :, self.length :], kept[1, :, :, self.length :] = k.data, v.data
        return Tensor(kept[0]), Tensor(kept[1])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone."""
        self.room = self.room[:, :, rows]


class MultiHeadSelfAttention(Module):
    """Every position gathers from itself and the positions before it, in n_head ways at once."""

    def __init__(self, config: GPTConfig, layer: int, backend: Backend, dtype: Any):
        c = config.n_embd
        self.n_head, self.layer = config.n_head, layer
        self.attn_dropout = config.dropout
        self.qkv = Linear(c, 3 * c, config.bias, backend, dtype)
        self.out = Linear(c, c, config.bias, backend, dtype)

    def __call__(self, x: Tensor, rng: Any, cache: KVCache | None, last: bool) -> Tensor:
        b, t, c = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.n_head, c // self.n_head)
        q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))  # (B, n_head, T, head_dim) each
        if cache:
            k, v = cache.extend(self.layer, k, v)
        if last:
            q = q[:, :, -1:]
        y = ops.causal_attention(q, k, v, self.attn_dropout, rng)
        y = y.transpose(0, 2, 1, 3).reshape(b, y.shape[2], c)  # heads side by side again
        return self.out(y)


class FeedForward(Module):
    """The same small network at every position: widen to d_ff, bend, come back."""

    def __init__(self, config: GPTConfig, backend: Backend, dtype: Any):
        assert config.d_ff is not None  # filled in by GPTConfig
        self.fc = Linear(config.n_embd, config.d_ff, config.bias, backend, dtype)
        self.activation = {"gelu": ops.gelu, "relu": ops.relu}[config.activation]
        self.proj = Linear(config.d_ff, config.n_embd, config.bias, backend, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))


class Block(Module):
    """Attention, then feed-forward; each reads a normalised copy and adds its result to the stream. With `last`, what
    comes out is the last position alone, which has looked at all of them."""

    def __init__(self, config: GPTConfig, layer: int, backend: Backend, dtype: Any):
        self.ln_1 = LayerNorm(config.n_embd, config.bias, backend, dtype)
        self.attn = MultiHeadSelfAttention(config, layer, backend, dtype)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, backend, dtype)
        self.mlp = FeedForward(config, backend, dtype)
        self.residual = Residual(config.dropout)

    def __call__(self, x: Tensor, rng: Any, cache: KVCache | None, last: bool) -> Tensor:
        x = self.residual(x[:, -1:] if last else x, self.attn(self.ln_1(x), rng, cache, last), rng)
        return self.residual(x, self.mlp(self.ln_2(x)), rng)


class GPT(Module):
    """logits, loss = model(ids, targets)

    `seed` draws the weights (None: they are about to be loaded, and stay zero); `dtype` is float32, or
    float64 to check gradients.
    """

    def __init__(self, config: GPTConfig, seed: int | None = 1337, backend: Backend = CPU, dtype: Any = np.float32):
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd, backend, dtype)
        self.wpe = Embedding(config.block_size, config.n_embd, backend, dtype)
        self.dropout = Dropout(config.dropout)
        self.blocks = [Block(config, layer, backend, dtype) for layer in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.bias, backend, dtype)
        if not config.tie_weights:
            self.lm_head = Linear(config.n_embd, config.vocab_size, False, backend, dtype)
        if seed is not None:
            self._draw_weights(seed)
        self.flatten_parameters()

    def __call__(
        self,
        ids: Any,
        targets: Any = None,
        rng: Any = None,
        cache: KVCache | None = None,
        last: bool = False,
        dtype: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """ids (B, T) integers, T <= block_size -> logits (B, T, V) and, with targets (B, T), the mean
        cross-entropy in nats, else None.

        `rng` is the generator dropout draws from, `model.backend.generator(...)`; without one there is no
        dropout. With a `cache` the ids are those that follow the ones it has seen. With `last`, logits (B, 1, V) and
        the loss are of the last position alone, and targets are (B, 1). `dtype` is that of everything between the
        embeddings and the loss: None, as the weights; on a GPU, and without a cache, also bfloat16. Raises ValueError when
        ids has another shape or goes beyond block_size.
        """
        ids = ids.data if isinstance(ids, Tensor) else ids if hasattr(ids, "ndim") else np.asarray(ids)
        seen = cache.length if cache else 0
        own = self.wte.weight.dtype
        if dtype is not None and np.dtype(dtype) != own:
            if cache:
                raise ValueError("a cache keeps keys and values in the weights' dtype; leave out `cache` or `dtype`")
            if np.dtype(dtype).name != "bfloat16" or self.backend.name == "cpu":
                raise ValueError(f"dtype must be None, {own.name}, or on a GPU bfloat16, got {np.dtype(dtype).name}")
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.block_size - seen:
            room = f"{self.config.block_size} - {seen} in the cache" if seen else str(self.config.block_size)
            raise ValueError(f"expected ids of shape (B, T) with 1 <= T <= block_size {room}, got {ids.shape}")
        positions = self.backend.xp.arange(seen, seen + ids.shape[1])
        x = self.dropout(self.wte(ids) + self.wpe(positions), rng)  # (B, T, C)
        x = x.astype(dtype or x.dtype)
        for layer, block in enumerate(self.blocks):
            # The other positions are of no use once the last block has their keys and values.
            x = block(x, rng, cache, last and layer == len(self.blocks) - 1)
        if cache:
            cache.length += ids.shape[1]
        x = self.ln_f(x)
        logits = ops.linear(x, self.wte.weight.T) if self.config.tie_weights else self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, ops.cross_entropy(logits, targets)

    @property
    def backend(self) -> Backend:
        return self.wte.weight.backend

    def num_parameters(self) -> int:
        return sum(p.size for p in self.parameters())

    def _draw_weights(self, seed: int) -> None:
        """GPT-2's initialisation: matrices and tables normal with deviation 0.02; the two projections that
        write into the stream of each block smaller by sqrt(2 n_layer), so that the stream does not grow
        with depth; biases 0 and layer-norm weights 1, as they are."""
        rng = generator(seed, Stream.INIT)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                into_stream = name.endswith(("attn.out.weight", "mlp.proj.weight"))
                deviation = 0.02 / math.sqrt(2 * self.config.n_layer) if into_stream else 0.02
                p.data[...] = self.backend.asarray(deviation * rng.standard_normal(p.shape), dtype=p.dtype)
