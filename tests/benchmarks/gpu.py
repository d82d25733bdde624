"""`make gpu`: the tests on a GPU, the speed of a training step against PyTorch, and a training run to a loss.

This takes less than nine minutes. It prints a table and writes a JSON file. It needs CuPy. If PyTorch is installed with CUDA,
npgpt is compared with it.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import HERE, machine, training
from workloads import ON_A_GPU

from npgpt.engine.backend import DeviceError, select
from npgpt.storage.run import RunFiles, read_log

ROOT = HERE.parent.parent
MODES = [f"{how} {dtype} cuda" for how in ("eager", "compiled") for dtype in ("float32", "TF32", "bfloat16")]


def gpu(cupy):
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cupy": cupy.__version__,
    }


def tests(seconds):
    """Run the tests marked `gpu`. Returns (the last line of pytest, whether all tests passed).

    Two processes run them, because much of the time goes to compiling kernels.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "gpu", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        print((error.stdout or b"").decode()[-6000:], flush=True)
        return f"not finished after {seconds} s", False
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return lines[-1] if lines else "", done.returncode == 0


def run_to_a_loss(text, seconds, extra):
    """Train nanoGPT's published configuration in bfloat16, for at most `seconds`. Returns the best exact held-out loss."""
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
        evaluations = [e for e in read_log(RunFiles(out).log) if e["event"] == "evaluation"]
        if not evaluations:
            return {"text": Path(text).name, "status": status, "seconds": round(taken)}
        best = min(evaluations, key=lambda e: e["val_loss"])
        return {
            "text": Path(text).name,
            "status": status,
            "steps": evaluations[-1]["step"],
            "seconds": round(taken),
            "best_step": best["step"],
            "best_loss": round(best["val_loss"], 4),
            "stderr": round(best["val_stderr"], 4),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=None, help="default: data/tinyshakespeare.txt if it is there, else data/tiny.txt")
    parser.add_argument("--rounds", type=int, default=6, help="number of turns of each contender")
    parser.add_argument("--seconds", type=float, default=150, help="longest time of the training run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json", help="the file for the figures")
    args, extra = parser.parse_known_args()
    try:
        cupy = select("cuda").xp
    except DeviceError as error:
        sys.exit(f"make gpu: {error}")
    shakespeare = ROOT / "data" / "tinyshakespeare.txt"
    text = args.text or str(shakespeare if shakespeare.exists() else ROOT / "data" / "tiny.txt")

    results = {"machine": machine() | gpu(cupy)}
    print("  ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)

    def keep():
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8", newline="\n")

    results["tests"], passed = tests(150)
    print(f"tests: {results['tests']}", flush=True)
    keep()

    engines = [f"npgpt {dtype} cuda" for dtype in ("float32", "TF32", "bfloat16")]
    if importlib.util.find_spec("torch"):
        engines += [f"torch {mode}" for mode in MODES]
    (name,) = ON_A_GPU
    rows, failed = training(name, engines, args.rounds)
    results["training"] = {name: rows}
    print(f"\n{name}: {'ms/step':>34} {'tokens/s':>11}")
    for engine, row in rows.items():
        print(f"  {engine:32} {row['ms']:10.2f} {row['tokens_per_second']:11,}", flush=True)
    if failed:
        print(f"  did not run: {', '.join(failed)}")
    keep()

    results["run"] = run_to_a_loss(text, args.seconds, extra)
    print("\n" + "  ".join(f"{key} {value}" for key, value in results["run"].items()))
    keep()
    print(f"written to {args.out}")
    return 0 if passed and not failed and results["run"].get("best_loss") else 1


if __name__ == "__main__":
    sys.exit(main())
