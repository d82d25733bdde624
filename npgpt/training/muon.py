"""Muon: an optimiser for the matrices inside the blocks. Embeddings, output layer and vectors stay with AdamW (optim.py).

`optimizer_for` makes the optimiser that the settings ask for, AdamW or Muon.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from npgpt.config.settings import TrainConfig
from npgpt.engine.tensor import Tensor
from npgpt.kernels.updates import AdamWStep, Array
from npgpt.model.gpt import GPT
from npgpt.model.module import Parameters
from npgpt.training.optim import ALONE, AdamW, Spread

# The coefficients of a quintic that sends every singular value in (0, 1] close to 1 in a few iterations (Jordan et al., 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TINY = 1e-12  # for a matrix of zeros


def orthogonalised(g: Array, iterations: int = ITERATIONS) -> Array:
    """A matrix with the singular vectors of g (m, n) and with singular values between about 0.7 and 1.2.

    The exact result would be U V^T for g = U S V^T. Newton-Schulz iterations need only matrix products: with X = g / |g|, each
    iteration applies the odd polynomial a s + b s^3 + c s^5 to the singular values,

        X <- a X + (b A + c A^2) X,   A = X X^T

    A and A^2 are symmetric, and NumPy computes a product of a matrix with its own transpose in half the time.
    """
    a, b, c = QUINTIC
    is_tall = g.shape[0] > g.shape[1]  # then A is smaller for the transpose
    x = g.T.copy() if is_tall else g.copy()
    x /= (x * x).sum() ** 0.5 + TINY
    for _ in range(iterations):
        gram = x @ x.T
        polynomial = gram @ gram.T
        polynomial *= c
        gram *= b
        polynomial += gram
        step = polynomial @ x
        x *= a
        x += step
    return x.T if is_tall else x


@dataclass(frozen=True)
class _Matrix:
    """One matrix in the flat arrays: columns of a parameter of this shape that begins at `start`."""

    start: int
    shape: tuple[int, int]
    columns: slice

    def of(self, flat: Array) -> Array:
        rows, width = self.shape
        return flat[self.start : self.start + rows * width].reshape(self.shape)[:, self.columns]

    @property
    def work(self) -> int:
        """Multiplications of an iteration, about."""
        n, m = sorted((self.shape[0], self.columns.stop - self.columns.start))
        return n * n * (2 * n + 3 * m)


class Muon(AdamW):
    """Muon for hidden matrices, AdamW for all other parameters (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

    Each step adds the gradient to a running mean, looks ahead as Nesterov does, and orthogonalises the result, so that a
    matrix moves equally far in each of its directions. The update is scaled by sqrt(max(1, out / in)). Weight decay is
    decoupled, as in AdamW.

    `exp_avg` holds the running means of both. `exp_avg_sq` stays zero for Muon's matrices. The state has the form of AdamW's.
    """

    def __init__(
        self,
        parameters: Parameters,
        hidden: Sequence[tuple[Tensor, int]],
        lr: float = 3e-4,
        muon_lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        """hidden: the matrices for Muon, (parameter, number of matrices side by side in it); see `GPT.hidden_matrices`.

        lr: the learning rate of AdamW. muon_lr: that of Muon; setting `lr` later changes both in proportion.

        Raises ValueError for values out of range, and for a hidden parameter that is not one of the parameters.
        """
        super().__init__(parameters, lr, betas, eps, weight_decay)
        if not (lr > 0 and muon_lr > 0 and 0 <= momentum < 1):
            raise ValueError(f"Muon needs lr > 0, muon_lr > 0 and momentum in [0, 1), got {lr}, {muon_lr}, {momentum}")
        self.momentum, self._ratio = momentum, muon_lr / lr
        starts = {id(p): end - p.size for p, end in zip(parameters, _ends(parameters), strict=True)}
        unknown = [p.shape for p, _ in hidden if id(p) not in starts]
        if unknown:
            raise ValueError(f"Muon got hidden matrices that are not among the parameters, of shapes {unknown}")
        matrices, taken = [], []
        for p, parts in hidden:
            start, (rows, width) = starts[id(p)], p.shape
            taken.append((start, start + p.size))
            edges = pairwise(width * i // parts for i in range(parts + 1))
            matrices += [_Matrix(start, (rows, width), slice(*edge)) for edge in edges]
        self._matrices = sorted(matrices, key=lambda m: -m.work)  # the largest first, so that workers finish together
        # What lies between the hidden parameters is AdamW's.
        edges_of_rest = [0, *(edge for span in sorted(taken) for edge in span), parameters.data.size]
        pairs = zip(edges_of_rest[::2], edges_of_rest[1::2], strict=True)
        self._rest = [slice(start, stop) for start, stop in pairs if start < stop]

    @property
    def muon_lr(self) -> float:
        return self._ratio * self.lr

    def step(self, workers: Spread = ALONE, scale: Array | None = None) -> None:
        """Update the parameters from their gradients. workers, scale: see `AdamW.step`.

        Each matrix is updated by one worker, so the bits of the result do not depend on the number of workers.
        """
        flat = self.parameters
        assert isinstance(flat, Parameters)
        flat.check()
        self.steps += 1
        numbers = AdamWStep(self.steps, self.lr, self.betas, self.eps, self.weight_decay, scale=scale)
        for at in self._rest:
            arrays = tuple(array[at] for array in (flat.data, flat.grad, self.exp_avg, self.exp_avg_sq))
            n_decay = min(max(0, flat.n_decay - at.start), at.stop - at.start)
            workers.over(functools.partial(self._update, arrays, numbers._replace(n_decay=n_decay)), at.stop - at.start)
        workers.map(functools.partial(self._update_matrix, scale), self._matrices)

    def _update_matrix(self, scale: Array | None, matrix: _Matrix) -> None:
        assert isinstance(self.parameters, Parameters)
        weight, gradient, mean = (matrix.of(a) for a in (self.parameters.data, self.parameters.grad, self.exp_avg))
        mu, shape_scale = self.momentum, math.sqrt(max(1.0, weight.shape[1] / weight.shape[0]))
        if scale is None:
            mean *= mu
            mean += (1 - mu) * gradient
            update = orthogonalised((1 - mu) * gradient + mu * mean)
            weight *= 1 - self.muon_lr * self.weight_decay
            weight -= (self.muon_lr * shape_scale) * update
            return
        xp = self.parameters[0].backend.xp  # on a GPU: without a branch, so that the host does not wait for `scale`
        gradient = (1 - mu) * gradient * scale
        new_mean = mu * mean + gradient
        update = orthogonalised(gradient + mu * new_mean)
        moved = weight * (1 - self.muon_lr * self.weight_decay) - (self.muon_lr * shape_scale) * update
        mean[...], weight[...] = xp.where(scale < 0, mean, new_mean), xp.where(scale < 0, weight, moved)


def _ends(parameters: Parameters) -> list[int]:
    """Where each parameter ends in the flat arrays."""
    ends, end = [], 0
    for p in parameters:
        end += p.size
        ends.append(end)
    return ends


def optimizer_for(model: GPT, config: TrainConfig) -> AdamW:
    """The optimiser that the settings ask for."""
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    if config.optimizer == "adamw":
        return AdamW(model.parameters(), config.lr, betas, weight_decay=decay)
    return Muon(model.flat, model.hidden_matrices(), config.lr, config.muon_lr, betas=betas, weight_decay=decay)
