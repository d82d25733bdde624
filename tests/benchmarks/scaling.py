"""Several ranks: what sums over them cost, the step of a model with 1, 2 and 4 ranks, and a model of the cost on many machines.

python tests/benchmarks/scaling.py [--rounds 5] [--out scaling.json]

The model: a step of a fixed batch on n machines takes compute / n + sum(n). A sum of `size` bytes moves 2 (n - 1) / n size
bytes into and out of each machine, in 2 (n - 1) messages: sum(n) = 2 (n - 1) latency + 2 (n - 1) / n size / bandwidth. Nothing
overlaps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from workloads import WORKLOADS, Workload

import npgpt
from npgpt.parallel.limits import available_cores
from npgpt.parallel.ranks import open_ranks
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.training.optim import Update

HERE = Path(__file__).parent
SIZES = (1_000, 100_000, 1_000_000, 3_224_576, 10_700_000)  # floats in a sum
MACHINES = (8, 16, 32, 64, 128, 256, 512, 1024)
NETWORKS = {"10 Gbit/s": 10e9 / 8, "100 Gbit/s": 100e9 / 8, "400 Gbit/s": 400e9 / 8}  # bytes a second
LATENCY = 20e-6  # seconds a message takes between machines of a data centre, an assumption
# Batches of whole runs: nanoGPT's for `char`, and half a million tokens for GPT-2 (Radford et al., 2019; nanoGPT's README).
CHAR = Workload(6, 6, 384, 256, 64, 0.2)
GPT2_PARAMETERS, GPT2_TOKENS, GPT2_WINDOW = 124_000_000, 524_288, 1024


def rank(names, rounds):
    """One rank: the time of sums, and of steps of some workloads. The first rank prints them."""
    with open_ranks() as ranks:
        found = {"sums": {}, "steps": {}}
        for size in SIZES:
            array, times = np.ones(size, dtype=np.float32), []
            for _ in range(10):
                ranks.gather(0)  # all begin together
                started = time.perf_counter()
                ranks.add_up(array)
                times.append(time.perf_counter() - started)
            found["sums"][size] = statistics.median(times)
        for name in names:
            found["steps"][name] = _step_seconds(WORKLOADS[name], ranks, rounds)
        if ranks.is_first:
            print(json.dumps(found))


def _model(workload):
    return npgpt.GPT(npgpt.GPTConfig(**{k: v for k, v in vars(workload).items() if k != "batch_size"}), seed=0)


def _step_seconds(workload, ranks, rounds):
    model = _model(workload)
    ids = np.random.default_rng(0).integers(0, workload.vocab_size, (workload.batch_size, workload.block_size + 1))
    update, times = Update(npgpt.AdamW(model.parameters()), 1.0), []
    with Workers(1) as workers:
        step = ParallelStep(model, workers, ranks=ranks)
        for number in range(rounds + 2):
            ranks.gather(0)
            started = time.perf_counter()
            update.step(step(ids[:, :-1], ids[:, 1:], 0, number), workers)
            update.results()
            times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def measured(n, names, rounds):
    """What `n` ranks of one thread found; see `rank`."""
    command = [sys.executable, str(Path(__file__)), "--rank", "--rounds", str(rounds), "--workloads", *names]
    launcher = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(n)] if n > 1 else []
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([*launcher, *command], capture_output=True, check=True, encoding="utf-8", env=environment)
    return json.loads(result.stdout)


def flops(parameters, n_layer, n_embd, window, tokens):
    """Floating-point operations of a step (PaLM, Chowdhery et al., 2022, appendix B): products, and those of attention."""
    return tokens * (6 * parameters + 12 * n_layer * n_embd * window)


def modelled(machine_flops):
    """Rows of the table: (model, machines, network, compute, sum, share of the time that is compute), from the cost model."""
    char = _model(CHAR).num_parameters()
    runs = {  # name: (parameters, operations of a step, windows in a batch)
        "char, batch 64": (char, flops(char, 6, 384, 256, 64 * 256), 64),
        "GPT-2 124M, half a million tokens": (
            GPT2_PARAMETERS,
            flops(GPT2_PARAMETERS, 12, 768, GPT2_WINDOW, GPT2_TOKENS),
            GPT2_TOKENS // GPT2_WINDOW,
        ),
    }
    rows = []
    for name, (parameters, operations, windows) in runs.items():
        for network, bandwidth in NETWORKS.items():
            for n in MACHINES:
                if n > windows:  # a machine needs a window of its own
                    continue
                compute = operations / machine_flops / n
                exchange = sum_seconds(n, 4 * parameters, LATENCY, bandwidth)
                rows.append((name, n, network, compute, exchange, compute / (compute + exchange)))
    return rows


def sum_seconds(n, size, latency, bandwidth):
    """The model of a sum over n machines of `size` bytes."""
    return 2 * (n - 1) * latency + 2 * (n - 1) / n * size / bandwidth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=["nano", "seed"])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each workload")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "latest-scaling.json")
    args = parser.parse_args()
    if args.rank:
        rank(args.workloads, args.rounds)
        return
    results = {n: measured(n, args.workloads, args.rounds) for n in (1, 2, 4)}
    print("a sum over the ranks of this machine, ms;", "floats:", *(f"{size:>12,}" for size in SIZES))
    for n in (2, 4):
        print(f"{n} ranks".rjust(48), *(f"{1e3 * seconds:12.2f}" for seconds in results[n]["sums"].values()))
    cores = available_cores()
    for name in args.workloads:
        one, size = results[1]["steps"][name], _model(WORKLOADS[name]).num_parameters()
        for n in (2, 4):
            sizes, times = zip(*((int(s), t) for s, t in results[n]["sums"].items()), strict=True)
            expected = one / min(n, cores) + float(np.interp(size, sizes, times))
            found = results[n]["steps"][name]
            print(
                f"{name}, {n} ranks: {1e3 * found:.1f} ms a step; one rank {1e3 * one:.1f}; the model says {1e3 * expected:.1f}"
            )
    seed = WORKLOADS["seed"]
    if "seed" in args.workloads:
        operations = flops(_model(seed).num_parameters(), seed.n_layer, seed.n_embd, seed.block_size, 32 * seed.block_size)
        speed = operations / results[2]["steps"]["seed"]
        print(f"\nFrom the model, not measured: machines like this one, {speed / 1e9:.0f} GFLOP/s with two ranks")
        results["modelled"] = modelled(speed)
        for name, n, network, compute, exchange, share in results["modelled"]:
            print(f"{name:34} {n:5} machines {network:>12}: {compute:9.3f} s + {exchange:7.3f} s, {share:4.0%} compute")
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
