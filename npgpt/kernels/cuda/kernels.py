"""The operations on an NVIDIA GPU that pay for a kernel of their own: what is launched, with which arrays.

The kernels are in the `.cu` files beside this one, a family a file; what they compute is defined by reference.py. Here
is how their arguments come about: layout, dtype, sizes, room for results. What has no kernel, and dtypes that are not in
ELEMENTS, go to the reference, which runs on CuPy's arrays.

Activations may be bfloat16. Parameters, their gradients, losses and whatever is summed up are then float32: a weight is
rounded where it meets an activation.

`launch` starts a kernel. It is a parameter, so that the same arguments can meet the same sources compiled for a CPU.
"""

from __future__ import annotations

import functools
from math import isqrt, prod, sqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from npgpt.kernels.cuda.products import Gemm, product
from npgpt.kernels.reference import Array, Kernels, Saved

FILES = ("common.cu", "norm.cu", "elementwise.cu", "softmax.cu", "embedding.cu")
# T of common.cu, the name of A in C++, and A.
ELEMENTS: dict[str, tuple[str, str, np.dtype]] = {
    "float32": ("float", "float", np.dtype(np.float32)),
    "float64": ("double", "double", np.dtype(np.float64)),
    "bfloat16": ("bfloat16", "float", np.dtype(np.float32)),
}
THREADS = 256  # of a block
MOST_BLOCKS = 4096  # of an elementwise kernel, whose threads go on to further elements
MOST_BLOCKS_OF_A_SUM = 256  # whose warps leave a sum each
CHUNK = 64  # rows added up by a thread, one after the other, at least
MOST_CHUNKS = 65_535  # the largest second dimension of a grid
MOST_PARTIAL = 1 << 24  # elements of an embedding's partial sums


def source() -> str:
    """All kernels, as one text for the compiler."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in FILES)


def compiler_options(dtype: str) -> tuple[str, ...]:
    """What the compiler is told so that arrays hold `dtype`."""
    element, accumulator, _ = ELEMENTS[dtype]
    return ("-std=c++14", f"-DSCALAR={element}", f"-DACCUMULATOR={accumulator}")


class Launch(Protocol):
    def __call__(self, name: str, dtype: str, grid: tuple[int, int], threads: int, arguments: tuple[Any, ...]) -> None:
        """Run the kernel `name` for `dtype` on a grid of blocks of threads. Arguments are arrays, None (a null pointer),
        integers (long long) and floats (double)."""


class CudaLaunch:
    """Launches on the current GPU, through CuPy. Each module is compiled when first needed, and kept by CuPy on disk."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kernel, self._module = functools.cache(self._find), functools.cache(self._compile)

    def __call__(self, name: str, dtype: str, grid: tuple[int, int], threads: int, arguments: tuple[Any, ...]) -> None:
        self._kernel(name, dtype)(grid, (threads,), tuple(np.uint64(0) if a is None else a for a in arguments))

    def _find(self, name: str, dtype: str) -> Any:
        return self._module(dtype).get_function(name)

    def _compile(self, dtype: str) -> Any:
        return self._cupy.RawModule(code=source(), options=compiler_options(dtype))


class Key:
    """Stands for a generator of random numbers on a GPU: they are a function of a key, of how often it was used before,
    and of the element, so that a backward pass draws the same again. See philox in common.cu."""

    def __init__(self, key: int) -> None:
        """key: below 2**63."""
        self.key, self.uses = key, 0

    def use(self) -> tuple[int, int]:
        """What one operation draws with: the key, and a number no other operation gets."""
        self.uses += 1
        return self.key, self.uses - 1


class Own(tuple[Any, ...]):
    """What a forward pass of this file saves, for its own backward pass; the reference's saves something else."""


class CudaKernels(Kernels):
    """The reference kernels with faster versions for CuPy's arrays."""

    def __init__(self, xp: Any, launch: Launch, gemm: Gemm) -> None:
        super().__init__(xp)
        self._launch, self.gemm = launch, gemm

    def _product(self, a: Array, b: Array, dtype: Any = None) -> Array:
        return product(self.xp, self.gemm, a, b, dtype)

    # ---------------------------------------------------------------- linear

    def linear_forward(self, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Saved]:
        if not (_activation(x) and _parameters_of(x, weight, bias)):
            return super().linear_forward(x, weight, bias)
        rows, rounded = x.reshape(prod(x.shape[:-1]), x.shape[-1]), weight.astype(x.dtype, copy=False)
        y = self._product(rows, rounded)
        if bias is not None and y.size:
            grid = -(-y.shape[1] // THREADS), min(MOST_BLOCKS, y.shape[0])
            self._launch("add_bias", y.dtype.name, grid, THREADS, (y, self.xp.ascontiguousarray(bias), *y.shape))
        return y.reshape(*x.shape[:-1], weight.shape[-1]), Own((rows, rounded, x.shape))

    def linear_backward(
        self, dy: Array, saved: Saved, needs: tuple[bool, bool, bool] = (True, True, True)
    ) -> tuple[Array | None, Array | None, Array | None]:
        if not isinstance(saved, Own):
            return super().linear_backward(dy, saved, needs)
        rows, weight, x_shape = saved
        dy = dy.reshape(len(rows), weight.shape[-1])
        dx = self._product(dy, weight.T).reshape(x_shape) if needs[0] else None
        dweight = self._product(rows.T, dy, _parameter_dtype(rows)) if needs[1] else None
        return dx, dweight, self._column_sums(dy) if needs[2] else None

    def _column_sums(self, x: Array) -> Array:
        """x (n, c) -> (c,), as parameters are."""
        x, (n, c) = self.xp.ascontiguousarray(x), x.shape
        if not x.size:
            return self.xp.zeros(c, dtype=_parameter_dtype(x))
        chunk, chunks = _chunks(n)
        partial = self.xp.empty((chunks, c), dtype=_parameter_dtype(x))
        self._launch("column_sums", x.dtype.name, (-(-c // THREADS), chunks), THREADS, (x, partial, n, c, chunk))
        return self._sum_of_rows(partial)

    # ---------------------------------------------------------------- dropout

    def dropout_draws(self, shape: tuple[int, ...], p: float, rng: Any) -> tuple[Array, int]:
        draws = self.xp.empty(shape, dtype=np.uint16)
        n, c = _rows_and_columns(shape)
        if draws.size:
            self._launch("draw", "float32", _elementwise(n * -(-c // 8)), THREADS, (draws, n, c, *rng.use()))
        return draws, round(p * 65536)

    def dropout_forward(self, x: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not _activation(x):
            return super().dropout_forward(x, p, rng)
        drawn = Own(_drawn(p, rng))
        return self._dropout(x, drawn), drawn

    def dropout_backward(self, dy: Array, saved: Saved) -> Array:
        return self._dropout(dy, saved) if isinstance(saved, Own) else super().dropout_backward(dy, saved)

    def residual_forward(self, x: Array, branch: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        if not _activation(x, branch):
            return super().residual_forward(x, branch, p, rng)
        drawn = Own(_drawn(p, rng))
        return self._dropout(branch, drawn, onto=x), drawn

    def _dropout(self, x: Array, drawn: tuple[Any, ...], onto: Array | None = None) -> Array:
        y = self.xp.empty(x.shape, dtype=x.dtype)
        x, onto = self.xp.ascontiguousarray(x), None if onto is None else self.xp.ascontiguousarray(onto)
        n, c = _rows_and_columns(y.shape)
        if x.size:
            self._launch("dropout", x.dtype.name, _elementwise(n * -(-c // 8)), THREADS, (x, onto, y, n, c, *drawn))
        return y

    # ---------------------------------------------------------------- causal attention
    #
    # The heads are taken out of the projection's output once, side by side as the products want them.

    def causal_attention_forward(
        self, q: Array, k: Array, v: Array, dropout: float = 0.0, rng: Any = None
    ) -> tuple[Array, Saved]:
        if not (_activation(q, k, v) and q.size):
            return super().causal_attention_forward(q, k, v, dropout, rng)
        q, k, v = (self.xp.ascontiguousarray(x) for x in (q, k, v))
        p = self._product(q, k.swapaxes(-1, -2))  # scores, then probabilities in their place
        kept, drawn = None, (0, 0, 0, 1.0)
        if dropout > 0 and rng is not None:
            kept = self.xp.empty_like(p)
            drawn = _drawn(dropout, rng)
        sizes = _attention_sizes(q, k)
        scale = 1 / sqrt(q.shape[-1])
        self._launch("causal_softmax_forward", p.dtype.name, _rows(sizes[0]), THREADS, (p, p, kept, *sizes, scale, *drawn))
        kept = p if kept is None else kept
        return self._product(kept, v), Own((q, k, v, p, kept, scale, drawn))

    def causal_attention_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        if not isinstance(saved, Own):
            return super().causal_attention_backward(dy, saved)
        q, k, v, p, kept, scale, drawn = saved
        dy = self.xp.ascontiguousarray(dy)
        dv = self._product(kept.swapaxes(-1, -2), dy)
        ds = self._product(dy, v.swapaxes(-1, -2))
        sizes = _attention_sizes(q, k)
        self._launch("causal_softmax_backward", ds.dtype.name, _rows(sizes[0]), THREADS, (ds, p, ds, *sizes, scale, *drawn))
        return self._product(ds, k), self._product(ds.swapaxes(-1, -2), q), dv

    # ---------------------------------------------------------------- layer norm

    def layer_norm_forward(self, x: Array, weight: Array, bias: Array | None, eps: float = 1e-5) -> tuple[Array, Saved]:
        if not (_activation(x) and _parameters_of(x, weight, bias) and x.size):
            return super().layer_norm_forward(x, weight, bias, eps)
        x, weight = self.xp.ascontiguousarray(x), self.xp.ascontiguousarray(weight)
        bias = None if bias is None else self.xp.ascontiguousarray(bias)
        n, c = _rows_and_columns(x.shape)
        y, mean, rstd = self.xp.empty_like(x), *(self.xp.empty(n, dtype=weight.dtype) for _ in range(2))
        self._launch("layer_norm_forward", x.dtype.name, _rows(n), THREADS, (x, weight, bias, y, mean, rstd, n, c, float(eps)))
        return y, Own((x, weight, mean, rstd))

    def layer_norm_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        if not isinstance(saved, Own):
            return super().layer_norm_backward(dy, saved)
        x, weight, mean, rstd = saved
        dy, dtype = self.xp.ascontiguousarray(dy), x.dtype.name
        n, c = _rows_and_columns(x.shape)
        dx = self.xp.empty_like(x)
        self._launch("layer_norm_backward", dtype, _rows(n), THREADS, (dy, x, weight, mean, rstd, dx, n, c))
        chunk, chunks = _chunks(n)
        partial = self.xp.empty((chunks, 2, c), dtype=weight.dtype)
        arguments = (dy, x, mean, rstd, partial, n, c, chunk)
        self._launch("layer_norm_backward_weight", dtype, (-(-c // THREADS), chunks), THREADS, arguments)
        dweight, dbias = self._sum_of_rows(partial)
        return dx, dweight, dbias

    def _sum_of_rows(self, x: Array) -> Array:
        y = self.xp.empty(x.shape[1:], dtype=x.dtype)
        self._launch("sum_of_rows", x.dtype.name, _elementwise(y.size), THREADS, (x, y, len(x), y.size))
        return y

    # ---------------------------------------------------------------- GELU

    def gelu_forward(self, x: Array) -> tuple[Array, Saved]:
        if not (_activation(x) and x.size):
            return super().gelu_forward(x)
        y = self.xp.empty(x.shape, dtype=x.dtype)
        x = self.xp.ascontiguousarray(x)
        self._launch("gelu_forward", x.dtype.name, _elementwise(x.size), THREADS, (x, y, x.size))
        return y, Own((x,))

    def gelu_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, Own):
            return super().gelu_backward(dy, saved)
        (x,) = saved
        dx = self.xp.empty(dy.shape, dtype=x.dtype)
        arguments = (self.xp.ascontiguousarray(dy), x, dx, x.size)
        self._launch("gelu_backward", x.dtype.name, _elementwise(x.size), THREADS, arguments)
        return dx

    # ---------------------------------------------------------------- embedding

    def embedding_backward(self, dy: Array, saved: Saved) -> Array:
        """Tables added up by chunks of rows, then these: no atomic additions, so the same sum every time."""
        (v, c), ids = saved
        n = ids.size
        if not (_activation(dy) and n and c):
            return super().embedding_backward(dy, saved)
        chunk = max(CHUNK, -(-n * v * c // MOST_PARTIAL), -(-n // MOST_CHUNKS))
        partial = self.xp.empty((-(-n // chunk), v, c), dtype=_parameter_dtype(dy))
        dy, ids = self.xp.ascontiguousarray(dy), self.xp.ascontiguousarray(ids, dtype=np.int64)
        grid = (-(-c // THREADS), len(partial))
        self._launch("embedding_backward", dy.dtype.name, grid, THREADS, (dy, ids, partial, n, c, v, chunk))
        return self._sum_of_rows(partial)

    # ---------------------------------------------------------------- cross-entropy

    def cross_entropy_forward(self, logits: Array, targets: Array) -> tuple[Array, Saved]:
        if not (_activation(logits) and logits.size):
            return super().cross_entropy_forward(logits, targets)
        xp = self.xp
        losses, largest, log_total = (xp.empty(targets.shape, dtype=_parameter_dtype(logits)) for _ in range(3))
        logits, targets = xp.ascontiguousarray(logits), xp.ascontiguousarray(targets, dtype=np.int64)
        n, v = _rows_and_columns(logits.shape)
        arguments = (logits, targets, losses, largest, log_total, n, v)
        self._launch("cross_entropy_forward", logits.dtype.name, _rows(n), THREADS, arguments)
        return losses, Own((logits, targets, largest, log_total))

    def cross_entropy_backward(self, dy: Array, saved: Saved) -> Array:
        if not isinstance(saved, Own):
            return super().cross_entropy_backward(dy, saved)
        logits, targets, largest, log_total = saved
        dlogits = self.xp.empty_like(logits)
        n, v = _rows_and_columns(logits.shape)
        arguments = (self.xp.ascontiguousarray(dy), logits, targets, largest, log_total, dlogits, n, v)
        self._launch("cross_entropy_backward", logits.dtype.name, _rows(n), THREADS, arguments)
        return dlogits

    # ---------------------------------------------------------------- clipping, AdamW
    #
    # Whether a step may change the weights is decided here and not by the processor, which would have to wait for the loss.

    def clip(self, gradient: Array, loss: Array, max_norm: float, scale: Array) -> Array:
        if not (_parameters(gradient, loss, scale) and gradient.size and gradient.flags.c_contiguous):
            return super().clip(gradient, loss, max_norm, scale)
        dtype, blocks = gradient.dtype, min(MOST_BLOCKS_OF_A_SUM, -(-gradient.size // THREADS))
        partial, seen = self.xp.empty(blocks * (THREADS // 32), dtype=dtype), self.xp.empty(2, dtype=dtype)
        self._launch("sum_of_squares", dtype.name, (blocks, 1), THREADS, (gradient, partial, gradient.size))
        arguments = (partial, partial.size, loss, float(max_norm), scale, seen)
        self._launch("clip", dtype.name, (1, 1), 32, arguments)
        return seen

    def adamw(
        self,
        parameter: Array,
        gradient: Array,
        exp_avg: Array,
        exp_avg_sq: Array,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        n_decay: int | None = None,
        scale: Array | None = None,
    ) -> None:
        arrays = (parameter, gradient, exp_avg, exp_avg_sq)
        if not (_parameters(*arrays) and parameter.size and all(a.flags.c_contiguous for a in arrays)):
            settings: dict[str, Any] = {"step": step, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            super().adamw(*arrays, **settings, n_decay=n_decay, scale=scale)
            return
        beta1, beta2 = betas
        numbers = (lr, beta1, beta2, 1 - beta1**step, 1 - beta2**step, eps, weight_decay)
        sizes = (parameter.size, parameter.size if n_decay is None else n_decay)
        arguments = (*arrays, scale, *sizes, *map(float, numbers))
        self._launch("adamw", parameter.dtype.name, _elementwise(parameter.size), THREADS, arguments)


def _activation(*arrays: Array) -> bool:
    """Whether there are kernels for arrays of this one dtype."""
    return all(a.dtype.name in ELEMENTS and a.dtype == arrays[0].dtype for a in arrays)


def _parameters(*arrays: Array) -> bool:
    """Whether there are kernels for parameters of this one dtype."""
    return _activation(*arrays) and arrays[0].dtype == _parameter_dtype(arrays[0])


def _parameters_of(x: Array, *parameters: Array | None) -> bool:
    """Whether these have the dtype that parameters have beside activations like x."""
    return all(p is None or p.dtype == _parameter_dtype(x) for p in parameters)


def _parameter_dtype(x: Array) -> np.dtype:
    return ELEMENTS[x.dtype.name][2]


def _chunks(n: int) -> tuple[int, int]:
    """(rows in a chunk, number of chunks) for sums over n rows: about as many of the one as of the other."""
    chunk = max(CHUNK, isqrt(n), -(-n // MOST_CHUNKS))
    return chunk, -(-n // chunk)


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """An array as rows along its last axis."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def _drawn(p: float, rng: Key) -> tuple[int, int, int, float]:
    """What dropout's kernels are told: key and use, from which draw on an element is kept, and by what it is scaled."""
    return *rng.use(), round(p * 65536), float(1 / (1 - p)) if p < 1 else 0.0


def _attention_sizes(q: Array, k: Array) -> tuple[int, int, int]:
    return prod(q.shape[:-1]), q.shape[-2], k.shape[-2]


def _rows(n: int) -> tuple[int, int]:
    """The grid for n rows, a warp each."""
    return -(-n // (THREADS // 32)), 1


def _elementwise(n: int) -> tuple[int, int]:
    return min(MOST_BLOCKS, -(-n // THREADS)), 1
