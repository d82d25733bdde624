"""What a training step launches on a GPU, and how many bytes it moves through the GPU's memory: counted, not measured.

This needs no GPU. The model trains one step on a stand-in for CuPy's arrays. Kernels and products are counted, not computed, so
all results are nonsense. The bytes are those of all arrays that a launch gets. Each counts once, also an array that is read and
written, or that is read in part. The floor is what the products and AdamW alone would move: everything else could in principle
be part of a product. cuBLAS may launch more than one kernel for a product; it counts as one launch.

    PYTHONPATH=. python tests/benchmarks/launches.py            # nanoGPT's configuration for a GPU, in bfloat16
    PYTHONPATH=. python tests/benchmarks/launches.py --float32
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from support import device_array
from workloads import ON_A_GPU

import npgpt
from npgpt.engine import backend
from npgpt.kernels.cuda.kernels import CudaKernels
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.training.optim import Update


def count_step(workload, bf16):
    """{(who, name): [launches, bytes]} of one training step. who: "npgpt", "cuBLAS" or "CuPy"."""
    launches, moved = Counter(), Counter()

    def count(who, name, arrays):
        launches[who, name] += 1
        moved[who, name] += sum(array.on_host.nbytes for array in {id(a.on_host): a for a in arrays}.values())

    class Gemm:
        tf32 = False

        def __call__(self, a, b, out, sizes, count_of_products, add):
            kind = "product, added to a gradient" if add else "product"
            count("cuBLAS", kind, [a.array, b.array, out.array])

        def with_bias(self, a, b, out, sizes, bias):
            count("cuBLAS", "product with bias", [a.array, b.array, out.array, bias])
            return True

    def launch(name, dtype, grid, threads, arguments, variant=None):
        count("npgpt", name, [a for a in arguments if isinstance(a, device_array.ndarray)])

    launch.has_tensor_cores = True

    xp = device_array.Module()
    gpu = backend.Backend("cuda", xp, CudaKernels(xp, launch, Gemm()), device_array.Recording)
    backend._backends[device_array.ndarray] = gpu
    settings = {name: value for name, value in vars(workload).items() if name != "batch_size"}
    model = npgpt.GPT(npgpt.GPTConfig(**settings), backend=gpu)
    update = Update(npgpt.AdamW(model.parameters()), 1.0)
    ids = np.zeros((workload.batch_size, workload.block_size), dtype=np.int64)
    with Workers(1) as workers:
        step = ParallelStep(model, workers, bf16=bf16)
        for number in range(2):  # the first one makes arrays that stay
            launches.clear()
            moved.clear()
            device_array.computed.clear()
            update.step(step(ids, ids, seed=0, number=number), workers)
    for name, size in device_array.computed:
        launches["CuPy", name] += 1
        moved["CuPy", name] += size
    return {key: [launches[key], moved[key]] for key in launches}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--float32", action="store_true", help="in float32 instead of bfloat16")
    args = parser.parse_args()
    if not args.float32:
        try:
            backend.bfloat16()
        except backend.DeviceError as error:
            sys.exit(f"launches.py: {error}, or give --float32")
    rows = count_step(ON_A_GPU["char, batch 64"], not args.float32)
    for (who, name), (n, size) in sorted(rows.items(), key=lambda row: -row[1][1]):
        print(f"{who:7} {name:32} {n:4} launches {size / 1e6:10,.0f} MB")
    for who in ("npgpt", "cuBLAS", "CuPy"):
        mine = [row for (owner, _), row in rows.items() if owner == who]
        print(f"{who}: {sum(n for n, _ in mine)} launches, {sum(size for _, size in mine) / 1e6:,.0f} MB")
    floor = sum(size for (who, name), (_, size) in rows.items() if who == "cuBLAS" or name == "adamw")
    print(f"all: {sum(n for n, _ in rows.values())} launches, {sum(size for _, size in rows.values()) / 1e6:,.0f} MB")
    print(f"floor: {floor / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
