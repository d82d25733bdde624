"""The optimiser: AdamW, clipping by the global norm, the learning-rate schedule. No graph, no files.

All three work on the flat arrays of `Parameters` (model/module.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from npgpt.engine.backend import to_numpy
from npgpt.engine.tensor import Tensor
from npgpt.kernels.updates import AdamWStep, Array
from npgpt.model.module import Parameters, zero_grad


class Spread(Protocol):
    """A way to compute many things side by side, as `Workers` does (parallel/workers.py)."""

    def over(self, function: Callable[[slice], None], n: int) -> None:
        """Call function(slice) for slices that together cover range(n)."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """[function(item) for item in items]."""


class _Alone:
    """One thing after the other, in the caller's thread."""

    def over(self, function: Callable[[slice], None], n: int) -> None:
        function(slice(0, n))

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [function(item) for item in items]


ALONE = _Alone()


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019). Weight decay acts on matrices and tables, not on vectors.

    `parameters` is `model.parameters()`, or any list of Tensors. The defaults are common for GPTs. `lr` may be set between
    steps. `exp_avg` and `exp_avg_sq`, of shape (number of parameters,), are the running means of the gradient and of its
    square. Raises ValueError for values out of range, for an empty list and for a parameter that occurs twice.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "AdamW needs lr >= 0, eps > 0, weight_decay >= 0 and betas in [0, 1), got "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        self.parameters = parameters if isinstance(parameters, Parameters) else list(parameters)
        if not self.parameters:
            raise ValueError("AdamW got no parameters")
        if len({id(p) for p in self.parameters}) != len(self.parameters):
            raise ValueError("AdamW got a parameter twice")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        first = self.parameters[0]
        n = sum(p.size for p in self.parameters)
        self.exp_avg: Array = first.backend.xp.zeros(n, dtype=first.dtype)
        self.exp_avg_sq: Array = first.backend.xp.zeros(n, dtype=first.dtype)

    def step(self, workers: Spread = ALONE, scale: Array | None = None) -> None:
        """Update the parameters from their gradients. In a plain list, a parameter whose `.grad` is None keeps its value.

        workers: compute the update side by side. The bits of the result do not depend on them, because no element depends on
        another.
        scale: an array of shape () on the parameters' device. It multiplies the gradients; if it is negative, nothing is
        updated.
        """
        self.steps += 1
        numbers = AdamWStep(self.steps, self.lr, self.betas, self.eps, self.weight_decay, scale=scale)
        start = 0
        for data, grad, n_decay in _flat_arrays(self.parameters):
            state = slice(start, start + data.size)
            start += data.size
            if grad is None:
                continue
            arrays = (data, grad, self.exp_avg[state].reshape(data.shape), self.exp_avg_sq[state].reshape(data.shape))
            update = functools.partial(self._update, arrays, numbers._replace(n_decay=n_decay))
            if data.ndim == 1:
                workers.over(update, data.size)
            else:
                update(slice(None))

    def _update(self, arrays: tuple[Array, ...], numbers: AdamWStep, at: slice) -> None:
        if numbers.n_decay is not None and at.start:
            numbers = numbers._replace(n_decay=max(0, numbers.n_decay - at.start))
        parameter, grad, exp_avg, exp_avg_sq = (a[at] if a.ndim else a for a in arrays)
        self.parameters[0].backend.kernels.adamw(parameter, grad, exp_avg, exp_avg_sq, numbers)

    def zero_grad(self) -> None:
        """Clear the gradients of all parameters."""
        zero_grad(self.parameters)

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        """The state that a resumed run needs: the number of steps, and both running means in host memory.

        copy: with False, the means may be the optimiser's own arrays, which the next step changes.
        """
        means = {"exp_avg": to_numpy(self.exp_avg), "exp_avg_sq": to_numpy(self.exp_avg_sq)}
        return {"steps": self.steps} | {name: mean.copy() if copy else mean for name, mean in means.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError, and changes nothing, if the shapes differ."""
        own = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        for name, array in own.items():
            if state[name].shape != array.shape:
                raise ValueError(f"optimiser state {name} has shape {state[name].shape}, expected {array.shape}")
        for name, array in own.items():
            array[...] = self.parameters[0].backend.asarray(state[name], dtype=array.dtype)
        self.steps = state["steps"]


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm` (Pascanu et al., 2013).

    Returns the norm before clipping. If the norm is not finite, the gradients keep their values. Raises ValueError if
    max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm needs max_norm > 0, got {max_norm}")
    parameters = parameters if isinstance(parameters, Parameters) else list(parameters)
    gradients = [grad for _, grad, _ in _flat_arrays(parameters) if grad is not None]
    if isinstance(parameters, Parameters):  # two sums: one sum would round differently and change the bytes of old runs
        gradients = [parameters.grad[: parameters.n_decay], parameters.grad[parameters.n_decay :]]
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for a norm that is not finite
        norm = math.sqrt(sum(float(g.reshape(-1) @ g.reshape(-1)) for g in gradients))
    if math.isfinite(norm) and norm > max_norm:
        for g in gradients:
            g *= max_norm / norm
    return norm


class Update:
    """Clipping and a step of the optimiser in one: `update.step(loss)` after each backward pass.

    `results()` returns the losses and norms of the steps since its last call. So on a GPU no step has to wait for the one
    before it. Once a loss or norm is not finite, later steps change nothing until `results()` is called.
    """

    def __init__(self, optimizer: AdamW, max_norm: float = math.inf) -> None:
        """max_norm: see `clip_grad_norm`."""
        if not max_norm > 0:
            raise ValueError(f"Update needs max_norm > 0, got {max_norm}")
        self._optimizer, self._max_norm = optimizer, max_norm
        self._seen: list[Any] = []  # (loss, norm) of each step since `results`; on a GPU, arrays of shape (2,)
        self._scale: Array | None = None
        parameters = optimizer.parameters
        if isinstance(parameters, Parameters) and not parameters[0].backend.is_cpu:
            self._scale = parameters[0].backend.xp.ones((), dtype=parameters[0].dtype)

    def step(self, loss: Any, workers: Spread = ALONE) -> None:
        """Clip and update after a backward pass. loss: a number, or an array of shape (). workers: see `AdamW.step`."""
        optimizer, parameters = self._optimizer, self._optimizer.parameters
        if self._scale is not None and isinstance(parameters, Parameters):
            parameters.check()
            loss = parameters[0].backend.asarray(loss, dtype=parameters.grad.dtype)
            self._seen.append(parameters[0].backend.kernels.clip_factor(parameters.grad, loss, self._max_norm, self._scale))
            optimizer.step(workers, self._scale)
        elif all(_finite(*seen) for seen in self._seen[-1:]):
            self._seen.append((float(loss), clip_grad_norm(parameters, self._max_norm)))
            if _finite(*self._seen[-1]):
                optimizer.step(workers)

    def results(self) -> list[tuple[float, float]]:
        """(loss, norm before clipping) of each step since the last call.

        The list ends with the first step whose loss or norm is not finite. That step did not change the weights.
        """
        seen, self._seen = self._seen, []
        if self._scale is None or not seen:
            return seen
        backend = self._optimizer.parameters[0].backend
        rows = [(loss, norm) for loss, norm in to_numpy(backend.xp.stack(seen)).tolist()]
        taken = next((i for i, row in enumerate(rows) if not _finite(*row)), len(rows))
        if taken < len(rows):
            self._optimizer.steps -= len(rows) - taken
            self._scale[...] = 1
        return rows[: taken + 1]


def _finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def _flat_arrays(parameters: list[Tensor]) -> list[tuple[Array, Array | None, int | None]]:
    """(data, grad, n_decay) for the whole flat array, or for each tensor of a plain list. n_decay: see AdamWStep."""
    if isinstance(parameters, Parameters):
        parameters.check()
        return [(parameters.data, parameters.grad, parameters.n_decay)]
    return [(p.data, p.grad, None if p.ndim >= 2 else 0) for p in parameters]


def learning_rate(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int, schedule: str) -> float:
    """The learning rate of step number `step`, counted from 0, in a run of `steps` steps.

    It rises linearly over the first `warmup_steps` steps. After that, with schedule "cosine" it falls along half a cosine
    wave to `min_lr` at the last step (Loshchilov and Hutter, 2017). With "constant" it stays at `lr`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, done)))
