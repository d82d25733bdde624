"""What a step does with the gradients: clipping by their norm, and AdamW. Like reference.py, this is the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray


class AdamWStep(NamedTuple):
    """The numbers of one AdamW step, the same for all parameters."""

    step: int  # counts from 1
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    n_decay: int | None = None  # weight decay acts on the first n_decay elements; None: on all
    scale: Array | None = None  # array of shape (): multiplies the gradient; if negative, nothing is updated


class Updates:
    """Clipping and AdamW, on arrays of the module `xp` (`numpy` or `cupy`)."""

    def __init__(self, xp: Any = np) -> None:
        self.xp = xp

    # ---------------------------------------------------------------- clipping by the norm
    #
    # "On the difficulty of training recurrent neural networks" (Pascanu et al., 2013). The factor for the gradient stays in an
    # array, so on a GPU a step never waits for a number to arrive on the host.

    def clip_factor(self, gradient: Array, loss: Array, max_norm: float, scale: Array) -> Array:
        """gradient (n,), loss () -> array (2,) of the loss and the gradient's norm.

        Writes to `scale` () the factor that makes the norm at most max_norm. Writes -1 if the loss or the norm is not
        finite, or if scale was already negative.
        """
        xp = self.xp
        with np.errstate(over="ignore", invalid="ignore"):
            norm = xp.sqrt((gradient * gradient).sum())
        finite = xp.isfinite(norm) & xp.isfinite(loss)
        scale[...] = xp.where(finite & (scale >= 0), xp.where(norm > max_norm, max_norm / norm, 1), -1)
        return xp.stack([loss, norm])

    # ---------------------------------------------------------------- AdamW
    #
    # "Decoupled Weight Decay Regularization" (Loshchilov, Hutter, 2019), algorithm 2. exp_avg and
    # exp_avg_sq are running means of the gradient and of its square. They start at zero, so after t
    # steps their weights add up to only 1 - beta^t; dividing by that corrects the bias. Weight decay
    # acts on the parameter itself, not through the gradient.

    def adamw(self, parameter: Array, gradient: Array, exp_avg: Array, exp_avg_sq: Array, numbers: AdamWStep) -> None:
        """Update `parameter`, `exp_avg` and `exp_avg_sq` in place. All four arrays have one shape."""
        step, lr, (beta1, beta2), eps, weight_decay, n_decay, scale = numbers
        if scale is not None:
            if scale < 0:
                return
            gradient = gradient * scale
        exp_avg *= beta1
        exp_avg += (1 - beta1) * gradient
        exp_avg_sq *= beta2
        exp_avg_sq += (1 - beta2) * (gradient * gradient)
        denominator = self.xp.sqrt(exp_avg_sq / (1 - beta2**step)) + eps
        decayed = parameter if n_decay is None else parameter.reshape(-1)[:n_decay]
        decayed *= 1 - lr * weight_decay
        parameter -= (lr / (1 - beta1**step)) * exp_avg / denominator
