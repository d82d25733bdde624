"""The definition of every neural operation: a forward and a backward pass on plain arrays.

Each operation is a pair of methods:

    y, saved = x_forward(inputs...)        saved: what the backward pass needs
    gradients = x_backward(dy, saved)      dy: the gradient of the loss L with respect to y, in the shape of y

Every method is written once, against `xp`, which is NumPy or CuPy, and for any float dtype. This file is meant to be
read. A faster version of an operation belongs in a subclass, and the tests compare it with the version here. There are
no Tensors here, no checks for devices and no tricks.

No method writes to its arguments, except where its docstring says so. `dy` may be a read-only broadcast view.
"""

from __future__ import annotations

from math import pi, prod, sqrt
from typing import Any

import numpy as np

from npgpt.kernels.updates import Array, Updates

Saved = Any  # what a forward pass keeps for its own backward pass

GELU_SCALE = sqrt(2 / pi)
GELU_CUBIC = 0.044715

# Where a parameter has an array for its gradient already, a backward pass adds to that array and returns it. This saves a new
# array and a pass over it. Such an array is contiguous, has the dtype of the parameter, and overlaps no other argument.
Onto = tuple["Array | None", "Array | None"]


def added(gradient: Array, onto: Array | None) -> Array:
    """A gradient, added to `onto` if there is one."""
    if onto is None:
        return gradient
    onto += gradient
    return onto


class Kernels(Updates):
    """Every operation, on arrays of the module `xp` (`numpy` or `cupy`)."""

    # ---------------------------------------------------------------- linear
    #
    # y = x @ weight + bias over the last axis. All leading axes are flattened first, so the whole
    # batch is one matrix product of N rows. With the matrices x (N, in) and dy (N, out):
    #
    #   y[n, j] = sum_i x[n, i] weight[i, j] + bias[j]
    #   dx = dy @ weight^T          every output j sends its gradient back along weight[:, j]
    #   dweight = x^T @ dy          weight[i, j] is used once in each row n: a sum over rows
    #   dbias = dy summed over rows

    def linear_forward(self, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Saved]:
        """x (..., in), weight (in, out), bias (out,) or None -> y (..., out)."""
        rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        y = rows @ weight
        if bias is not None:
            y += bias
        return y.reshape(*x.shape[:-1], weight.shape[-1]), (rows, weight, x.shape)

    def linear_backward(
        self, dy: Array, saved: Saved, needs: tuple[bool, bool, bool] = (True, True, True), onto: Onto = (None, None)
    ) -> tuple[Array | None, Array | None, Array | None]:
        """-> dx, dweight, dbias. `needs` says which of them are wanted; the others are None.

        dweight and dbias are added to the arrays of `onto`, in place.
        """
        rows, weight, x_shape = saved
        dy = dy.reshape(len(rows), weight.shape[-1])
        dx = (dy @ weight.T).reshape(x_shape) if needs[0] else None
        dweight = added(rows.T @ dy, onto[0]) if needs[1] else None
        dbias = added(dy.sum(axis=0), onto[1]) if needs[2] else None
        return dx, dweight, dbias

    # ---------------------------------------------------------------- softmax
    #
    # p_i = exp(x_i) / sum_j exp(x_j) along one axis. Subtracting the maximum from x leaves the
    # quotient unchanged and keeps exp from overflowing. With dp_i/dx_j = p_i (1[i = j] - p_j):
    #
    #   dx_j = sum_i dp_i p_i (1[i = j] - p_j) = p_j (dp_j - sum_i dp_i p_i)
    #
    # A row whose elements are all -inf (a query that may attend to nothing) has no distribution. Its
    # probabilities are zeros, and so is its gradient.

    def softmax_forward(self, x: Array, axis: int = -1) -> tuple[Array, Saved]:
        """x -> probabilities of the shape of x; they sum to one along `axis`."""
        xp = self.xp
        top = x.max(axis=axis, keepdims=True)
        top = xp.where(xp.isneginf(top), 0, top).astype(x.dtype, copy=False)
        with np.errstate(over="ignore"):  # a difference below the dtype's range becomes -inf, and exp(-inf) is 0
            p = xp.exp(x - top)
        total = p.sum(axis=axis, keepdims=True)
        p /= total + (total == 0)
        return p, (p, axis)

    def softmax_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dx."""
        p, axis = saved
        return p * (dy - (dy * p).sum(axis=axis, keepdims=True))

    # ---------------------------------------------------------------- masked fill
    #
    # Where the mask is true, the output is a constant. No gradient passes there.

    def masked_fill_forward(self, x: Array, mask: Array, value: float) -> tuple[Array, Saved]:
        """y = value where mask (broadcast against x) is true; y = x elsewhere."""
        return self.xp.where(mask, self.xp.asarray(value, dtype=x.dtype), x), mask

    def masked_fill_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dx."""
        mask = saved
        return self.xp.where(mask, self.xp.zeros((), dtype=dy.dtype), dy)

    # ---------------------------------------------------------------- dropout
    #
    # "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (Srivastava et al., 2014),
    # in the inverted form: the elements that stay are scaled by 1 / (1 - p). The expectation is
    # then x, and nothing has to change when dropout is off.

    def dropout_draws(self, shape: tuple[int, ...], p: float, rng: Any) -> tuple[Array, int]:
        """-> (draws, threshold). An element stays where draws >= threshold.

        A draw is one of 65,536 equally likely integers, so p is rounded to a multiple of 1/65536. Each 64-bit random
        number gives four draws. This is several times faster than drawing one float for each element.
        """
        n = prod(shape)
        bits = rng.integers(0, 2**64, size=(n + 3) // 4, dtype=np.uint64)
        return bits.view(np.uint16)[:n].reshape(shape), round(p * 65536)

    def dropout_forward(self, x: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        """Set each element to zero with probability p, 0 <= p <= 1. `rng` is the random generator."""
        draws, threshold = self.dropout_draws(x.shape, p, rng)
        scaled_mask = (draws >= threshold) * x.dtype.type(1 / (1 - p) if p < 1 else 0)
        return x * scaled_mask, scaled_mask

    def dropout_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dx: dy with the same mask and scale."""
        scaled_mask = saved
        return dy * scaled_mask

    # Every branch of a transformer block ends with a residual connection: x + dropout(branch).

    def residual_forward(self, x: Array, branch: Array, p: float, rng: Any) -> tuple[Array, Saved]:
        """x and branch, of the same shape -> y = x + dropout(branch)."""
        y, saved = self.dropout_forward(branch, p, rng)
        y += x
        return y, saved

    def residual_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array]:
        """-> dx, dbranch."""
        return dy, self.dropout_backward(dy, saved)

    # ---------------------------------------------------------------- causal attention
    #
    # "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.1, with a decoder's mask:
    #
    #   scores = q @ k^T / sqrt(head_dim);  p = softmax(scores, where not in the future)
    #   out = dropout(p) @ v
    #
    # The backward pass takes these steps in reverse: dv = dropout(p)^T @ dout; dp = dout @ v^T, with
    # the dropout mask applied; then the softmax rule; then the two factors of the product q @ k^T.
    # Masked scores have p = 0, so the softmax rule gives them no gradient.

    def causal_attention_forward(
        self, q: Array, k: Array, v: Array, dropout: float = 0.0, rng: Any = None
    ) -> tuple[Array, Saved]:
        """q (B, H, T, head_dim); k and v (B, H, S, head_dim), S >= T -> out (B, H, T, head_dim).

        The T queries are the last T of the S positions: query t sees the keys 0 .. S - T + t. With
        S = T the mask is the usual lower triangle. With `rng` None there is no dropout.
        """
        xp = self.xp
        n_query, n_key = q.shape[-2], k.shape[-2]
        scale = q.dtype.type(1 / sqrt(q.shape[-1]))
        scores = (q @ k.swapaxes(-1, -2)) * scale  # (B, H, T, S)
        future = xp.arange(n_key) > xp.arange(n_key - n_query, n_key)[:, None]
        masked, _ = self.masked_fill_forward(scores, future, -xp.inf)
        p, saved_softmax = self.softmax_forward(masked)
        saved_dropout = None
        if dropout > 0 and rng is not None:
            p, saved_dropout = self.dropout_forward(p, dropout, rng)
        return p @ v, (q, k, v, scale, p, saved_softmax, saved_dropout)

    def causal_attention_backward(self, dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """-> dq, dk, dv."""
        q, k, v, scale, p, saved_softmax, saved_dropout = saved
        dv = p.swapaxes(-1, -2) @ dy
        dp = dy @ v.swapaxes(-1, -2)
        if saved_dropout is not None:
            dp = self.dropout_backward(dp, saved_dropout)
        dscores = self.softmax_backward(dp, saved_softmax) * scale
        dq = dscores @ k
        dk = dscores.swapaxes(-1, -2) @ q
        return dq, dk, dv

    # The same for queries, keys and values that one layer has computed side by side. `split_heads` and `merge_heads` are
    # inverse to each other: they only change the places of elements.

    def self_attention_forward(self, qkv: Array, dropout: float = 0.0, rng: Any = None) -> tuple[Array, Saved]:
        """qkv (B, T, 3, H, head_dim) -> out (B, T, H, head_dim)."""
        out, saved = self.causal_attention_forward(*self.split_heads(qkv), dropout, rng)
        return out.swapaxes(1, 2), saved

    def self_attention_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dqkv."""
        return self.merge_heads(*self.causal_attention_backward(dy.swapaxes(1, 2), saved))

    def split_heads(self, qkv: Array) -> tuple[Array, Array, Array]:
        """(B, T, 3, H, head_dim) -> three of (B, H, T, head_dim)."""
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))
        return q, k, v

    def merge_heads(self, q: Array, k: Array, v: Array) -> Array:
        """Three of (B, H, T, head_dim) -> (B, T, 3, H, head_dim)."""
        b, h, t, head_dim = q.shape
        qkv = self.xp.empty((b, t, 3, h, head_dim), dtype=q.dtype)
        for i, part in enumerate((q, k, v)):
            qkv[:, :, i] = part.swapaxes(1, 2)
        return qkv

    # ---------------------------------------------------------------- rotary positions
    #
    # "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al., 2021), section 3.2.2. Two neighbouring
    # elements of a query or a key are a point in a plane. At position m, plane i is turned by the angle a = m theta_i:
    #
    #   y[2i]     = cos(a) x[2i] - sin(a) x[2i + 1]
    #   y[2i + 1] = sin(a) x[2i] + cos(a) x[2i + 1]
    #
    # Turning both points of a product by the same angle does not change it. So the product of a query at m and a key at n
    # depends on m - n only. The inverse of a rotation is its transpose, so the gradient is turned back by the same angle.

    def rotary_forward(self, x: Array, rotation: Array) -> tuple[Array, Saved]:
        """x (..., head_dim), rotation (..., head_dim) that broadcasts against x -> y in the shape of x.

        The elements 2i and 2i + 1 of the rotation are cos and sin of the angle of plane i.
        """
        return self._turned(x, rotation[..., 0::2], rotation[..., 1::2]), rotation

    def rotary_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dx."""
        rotation = saved
        return self._turned(dy, rotation[..., 0::2], -rotation[..., 1::2])

    def _turned(self, x: Array, cos: Array, sin: Array) -> Array:
        y = self.xp.empty(x.shape, dtype=x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        y[..., 0::2] = cos * even - sin * odd
        y[..., 1::2] = sin * even + cos * odd
        return y

    # ---------------------------------------------------------------- layer norm
    #
    # "Layer Normalization" (Ba, Kiros, Hinton, 2016). Over the last axis, of size C:
    #
    #   xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps);   y = xhat * weight + bias
    #
    # The gradient at xhat is g = dy * weight. Three paths lead from xhat back to x: the element
    # itself; the mean, which moves every element by -1/C; and the variance, which scales every
    # element and whose derivative contains xhat. Their sum is a projection of g. It removes the
    # component of g along the constant vector and the component along xhat. A change of x in these
    # two directions does not change xhat, so dx has no component along them:
    #
    #   dx = rstd * (g - mean(g) - xhat * mean(g * xhat))

    def layer_norm_forward(self, x: Array, weight: Array, bias: Array | None, eps: float = 1e-5) -> tuple[Array, Saved]:
        """x (..., C), weight (C,), bias (C,) or None -> y (..., C)."""
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        rstd = 1 / self.xp.sqrt(variance + x.dtype.type(eps))
        xhat = centred * rstd
        y = xhat * weight
        if bias is not None:
            y += bias
        return y, (xhat, rstd, weight)

    def layer_norm_backward(self, dy: Array, saved: Saved, onto: Onto = (None, None)) -> tuple[Array, Array, Array]:
        """-> dx, dweight, dbias. The last two are added to the arrays of `onto`, in place."""
        xhat, rstd, weight = saved
        g = dy * weight
        mean_g = g.mean(axis=-1, keepdims=True)
        mean_g_xhat = (g * xhat).mean(axis=-1, keepdims=True)
        dx = rstd * (g - mean_g - xhat * mean_g_xhat)
        leading = tuple(range(dy.ndim - 1))
        return dx, added((dy * xhat).sum(axis=leading), onto[0]), added(dy.sum(axis=leading), onto[1])

    # ---------------------------------------------------------------- activations
    #
    # GELU in the tanh form of GPT-2, "Gaussian Error Linear Units" (Hendrycks, Gimpel, 2016), section 2:
    #
    #   y = x/2 (1 + t),  t = tanh(u),  u = sqrt(2/pi) (x + 0.044715 x^3)
    #   dy/dx = (1 + t)/2 + x/2 (1 - t^2) du/dx,  du/dx = sqrt(2/pi) (1 + 3 * 0.044715 x^2)

    def gelu_forward(self, x: Array) -> tuple[Array, Saved]:
        """x -> y, elementwise."""
        t = self.xp.tanh(GELU_SCALE * (x + GELU_CUBIC * (x * x * x)))
        return 0.5 * x * (1 + t), (x, t)

    def gelu_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dx."""
        x, t = saved
        du_dx = GELU_SCALE * (1 + 3 * GELU_CUBIC * (x * x))
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du_dx)

    def relu_forward(self, x: Array) -> tuple[Array, Saved]:
        """y = max(x, 0)."""
        return self.xp.maximum(x, 0), x > 0

    def relu_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dx. At the kink x = 0 the gradient is defined as 0."""
        positive = saved
        return dy * positive

    # ---------------------------------------------------------------- embedding
    #
    # y[n] = weight[ids[n]]: rows picked from a table. The gradient of a row is the sum over all its
    # uses. A row that is never picked has gradient zero.

    def embedding_forward(self, weight: Array, ids: Array) -> tuple[Array, Saved]:
        """weight (V, C), ids (...) integers in [0, V) -> y (..., C)."""
        return weight[ids], (weight.shape, ids)

    def embedding_backward(self, dy: Array, saved: Saved, onto: Array | None = None) -> Array:
        """-> dweight, which is added to `onto`, in place."""
        shape, ids = saved
        dweight = self.xp.zeros(shape, dtype=dy.dtype) if onto is None else onto
        self.xp.add.at(dweight, ids, dy)
        return dweight

    # ---------------------------------------------------------------- cross-entropy
    #
    # The loss at one position is -log softmax(logits)[target] = logsumexp(logits) - logits[target].
    # The derivative of logsumexp is the softmax p, so
    #
    #   dlogits = dy * (p - onehot(target))

    def cross_entropy_forward(self, logits: Array, targets: Array) -> tuple[Array, Saved]:
        """logits (..., V), targets (...) integers in [0, V) -> losses (...) in nats."""
        xp = self.xp
        top = logits.max(axis=-1, keepdims=True)
        with np.errstate(over="ignore"):  # as in softmax_forward
            shifted = logits - top
        p = xp.exp(shifted)
        total = p.sum(axis=-1, keepdims=True)
        p /= total
        at_target = xp.take_along_axis(shifted, targets[..., None], axis=-1)
        losses = (xp.log(total) - at_target)[..., 0]
        return losses, (p, targets)

    def cross_entropy_backward(self, dy: Array, saved: Saved) -> Array:
        """-> dlogits."""
        p, targets = saved
        dlogits = p * dy[..., None]
        onehot = targets[..., None] == self.xp.arange(p.shape[-1])
        dlogits -= onehot * dy[..., None]
        return dlogits

    # ---------------------------------------------------------------- sums of gradients

    def add(self, a: Array, b: Array) -> Array:
        """a + b, of one shape and dtype."""
        return a + b

    def add_into(self, total: Array, index: Any, values: Array) -> None:
        """total[index] += values, in place, for an index of slices and integers."""
        total[index] += values
