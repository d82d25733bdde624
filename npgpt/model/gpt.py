"""The GPT: a decoder-only transformer, from the attention heads to the logits, in one file.

The architecture is GPT-2's ("Language Models are Unsupervised Multitask Learners", Radford et al., 2019): layer norms before
attention and before the feed-forward network, learned positions, a last layer norm. Rotary positions are an option. There is no
backward code here, because every operation knows its own. Training and sampling are in other rooms.

Each class has two forward passes side by side: `__call__` on Tensors, and `decode` on NumPy arrays for one more token of
each sequence (see layers.py). Shapes: B sequences, T tokens, C = n_embd channels, V = vocab_size.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from npgpt.config.settings import GPTConfig
from npgpt.engine import ops
from npgpt.engine.backend import CPU, CPU_KERNELS, Backend
from npgpt.engine.streams import Stream, generator
from npgpt.engine.tensor import Tensor
from npgpt.kernels.reference import Array
from npgpt.model.cache import KVCache
from npgpt.model.layers import ACTIVATIONS, Dropout, Embedding, LayerNorm, Linear, Residual, Rotary
from npgpt.model.module import Module


class MultiHeadSelfAttention(Module):
    """Each position gathers information from itself and from earlier positions, in n_head heads side by side."""

    def __init__(self, config: GPTConfig, layer: int, rotary: Rotary | None, backend: Backend, dtype: Any):
        c = config.n_embd
        self.rotary = rotary
        self.n_head, self.layer = config.n_head, layer
        self.attn_dropout = config.dropout
        self.qkv = Linear(c, 3 * c, config.bias, backend, dtype)
        self.out = Linear(c, c, config.bias, backend, dtype)
        self._scale = np.dtype(dtype).type(1 / math.sqrt(c // config.n_head))

    def _project(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, 3, n_head, head_dim): queries, keys and values side by side, before rotary positions."""
        b, t, c = x.shape
        return self.qkv(x).reshape(b, t, 3, self.n_head, c // self.n_head)

    def project(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), at the positions from `first` on -> queries, keys and values, each (B, n_head, T, head_dim)."""
        qkv = self._project(x)
        qk = self.rotary(qkv[:, :, :2], first) if self.rotary else qkv
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        return q, k, v

    def __call__(self, x: Tensor, rng: Any, cache: KVCache | None, last_only: bool) -> Tensor:
        b, t, c = x.shape
        if not (self.rotary or cache or last_only):
            return self.out(ops.self_attention(self._project(x), self.attn_dropout, rng).reshape(b, t, c))
        q, k, v = self.project(x, cache.length if cache else 0)
        if cache:
            k, v = map(Tensor, cache.extend(self.layer, k.data, v.data))
        if last_only:
            q = q[:, :, -1:]
        y = ops.causal_attention(q, k, v, self.attn_dropout, rng)
        y = y.transpose(0, 2, 1, 3).reshape(b, y.shape[2], c)  # join the heads
        return self.out(y)

    def weights(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> the attention weights (B, n_head, T, T), which `__call__` uses but does not return. See inside.py."""
        q, k, _ = self.project(x)
        scores = (q @ k.transpose(0, 1, 3, 2)) * self._scale
        t = x.shape[1]
        future = x.backend.xp.triu(x.backend.xp.ones((t, t), dtype=bool), 1)
        return ops.softmax(ops.masked_fill(scores, future, -math.inf))

    def decode(self, x: Array, cache: KVCache, onto: Array) -> Array:
        b, c = x.shape
        qkv = self.qkv.decode(x).reshape(b, 3, self.n_head, 1, c // self.n_head)
        qk = self.rotary.decode(qkv[:, :2], cache.positions) if self.rotary else qkv
        k, v = cache.extend(self.layer, qk[:, 1], qkv[:, 2])  # (B, n_head, tokens so far, head_dim) each
        y = CPU_KERNELS.attention_decode(qk[:, 0], k, v, cache.absent)
        return self.out.decode(y.reshape(b, c), onto)


class FeedForward(Module):
    """Two linear layers with an activation between them, the same for every position: C -> d_ff -> C."""

    def __init__(self, config: GPTConfig, backend: Backend, dtype: Any):
        assert config.d_ff is not None  # GPTConfig fills it in
        self.fc = Linear(config.n_embd, config.d_ff, config.bias, backend, dtype)
        self.activation = ACTIVATIONS[config.activation]()
        self.proj = Linear(config.d_ff, config.n_embd, config.bias, backend, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))

    def decode(self, x: Array, onto: Array) -> Array:
        return self.proj.decode(self.activation.decode(self.fc.decode(x)), onto)


class Block(Module):
    """A transformer block: attention, then feed-forward. Each reads a normalised copy of x and adds its result to x."""

    def __init__(self, config: GPTConfig, layer: int, rotary: Rotary | None, backend: Backend, dtype: Any):
        self.ln_1 = LayerNorm(config.n_embd, config.bias, backend, dtype)
        self.attn = MultiHeadSelfAttention(config, layer, rotary, backend, dtype)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, backend, dtype)
        self.mlp = FeedForward(config, backend, dtype)
        self.residual = Residual(config.dropout)

    def __call__(self, x: Tensor, rng: Any, cache: KVCache | None, last_only: bool) -> Tensor:
        """x (B, T, C) -> (B, T, C); with `last_only` -> (B, 1, C), the last position."""
        x = self.residual(x[:, -1:] if last_only else x, self.attn(self.ln_1(x), rng, cache, last_only), rng)
        return self.residual(x, self.mlp(self.ln_2(x)), rng)

    def decode(self, x: Array, cache: KVCache) -> Array:
        """x (B, C) -> (B, C), in place."""
        self.attn.decode(self.ln_1.decode(x), cache, onto=x)
        return self.mlp.decode(self.ln_2.decode(x), onto=x)

    def weights(self) -> list[Array | None]:
        """The weight and the bias of each layer, as `block_addresses` in kernels/decode.py wants them."""
        layers = (self.ln_1, self.attn.qkv, self.attn.out, self.ln_2, self.mlp.fc, self.mlp.proj)
        return [p if p is None else p.data for layer in layers for p in (layer.weight, layer.bias)]


class GPT(Module):
    """The model: `logits, loss = model(ids, targets)`.

    `seed` draws the weights. With None, matrices, tables and biases are zeros and layer-norm weights are ones, for weights
    that are loaded afterwards. `dtype` is float32, or float64 to check gradients.
    """

    def __init__(self, config: GPTConfig, seed: int | None = 1337, backend: Backend = CPU, dtype: Any = np.float32):
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd, backend, dtype)
        rotary = None
        if config.position == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd, backend, dtype)
        else:
            rotary = Rotary(config.block_size, config.n_embd // config.n_head, backend, dtype)
        self.dropout = Dropout(config.dropout)
        self.blocks = [Block(config, layer, rotary, backend, dtype) for layer in range(config.n_layer)]
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
        last_only: bool = False,
        dtype: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """ids (B, T), integers, T <= block_size -> (logits (B, T, V), loss).

        targets: integers (B, T). With targets, loss is the mean cross-entropy in nats; without, it is None.
        rng: the generator for dropout, from `model.backend.generator(...)`. None: no dropout.
        cache: keys and values of earlier tokens. `ids` follow these tokens, and their keys and values are added. With rotary
        positions, one more token takes the place of the oldest one if the cache is full.
        last_only: compute the logits (B, 1, V) and the loss of the last position only; targets are then (B, 1).
        dtype: the dtype of everything between the embeddings and the loss. None means that of the weights. On a GPU, and
        without a cache, it may be bfloat16.

        Raises ValueError if ids has another shape or does not fit into block_size, or if `dtype` does not fit the device or the
        cache. Raises IndexError for an id outside [0, V).
        """
        ids = ids.data if isinstance(ids, Tensor) else ids if hasattr(ids, "ndim") else np.asarray(ids)
        seen = cache.length if cache else 0
        self._check(ids, seen, dtype, cache is not None)
        x = self.dropout(self.embed(ids, seen), rng)
        x = x.astype(dtype or x.dtype)
        for layer, block in enumerate(self.blocks):
            # The last block needs all positions for its keys and values, but only the last one for its output.
            x = block(x, rng, cache, last_only and layer == len(self.blocks) - 1)
        if cache:
            cache.advance(ids.shape[1])
        logits = self.logits(x)
        if targets is None:
            return logits, None
        return logits, ops.cross_entropy(logits, targets)

    def embed(self, ids: Array, first: int = 0) -> Tensor:
        """ids (B, T), at the positions from `first` on -> what the first block reads, (B, T, C)."""
        x = self.wte(ids)
        if self.config.position == "learned":
            x = x + self.wpe(self.backend.xp.arange(first, first + ids.shape[1]))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """What the last block wrote, (B, T, C) -> logits (B, T, V). For other blocks, see inside.py."""
        x = self.ln_f(x)
        return ops.linear(x, self.wte.weight.T) if self.config.tie_weights else self.lm_head(x)

    def decode(self, ids: Array, cache: KVCache) -> Array:
        """The logits after one more token of each sequence: ids (B,) -> (B, V). The sequences may differ in length.

        This works only on a CPU and records no graph. With learned positions, the cache must have room for one more token.
        """
        x = self.wte.decode(ids)  # (B, C)
        if self.config.position == "learned":
            x += self.wpe.decode(cache.positions)
        if not (CPU_KERNELS.decodes_blocks(x) and self._decode_blocks(x, cache)):
            for block in self.blocks:
                x = block.decode(x, cache)
        cache.advance(1)
        x = self.ln_f.decode(x)
        return x @ self.wte.weight.data.T if self.config.tie_weights else self.lm_head.decode(x)

    def _decode_blocks(self, x: Array, cache: KVCache) -> bool:
        """All blocks in one call, in place; see `blocks_decode` in kernels/decode.py. False if the blocks do not allow it."""
        first, lengths, memory = self.blocks[0], cache.lengths, cache.all_memory
        d_ff, eps = len(first.mlp.proj.weight.data), first.ln_1.eps
        weights = [p for block in self.blocks for p in block.weights()]
        is_known = len(weights) == len(cache.weights) and all(map(operator.is_, weights, cache.weights))
        if not is_known:
            are_in_order = [block.attn.layer for block in self.blocks] == list(range(len(memory)))
            are_equal = all(block.ln_1.eps == block.ln_2.eps == eps for block in self.blocks)
            usable = are_in_order and are_equal
            cache.weights = weights
            cache.addresses = CPU_KERNELS.block_addresses(weights, x.shape[1], d_ff) if usable else None
        if cache.addresses is None:
            return False
        rotations = first.attn.rotary.rotations(lengths) if first.attn.rotary else None
        CPU_KERNELS.blocks_decode(x, cache.addresses, memory, lengths, rotations, d_ff, self.config.activation, eps)
        return True

    @property
    def backend(self) -> Backend:
        return self.wte.weight.backend

    def num_parameters(self) -> int:
        return sum(p.size for p in self.parameters())

    def hidden_matrices(self) -> list[tuple[Tensor, int]]:
        """Every weight matrix inside the blocks, with the number of matrices that lie side by side in it: q, k and v in qkv."""
        found = []
        for block in self.blocks:
            found += [(block.attn.qkv.weight, 3), (block.attn.out.weight, 1)]
            found += [(block.mlp.fc.weight, 1), (block.mlp.proj.weight, 1)]
        return found

    def new_cache(self, batch: int = 1, most_tokens: int | None = None) -> KVCache:
        """An empty KV cache for `batch` sequences, with room for block_size tokens of each, or for `most_tokens`."""
        return KVCache(self.config, batch, self.backend, self.wte.weight.dtype, most_tokens)

    def _check(self, ids: Array, seen: int, dtype: Any, cached: bool) -> None:
        own = self.wte.weight.dtype
        if dtype is not None and np.dtype(dtype) != own:
            if cached:
                raise ValueError("a cache keeps keys and values in the weights' dtype; leave out `cache` or `dtype`")
            if np.dtype(dtype).name != "bfloat16" or self.backend.is_cpu:
                raise ValueError(f"dtype must be None, {own.name}, or on a GPU bfloat16, got {np.dtype(dtype).name}")
        slides = self.config.position == "rotary" and cached and ids.ndim == 2 and ids.shape[1] == 1
        if ids.ndim != 2 or not (slides or 1 <= ids.shape[1] <= self.config.block_size - seen):
            room = f"{self.config.block_size} - {seen} in the cache" if seen else str(self.config.block_size)
            raise ValueError(f"expected ids of shape (B, T) with 1 <= T <= block_size {room}, got {ids.shape}")

    def _draw_weights(self, seed: int) -> None:
        """Initialise the weights as in GPT-2.

        Matrices and tables are normal with standard deviation 0.02. The two projections of each block that add to x have a
        standard deviation smaller by sqrt(2 n_layer), so that x does not grow with depth. Biases stay 0 and layer-norm
        weights stay 1.
        """
        rng = generator(seed, Stream.INIT)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                adds_to_x = name.endswith(("attn.out.weight", "mlp.proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if adds_to_x else 0.02
                p.data[...] = self.backend.asarray(std * rng.standard_normal(p.shape), dtype=p.dtype)
