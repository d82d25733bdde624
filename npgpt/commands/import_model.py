"""`npgpt import`: make a checkpoint of a model from Hugging Face. How its files are read is in exchange/."""

from __future__ import annotations

import argparse
import shlex

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.console.flags import file_to_write, positive
from npgpt.console.terminal import command, command_parser, say
from npgpt.exchange.huggingface import check_vocabulary, read_model, read_tokenizer_of
from npgpt.generation.generate import generate_text
from npgpt.storage.checkpoint import Checkpoint, save
from npgpt.text.tokenizer_files import read_tokenizer

ABOUT = "make a checkpoint of a model from Hugging Face"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "import",
        "Make a checkpoint of a model from Hugging Face: of a GPT-2, or of what export has written. The weights are kept as\n"
        "they are. A model that npgpt cannot compute exactly is refused.",
        ["gpt2/ --out gpt2.npz", "gpt2/model.safetensors --out short.npz --block-size 256"],
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder with config.json, model.safetensors (or its parts) and a tokenizer; or the .safetensors file in it",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write; it must not exist yet")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="the file or folder of the tokenizer (default: the one beside the model)"
    )
    parser.add_argument(
        "--block-size",
        type=positive("block_size"),
        metavar="N",
        help="crop the context to N tokens; the learned positions after it are left out",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    out = file_to_write(args.out, ".npz")
    if out.exists():
        raise RequestError(f"{out} exists already; choose another --out")
    imported = read_model(args.source, args.block_size)
    model, config = imported.model, imported.model.config
    if args.tokenizer is None:
        tokenizer = read_tokenizer_of(args.source, config)
    else:
        tokenizer = read_tokenizer(args.tokenizer)
        check_vocabulary(tokenizer, config)
    say(f"model   {config.num_parameters():,} parameters: " + ", ".join(f"{k} {v}" for k, v in vars(config).items()))
    for note in imported.notes:
        say(f"        {note}")
    kind = "characters" if tokenizer.is_characters else "tokens of a byte-level BPE"
    padding = config.vocab_size - tokenizer.vocab_size
    say(f"text    {tokenizer.vocab_size:,} {kind}" + (f"; {padding:,} more ids are never drawn" if padding else ""))
    save(out, Checkpoint(model, tokenizer))
    settings = GenerateConfig(max_new_tokens=min(24, config.block_size), seed=0)
    say(f"writes  {''.join(generate_text(model, tokenizer, '', settings))!r}")
    say(f"{out}: write with: {command('generate')} --ckpt {shlex.quote(str(out))}")
    return 0
