"""`npgpt gradcheck`: check the gradient of every parameter of a GPT against finite differences."""

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
from npgpt.storage.checkpoint import load

ABOUT = "check the hand-written gradients"

SMALL_MODEL = {"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "gradcheck",
        "Compare the gradient of every parameter of a small GPT with finite differences, in float64 and with dropout:\n"
        "twelve elements of each parameter, and three random directions that all elements contribute to. Where the\n"
        "function is not smooth (at a kink, such as ReLU's at 0) there is no derivative; such places are counted.",
        ["--activation relu --n-layer 3", "--ckpt model.npz"],
    )
    parser.add_argument(
        "--ckpt", metavar="FILE", help="check the model of a checkpoint, with its weights (default: a small one)"
    )
    add_flags(parser, GPTConfig, defaults=SMALL_MODEL)
    return parser


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    asked = settings_from(args, GPTConfig)
    if args.ckpt and asked:
        raise RequestError(f"a checkpoint has its own shape: leave out --ckpt or --{next(iter(asked)).replace('_', '-')}")
    trained = None
    if args.ckpt:
        checkpoint = load(args.ckpt)
        if checkpoint.crash is not None:
            raise RequestError(f"{args.ckpt} is a crash file, and its numbers cannot be checked; see npgpt replay")
        trained = checkpoint.model
    config = trained.config if trained else GPTConfig(**(SMALL_MODEL | asked))
    model = GPT(config, dtype=np.float64)
    rng = np.random.default_rng(0)
    if trained:
        model.load_state_dict(trained.state_dict())
    else:
        for p in model.parameters():  # larger weights, so that no term is too small to show
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
