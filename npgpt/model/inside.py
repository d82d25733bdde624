"""What a GPT computes on the way to its logits: attention, the residual stream, and what each block would have said.

Everything is computed by the model's own modules. How it is shown is in report/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npgpt.engine import ops
from npgpt.engine.graph import no_grad
from npgpt.engine.tensor import Tensor
from npgpt.model.gpt import GPT


@dataclass(frozen=True)
class Inside:
    """What a model computes for T tokens, as NumPy arrays. L blocks, H heads, C = n_embd channels, V = vocab_size.

    logits (T, V): what `model(ids)` returns.
    attention (L, H, T, T): the weights of head h of block l. Row t says how much position t takes from each position; it sums
    to 1, and is 0 for later positions.
    residual (L + 1, T, C): the residual stream. The first is what the first block reads, the one at l + 1 what block l wrote.
    layer_logits (L + 1, T, V): the logits if the blocks ended there, which is the logit lens (nostalgebraist, 2020): the last
    layer norm and the output layer, applied to each of `residual`. The last are `logits`.
    """

    ids: np.ndarray
    logits: np.ndarray
    attention: np.ndarray
    residual: np.ndarray
    layer_logits: np.ndarray

    @property
    def cache(self) -> dict[str, np.ndarray]:
        """The arrays under the names of TransformerLens (Nanda and Bloom, 2022), without a batch axis."""
        found = {"hook_embed": self.residual[0]}
        for n in range(len(self.attention)):
            found[f"blocks.{n}.hook_resid_pre"] = self.residual[n]
            found[f"blocks.{n}.attn.hook_pattern"] = self.attention[n]
            found[f"blocks.{n}.hook_resid_post"] = self.residual[n + 1]
        return found


@no_grad()
def inside(model: GPT, ids: Sequence[int] | np.ndarray) -> Inside:
    """Read what a model computes for a text, `ids` (T,) with 1 <= T <= block_size.

    Raises ValueError if ids has another shape or is too long, and IndexError for an id outside the vocabulary.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or not 1 <= len(ids) <= model.config.block_size:
        raise ValueError(f"expected ids of shape (T,) with 1 <= T <= block_size {model.config.block_size}, got {ids.shape}")
    x = model.embed(ids[None])
    residual, attention = [x], []
    for block in model.blocks:
        q, k, _ = block.attn.project(block.ln_1(x))
        attention.append(_attention(q, k))
        x = block(x, rng=None, cache=None, last_only=False)
        residual.append(x)
    layer_logits = np.stack([model.logits(x).numpy()[0] for x in residual])
    return Inside(
        ids,
        layer_logits[-1],
        np.stack([p.numpy()[0] for p in attention]),
        np.stack([x.numpy()[0] for x in residual]),
        layer_logits,
    )


def _attention(q: Tensor, k: Tensor) -> Tensor:
    """The weights that `ops.causal_attention` uses but does not return: q and k (1, H, T, head_dim) -> (1, H, T, T)."""
    t, head_dim = q.shape[2:]
    scores = (q @ k.transpose(0, 1, 3, 2)) * q.dtype.type(1 / math.sqrt(head_dim))
    future = q.backend.xp.triu(q.backend.xp.ones((t, t), dtype=bool), 1)
    return ops.softmax(ops.masked_fill(scores, future, -math.inf))
