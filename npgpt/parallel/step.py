"""One training step over many workers, each with some of the batch's micro-batches.

A micro-batch is so small that its activations stay in a core's cache. NumPy releases Python's lock inside its operations, so
threads run all operations side by side; a BLAS with threads of its own would speed up only the matrix products. Workers
share the weights, and each has gradients of its own. The gradients are added up in a fixed order, so the same seed and
the same number of threads give the same bytes. Ranks are further workers, each a process with weights and workers of its own.

This file has no formulas. It uses only the GPT's call, its parameters and its configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from npgpt.engine.backend import bfloat16, rounded_products, weights_rounded_ahead
from npgpt.engine.streams import Stream
from npgpt.engine.watch import NonFiniteError, detect_anomaly
from npgpt.kernels.reference import Array
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import keep_freed_memory
from npgpt.parallel.ranks import ONE_RANK, Ranks
from npgpt.parallel.recorded import RecordedStep
from npgpt.parallel.workers import Workers, even_slices

ALL_FINITE = "the loss and the gradient are finite"  # the answer of `diagnose` if nothing is wrong
MICRO_BATCH_TOKENS = 1024  # measured: with fewer, products are slower; with more, activations leave the cache

Share = list[tuple[int, slice]]  # one worker's part of a step: the numbers of its micro-batches and their rows of the batch


class RemoteWorkers(Protocol):
    """Workers outside this process, numbered from 0. processes.py has them."""

    gradients: list[np.ndarray]  # one flat array for each worker

    def begin(self, worker: int, x: np.ndarray, y: np.ndarray, share: Share, seed: int, number: int) -> None:
        """Let a worker compute the gradient of its share of step `number`. Raises OSError if the worker has died."""

    def loss(self, worker: int) -> float:
        """Wait for the worker, and return its share of the loss. Raises EOFError if the worker has died."""

    def close(self) -> None:
        """End the workers."""


class ParallelStep:
    """Forward and backward pass of a batch over workers: `loss = step(x, y, seed, number)`."""

    def __init__(
        self,
        model: GPT,
        workers: Workers,
        micro_batch: int | None = None,
        bf16: bool = False,
        use_tf32: bool = False,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """micro_batch: sequences in a micro-batch. None: about MICRO_BATCH_TOKENS tokens; on a GPU, the share of a rank.
        bf16: on a GPU, activations are bfloat16; on a CPU, the operands of linear layers' products are rounded to bfloat16.
        use_tf32: whether products round float32 operands to TF32, on a GPU.

        Raises DeviceError if the device cannot do what bf16 asks for.
        """
        keep_freed_memory()
        self.model, self.workers, self.micro_batch, self.ranks = model, workers, micro_batch, ranks
        self.dtype = bfloat16() if bf16 and not model.backend.is_cpu else None
        self._rounded = {"use_tf32": use_tf32, "bf16_products": bf16 and model.backend.is_cpu}
        with rounded_products(model.backend, **self._rounded):
            pass  # raises the error now
        self._remote: RemoteWorkers | None = None
        self._recorded: RecordedStep | None = None
        # Worker 0 uses the model itself. Other worker threads use models that share its weights.
        self._models = [model]

    def __call__(self, x: Array, y: Array, seed: int, number: int) -> Any:
        """The mean loss of the batch x, y (B, T). Its gradient is then in the model's parameters.

        The dropout masks of micro-batch i are a function of (seed, number, i). On a GPU the loss is an array of shape ():
        float(loss) waits for the GPU.
        """
        everything = list(enumerate(self._micro_batches(x)))
        own = everything[self.ranks.rank :: self.ranks.size]
        if self.ranks.size == 1:
            return self._compute(x, y, own, seed, number)
        loss = self.ranks.together(lambda: self._compute(x, y, own, seed, number))
        self.ranks.add_up(self.model.flat.grad)
        return sum(self.ranks.gather(float(loss)))

    def _compute(self, x: Array, y: Array, micro_batches: Share, seed: int, number: int) -> Any:
        """The loss and the gradient of some micro-batches. There are none if there are more ranks than micro-batches."""
        if not micro_batches:
            self.model.zero_grad()
            return 0.0
        if self.model.backend.record:
            return self._on_a_gpu(x, y, micro_batches, seed, number)
        n_workers = min(self.workers.threads, len(micro_batches))
        shares = [micro_batches[worker :: self.workers.threads] for worker in range(n_workers)]

        def work(worker: int) -> float:
            model = self._models[worker]
            return forward_backward(model, x, y, shares[worker], dropout_generators(model, seed, number))

        with rounded_products(self.model.backend, **self._rounded):
            losses = self._with_remote_workers(x, y, shares, seed, number) if self._remote and len(shares) > 1 else None
            if losses is None:
                while len(self._models) < len(shares):
                    self._models.append(self._replica())
                losses = self.workers.map(work, range(len(shares)))
        gradients = self._remote.gradients if self._remote else [replica.flat.grad for replica in self._models[1:]]
        first, others = self.model.flat.grad, gradients[: len(shares) - 1]

        def add_up(at: slice) -> None:
            with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for a gradient that is not finite
                for gradient in others:
                    first[at] += gradient[at]

        if others:
            self.workers.over(add_up, first.size)
        return float(sum(losses))

    def _on_a_gpu(self, x: Array, y: Array, share: Share, seed: int, number: int) -> Array:
        if not (self._recorded and self._recorded.fits(x, len(share))):

            def compute(x: Array, y: Array, generators: Callable[[int], Any]) -> Array:
                weights = [p.data for p in self.model.flat]
                with weights_rounded_ahead(self.model.backend, self.model.flat.data, weights, self.dtype):
                    return forward_backward(self.model, x, y, share, generators, self.dtype)

            self._recorded = RecordedStep(self.model, compute, x.shape, len(share))
        with rounded_products(self.model.backend, **self._rounded):
            return self._recorded(x, y, seed, number)

    def use_remote_workers(self, start: Callable[[GPT, int], RemoteWorkers]) -> None:
        """From now on, remote workers share the steps instead of threads. `start(model, n)` starts n of them.

        This moves the model's flat arrays: a view into the old ones no longer sees the model. Raises OSError if the workers
        cannot be started.
        """
        self.close()
        with rounded_products(self.model.backend, **self._rounded):  # the workers round as this process does now
            self._remote = start(self.model, self.workers.threads - 1)
        del self._models[1:]

    def close(self) -> None:
        """End the remote workers, if any. Later steps use threads."""
        remote, self._remote = self._remote, None
        if remote:
            remote.close()

    def diagnose(self, x: np.ndarray, y: np.ndarray, seed: int, number: int) -> str:
        """Say why the loss or the gradient of a step is not finite.

        This repeats the step in one thread and checks every operation. The answer names a weight or a gradient that is
        not finite, or the first such operation and a weight near it.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        isfinite = self.model.backend.xp.isfinite
        for p in self.model.parameters():
            if not isfinite(p.data).all():
                return f"the weight {names[id(p)]} is not finite"
        try:
            share, generators = list(enumerate(self._micro_batches(x))), dropout_generators(self.model, seed, number)
            with detect_anomaly(), rounded_products(self.model.backend, **self._rounded):
                forward_backward(self.model, x, y, share, generators, self.dtype)
        except NonFiniteError as error:
            leaf = names.get(id(error.leaf))
            return f"{error}" + (f", near the weight {leaf}" if leaf else "")
        for p in self.model.parameters():
            if not isfinite(p.grad).all():
                return f"the gradient of {names[id(p)]} became infinite or NaN when those of the micro-batches were added up"
        with np.errstate(over="ignore"):
            norm = float(self.model.flat.grad @ self.model.flat.grad)
        return ALL_FINITE if np.isfinite(norm) else "the gradient is finite, but its norm is not"

    def _replica(self) -> GPT:
        replica = GPT(self.model.config, seed=None, backend=self.model.backend, dtype=self.model.wte.weight.dtype)
        replica.share_weights(self.model)
        return replica

    def _with_remote_workers(
        self, x: np.ndarray, y: np.ndarray, shares: list[Share], seed: int, number: int
    ) -> list[float] | None:
        """The losses of the shares; the first is computed here. None if a remote worker has died."""
        assert self._remote
        done = False
        try:
            for i, share in enumerate(shares[1:]):
                self._remote.begin(i, x, y, share, seed, number)
            losses = [forward_backward(self.model, x, y, shares[0], dropout_generators(self.model, seed, number))]
            losses += [self._remote.loss(i) for i in range(len(shares) - 1)]
            done = True
            return losses
        except (EOFError, OSError):
            warnings.warn(
                "a worker process has died, perhaps because memory ran out (--threads lowers the number of workers); "
                "training continues with threads",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        finally:
            if not done:  # late answers of this step must not be taken for answers of the next one
                self.close()

    def _micro_batches(self, x: np.ndarray) -> list[slice]:
        rows, tokens = x.shape
        on_a_gpu = -(-rows // self.ranks.size)
        return micro_batches(rows, tokens, self.micro_batch if self.model.backend.is_cpu else self.micro_batch or on_a_gpu)


def dropout_generators(model: GPT, seed: int, number: int) -> Callable[[int], Any]:
    """A function that makes the random generator for the dropout of micro-batch i of step `number`."""
    return lambda i: model.backend.generator(seed, Stream.DROPOUT, number, i)


def forward_backward(model: GPT, x: Array, y: Array, share: Share, generators: Callable[[int], Any], dtype: Any = None) -> Any:
    """Compute the gradient of a share of a step into the model's parameters. Returns the share of the loss.

    The loss and the gradient of each micro-batch are weighted with its part of the batch. generators: see `dropout_generators`.
    """
    model.zero_grad()
    total: Any = 0
    for i, rows in share:
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for a loss that is not finite
            _, loss = model(x[rows], y[rows], generators(i), dtype=dtype)
            assert loss is not None  # because there are targets
            part = (rows.stop - rows.start) / len(x)
            loss.backward(model.backend.xp.full((), part, dtype=loss.dtype))
        total = total + part * (loss.item() if model.backend.is_cpu else loss.data)
    return total


def micro_batches(rows: int, tokens_in_row: int, size: int | None = None) -> list[slice]:
    """The rows of a batch as micro-batches of nearly equal length, at most `size` rows each.

    With size None, a micro-batch has about MICRO_BATCH_TOKENS tokens. The result does not depend on the number of workers,
    so the dropout masks do not depend on it either.
    """
    if size is None:
        n = -(-rows * tokens_in_row // MICRO_BATCH_TOKENS)
        n = min(rows, n + n % 2)  # rounded up to an even number, so that two workers get equally many
    else:
        n = -(-rows // size)
    return even_slices(rows, n)
