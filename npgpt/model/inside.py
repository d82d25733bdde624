"""What a GPT computes on the way to its logits: attention, the residual stream, and what each block would have said.

The model's own modules compute everything. How it is shown is in report/.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from npgpt.engine.graph import no_grad
from npgpt.engine.tensor import Tensor
from npgpt.model.gpt import GPT


class Inside:
    """What a model computes for T tokens, as NumPy arrays. L blocks, H heads, C = n_embd channels, V = vocab_size.

    Attention and logits are computed when they are asked for, because those of a large model take much memory.
    """

    def __init__(self, model: GPT, ids: np.ndarray, residual: list[Tensor]) -> None:
        self.ids = ids
        self._model, self._residual = model, residual

    @functools.cached_property
    def residual(self) -> np.ndarray:
        """(L + 1, T, C): the residual stream. residual[0] is what the first block reads, residual[n] what block n - 1 wrote."""
        return np.stack([x.numpy()[0] for x in self._residual])

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """(T, V): what `model(ids)` returns."""
        return self.logits_of(len(self._model.blocks))

    @functools.cached_property
    def attention(self) -> np.ndarray:
        """(L, H, T, T): the weights of each head. Row t says how much position t attends to each position. It sums to 1, and
        is 0 for later positions."""
        return np.stack([self.attention_of(block) for block in range(len(self._model.blocks))])

    @functools.cached_property
    def layer_logits(self) -> np.ndarray:
        """(L + 1, T, V): the logit lens (nostalgebraist, 2020). layer_logits[n] is the last layer norm and the output layer,
        applied to residual[n]. The last are `logits`."""
        return np.stack([*[self.logits_of(n) for n in range(len(self._model.blocks))], self.logits])

    @no_grad()
    def logits_of(self, n: int, positions: slice = slice(None)) -> np.ndarray:
        """layer_logits[n, positions]."""
        return self._model.logits(self._residual[n][:, positions]).numpy()[0]

    @no_grad()
    def attention_of(self, block: int) -> np.ndarray:
        """attention[block]: (H, T, T)."""
        module = self._model.blocks[block]
        return module.attn.weights(module.ln_1(self._residual[block])).numpy()[0]

    @functools.cached_property
    @no_grad()
    def cache(self) -> dict[str, np.ndarray]:
        """The arrays under the names of TransformerLens (Nanda and Bloom, 2022), without a batch axis."""
        model = self._model
        found = {"hook_embed": model.wte(self.ids[None]).numpy()[0]}
        if model.config.position == "learned":
            found["hook_pos_embed"] = model.wpe.weight.numpy()[: len(self.ids)]
        for n in range(len(model.blocks)):
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
    residual = [x]
    for block in model.blocks:
        x = block(x, rng=None, cache=None, last_only=False)
        residual.append(x)
    return Inside(model, ids, residual)
