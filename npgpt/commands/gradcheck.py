"""`npgpt gradcheck`, `npgpt replay` and `npgpt inspect`: looking into a model, a crash, a file."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig
from npgpt.console.flags import add_flags, settings_from
from npgpt.console.terminal import command_parser
from npgpt.engine import ops
from npgpt.engine.gradcheck import check_tensors
from npgpt.engine.streams import Stream, generator
from npgpt.engine.tensor import Tensor
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import blas_threads
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.storage.checkpoint import load

# ---------------------------------------------------------------- gradcheck


GRADCHECK_MODEL = {"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}


def gradcheck_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "gradcheck",
        "Hold every parameter's gradient in a small GPT against finite differences, in float64, dropout on: of each\n"
        "parameter a dozen elements, and three random directions that every element has a part in. Where the function\n"
        "is not smooth (a kink, as ReLU's at 0) there is nothing to compare with; such places are counted.",
        ["bin/gradcheck --activation relu --n-layer 3", "bin/gradcheck --ckpt model.npz"],
    )
    parser.add_argument(
        "--ckpt", metavar="FILE", help="check the model of a checkpoint, with its weights (default: a small one)"
    )
    add_flags(parser, GPTConfig, defaults=GRADCHECK_MODEL)
    return parser


def gradcheck(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    asked = settings_from(args, GPTConfig)
    if args.ckpt and asked:
        raise RequestError(f"a checkpoint has its own shape: leave out --ckpt or --{next(iter(asked)).replace('_', '-')}")
    trained = None
    if args.ckpt:
        checkpoint = load(args.ckpt)
        if checkpoint.crash is not None:
            raise RequestError(f"{args.ckpt} is a crash file, whose numbers are beyond checking; see npgpt replay")
        trained = checkpoint.model
    config = trained.config if trained else GPTConfig(**(GRADCHECK_MODEL | asked))
    model = GPT(config, dtype=np.float64)
    rng = np.random.default_rng(0)
    if trained:
        model.load_state_dict(trained.state_dict())
    else:
        for p in model.parameters():  # weights of ordinary size, so that no term is too small to show
            p.data[...] += 0.3 * rng.standard_normal(p.shape)
    ids = rng.integers(0, config.vocab_size, (2, min(config.block_size, 8) + 1))
    x, y = ids[:, :-1], ids[:, 1:]

    def loss() -> Tensor:
        logits, _ = model(x, rng=generator(0, Stream.DROPOUT))  # the same masks every time
        return ops.cross_entropy(logits, y, reduction="none")

    parameters = dict(model.named_parameters())
    width = max(map(len, parameters))
    print(f"{'parameter':{width}}  {'shape':>9}  checked  kinks  largest error  median error")
    reports = check_tensors(loss, parameters, op="GPT", rtol=1e-7, max_elements=12)
    with blas_threads(1), tqdm(total=len(parameters), unit="parameter", disable=None, leave=False) as bar:
        for report in reports:
            shape = "x".join(map(str, parameters[report.name].shape))
            errors = f"{report.max_error:13.1e}  {report.median_error:12.1e}"
            with bar.external_write_mode(file=sys.stdout):
                print(f"{report.name:{width}}  {shape:>9}  {report.checked:7}  {report.kinks:5}  {errors}", flush=True)
            bar.update()
    print("all gradients agree with finite differences to 1e-7")
    return 0


# ---------------------------------------------------------------- replay


def replay_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "replay",
        "Repeat the step at which a training run found a number that is not finite, and say which operation gave it.",
        ["bin/npgpt replay model.crash.npz"],
    )
    parser.add_argument("ckpt", metavar="FILE", help="the crash file the run has left")
    return parser


def replay(args: argparse.Namespace) -> int:
    crash = load(args.ckpt)
    if crash.crash is None or crash.batch is None or crash.train_config is None:
        raise RequestError(f"{args.ckpt} is no crash file, but the checkpoint of a run; train writes a NAME.crash.npz")
    config = crash.train_config
    with Workers(1) as workers:
        step = ParallelStep(crash.model, workers, config.micro_batch)
        loss = step(*crash.batch, config.seed, crash.step)
        found = step.diagnose(*crash.batch, config.seed, crash.step)
    if config.bf16 or config.tf32:
        print("the run computed with fewer bits, on a GPU; this is the step in float32")
    print(f"step {crash.step + 1}, loss {loss}: {found}")
    if found != crash.crash:
        print(f"the run itself had found: {crash.crash}")
    return 0


# ---------------------------------------------------------------- inspect


def inspect_parser() -> argparse.ArgumentParser:
    parser = command_parser("inspect", "What a checkpoint holds.", ["bin/inspect model.npz", "bin/inspect --arrays model.npz"])
    parser.add_argument("ckpt", metavar="FILE", help="a checkpoint written by train")
    parser.add_argument("--arrays", action="store_true", help="also list every array")
    return parser


def inspect(args: argparse.Namespace) -> int:
    checkpoint = load(args.ckpt, with_optimizer=True)
    config, progress = checkpoint.config, checkpoint.progress
    print(f"{args.ckpt}: {checkpoint.model.num_parameters():,} parameters, step {checkpoint.step}")
    verified = "the SHA-256 of every array verified" if checkpoint.format > 1 else "which has no hashes to verify"
    print(f"file        format {checkpoint.format}, {verified}")
    if checkpoint.crash is not None:
        print(f"crash       {checkpoint.crash} (npgpt replay repeats the step)")
    print("model       " + ", ".join(f"{k} {v}" for k, v in vars(config).items()))
    if checkpoint.train_config:
        print("training    " + ", ".join(f"{k} {v}" for k, v in vars(checkpoint.train_config).items()))
    print(f"vocabulary  {checkpoint.tokenizer.characters!r}")
    if checkpoint.fingerprint:
        print(f"text        SHA-256 of its ids {checkpoint.fingerprint}")
    if checkpoint.machine:
        print("machine     " + ", ".join(f"{k} {v}" for k, v in checkpoint.machine.items()))
    for step, train_loss, val_loss, _ in progress.get("history", []):
        best = " (best)" if step == progress.get("best_step") else ""
        val = "" if val_loss is None else f", val loss {val_loss:.4f}{best}"
        print(f"step {step:6}  train loss {train_loss:.4f}{val}")
    if args.arrays:
        for name, array in checkpoint.model.state_dict().items():
            with np.errstate(over="ignore", invalid="ignore"):  # of a crash file
                numbers = f"mean {array.mean():+.4f}  std {array.std():.4f}"
            print(f"{name:28} {array.shape!s:14} {array.dtype}  {numbers}")
    return 0
