"""`make bench`: training against PyTorch, kernels against the reference, generation, saving, start-up, large texts.

The contenders are processes. They take turns and do a few steps each. The figures are medians, and all ratios are within this
one run. The program prints tables and writes them, with a description of the machine, to a JSON file. If PyTorch is installed
(pip install 'npgpt[parity]'), npgpt is compared with it. Nothing here is a test.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info
from workloads import ON_A_GPU, WORKLOADS

import npgpt
from npgpt.engine.backend import CPU, has_bfloat16_products
from npgpt.generation.generate import TokenStream
from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.native.kernels import NativeKernels
from npgpt.kernels.reference import Kernels
from npgpt.kernels.updates import AdamWStep
from npgpt.parallel.limits import available_cores
from npgpt.parallel.machine import blas_threads, describe_kernels, keep_freed_memory
from npgpt.storage.files import atomic_copy
from npgpt.text.reading import read_ids

HERE = Path(__file__).parent
TORCH_MODES = ["torch eager float32", "torch eager bfloat16", "torch compiled float32", "torch compiled bfloat16"]


class Contender:
    """A process that runs contender.py, and its measurements.

    A process that has died, or that has not answered after `patience` seconds, is out: `failure` says why.
    """

    def __init__(self, engine, workload, patience):
        self.engine, self.seconds, self.peak_memory, self.failure, self._patience = engine, [], None, None, patience
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (close() closes it)
        self._process = subprocess.Popen(
            [sys.executable, HERE / "contender.py", engine, workload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])},
        )

    def ask(self, steps):
        """Ask for some steps."""
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._has_died()

    def answer(self):
        """Wait for the steps that were asked for. Returns the seconds of each, none if the process is out."""
        alarm = threading.Timer(self._patience, self._process.kill)
        alarm.start()
        line = "" if self.failure else self._process.stdout.readline()
        in_time = alarm.is_alive()
        alarm.cancel()
        if not line:
            self._has_died(None if in_time else f"no answer after {self._patience} s")
            return []
        answer = json.loads(line)
        self.peak_memory = answer["peak_memory"]
        return answer["seconds"]

    def _has_died(self, failure=None):
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [f"status {status}"]
        self.failure = self.failure or failure or lines[-1]

    def close(self):
        with suppress(BrokenPipeError):  # the request that a dead process has not read
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()


def training(name, engines, rounds, patience=300):
    """Train one workload with all engines, taking turns.

    Returns ({engine: its figures}, {engine that failed: why}). An engine that does not answer for `patience` seconds fails.
    """
    contenders = [Contender(engine, name, patience) for engine in engines]
    for contender in contenders:
        contender.ask(2)  # warm-up: caches, compilation
    for contender in contenders:
        contender.answer()
    for _ in range(rounds):
        for contender in contenders:
            if not contender.failure:
                contender.ask(max(3, round(0.5 / statistics.median(contender.seconds or [0.5]))))
                contender.seconds += contender.answer()
    for contender in contenders:
        contender.close()
    workload = (WORKLOADS | ON_A_GPU)[name]
    tokens = workload.batch_size * workload.block_size
    rows = {}
    for c in contenders:
        if c.failure:
            continue
        median = statistics.median(c.seconds)
        rows[c.engine] = {
            "ms": round(1e3 * median, 2),
            "fastest_ms": round(1e3 * min(c.seconds), 2),
            "tokens_per_second": round(tokens / median),
            "steps": len(c.seconds),
            "peak_memory_mb": c.peak_memory and round(c.peak_memory / 1e6),
        }
    return rows, {c.engine: c.failure for c in contenders if c.failure}


def seconds_of(function, repeat):
    """The median time of a call. The first call does not count."""
    function()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def kernels():
    """The time of each operation with each set of kernels, forward and backward, on one micro-batch of `seed`.

    As in training, the BLAS has one thread and freed memory is kept.
    """
    keep_freed_memory()
    rng = np.random.default_rng(0)
    rows, c, heads, t = 1024, 256, 4, 128

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    def generator():
        return np.random.Generator(np.random.SFC64(1))

    q, k, v = (normal(rows // t, t, heads, c // heads).transpose(0, 2, 1, 3) for _ in range(3))
    x, wide = normal(rows, c), normal(rows, 4 * c)
    cases = {
        "gelu": lambda: (wide,),
        "layer_norm": lambda: (x, np.ones(c, np.float32), np.zeros(c, np.float32)),
        "causal_attention": lambda: (q, k, v, 0.1, generator()),
        "residual": lambda: (x, x, 0.1, generator()),
        "cross_entropy": lambda: (normal(rows, 65), rng.integers(0, 65, rows)),
        "rotary": lambda: (normal(rows // t, t, 2, heads, c // heads), normal(t, 1, 1, c // heads)),
        "embedding": lambda: (normal(65, c), rng.integers(0, 65, rows)),
    }
    results = {}
    for name, arguments in cases.items():
        given = arguments()

        def there_and_back(kernels, name=name, given=given):
            y, saved = getattr(kernels, f"{name}_forward")(*given)
            getattr(kernels, f"{name}_backward")(y, saved)

        results[name] = _milliseconds(there_and_back)
    state = [normal(1 << 20) for _ in range(4)]
    state[3] = np.abs(state[3])
    numbers = AdamWStep(step=5, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    results["adamw"] = _milliseconds(lambda kernels: kernels.adamw(*state, numbers))
    return results


def _milliseconds(call):
    """The time of call(kernels) for each set of kernels: the mean of two medians."""
    sets = {"reference": Kernels(np), "numpy": CpuKernels()}
    if isinstance(CPU.kernels, NativeKernels):
        sets["native"] = CPU.kernels
    seconds = {name: [] for name in sets}
    with blas_threads(1):
        for _ in range(2):
            for name, kernels in sets.items():
                seconds[name].append(seconds_of(functools.partial(call, kernels), 15))
    return {f"{name}_ms": round(1e3 * statistics.mean(times), 3) for name, times in seconds.items()}


def generation(name):
    """Tokens per second, drawn from one token to the end of the window, and past the window.

    npgpt draws one sequence, or sixteen side by side, with one BLAS thread or with one for each core. PyTorch and Hugging Face
    draw one sequence. "limit" is what one sequence would reach if a token took only the time to multiply all weights with a
    vector.
    """
    workload = WORKLOADS[name]
    n, cores = workload.block_size - 1, available_cores()
    model = npgpt.GPT(npgpt.GPTConfig(**{k: v for k, v in vars(workload).items() if k != "batch_size"}))

    def draw(tokens, context=1, **settings):
        config = npgpt.GenerateConfig(max_new_tokens=tokens, temperature=1.0, seed=0, **settings)
        for _ in TokenStream(model, [0] * context, config, range(config.num_samples)):
            pass

    def limit(threads):
        with blas_threads(threads):
            weights_once()

    weights_once = _weights_once(model)

    contenders = {
        "one": (n, lambda: draw(n)),
        "one, all cores": (n, lambda: draw(n, threads=cores)),
        "sixteen": (16 * n, lambda: draw(n, num_samples=16)),
        "sixteen, all cores": (16 * n, lambda: draw(n, num_samples=16, threads=cores)),
        "past the window": (30, lambda: draw(30, context=n + 1)),
        "past the window, all cores": (30, lambda: draw(30, context=n + 1, threads=cores)),
        "past the window, half": (4 * n, lambda: draw(4 * n, context=n + 1, window="half")),
        "limit": (1, lambda: limit(1)),
        "limit, all cores": (1, lambda: limit(cores)),
    }
    if importlib.util.find_spec("torch"):
        import torch_gpt

        contenders["PyTorch, no cache"] = (n, lambda: torch_gpt.draw_without_cache(workload, n))
        contenders["PyTorch, past the window"] = (30, lambda: torch_gpt.draw_without_cache(workload, 30, context=n + 1))
        if importlib.util.find_spec("transformers"):
            hugging_face = torch_gpt.hugging_face(workload)
            contenders["Hugging Face"] = (n, lambda: hugging_face(n))
    seconds = {key: [] for key in contenders}
    for _ in range(3):
        for key, (_, function) in contenders.items():
            seconds[key].append(seconds_of(function, 50 if "limit" in key else 1))
    return {key: round(contenders[key][0] / statistics.median(seconds[key])) for key in contenders}


def _weights_once(model):
    """A function that multiplies each matrix of a model with a vector, except the embeddings."""
    matrices = [p.data for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name and "wpe" not in name]
    vectors = [np.ones((1, len(m)), dtype=np.float32) for m in matrices]
    return lambda: [v @ m for v, m in zip(vectors, matrices, strict=True)]


def saving(step_ms):
    """The time to save the state of each workload, as the last one and as the best one.

    Also its share of the training time, at the default interval, if every evaluation is the best so far.
    step_ms: {workload: milliseconds of a step}.
    """
    interval, rows = npgpt.TrainConfig().eval_interval, {}
    tokenizer = npgpt.CharTokenizer("".join(map(chr, range(32, 97))))
    with tempfile.TemporaryDirectory(dir=".") as folder:  # a temporary folder elsewhere may be in memory
        for name, ms in step_ms.items():
            settings = {k: v for k, v in vars(WORKLOADS[name]).items() if k != "batch_size"}
            model = npgpt.GPT(npgpt.GPTConfig(**settings))
            optimizer = npgpt.AdamW(model.parameters())
            path = Path(folder) / "model.npz"

            def save(model=model, optimizer=optimizer, path=path):
                npgpt.save(path, npgpt.Checkpoint(model, tokenizer, optimizer_state=optimizer.state_dict()))
                atomic_copy(path, path.with_name("best.npz"))

            seconds = seconds_of(save, 5)
            rows[name] = {
                "file_mb": round(path.stat().st_size / 1e6, 1),
                "save_ms": round(1e3 * seconds, 1),
                "percent_of_training": round(100 * 1e3 * seconds / (interval * ms), 2),
            }
    return rows


def start_up():
    """The seconds of a process that imports the package, and of one that answers --help."""

    def process(*arguments):
        return lambda: subprocess.run(
            [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=HERE.parent.parent
        )

    bare = seconds_of(process("-c", "pass"), 7)
    return {
        "python_alone_s": round(bare, 3),
        "import_numpy_s": round(seconds_of(process("-c", "import numpy"), 7), 3),
        "import_npgpt_s": round(seconds_of(process("-c", "import npgpt"), 7), 3),
        "generate_help_s": round(seconds_of(process("-m", "npgpt", "generate", "--help"), 7), 3),
    }


def large_texts(sizes):
    """For texts of these sizes: seconds to read and encode, milliseconds to draw a batch of `seed`, bytes per token.

    The files are in the page cache.
    """
    rows = {}
    characters = "".join(map(chr, range(32, 97))).encode()
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / "text.txt"
            with path.open("wb") as file:
                for start in range(0, size, 65 << 14):
                    file.write((characters * (1 << 14))[: size - start])
            started = time.perf_counter()
            _, ids = read_ids(path)
            read = time.perf_counter() - started
            dataset = npgpt.Dataset(ids, 128, 32)
            counter = iter(range(1 << 62))
            draw = seconds_of(lambda d=dataset, c=counter: d.get_batch("train", next(c)), 50)
            rows[f"{size:,}"] = {
                "read_s": round(read, 3),
                "draw_ms": round(1e3 * draw, 3),
                "bytes_per_token": dataset.ids.nbytes / size,
            }
    return rows


def machine():
    """The machine of this run: processor, cores, system, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return {
        "processor": model,
        "cores": available_cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": ", ".join(f"{b['internal_api']} {b['version']} {b.get('architecture', '')}" for b in blas),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "kernels": describe_kernels(),
        "npgpt": npgpt.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS), help="default: all three")
    parser.add_argument("--rounds", type=int, default=10, help="number of turns of each contender")
    parser.add_argument("--eager-only", action="store_true", help="leave out PyTorch's compiled modes, which take minutes")
    parser.add_argument("--largest-text", type=int, default=1_000_000_000, help="number of tokens of the largest text")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "latest.json", help="the file for the figures")
    args = parser.parse_args()

    results = {"machine": machine(), "training": {}}
    print("  ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed, so there is no comparison; install it with: pip install 'npgpt[parity]'")
        modes = []
    else:
        modes = [mode for mode in TORCH_MODES if not (args.eager_only and "compiled" in mode)]

    for name in args.workloads:
        own_modes = ["npgpt", *(["npgpt bfloat16"] if has_bfloat16_products(CPU) else [])]
        rows, failed = training(name, [*own_modes, "gemm", *modes], args.rounds)
        for engine, why in failed.items():
            print(f"  {engine} did not run: {why}", flush=True)
        if own_failed := failed.keys() & {"npgpt", "gemm"}:
            sys.exit(f"make bench: nothing to compare with, because {' and '.join(sorted(own_failed))} did not run")
        own = rows["npgpt"]["ms"]
        print(f"\n{name}: {'ms/step':>34} {'tokens/s':>9} {'rel. time':>9} {'peak MB':>8}")
        for engine, row in rows.items():
            ratio = row["ms"] / own
            print(
                f"  {engine:28} {row['ms']:10.1f} {row['tokens_per_second']:9,} {ratio:8.2f}x {row['peak_memory_mb'] or 0:8,}"
            )
        print(f"  GEMM share {rows['gemm']['ms'] / own:.2f}", flush=True)
        results["training"][name] = rows

    sizes = [n for n in (1_000_000, 10_000_000, 100_000_000, 1_000_000_000) if n <= args.largest_text]
    for title, measure in [
        ("kernels, forward and backward, one micro-batch of seed", kernels),
        ("generation, tokens/s", lambda: {name: generation(name) for name in ("seed", "char")}),
        ("saving", lambda: saving({name: rows["npgpt"]["ms"] for name, rows in results["training"].items()})),
        ("start-up", start_up),
        ("large texts", lambda: large_texts(sizes)),
    ]:
        results[title] = measure()
        print(f"\n{title}")
        for key, value in results[title].items():
            shown = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"  {key:20} {shown}", flush=True)

    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
