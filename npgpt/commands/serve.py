"""`npgpt serve`: serve a model over HTTP. The application is in serving/."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from npgpt.config.fields import RequestError, fields_of
from npgpt.config.settings import GenerateConfig, GPTConfig
from npgpt.console.extras import SERVE, check_installed
from npgpt.console.flags import port, positive
from npgpt.console.terminal import command_parser, say
from npgpt.generation.decode import window_for
from npgpt.parallel.limits import available_cores, memory_limit
from npgpt.serving.batching import SIDE_BY_SIDE
from npgpt.storage.checkpoint import load

ABOUT = "serve a model: a page, and the interface that OpenAI's clients know"
KEY_VARIABLE = "NPGPT_API_KEY"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "serve",
        "Serve a model over HTTP: a page at /, and /v1/models and /v1/completions as OpenAI's clients expect them. Requests\n"
        "that arrive together are drawn side by side. By default only this computer can reach the server. Needs the extra\n"
        "[serve].",
        ["--ckpt model.npz", "--ckpt model.npz --port 9000 --host 0.0.0.0 --api-key SECRET"],
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint written by train")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0: any free one (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="the address to listen on (default: 127.0.0.1)")
    key = parser.add_mutually_exclusive_group()
    key.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"clients must send this key; the environment variable {KEY_VARIABLE} is safer, because other users of this "
        "computer can see the arguments of a command",
    )
    key.add_argument("--no-api-key", action="store_true", help="accept every client that can reach the address")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which clients reach this server; may be given several times (default: this computer's own names)",
    )
    window = next(f for f in fields_of(GenerateConfig) if f.name == "window")
    parser.add_argument("--window", choices=window.choices, help=window.help)
    parser.add_argument(
        "--threads", type=positive("threads"), metavar="N", help="threads that draw (default: one for each core)"
    )
    parser.add_argument(
        "--side-by-side",
        type=positive("side_by_side"),
        metavar="N",
        help=f"texts that a thread draws together (default: {SIDE_BY_SIDE}, or fewer if memory is short)",
    )
    parser.add_argument(
        "--queue",
        type=positive("queue"),
        default=64,
        metavar="N",
        help="texts that may wait while all places are taken (default: 64)",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive("max_tokens"),
        default=4096,
        metavar="N",
        help="the largest max_tokens of a request (default: 4096)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    check_installed(*SERVE)
    from npgpt.serving.app import Application, ServerSettings
    from npgpt.serving.protection import LOCAL_HOSTS
    from npgpt.serving.server import EVERY_ADDRESS, address, listen, own_addresses
    from npgpt.serving.server import run as serve

    if "" in (args.host, args.api_key, *args.allow_host):
        raise RequestError("--host, --api-key and --allow-host must not be empty")
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if args.host not in LOCAL_HOSTS and key is None and not args.no_api_key:
        raise RequestError(
            f"--host {args.host} lets other computers in; give a key with --api-key or {KEY_VARIABLE}, or --no-api-key to let "
            "everybody in"
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise RequestError("the API key must be of printable ASCII characters without blanks")
    checkpoint = load(args.ckpt)
    window_for(checkpoint.model, args.window)
    threads = args.threads or available_cores()
    names = own_addresses() if args.host in EVERY_ADDRESS else [args.host]
    settings = ServerSettings(
        Path(args.ckpt).stem,
        (*LOCAL_HOSTS, *names, *args.allow_host),
        None if args.no_api_key else key,
        args.window,
        threads,
        _side_by_side(args.side_by_side, threads, checkpoint.config),
        args.queue,
        args.max_tokens,
    )
    served = Application(checkpoint.model, checkpoint.tokenizer, settings)
    with listen(args.host, args.port) as listening:
        say(f"{args.ckpt}: {address(listening)} in a browser, {address(listening)}v1 for OpenAI's clients; Ctrl-C stops")
        serve(served, listening)
    return 0


def _side_by_side(asked: int | None, threads: int, config: GPTConfig) -> int:
    """How many texts each thread draws together. Raises RequestError if the memory for their keys and values is missing."""
    limit = memory_limit()
    # Keys and values in float32; the cache grows by doubling, and while it grows the old one is still there.
    of_one = 3 * 2 * 4 * config.n_layer * config.block_size * config.n_embd
    if asked is None:
        return SIDE_BY_SIDE if limit is None else max(1, min(SIDE_BY_SIDE, limit.value // 4 // (threads * of_one)))
    if limit is not None and threads * asked * of_one > limit.value:
        needed = f"{threads} x {asked} texts need {threads * asked * of_one / 2**30:.1f} GiB for their keys and values"
        raise RequestError(f"{needed}, but {limit.source}; lower --side-by-side or --threads")
    return asked
