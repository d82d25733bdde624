"""`make gpu`: tests on a GPU, training steps against PyTorch, the time of each kernel, a run to a loss, several GPUs.

This takes less than nine minutes. It prints tables, and after each stage it writes a JSON file. It needs CuPy. If PyTorch is
installed with CUDA, npgpt is compared with it, and PyTorch's profiler measures the kernels.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import contender
import numpy as np
from bench import HERE, machine, training
from workloads import ON_A_GPU

from npgpt.engine.backend import DeviceError, select
from npgpt.storage.run import RunFiles, read_log

ROOT = HERE.parent.parent
STAGES = ["tests", "training", "kernels", "run", "ranks"]
DTYPES = ["float32", "TF32", "bfloat16"]
PYTORCH = [f"eager {dtype} cuda" for dtype in DTYPES] + ["compiled bfloat16 cuda"]  # compiling takes about a minute
PUBLISHED = 1.4697  # nanoGPT's best validation loss of its configuration for a GPU, on tiny Shakespeare (its README)


def gpu(cupy):
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cupy": cupy.__version__,
    }


def torch_with_cuda():
    """PyTorch if it is installed and sees a GPU, else None."""
    if not importlib.util.find_spec("torch"):
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def tests(seconds):
    """Run the tests marked `gpu`. Returns ({"result": the last line of pytest}, whether all tests passed).

    Eight processes run them, because much of the time goes to compiling kernels. The tests of the server are left out: none of
    them needs a GPU, and their packages may be missing here.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "--maxfail", "20", "--tb", "short", "-m", "gpu"]
    command += ["-p", "no:benchmark", "tests", "--ignore", "tests/serving"]  # pytest-benchmark warns beside pytest-xdist
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        output.seek(0)
        lines = output.read().strip().splitlines() or [""]
    if status:
        print("\n".join(lines[-150:]), flush=True)
    result = lines[-1] if time.perf_counter() - started < seconds else f"not finished after {seconds} s"
    print(f"tests: {result}", flush=True)
    return {"result": result}, status == 0


def speed(rounds):
    """The time of a training step, for each engine and precision. Returns ({engine: its figures}, whether all ran)."""
    engines = [f"npgpt {dtype} cuda" for dtype in DTYPES]
    if torch_with_cuda():
        engines += [f"torch {mode}" for mode in PYTORCH]
    else:
        print("PyTorch with CUDA is not installed, so there is no comparison")
    (name,) = ON_A_GPU
    rows, failed = training(name, engines, rounds, patience=120)
    print(f"\n{name}: {'ms/step':>34} {'tokens/s':>11}")
    for engine, row in rows.items():
        print(f"  {engine:32} {row['ms']:10.2f} {row['tokens_per_second']:11,}")
    for engine, why in failed.items():
        print(f"  {engine} did not run: {why}")
    return {name: rows} | ({"failed": failed} if failed else {}), not failed


def kernels(cupy, steps=10):
    """Where the time of a step in bfloat16 goes. Returns (the figures, True).

    The host's time is from the first launch of a step to its last, when nothing waits. The time of each kernel comes from
    PyTorch's profiler, which sees the kernels of the whole process.
    """
    ((name, workload),) = ON_A_GPU.items()
    step = contender.npgpt_step(workload, "bfloat16 cuda", wait=False)
    ids = np.random.default_rng(0).integers(0, workload.vocab_size, (workload.batch_size, workload.block_size + 1))
    x, y = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])

    def seconds():
        started = time.perf_counter()
        step(x, y)
        launched = time.perf_counter()
        cupy.cuda.Device().synchronize()
        return launched - started, time.perf_counter() - started

    times = [seconds() for _ in range(steps + 3)][3:]
    figures = {"host_ms": 1e3 * statistics.median(t[0] for t in times), "step_ms": 1e3 * statistics.median(t[1] for t in times)}
    torch = torch_with_cuda()
    if torch:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for _ in range(steps):
                step(x, y)
            cupy.cuda.Device().synchronize()
        launches, spent = Counter(), Counter()
        for event in profile.key_averages():
            if not event.device_time_total:
                continue  # a call of the host
            launches[event.key] += event.count / steps
            spent[event.key] += event.device_time_total / steps / 1e3
        figures |= {"launches": sum(launches.values()), "device_ms": sum(spent.values())}
        figures["kernels"] = {key: {"launches": launches[key], "ms": round(ms, 4)} for key, ms in spent.most_common()}
    print(f"\n{name}, bfloat16: " + "  ".join(f"{k} {v:.2f}" for k, v in figures.items() if k != "kernels"))
    for key, row in list(figures.get("kernels", {}).items())[:40]:
        print(f"  {row['ms']:8.3f} ms {row['launches']:7.1f} launches  {key[:100]}")
    return figures, True


def run_to_a_loss(text, seconds, extra):
    """Train nanoGPT's configuration in bfloat16, for at most `seconds`. Returns (the best exact held-out loss, whether enough).

    "Enough" is the published loss if the text is tiny Shakespeare, and any loss otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.npz"
        command = [sys.executable, "-m", "npgpt", "train", text, "--out", out, "--preset", "char", "--device", "cuda", "--bf16"]
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--patience", "0", "--eval-tokens", "0", *extra], cwd=ROOT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # the run saves its state and ends
            status = process.wait(60)
        taken = time.perf_counter() - started
        log = RunFiles(out).log
        evaluations = [e for e in read_log(log) if e["event"] == "evaluation"] if log.exists() else []
    row = {"text": Path(text).name, "status": status, "seconds": round(taken)}
    if not evaluations:
        print(f"\nthe training run ended with status {status} before its first evaluation")
        return row, False
    best = min(evaluations, key=lambda e: e["val_loss"])
    row |= {"steps": evaluations[-1]["step"], "best_step": best["step"], "best_loss": round(best["val_loss"], 4)}
    row["stderr"] = round(best["val_stderr"], 4)
    print("\n" + "  ".join(f"{key} {value}" for key, value in row.items()))
    if Path(text).name != "tinyshakespeare.txt":
        print("the text is not tiny Shakespeare, so the loss is not compared with the published one; `make data` fetches it")
        return row, True
    print(f"published: {PUBLISHED}")
    return row | {"published": PUBLISHED}, row["best_loss"] <= PUBLISHED


def several(cupy, text):
    """Train with one rank and with one for each GPU: (the seconds of a step and the largest difference of the losses, passed).

    With a given micro-batch, all see the same batches and masks. With one GPU there is nothing to compare.
    """
    n, mpiexec = cupy.cuda.runtime.getDeviceCount(), Path(sys.executable).parent / "mpiexec"
    missing = "there is one GPU" if n < 2 else "there is no mpiexec; install npgpt[mpi]" if not mpiexec.exists() else None
    if missing:
        print(f"\nseveral GPUs are left out: {missing}")
        return {"left_out": missing}, True
    losses, row = [], {"gpus": n}
    for ranks in (1, n):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model.npz"
            command = [sys.executable, "-m", "npgpt", "train", text, "--out", out, "--preset", "char", "--device", "cuda"]
            command += ["--steps", "60", "--micro-batch", str(64 // n), "--log-interval", "1", "--eval-interval", "60"]
            launcher = [mpiexec, "-n", str(n)] if ranks > 1 else []
            subprocess.run([*launcher, *command], cwd=ROOT, check=True)
            steps = [event for event in read_log(RunFiles(out).log) if event["event"] == "step"]
        losses.append(np.array([step["loss"] for step in steps]))
        row[f"ms, {ranks} ranks"] = round(1e3 * statistics.median(step["seconds"] for step in steps[20:]), 1)
    row["difference"] = float(np.abs(losses[1] / losses[0] - 1).max())
    print("\n" + "  ".join(f"{key} {value}" for key, value in row.items()))
    return row, row["difference"] < 1e-3  # float32, and another order of sums


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--text", default=None, help="default: data/tinyshakespeare.txt if it is there, else data/tiny.txt")
    parser.add_argument("--rounds", type=int, default=6, help="number of turns of each contender")
    parser.add_argument("--seconds", type=float, default=150, help="longest time of the tests, and of the training run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json", help="the file for the figures")
    parser.add_argument("train", nargs="*", help="after --: arguments of `npgpt train` for the training run")
    args = parser.parse_args()
    try:
        cupy = select("cuda").xp
    except DeviceError as error:
        without_advice = re.sub("[;,] (or )?use --device cpu", "", str(error))  # that is advice for `npgpt train`
        sys.exit(f"make gpu: {without_advice}; `make test` checks the kernels without a GPU")
    shakespeare = ROOT / "data" / "tinyshakespeare.txt"
    text = args.text or str(shakespeare if shakespeare.exists() else ROOT / "data" / "tiny.txt")

    results = {"machine": machine() | gpu(cupy)}
    print("  ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    measure = {
        "tests": lambda: tests(args.seconds),
        "training": lambda: speed(args.rounds),
        "kernels": lambda: kernels(cupy),
        "run": lambda: run_to_a_loss(text, args.seconds, args.train),
        "ranks": lambda: several(cupy, text),
    }
    missed = []
    for stage in args.stages:
        results[stage], passed = measure[stage]()
        missed += [] if passed else [stage]
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(f"written to {args.out}" + (f"; not passed: {', '.join(missed)}" if missed else ""), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    status = main()
    os._exit(status)  # after PyTorch's profiler, the interpreter sometimes frees memory twice at its end, and is aborted
