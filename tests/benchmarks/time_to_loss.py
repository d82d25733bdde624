"""Time to a validation loss of 1.88: npgpt's `--preset quick` against nanoGPT's configuration for a CPU in PyTorch.

    python time_to_loss.py data/tinyshakespeare.txt

PyTorch does 2000 steps of `nano`, with nanoGPT's schedule and evaluations: 20 batches of each split, every 250 steps. npgpt's
time is that of the whole command: start-up, reading, training, evaluations and checkpoints. The two take turns. The figures are
wall-clock seconds and exact validation losses; the ratio is that of the median times. This is not a test.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from workloads import WORKLOADS

import npgpt
from npgpt.text.dataset import window_starts, windows_at
from npgpt.text.reading import read_ids

HERE = Path(__file__).parent


def train_torch(text, seed):
    """Train nanoGPT's configuration in PyTorch. Returns (seconds, exact validation loss)."""
    import torch
    from torch_gpt import TorchGPT

    workload, steps = WORKLOADS["nano"], 2000
    started = time.perf_counter()
    _, ids = read_ids(text)
    data = npgpt.Dataset(ids, workload.block_size, workload.batch_size, seed=seed)
    torch.manual_seed(seed)
    model = TorchGPT(workload)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    def batch(split):
        return (torch.from_numpy(np.ascontiguousarray(a)) for a in data.get_batch(split))

    for step in range(steps):
        if step % 250 == 0:
            with torch.no_grad():
                for split in ("train", "val"):
                    for _ in range(20):
                        model(*batch(split)).item()
        rate = npgpt.learning_rate(step, steps=steps, lr=1e-3, min_lr=1e-4, warmup_steps=100, schedule="cosine")
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(*batch("train"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - started
    total, count = 0.0, 0
    with torch.no_grad():
        starts = window_starts(len(data.val), workload.block_size)
        for part in np.array_split(starts, 20):
            x, y = windows_at(data.val, part, workload.block_size)
            total += model(torch.from_numpy(x.copy()), torch.from_numpy(y.copy())).item() * y.size
            count += y.size
    return seconds, total / count


def train_npgpt(text, seed, flags):
    """Run `npgpt train` with these flags. Returns (seconds of the whole command, exact validation loss)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.npz"
        environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
        command = [sys.executable, "-m", "npgpt", "train", text, "--out", out, "--seed", str(seed), *flags]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        checkpoint = npgpt.load(out)
        _, ids = read_ids(text, checkpoint.tokenizer)
        loss = npgpt.evaluate(checkpoint.model, npgpt.Dataset(ids, 64, 1).val).loss
    return seconds, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="the file of tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of each; turn number k has the seed k")
    parser.add_argument("--flags", default="--preset quick", help="flags of npgpt train")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "time-to-loss.json", help="the file for the figures")
    args = parser.parse_args()
    runs = {"npgpt": [], "torch": []}
    for seed in range(args.rounds):
        for name, train in (
            ("npgpt", lambda s: train_npgpt(args.text, s, args.flags.split())),
            ("torch", lambda s: train_torch(args.text, s)),
        ):
            seconds, loss = train(seed)
            runs[name].append({"seconds": round(seconds, 1), "validation_loss": round(loss, 4)})
            print(f"{name:6} {seconds:6.1f} s  validation loss {loss:.4f}", flush=True)
    medians = {name: statistics.median(run["seconds"] for run in each) for name, each in runs.items()}
    print(f"npgpt takes {medians['npgpt'] / medians['torch']:.2f} of PyTorch's time")
    result = {"flags": args.flags, "ratio": round(medians["npgpt"] / medians["torch"], 3), **runs}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
