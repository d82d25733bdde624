"""Are the hand-written gradients right? Compare them with finite differences.

For a function f of one or more arrays, a fixed random weighting u of its output makes a number
L(x) = sum(u * f(x)). The engine's dL/dx is held against a numerical derivative that knows nothing of it:
central differences at four step sizes, extrapolated to step zero (Richardson, 1911; the table is
Romberg's). In float64 that is good to about twelve digits, so an error of one part in a billion in a
backward pass shows.

A function has no derivative at a kink (ReLU at 0). Near one the table does not settle; such elements are
recognised by that, counted and left out, never let through by a looser tolerance.

This file is for tests and for whoever writes an operation of their own. Training does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.backend import to_numpy
from npgpt.tensor import Tensor, no_grad

LEVELS = 4  # step sizes h, h/2, h/4, h/8: truncation error of order h^8
STEP = 1e-2  # h for an element of size up to 1, larger in proportion


class GradientError(AssertionError):
    """An analytic gradient differs from the numerical one; the message says where and by how much."""


@dataclass(frozen=True)
class InputReport:
    """What was found for one input."""

    name: str
    checked: int  # derivatives compared
    kinks: int  # derivatives left out because the function is not smooth there
    max_error: float  # relative
    median_error: float


def gradcheck(
    fn: Callable[..., Tensor],
    inputs: Sequence[Any],
    *,
    rtol: float = 1e-9,
    max_elements: int | None = None,
    max_kinks: float = 0.1,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> list[InputReport]:
    """Check d(fn)/d(input) for every float64 input that is an array or a Tensor.

    fn: takes the inputs as Tensors, in order, and returns a Tensor. It must be deterministic: a function
    with dropout makes its generator anew from a fixed seed in each call.
    inputs: float64 arrays or Tensors are checked; integer arrays are passed through.
    rtol, max_elements, max_kinks, seed: see `check_tensors`. names: of the inputs, for messages.

    Returns one report per checked input. Raises GradientError on a wrong gradient, TypeError for a float
    input that is not float64, ValueError when the function is not deterministic or there is nothing to check.
    """
    op = getattr(fn, "__name__", type(fn).__name__)
    tensors = [_as_input(op, i, x) for i, x in enumerate(inputs)]
    names = names or [f"input {i}" for i in range(len(tensors))]
    checked = {name: t for name, t in zip(names, tensors, strict=True) if t.requires_grad}
    return list(
        check_tensors(
            lambda: fn(*tensors), checked, op=op, rtol=rtol, max_elements=max_elements, max_kinks=max_kinks, seed=seed
        )
    )


def check_tensors(
    fn: Callable[[], Tensor],
    tensors: Mapping[str, Tensor],
    *,
    op: str = "function",
    rtol: float = 1e-9,
    max_elements: int | None = None,
    max_kinks: float = 0.1,
    seed: int = 0,
) -> Iterator[InputReport]:
    """Check d(fn)/d(tensor) for float64 Tensors that `fn`, which takes no arguments, computes from: the
    parameters of a model, say. Their values are put back, their gradients overwritten.

    rtol: largest |analytic - numeric| / max(|analytic|, |numeric|, a thousandth of the tensor's largest
    derivative). The last term is there because a derivative near zero has no digits of its own.
    max_elements: check this many elements, drawn at random, of each larger tensor, and the derivative along
    three random directions, in which every element takes part. None: every element.
    max_kinks: the largest fraction of derivatives that may be left out as not smooth.
    seed: of the output's weighting and the random choices.

    Yields one report per tensor as it goes, and raises as `gradcheck` does.
    """
    if not tensors:
        raise ValueError(f"gradcheck of {op}: no float64 input to check")
    rng = np.random.default_rng(seed)
    for tensor in tensors.values():
        tensor.grad = None
    output = fn()
    upstream = rng.uniform(0.5, 1.5, output.shape) * rng.choice([-1.0, 1.0], output.shape)
    output.backward(output.backend.asarray(upstream))

    @no_grad()
    def objective() -> float:
        return float(np.sum(upstream * fn().numpy()))

    if objective() != objective():
        raise ValueError(f"gradcheck of {op}: two calls on equal inputs differ; fix the generator's seed inside it")
    for name, tensor in tensors.items():
        yield _check_one(op, name, tensor, objective, rng, rtol, max_elements, max_kinks)


def _as_input(op: str, position: int, x: Any) -> Tensor:
    x = x.data if isinstance(x, Tensor) else np.asarray(x)
    if x.dtype.kind == "f" and x.dtype != np.float64:
        raise TypeError(f"gradcheck of {op}: input {position} must be float64 (finite differences need it), got {x.dtype}")
    return Tensor(x.copy(), requires_grad=x.dtype == np.float64)


def _check_one(
    op: str,
    name: str,
    tensor: Tensor,
    objective: Callable[[], float],
    rng: np.random.Generator,
    rtol: float,
    max_elements: int | None,
    max_kinks: float,
) -> InputReport:
    analytic_gradient = np.zeros(tensor.shape) if tensor.grad is None else to_numpy(tensor.grad)
    if analytic_gradient.shape != tensor.shape:
        raise GradientError(f"{op}: gradient of {name} has shape {analytic_gradient.shape}, expected {tensor.shape}")

    probes: list[tuple[str, Any]] = []  # a label and the unit vector or direction to move along
    chosen = np.arange(tensor.size)
    if max_elements is not None and tensor.size > max_elements:
        chosen = np.sort(rng.choice(tensor.size, max_elements, replace=False))
        for i in range(3):
            direction = rng.standard_normal(tensor.shape)
            probes.append((f"along random direction {i}", direction / np.linalg.norm(direction)))
    probes += [(f"at index {np.unravel_index(i, tensor.shape)}", int(i)) for i in chosen]

    analytic = np.empty(len(probes))
    numeric = np.empty(len(probes))
    smooth = np.empty(len(probes), dtype=bool)
    for i, (_, probe) in enumerate(probes):
        if isinstance(probe, int):
            analytic[i] = analytic_gradient.flat[probe]
        else:
            analytic[i] = np.sum(analytic_gradient * probe)
        numeric[i], smooth[i] = _derivative(tensor, probe, objective, rtol)

    floor = 1e-3 * np.abs(numeric[smooth]).max(initial=0.0)
    scale = np.maximum(np.maximum(np.abs(analytic), np.abs(numeric)), floor)
    # Where all derivatives vanish, the differences' own rounding (about 1e-13) is all there is to compare.
    error = np.where(smooth, np.abs(analytic - numeric) / np.maximum(scale, 1e-3), 0.0)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error))) if len(probes) else 0
    if len(probes) and not error[worst] <= rtol:
        raise GradientError(
            f"{op}: gradient of {name} {probes[worst][0]} is {analytic[worst]!r}, finite differences say "
            f"{numeric[worst]!r} (relative error {error[worst]:.2e}, allowed {rtol:.0e})"
        )
    kinks = int((~smooth).sum())
    if kinks > max_kinks * len(probes):
        raise GradientError(f"{op}: {kinks} of {len(probes)} derivatives of {name} could not be measured: not smooth there")
    return InputReport(
        name,
        checked=len(probes) - kinks,
        kinks=kinks,
        max_error=float(error.max(initial=0.0)),
        median_error=float(np.median(error[smooth])) if smooth.any() else 0.0,
    )


def _derivative(tensor: Tensor, probe: Any, objective: Callable[[], float], rtol: float) -> tuple[float, bool]:
    """The derivative of `objective` along a unit vector (an index) or a direction (an array), and whether
    the function looked smooth: the extrapolation settled and the slopes on either side met."""
    base = tensor.data
    size = abs(base.flat[probe]) if isinstance(probe, int) else np.abs(base).max()
    h = STEP * max(1.0, float(size))

    def at(offset: float) -> float:
        moved = base.copy()
        if isinstance(probe, int):
            moved.flat[probe] += offset
        else:
            moved += offset * probe
        tensor.data = moved
        try:
            return objective()
        finally:
            tensor.data = base

    # Column 0: central differences, whose error is a series in h^2. Each further column cancels a term.
    centre = at(0.0)
    table: list[float] = []
    previous: list[float] = []
    bends = []  # forward minus backward difference: shrinks with the step, unless the slope jumps here
    for level in range(LEVELS):
        step = h / 2**level
        ahead, behind = at(step), at(-step)
        bends.append(abs(ahead - 2 * centre + behind) / step)
        table = [(ahead - behind) / (2 * step)]
        for column in range(1, level + 1):
            table.append(table[-1] + (table[-1] - previous[column - 1]) / (4**column - 1))
        previous, before = table, previous
    scale = max(1.0, abs(table[-1]))
    settled = abs(table[-1] - before[-1]) <= 1e3 * rtol * scale
    straightens = bends[-1] <= max(0.5 * bends[0], 1e-6 * scale)
    return table[-1], settled and straightens
