"""Checking hand-written gradients against finite differences.

For a function f of one or more arrays, fixed random weights u turn the output into one number, L(x) = sum(u * f(x)). The
check compares the engine's dL/dx with a numerical derivative: central differences at four step sizes, extrapolated to
step zero (Richardson, 1911; the table is Romberg's). In float64 this is accurate to about twelve digits. So it shows an
error of one part in a billion in a backward pass.

A function has no derivative at a kink, such as ReLU's at 0. Near a kink the extrapolation does not converge. The check
recognises such elements by that, counts them and leaves them out. The tolerance stays the same.

This file is for tests, and for users who write an operation of their own. Training does not import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.engine.backend import to_numpy
from npgpt.engine.graph import Node, no_grad, watched
from npgpt.engine.tensor import Tensor
from npgpt.engine.watch import Trace

LEVELS = 4  # step sizes h, h/2, h/4, h/8: truncation error of order h^8
STEP_SIZES = (1e-2, 1e-3, 1e-4)  # h for elements up to size 1; larger elements use larger steps in proportion
CONVERGED = 1e-10  # if the relative change by the last extrapolation is below this, no smaller h is tried


class GradientError(AssertionError):
    """An analytic gradient differs from the numerical one. The message says where and by how much."""


class NotSmoothError(GradientError):
    """Too many numerical derivatives could not be computed, so the analytic ones cannot be checked."""


@dataclass(frozen=True)
class InputReport:
    """The result of the check for one input."""

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
    """Check d(fn)/d(input) for every float64 input.

    fn: a function that takes the inputs as Tensors, in order, and returns a Tensor. It must be deterministic: a function
    with dropout makes a new generator from a fixed seed in each call.
    inputs: arrays or Tensors. float64 inputs are checked; integer inputs are passed on.
    rtol, max_elements, max_kinks, seed: see `check_tensors`.
    names: the names of the inputs in messages.

    Returns one report for each checked input. Raises GradientError for a wrong gradient, its subclass NotSmoothError if
    more than max_kinks of the derivatives cannot be computed, TypeError for a float input that is not float64, and
    ValueError if fn is not deterministic or no input is float64.
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
    """Check d(fn)/d(tensor) for float64 Tensors, such as the parameters of a model.

    fn: a function without arguments that computes a Tensor from the `tensors`.
    rtol: the largest allowed |analytic - numeric| / max(|analytic|, |numeric|, floor). The floor is a thousandth of
    the larger of two values: the tensor's largest derivative and the largest weighted output. Finite differences cannot
    resolve a derivative far below these.
    max_elements: for a tensor with more elements, check this many, chosen at random, and the derivatives along three random
    directions, which all elements contribute to. None: check every element.
    max_kinks: the largest fraction of derivatives that may be left out as not smooth.
    seed: the seed of the output's weights and of the random choices.

    Yields one report for each tensor, and leaves its values and its gradient unchanged. Raises as `gradcheck` does. The
    message of a GradientError ends with the first wrong operation on the walk back.
    """
    if not tensors:
        raise ValueError(f"gradcheck of {op}: no float64 input to check")
    rng = np.random.default_rng(seed)
    output = fn()
    upstream = rng.uniform(0.5, 1.5, output.shape) * rng.choice([-1.0, 1.0], output.shape)
    before = {name: tensor.grad for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    output.backward(output.backend.asarray(upstream))
    analytic = {name: tensor.grad for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.grad = before[name]

    @no_grad()
    def weighted() -> np.ndarray:
        return upstream * fn().numpy()

    if not np.array_equal(weighted(), weighted(), equal_nan=True):
        raise ValueError(f"gradcheck of {op}: two calls on equal inputs differ; fix the generator's seed inside it")
    for name, tensor in tensors.items():
        gradient = np.zeros(tensor.shape) if analytic[name] is None else to_numpy(analytic[name])
        try:
            report = _check_one(op, name, tensor, gradient, weighted, rng, rtol, max_elements, max_kinks)
        except NotSmoothError:
            raise
        except GradientError as error:
            culprit = first_wrong_operation(fn, tensor, upstream, rtol)
            raise GradientError(f"{error}; the first wrong operation on the way back: {culprit}") from None
        yield report


def first_wrong_operation(fn: Callable[[], Tensor], tensor: Tensor, upstream: np.ndarray, rtol: float) -> str:
    """The name of the operation whose backward pass gives `tensor` a wrong gradient.

    `upstream` is the gradient of fn's output. This function shifts the result of every operation in a random direction and
    compares the change of the output with the gradient that the walk back gave to that result. It starts at the output. The
    first result with a wrong gradient got it from an operation that used the result; that operation is wrong.
    """
    trace = Trace()
    with watched(trace):
        output = fn()
        leaves = [leaf for inputs in trace.inputs for leaf in inputs if isinstance(leaf, Tensor)]
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        output.backward(upstream)
    for leaf, grad in zip(leaves, before, strict=True):
        leaf.grad = grad
    rng = np.random.default_rng(0)
    for k in reversed(range(len(trace.names))):
        if k not in trace.gradients or not trace.gradients[k].size:
            continue
        direction = rng.standard_normal(trace.shapes[k])
        direction /= np.linalg.norm(direction)

        def at(offset: float, k: int = k, direction: np.ndarray = direction) -> np.ndarray:
            with watched(Trace((k, offset * direction))):
                return upstream * fn().numpy()

        numeric, uncertainty = _best_extrapolation(at, 1.0)
        analytic = float(np.sum(to_numpy(trace.gradients[k]) * direction))
        scale = max(abs(numeric), abs(analytic), 1e-3 * float(np.abs(at(0.0)).max(initial=0.0)))
        if uncertainty <= rtol * scale and abs(numeric - analytic) > rtol * scale:
            users = [n for n, inputs in enumerate(trace.inputs) if any(_is_operation(i, k, trace) for i in inputs)]
            return " or ".join(dict.fromkeys(trace.names[n] for n in users))
    users = [n for n, inputs in enumerate(trace.inputs) if any(i is tensor for i in inputs)]
    return " or ".join(dict.fromkeys(trace.names[n] for n in users)) or "none that uses it"


def _is_operation(source: Any, k: int, trace: Trace) -> bool:
    """Whether an input is the result of operation number k."""
    return isinstance(source, Node) and trace.number(source) == k


def _as_input(op: str, position: int, x: Any) -> Tensor:
    x = x.data if isinstance(x, Tensor) else np.asarray(x)
    if x.dtype.kind == "f" and x.dtype != np.float64:
        raise TypeError(f"gradcheck of {op}: input {position} must be float64 (finite differences need it), got {x.dtype}")
    return Tensor(x.copy(order="K"), requires_grad=x.dtype == np.float64)  # order K keeps the memory layout


def _check_one(
    op: str,
    name: str,
    tensor: Tensor,
    gradient: np.ndarray,
    output: Callable[[], np.ndarray],
    rng: np.random.Generator,
    rtol: float,
    max_elements: int | None,
    max_kinks: float,
) -> InputReport:
    probes: list[tuple[str, Any]] = []  # (label; the index of an element, or a direction, to move along)
    chosen = np.arange(tensor.size)
    if max_elements is not None and tensor.size > max_elements:
        chosen = np.sort(rng.choice(tensor.size, max_elements, replace=False))
        for i in range(3):
            direction = rng.standard_normal(tensor.shape)
            probes.append((f"along random direction {i}", direction / np.linalg.norm(direction)))
    probes += [(f"at index {tuple(map(int, np.unravel_index(i, tensor.shape)))}", int(i)) for i in chosen]

    analytic = np.empty(len(probes))
    numeric = np.empty(len(probes))
    uncertainty = np.empty(len(probes))
    for i, (_, probe) in enumerate(probes):
        if isinstance(probe, int):
            analytic[i] = gradient.flat[probe]
        else:
            analytic[i] = np.sum(gradient * probe)
        numeric[i], uncertainty[i] = _derivative(tensor, probe, output)

    # Finite differences cannot resolve a derivative far below the largest one, or far below the output.
    largest = max(np.abs(numeric[np.isfinite(uncertainty)]).max(initial=0.0), np.abs(output()).max(initial=0.0))
    floor = max(1e-3 * float(largest), np.finfo(np.float64).tiny)
    scale = np.maximum(np.maximum(np.abs(analytic), np.abs(numeric)), floor)
    smooth = uncertainty <= rtol * np.maximum(np.abs(numeric), floor)
    error = np.where(smooth, np.abs(analytic - numeric) / scale, 0.0)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error))) if len(probes) else 0
    if len(probes) and not error[worst] <= rtol:
        raise GradientError(
            f"{op}: gradient of {name} {probes[worst][0]} is {analytic[worst]:.15g}, finite differences say "
            f"{numeric[worst]:.15g} (relative error {error[worst]:.2e}, allowed {rtol:.0e})"
        )
    kinks = int((~smooth).sum())
    if kinks > max_kinks * len(probes):
        raise NotSmoothError(
            f"{op}: {kinks} of {len(probes)} derivatives of {name} could not be measured, at most {max_kinks:.0%} are allowed: "
            "the function is not smooth there, or not finite"
        )
    return InputReport(
        name,
        checked=len(probes) - kinks,
        kinks=kinks,
        max_error=float(error.max(initial=0.0)),
        median_error=float(np.median(error[smooth])) if smooth.any() else 0.0,
    )


def _derivative(tensor: Tensor, probe: Any, output: Callable[[], np.ndarray]) -> tuple[float, float]:
    """(derivative, bound on its error) of the weighted `output` along an element (probe: its index) or a direction (array)."""
    there, base = tensor.data, to_numpy(tensor.data)
    size = abs(base.flat[probe]) if isinstance(probe, int) else np.abs(base).max(initial=0.0)

    backend = tensor.backend

    def at(offset: float) -> np.ndarray:
        moved = base.copy()
        if isinstance(probe, int):
            moved.flat[probe] += offset
        else:
            moved += offset * probe
        tensor.data = backend.asarray(moved)
        try:
            return output()
        finally:
            tensor.data = there

    return _best_extrapolation(at, max(1.0, float(size)))


def _best_extrapolation(at: Callable[[float], np.ndarray], size: float) -> tuple[float, float]:
    """(derivative, bound on its error) of the sum of at(offset), at offset 0.

    Large steps are the most precise. Small steps are the least likely to reach a kink. So the step size is reduced only
    while the extrapolation does not converge.
    """
    best = (math.nan, math.inf)
    for step in STEP_SIZES:
        value, uncertainty = _extrapolate(at, step * size)
        if uncertainty < best[1]:
            best = value, uncertainty
        if best[1] <= CONVERGED * max(1.0, abs(best[0])):
            break
    return best


def _extrapolate(at: Callable[[float], np.ndarray], h: float) -> tuple[float, float]:
    """(derivative, uncertainty) from the Romberg table of central differences with steps h, h/2, h/4, ...

    The error of the first column is a series in the square of the step. Each further column removes one term of this
    series. The uncertainty is how much the last level changed the result. It is infinite if the slopes on the two sides do
    not approach each other.
    """
    centre = at(0.0)
    table: list[float] = []
    before: list[float] = []
    bends = []  # forward minus backward difference; it shrinks with the step, except at a kink
    for level in range(LEVELS):
        step = h / 2**level
        ahead, behind = at(step), at(-step)
        bends.append(float(np.abs((ahead - centre) - (centre - behind)).sum()) / step)
        previous, table = table, [float((ahead - behind).sum()) / (2 * step)]
        for column in range(1, level + 1):
            table.append(table[-1] + (table[-1] - previous[column - 1]) / (4**column - 1))
        before = previous
    straightens = bends[-1] <= max(0.5 * bends[0], 1e-6 * max(1.0, abs(table[-1])))
    return table[-1], abs(table[-1] - before[-1]) if straightens else math.inf
