"""Many clients at a server at once, for a while: errors, speed beside the library's, time to the first token, equal texts.

    python tests/benchmarks/serving.py model.npz --clients 64 --seconds 60

The clients run in this process, on the same cores as the server. Afterwards every text is compared with the one that the
library writes for its seed alone.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time

import npgpt
from npgpt.generation.generate import TokenStream, generate_text

PROMPT, TEMPERATURE = "HOB:", 0.8
TOKENS = (50, 124)  # of a text, between these


class Clients:
    """What the clients have received."""

    def __init__(self, port):
        self.port, self.texts, self.first, self.errors, self.refused = port, [], [], [], 0

    async def one_text(self, seed, n_tokens):
        body = {"prompt": PROMPT, "max_tokens": n_tokens, "seed": seed, "temperature": TEMPERATURE, "stream": True}
        raw = json.dumps(body).encode()
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        received, first = b"", None
        while part := await reader.read(1 << 16):
            received += part
            if first is None and b"data: " in received:
                first = time.perf_counter() - started
        writer.close()
        status = int(received.split(b" ", 2)[1])
        if status == 429:
            self.refused += 1
            await asyncio.sleep(0.2)
            return
        events = re.findall(rb"data: (.+?)\n\n", received)
        if status != 200 or events[-1] != b"[DONE]":
            self.errors.append(received[-200:])
            return
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        self.texts.append((seed, n_tokens, text))
        self.first.append(first)

    async def client(self, number, until):
        rng, count = random.Random(number), 0
        while time.perf_counter() < until:
            await self.one_text(number * 100_000 + count, rng.randint(*TOKENS))
            count += 1

    async def run(self, n, seconds):
        until = time.perf_counter() + seconds
        await asyncio.gather(*[self.client(number, until) for number in range(n)])


def sixteen_side_by_side(model, start_ids):
    """Tokens a second of the library."""
    speeds = []
    for seed in range(5):
        settings = npgpt.GenerateConfig(max_new_tokens=120, seed=seed, temperature=TEMPERATURE)
        started = time.perf_counter()
        n = sum(1 for _ in TokenStream(model, start_ids, settings, range(16)))
        speeds.append(n / (time.perf_counter() - started))
    return statistics.median(speeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    checkpoint = npgpt.load(args.ckpt)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    library = [sixteen_side_by_side(model, tokenizer.start_ids)]
    command = [sys.executable, "-m", "npgpt", "serve", "--ckpt", args.ckpt, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as server:
        clients = Clients(int(re.search(r":(\d+)/ ", server.stderr.readline())[1]))
        started = time.perf_counter()
        asyncio.run(clients.run(args.clients, args.seconds))
        seconds = time.perf_counter() - started
        server.terminate()
    library.append(sixteen_side_by_side(model, tokenizer.start_ids))
    n_tokens, fastest = sum(n for _, n, _ in clients.texts), statistics.mean(library)
    print(f"{args.clients} clients for {seconds:.0f} s: {len(clients.texts):,} texts, {n_tokens:,} tokens")
    print(f"errors {len(clients.errors)}, refused with 429: {clients.refused}")
    before, after = library
    print(f"{n_tokens / seconds:,.0f} tokens/s; the library, sixteen side by side: {before:,.0f}, afterwards {after:,.0f}")
    print(f"ratio {n_tokens / seconds / fastest:.2f}")
    print(f"first token: median {1000 * statistics.median(clients.first):.0f} ms, worst {1000 * max(clients.first):.0f} ms")
    differing = 0
    for seed, n, text in clients.texts:
        settings = npgpt.GenerateConfig(max_new_tokens=n, seed=seed, temperature=TEMPERATURE)
        differing += "".join(generate_text(model, tokenizer, PROMPT, settings)) != text
    print(f"{differing} of {len(clients.texts):,} texts differ from those of their seeds alone")
    if clients.errors or differing:
        sys.exit(str(clients.errors[:3]))


if __name__ == "__main__":
    main()
