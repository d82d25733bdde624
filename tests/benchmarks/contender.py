"""A process that trains one workload with one engine, a few steps at each request.

bench.py starts one process for each contender and lets the processes take turns. So if the speed of the machine changes, it
changes for all of them alike. A request is a line of standard input with a number of steps. The answer is a line of JSON: the
seconds of each step, and the peak memory of the process.

    python contender.py npgpt seed
    python contender.py "torch eager float32" seed
    python contender.py "npgpt bfloat16 cuda" "char, batch 64"
    python contender.py gemm seed                   only the matrix products of a step, with the same shapes and threads
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
from workloads import ON_A_GPU, WORKLOADS


def npgpt_step(workload, mode, wait=True):
    """A function that does one training step on x and y. wait: whether it returns only when the step is done."""
    import npgpt
    from npgpt.engine.backend import select
    from npgpt.parallel.processes import Processes
    from npgpt.parallel.step import ParallelStep
    from npgpt.parallel.workers import Workers
    from npgpt.training.optim import Update

    backend = select("cuda" if "cuda" in mode else "cpu")
    settings = {k: v for k, v in vars(workload).items() if k != "batch_size"}
    model = npgpt.GPT(npgpt.GPTConfig(**settings), seed=0, backend=backend)
    optimizer = npgpt.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    workers = Workers(None if backend.name == "cpu" else 1).__enter__()
    update = Update(optimizer, 1.0)
    forward_backward = ParallelStep(model, workers, bf16="bfloat16" in mode, use_tf32="TF32" in mode)
    if workers.threads > 1:  # as in a training run that takes longer than some seconds
        forward_backward.use_remote_workers(Processes)
    number = iter(range(1 << 62))

    def step(x, y):
        update.step(forward_backward(x, y, seed=0, number=next(number)), workers)
        if wait:  # as PyTorch's loss.item() does; training waits less often
            update.results()

    return step


def gemm_step(workload):
    """All matrix products of a step, forward and backward. The arrays for the results exist beforehand."""
    from npgpt.parallel.step import micro_batches
    from npgpt.parallel.workers import Workers

    rng = np.random.default_rng(0)
    workers = Workers().__enter__()
    pieces = micro_batches(workload.batch_size, workload.block_size)
    c, t, h = workload.n_embd, workload.block_size, workload.n_head
    shapes = [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)]

    def products(rows):
        """(operand, operand, output) of each product, for one micro-batch."""
        n = rows * t

        def normal(*shape):
            return rng.standard_normal(shape, dtype=np.float32)

        def pair(a, b):
            return a, b, np.empty((*a.shape[:-1], b.shape[-1]), dtype=np.float32)

        each_layer = []
        for n_in, n_out in shapes:
            x, w, dy = normal(n, n_in), normal(n_in, n_out), normal(n, n_out)
            each_layer += [pair(x, w), pair(dy, w.T), pair(x.T, dy)]
        for start in range(0, t, 64):  # causal blocks: a block of queries needs the keys up to its own end
            stop = min(t, start + 64)
            q, k, e = normal(rows, h, stop - start, c // h), normal(rows, h, stop, c // h), normal(rows, h, stop - start, stop)
            # scores, out, dv; then de, dq, dk, with the same shapes
            each_layer += 2 * [pair(q, k.swapaxes(2, 3)), pair(e, k), pair(e.swapaxes(2, 3), q)]
        x, w, dy = normal(n, c), normal(c, workload.vocab_size), normal(n, workload.vocab_size)
        return each_layer * workload.n_layer + [pair(x, w), pair(dy, w.T), pair(x.T, dy)]

    lists = [products(piece.stop - piece.start) for piece in pieces[: workers.threads]]

    def work(worker):
        for _ in range(worker, len(pieces), workers.threads):
            for a, b, out in lists[worker]:
                np.matmul(a, b, out=out)

    def step(x, y):
        workers.map(work, range(len(lists)))

    return step


def peak_memory_bytes():
    """The peak memory of this process and its children; shared memory is counted for each. None if the system does not tell."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text(encoding="utf-8").split()]
    peaks = [re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8")) for pid in children]
    return 1024 * (peak + sum(int(found.group(1)) for found in peaks if found))


def main(engine, name):
    workload = (WORKLOADS | ON_A_GPU)[name]
    if engine.startswith("npgpt"):
        step = npgpt_step(workload, engine)
    elif engine == "gemm":
        step = gemm_step(workload)
    else:
        import torch_gpt

        step = torch_gpt.make_step(workload, engine.removeprefix("torch "))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, workload.vocab_size, (workload.batch_size, workload.block_size + 1))
    x, y = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            step(x, y)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds, "peak_memory": peak_memory_bytes()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
