"""`npgpt export`: write a model for other programs. How its files are written is in exchange/."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from npgpt.config.fields import RequestError
from npgpt.console.terminal import command_parser, say
from npgpt.exchange.gguf import write_gguf
from npgpt.exchange.huggingface import write_folder
from npgpt.storage.checkpoint import load

ABOUT = "write a model for transformers or llama.cpp"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "export",
        "Write a model for other programs: a folder for Hugging Face's transformers, or a GGUF file for llama.cpp.\n"
        "A model with learned positions becomes a GPT-2, one with rotary positions a GPT-NeoX.",
        ["model.npz mymodel/ --format hf", "model.npz mymodel.gguf --format gguf --dtype f16"],
    )
    parser.add_argument("ckpt", metavar="FILE", help="a checkpoint written by train")
    parser.add_argument(
        "out", metavar="OUT", help="the file to write, which must not exist yet, or the folder, which may be empty"
    )
    parser.add_argument(
        "--format",
        choices=("hf", "gguf"),
        help="hf: a folder for transformers; gguf: a file for llama.cpp (default: gguf if OUT ends in .gguf, hf if it has no "
        "suffix)",
    )
    parser.add_argument("--dtype", choices=("f32", "f16"), default="f32", help="how weights are stored (default: f32)")
    return parser


def run(args: argparse.Namespace) -> int:
    checkpoint = load(args.ckpt)
    n = min(200, checkpoint.config.block_size // 2)  # so that prompt and text fit into the context
    suffix = Path(args.out).suffix.lower()
    if args.format is None and suffix not in ("", ".gguf"):
        raise RequestError(f"is {args.out} a folder or a file? say --format hf or --format gguf")
    kind = args.format or ("gguf" if suffix else "hf")
    if kind == "hf":
        write_folder(checkpoint, args.out, args.dtype)
        pipeline = f'pipeline("text-generation", {json.dumps(args.out)})'
        code = f'from transformers import pipeline; print({pipeline}("The", max_new_tokens={n})[0]["generated_text"])'
        say(f"{args.out}: use it with: python -c {shlex.quote(code)}")
        return 0
    for note in write_gguf(checkpoint, args.out, args.dtype):
        say(f"        {note}")
    context = checkpoint.config.block_size
    say(f"{args.out}: use it with: llama-completion -m {shlex.quote(args.out)} -no-cnv -c {context} -n {n} -p 'The'")
    return 0
