"""Faster versions of some operations for a CPU. They compute what reference.py and updates.py define.

The tests compare every override with the reference, and the kernel benchmark has a row for each operation. One that gains
nothing from an override is not here. The overrides use three techniques:

- They work on blocks of rows that stay in a core's cache, and write results in place.
- They compute sums over the last axis as products with a vector, which the BLAS does several times faster.
- They save for the backward pass what is cheapest there: GELU saves its derivative; attention saves exponentials and
  divides results of size T x head_dim instead of probabilities of size T x T.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

import numpy as np

from npgpt.kernels.decode import DecodeKernels
from npgpt.kernels.reference import GELU_CUBIC, GELU_SCALE, Array, Onto, Saved
from npgpt.kernels.updates import AdamWStep

BLOCK = 65_536  # elements in a block: 256 KiB of float32, so a few blocks fit into a second-level cache
QUERY_BLOCK = 64  # queries in a block of attention; they share a range of keys
SAFE_SCORE = 40.0  # exp(40), summed over any context, is far below the largest float32


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Slices that cut n rows of `width` elements into blocks of about BLOCK elements."""
    rows = max(1, BLOCK // max(1, width))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def _as_rows(x: Array) -> Array:
    """x (..., C) as contiguous (N, C)."""
    return np.ascontiguousarray(x).reshape(prod(x.shape[:-1]), x.shape[-1])


def _column_sums(x: Array) -> Array:
    """The sum over the first axis of x (N, C), as a product."""
    return np.ones(len(x), dtype=x.dtype) @ x


COMPLEX = {np.dtype(np.float32): np.dtype(np.complex64), np.dtype(np.float64): np.dtype(np.complex128)}


def _are_complex(x: Array) -> bool:
    """Whether pairs of neighbouring elements can be seen as complex numbers."""
    return x.dtype in COMPLEX and x.strides[-1] == x.itemsize and x.size > 0


def _as_complex(x: Array) -> Array:
    """x (..., 2n) -> a complex view (..., n)."""
    return x.view(COMPLEX[x.dtype])


def _product_of_pairs(x: Array, factors: Array) -> Array:
    """x (..., 2n), whose pairs are complex numbers, times complex factors (..., n)."""
    y = np.empty(x.shape, dtype=x.dtype)
    np.multiply(_as_complex(x), factors, out=_as_complex(y))
    return y


def _exponentials(scores: Array) -> Array:
    """Scores (B, H, n_rows, seen) -> exponentials, in place; 0 for keys in the future. Returns their sums (B, H, n_rows, 1).

    The exponentials of a row may have a common factor.
    """
    n_rows, seen = scores.shape[2:]
    corner = scores[..., seen - n_rows :]  # the square on the diagonal, the only part with future keys
    if scores.dtype.itemsize >= 4 and scores.min(initial=0) >= -SAFE_SCORE and scores.max(initial=0) <= SAFE_SCORE:
        np.exp(scores, out=scores)
        corner *= np.tri(n_rows, dtype=scores.dtype)
    else:
        np.copyto(corner, -np.inf, where=~np.tri(n_rows, dtype=bool))
        with np.errstate(over="ignore"):  # as in softmax_forward of reference.py
            scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
    return (scores @ np.ones(seen, dtype=scores.dtype))[..., None]


class CpuKernels(DecodeKernels):
    """The reference kernels, with overrides that are faster in NumPy."""

    description = "NumPy"

    # ---------------------------------------------------------------- causal attention
    #
    # A block of queries is multiplied only with the keys up to its own end. So little above the
    # diagonal is computed. Let e = exp(scores), and let total be its row sums. The probabilities
    # e / total are never formed:
    #
    #   out = (keep * e) @ v * f,   f = 1 / (total (1 - dropout)),   a factor per query
    #
    # The row term of the softmax rule, sum_j dp_j p_j, equals sum_d dout_d out_d: one number per
    # query. With g = f dout and D = row term / total:
    #
    #   dv = (keep * e)^T @ g,   dscores = (keep * e) * (g @ v^T) - e * D
    #
    # Nearly always all scores are small. Then exp cannot overflow, and the maximum of each row is
    # not needed.
    #
    # The heads arrive as views into the output of the projection. Contiguous copies of them cost
    # less than the BLAS loses on such small strided operands.

    def causal_attention_forward(
        self, q: Array, k: Array, v: Array, dropout: float = 0.0, rng: Any = None
    ) -> tuple[Array, Saved]:
        b, h, n_query, head_dim = q.shape
        n_key = k.shape[2]
        past = n_key - n_query
        q = np.multiply(q, q.dtype.type(1 / sqrt(head_dim)), out=np.empty(q.shape, dtype=q.dtype))
        k, v = np.ascontiguousarray(k), np.ascontiguousarray(v)
        draws, threshold = None, 0
        if dropout > 0 and rng is not None:
            draws, threshold = self.dropout_draws((b, h, n_query, n_key), dropout, rng)
        keep = 1 - dropout if draws is not None else 1.0

        # In this memory layout, joining the heads afterwards needs no copy.
        out = np.empty((b, n_query, h, head_dim), dtype=q.dtype).transpose(0, 2, 1, 3)
        factor = np.empty((b, h, n_query, 1), dtype=q.dtype)
        blocks = []
        for start in range(0, n_query, QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, n_query))
            seen = past + rows.stop
            e = q[:, :, rows] @ k[:, :, :seen].swapaxes(-1, -2)  # (B, H, n_rows, seen)
            total = _exponentials(e)
            np.divide(1 / keep if keep else 0.0, total, out=factor[:, :, rows])
            kept = e if draws is None else (draws[:, :, rows, :seen] >= threshold) * e
            np.matmul(kept, v[:, :, :seen], out=out[:, :, rows])
            out[:, :, rows] *= factor[:, :, rows]
            blocks.append((rows, seen, e, kept))
        return out, (q, k, v, out, factor, keep, blocks)

    def causal_attention_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        q, k, v, out, factor, keep, blocks = saved
        g = np.multiply(dy, factor, out=np.empty(q.shape, dtype=q.dtype))
        row_term = np.einsum("bhtd,bhtd->bht", dy, out)[..., None] * factor * q.dtype.type(keep)
        scale = q.dtype.type(1 / sqrt(q.shape[-1]))
        new = np.empty if blocks else np.zeros  # without queries, the gradients of keys and values are zero
        dq, dk, dv = new(q.shape, dtype=q.dtype), new(k.shape, dtype=k.dtype), new(v.shape, dtype=v.dtype)
        written = False
        while blocks:  # from the last block, which sees every key; each block's memory is freed after its turn
            rows, seen, e, kept = blocks.pop()
            dv_part = kept.swapaxes(-1, -2) @ g[:, :, rows]
            ds = g[:, :, rows] @ v[:, :, :seen].swapaxes(-1, -2)
            if kept is e:
                ds -= row_term[:, :, rows]
                ds *= e
            else:
                ds *= kept
                e *= row_term[:, :, rows]
                ds -= e
            np.multiply(ds @ k[:, :, :seen], scale, out=dq[:, :, rows])
            dk_part = ds.swapaxes(-1, -2) @ q[:, :, rows]
            if written:
                dk[:, :, :seen] += dk_part
                dv[:, :, :seen] += dv_part
            else:
                dk[...], dv[...] = dk_part, dv_part
                written = True
        return dq, dk, dv

    # ---------------------------------------------------------------- rotary positions
    #
    # Two neighbouring elements are one complex number, cos and sin are another, and a rotation is their product.

    def rotary_forward(self, x: Array, rotation: Array) -> tuple[Array, Saved]:
        if not (_are_complex(x) and _are_complex(rotation) and x.dtype == rotation.dtype):
            return super().rotary_forward(x, rotation)
        return _product_of_pairs(x, _as_complex(rotation)), rotation

    def rotary_backward(self, dy: Array, saved: Saved) -> Array:
        rotation = saved
        if not (_are_complex(dy) and _are_complex(rotation) and dy.dtype == rotation.dtype):
            return super().rotary_backward(dy, saved)
        return _product_of_pairs(dy, _as_complex(rotation).conj())

    # ---------------------------------------------------------------- layer norm
    #
    # The backward pass needs mean(g) and mean(g * xhat) with g = dy * weight. They are the products
    # dy @ weight / C and (dy * xhat) @ weight / C, so g is formed only once, in place.

    def layer_norm_forward(self, x: Array, weight: Array, bias: Array | None, eps: float = 1e-5) -> tuple[Array, Saved]:
        shape, c = x.shape, x.shape[-1]
        x = _as_rows(x)
        y, xhat = np.empty_like(x), np.empty_like(x)
        rstd = np.empty((len(x), 1), dtype=x.dtype)
        ones = np.ones(c, dtype=x.dtype)
        for s in _blocks(*x.shape):
            np.subtract(x[s], (x[s] @ ones / c)[:, None], out=xhat[s])
            variance = np.einsum("ij,ij->i", xhat[s], xhat[s])[:, None] / c
            np.divide(1, np.sqrt(variance + eps), out=rstd[s])
            xhat[s] *= rstd[s]
            np.multiply(xhat[s], weight, out=y[s])
            if bias is not None:
                y[s] += bias
        return y.reshape(shape), (xhat, rstd, weight)

    def layer_norm_backward(self, dy: Array, saved: Saved, onto: Onto = (None, None)) -> tuple[Array, Array, Array]:
        xhat, rstd, weight = saved
        shape, c = dy.shape, dy.shape[-1]
        dy = _as_rows(dy)
        dx = np.empty_like(dy)
        dweight, dbias = (np.zeros_like(weight) if sums is None else sums for sums in onto)
        weight_mean = weight / c
        for s in _blocks(*dy.shape):
            product = dy[s] * xhat[s]
            dweight += _column_sums(product)
            dbias += _column_sums(dy[s])
            mean_g_xhat = product @ weight_mean
            np.multiply(dy[s], weight, out=dx[s])
            dx[s] -= (dy[s] @ weight_mean)[:, None]
            np.multiply(xhat[s], mean_g_xhat[:, None], out=product)
            dx[s] -= product
            dx[s] *= rstd[s]
        return dx.reshape(shape), dweight, dbias

    # ---------------------------------------------------------------- GELU
    #
    # With u = c x (1 + a x^2) and g = (1 + tanh u) / 2, the output is y = x g. Since dg/du = 2 g (1 - g),
    #
    #   dy/dx = g + y (1 - g) 2 du/dx,   2 du/dx = 2 c + 6 a c x^2
    #
    # The forward pass computes this derivative while x and g are in the cache, and saves it. The
    # backward pass is then a single product.

    def gelu_forward(self, x: Array) -> tuple[Array, Saved]:
        shape = x.shape
        x = np.ascontiguousarray(x).reshape(-1)
        y, slope = np.empty_like(x), np.empty_like(x)
        width = min(BLOCK, x.size)
        scratch_square, scratch_g = np.empty(width, dtype=x.dtype), np.empty(width, dtype=x.dtype)
        for s in _blocks(x.size, 1):
            xs, ys, slopes = x[s], y[s], slope[s]
            square, g = scratch_square[: xs.size], scratch_g[: xs.size]
            np.multiply(xs, xs, out=square)
            np.multiply(square, GELU_SCALE * GELU_CUBIC, out=g)
            g += GELU_SCALE
            g *= xs
            np.tanh(g, out=g)
            g *= 0.5
            g += 0.5
            np.multiply(xs, g, out=ys)
            np.subtract(1, g, out=slopes)
            slopes *= ys
            square *= 6 * GELU_SCALE * GELU_CUBIC
            square += 2 * GELU_SCALE
            slopes *= square
            slopes += g
        return y.reshape(shape), slope.reshape(shape)

    def gelu_backward(self, dy: Array, saved: Saved) -> Array:
        slope = saved
        return dy * slope

    # ---------------------------------------------------------------- embedding

    def embedding_backward(self, dy: Array, saved: Saved, onto: Array | None = None) -> Array:
        """Sort the rows by id. Rows of equal id are then neighbours, and each run of them is summed at once."""
        shape, ids = saved
        dweight = np.zeros(shape, dtype=dy.dtype) if onto is None else onto
        if ids.size:
            ids = ids.reshape(-1)
            order = np.argsort(ids, kind="stable")
            ordered = ids[order]
            starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
            dweight[ordered[starts]] += np.add.reduceat(_as_rows(dy)[order], starts, axis=0)
        return dweight

    # ---------------------------------------------------------------- AdamW

    def adamw(self, parameter: Array, gradient: Array, exp_avg: Array, exp_avg_sq: Array, numbers: AdamWStep) -> None:
        """The operations of the reference in the same order, one block at a time."""
        arrays = (parameter, gradient, exp_avg, exp_avg_sq)
        step, lr, (beta1, beta2), eps, weight_decay, n_decay, scale = numbers
        if scale is not None or not all(a.flags.c_contiguous for a in arrays):
            super().adamw(*arrays, numbers)
            return
        p, g, m, v = (a.reshape(-1) for a in arrays)
        scratch, update = np.empty(min(BLOCK, p.size), dtype=p.dtype), np.empty(min(BLOCK, p.size), dtype=p.dtype)
        for s in _blocks(p.size, 1):
            ps, gs, ms, vs = p[s], g[s], m[s], v[s]
            t, u = scratch[: ps.size], update[: ps.size]
            np.multiply(gs, 1 - beta1, out=t)
            ms *= beta1
            ms += t
            np.multiply(gs, gs, out=t)
            t *= 1 - beta2
            vs *= beta2
            vs += t
            np.divide(vs, 1 - beta2**step, out=t)
            np.sqrt(t, out=t)
            t += eps
            np.multiply(ms, lr / (1 - beta1**step), out=u)
            u /= t
            decayed = ps if n_decay is None else ps[: max(0, n_decay - s.start)]
            decayed *= 1 - lr * weight_decay
            ps -= u
