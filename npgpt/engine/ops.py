"""The neural operations on Tensors. Each one checks its arguments, calls a forward kernel and records its backward kernel.

There is no arithmetic here (it is in kernels/), and there are no parameters (they are in model/). Sums, products and other
general operations are methods of Tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npgpt.engine.backend import backend_of, is_float
from npgpt.engine.graph import current_watch
from npgpt.engine.tensor import Tensor, record
from npgpt.kernels.reference import Array, Kernels


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight + bias: x (..., in), weight (in, out), bias (out,) -> (..., out).

    Raises ValueError if the shapes do not fit together.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"linear: x (..., in) and weight (in, out) must agree, got {x.shape} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"linear: bias must have shape {weight.shape[1:]}, got {bias.shape}")
    inputs = (x, weight) if bias is None else (x, weight, bias)
    kernels = _kernels("linear", *inputs)
    y, saved = kernels.linear_forward(x.data, weight.data, None if bias is None else bias.data)
    needs, n = (x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad), len(inputs)
    arrays = _gradient_arrays(x, weight, bias)

    def backward(dy: Array) -> tuple[Array | None, ...]:
        onto = arrays()
        return _not_added(kernels.linear_backward(dy, saved, needs, (onto[0], onto[1])), None, *onto)[:n]

    return record(y, inputs, backward)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x), normalised to sum to one along `axis`; in the shape of x.

    If all elements of a slice are -inf, the result is zeros.
    """
    kernels = _kernels("softmax", x)
    y, saved = kernels.softmax_forward(x.data, axis)
    return record(y, (x,), lambda dy: (kernels.softmax_backward(dy, saved),))


def masked_fill(x: Tensor, mask: Any, value: float) -> Tensor:
    """`value` where the boolean `mask` (broadcast against x) is true, x elsewhere. No gradient passes where it is true.

    Raises TypeError if the mask is not boolean.
    """
    mask_data = mask.data if isinstance(mask, Tensor) else x.backend.asarray(mask)
    if mask_data.dtype != np.bool_:
        raise TypeError(f"masked_fill: the mask must be boolean, got dtype {mask_data.dtype}")
    kernels = backend_of(x.data, mask_data).kernels
    y, saved = kernels.masked_fill_forward(x.data, mask_data, value)
    return record(y, (x,), lambda dy: (kernels.masked_fill_backward(dy, saved),))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, rng: Any = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017, section 3.2.1). No position sees a later one.

    q (B, H, T, head_dim), k and v (B, H, S, head_dim) with S >= T -> (B, H, T, head_dim). The queries are the last T of the
    S positions. Dropout with probability `dropout` acts on the attention probabilities. The generator `rng` draws it; with
    None there is no dropout. Raises ValueError if the shapes do not fit together.
    """
    same = q.ndim == k.ndim == 4 and k.shape == v.shape
    if not same or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] > k.shape[2]:
        raise ValueError(
            "causal_attention: expected q (B, H, T, head_dim) and k, v (B, H, S, head_dim) with S >= T, "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    _check_probability("causal_attention", dropout)
    kernels = _kernels("causal_attention", q, k, v)
    y, saved = kernels.causal_attention_forward(q.data, k.data, v.data, dropout, rng)
    return record(y, (q, k, v), lambda dy: kernels.causal_attention_backward(dy, saved))


def self_attention(qkv: Tensor, dropout: float = 0.0, rng: Any = None) -> Tensor:
    """`causal_attention` of queries, keys and values that lie side by side: (B, T, 3, H, head_dim) -> (B, T, H, head_dim).

    Raises ValueError if qkv has another shape.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"self_attention: expected qkv (B, T, 3, H, head_dim), got {qkv.shape}")
    _check_probability("self_attention", dropout)
    kernels = _kernels("self_attention", qkv)
    y, saved = kernels.self_attention_forward(qkv.data, dropout, rng)
    return record(y, (qkv,), lambda dy: (kernels.self_attention_backward(dy, saved),))


def rotary(x: Tensor, rotation: Any) -> Tensor:
    """Turn each pair of neighbouring elements by the angle of its position (Su et al., 2021, section 3.2.2).

    x (..., head_dim). rotation: an array that broadcasts against x; its elements 2i and 2i + 1 are cos and sin of the angle of
    pair i. No gradient goes to it. Raises ValueError if head_dim is odd or the shapes do not fit together.
    """
    data = x.backend.asarray(rotation)
    fits = data.ndim <= x.ndim and all(a in (1, b) for a, b in zip(data.shape[::-1], x.shape[::-1], strict=False))
    if x.ndim < 1 or x.shape[-1] % 2 or data.shape[-1:] != x.shape[-1:] or not fits:
        raise ValueError(
            "rotary: expected x (..., head_dim) with an even head_dim, and a rotation that broadcasts against it, got "
            f"{x.shape} and {data.shape}"
        )
    kernels = _kernels("rotary", x)
    y, saved = kernels.rotary_forward(x.data, data)
    return record(y, (x,), lambda dy: (kernels.rotary_backward(dy, saved),))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al., 2016).

    x (..., C), weight and bias (C,) -> (..., C). Raises ValueError if the shapes do not fit together.
    """
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if any(t.shape != x.shape[-1:] for t in inputs[1:]):
        raise ValueError(f"layer_norm: weight and bias must have shape {x.shape[-1:]}, got {[t.shape for t in inputs[1:]]}")
    kernels = _kernels("layer_norm", *inputs)
    y, saved = kernels.layer_norm_forward(x.data, weight.data, None if bias is None else bias.data, eps)
    n, arrays = len(inputs), _gradient_arrays(x, weight, bias)

    def backward(dy: Array) -> tuple[Array | None, ...]:
        onto = arrays()
        return _not_added(kernels.layer_norm_backward(dy, saved, (onto[0], onto[1])), None, *onto)[:n]

    return record(y, inputs, backward)


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form of GPT-2 (Hendrycks and Gimpel, 2016); in the shape of x."""
    kernels = _kernels("gelu", x)
    y, saved = kernels.gelu_forward(x.data)
    return record(y, (x,), lambda dy: (kernels.gelu_backward(dy, saved),))


def relu(x: Tensor) -> Tensor:
    """max(x, 0), with gradient 0 at 0; in the shape of x."""
    kernels = _kernels("relu", x)
    y, saved = kernels.relu_forward(x.data)
    return record(y, (x,), lambda dy: (kernels.relu_backward(dy, saved),))


def dropout(x: Tensor, p: float, rng: Any) -> Tensor:
    """Set each element to zero with probability p, and scale the others by 1 / (1 - p) (Srivastava et al., 2014).

    `rng` is a generator for the tensor's device, from `Backend.generator`. With rng None, as outside training, x is returned.
    """
    _check_probability("dropout", p)
    if p == 0 or rng is None:
        return x
    kernels = _kernels("dropout", x)
    y, saved = kernels.dropout_forward(x.data, p, rng)
    return record(y, (x,), lambda dy: (kernels.dropout_backward(dy, saved),))


def residual(x: Tensor, branch: Tensor, p: float = 0.0, rng: Any = None) -> Tensor:
    """x + dropout(branch, p, rng), for x and branch of the same shape: a residual connection."""
    if x.shape != branch.shape:
        raise ValueError(f"residual: expected x and branch of one shape, got {x.shape} and {branch.shape}")
    _check_probability("residual", p)
    if p == 0 or rng is None:
        return x + branch
    kernels = _kernels("residual", x, branch)
    y, saved = kernels.residual_forward(x.data, branch.data, p, rng)
    return record(y, (x, branch), lambda dy: kernels.residual_backward(dy, saved))


def embedding(weight: Tensor, ids: Any) -> Tensor:
    """Rows of a table: weight (V, C), integer ids (...) in [0, V) -> (..., C).

    Raises IndexError for an id outside the table. Ids already on a GPU are not checked: an out-of-range id reads, and in
    backward writes, out of bounds.
    """
    ids_data = _integers("embedding", ids, weight, weight.shape[0])
    kernels = backend_of(weight.data, ids_data).kernels
    y, saved = kernels.embedding_forward(weight.data, ids_data)
    arrays = _gradient_arrays(None, weight)

    def backward(dy: Array) -> tuple[Array | None, ...]:
        (onto,) = arrays()
        return _not_added((kernels.embedding_backward(dy, saved, onto),), onto)

    return record(y, (weight,), backward)


def cross_entropy(logits: Tensor, targets: Any, reduction: str = "mean") -> Tensor:
    """-log softmax(logits)[target], in nats: logits (..., V), integer targets (...) in [0, V).

    `reduction` is "mean" (over all positions -> ()) or "none" (one loss for each position -> (...)). Raises IndexError for a
    target outside [0, V). Targets already on a GPU are not checked: an out-of-range target reads out of bounds.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"cross_entropy: reduction must be 'mean' or 'none', got {reduction!r}")
    target_ids = _integers("cross_entropy", targets, logits, logits.shape[-1])
    if target_ids.shape != logits.shape[:-1]:
        raise ValueError(f"cross_entropy: targets must have shape {logits.shape[:-1]}, got {target_ids.shape}")
    kernels = backend_of(logits.data, target_ids).kernels
    y, saved = kernels.cross_entropy_forward(logits.data, target_ids)
    losses = record(y, (logits,), lambda dy: (kernels.cross_entropy_backward(dy, saved),))
    return losses.mean() if reduction == "mean" else losses


def _gradient_arrays(x: Tensor | None, *parameters: Tensor | None) -> Callable[[], tuple[Array | None, ...]]:
    """A function that says, on the way back, to which arrays a kernel may add the gradients of the parameters itself.

    None: the walk back adds up the gradient of this parameter. x: what the kernel reads besides its parameters.
    """
    known = [None if p is None or not p.requires_grad or p._node is not None else (p, p.shape, p.dtype) for p in parameters]
    for i, p in enumerate(parameters):  # an array that the kernel reads must not change under its hands
        if p is not None and p.grad is not None and any(_overlap(p.grad, t) for t in (x, *parameters)):
            known[i] = None

    def arrays() -> tuple[Array | None, ...]:
        if current_watch():  # it wants to see every gradient
            return (None,) * len(known)
        return tuple(None if leaf is None else _gradient_array(*leaf) for leaf in known)

    return arrays


def _gradient_array(leaf: Tensor, shape: tuple[int, ...], dtype: np.dtype) -> Array | None:
    """The gradient of a leaf that had this shape and dtype in the forward pass, if a kernel can add to it."""
    grad = leaf.grad
    if grad is None or (grad.shape, grad.dtype) != (shape, dtype) or dtype.itemsize < 4:
        return None
    return grad if grad.flags.c_contiguous and getattr(grad.flags, "writeable", True) else None  # CuPy's are all writeable


def _overlap(a: Array, tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.backend.xp.may_share_memory(a, tensor.data))


def _not_added(gradients: Sequence[Array | None], *onto: Array | None) -> tuple[Array | None, ...]:
    """The gradients that the walk back must still add up: those that were not added to an array of `onto`."""
    return tuple(dx if total is None else None for dx, total in zip(gradients, onto, strict=True))


def _kernels(op: str, *tensors: Tensor) -> Kernels:
    """The kernels of the tensors' device. Raises TypeError if a tensor is not float."""
    for t in tensors:
        if not is_float(t.dtype):
            raise TypeError(f"{op}: expected a float tensor, got dtype {t.dtype}")
    return backend_of(*(t.data for t in tensors)).kernels


def _integers(op: str, ids: Any, like: Tensor, n: int) -> Array:
    """The ids as an integer array on the device of `like`.

    Raises TypeError if they are not integers, and IndexError if one lies outside 0..n - 1 (NumPy would count a negative id
    from the end). The check happens before the ids go to a GPU. Ids already there are not checked, because the host would
    have to wait for the GPU.
    """
    data = ids.data if isinstance(ids, Tensor) else ids
    if not hasattr(data, "dtype") or isinstance(data, np.generic):
        data = np.asarray(data)
    if data.dtype.kind not in "iu":
        raise TypeError(f"{op}: expected integers, got dtype {data.dtype}")
    if not isinstance(data, np.ndarray):
        return data
    if data.size and (data.min() < 0 or data.max() >= n):
        raise IndexError(f"{op}: ids must lie in 0..{n - 1}, got {int(data.min())}..{int(data.max())}")
    return like.backend.asarray(data)


def _check_probability(op: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: the dropout probability must lie in 0..1, got {p}")
