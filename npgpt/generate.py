"""Drawing text from a model: look at the last block_size tokens, draw the next one, append, repeat."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from npgpt.backend import Stream, generator
from npgpt.config import GenerateConfig, RequestError
from npgpt.gpt import GPT
from npgpt.parallel import one_blas_thread
from npgpt.tensor import no_grad
from npgpt.tokenizer import CharTokenizer


def generate(
    model: GPT,
    context_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[int]:
    """The context followed by max_new_tokens drawn ids. For the other arguments see `generate_ids`."""
    context = [int(i) for i in context_ids]
    return context + list(generate_ids(model, context, max_new_tokens, temperature, top_k, top_p, seed))


def generate_ids(
    model: GPT,
    context_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    sample: int = 0,
) -> Iterator[int]:
    """Ids one by one, as they are drawn.

    context_ids: at least one id. temperature 0 takes the likeliest token every time. top_k larger than the
    vocabulary means all of it. seed None draws something new each time; with a seed, `sample` numbers
    independent samples of it. Raises RequestError, at the call, for anything out of range.
    """
    settings = GenerateConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    context = [int(i) for i in context_ids]
    if not context:
        raise RequestError("the context must have at least one token, got none")
    if not all(0 <= i < model.config.vocab_size for i in context):
        raise RequestError(f"context ids must lie in 0..{model.config.vocab_size - 1}, got {min(context)}..{max(context)}")
    return _draw(model, context, settings, sample)


def _draw(model: GPT, ids: list[int], settings: GenerateConfig, sample: int) -> Iterator[int]:
    entropy = settings.seed if settings.seed is not None else secrets.randbits(64)
    rng = generator(entropy, Stream.SAMPLE, sample)
    for _ in range(settings.max_new_tokens):
        logits = next_logits(model, ids[-model.config.block_size :])
        ids.append(sample_id(logits, settings.temperature, settings.top_k, settings.top_p, rng))
        yield ids[-1]


@no_grad()
def next_logits(model: GPT, ids: Sequence[int]) -> np.ndarray:
    """The logits (V,) of the token that follows `ids`, at most block_size of them. Raises FloatingPointError
    when they are not finite."""
    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):  # told below
        logits, _ = model(np.asarray([ids]))
    last = logits.numpy()[0, -1]
    if not np.isfinite(last).all():
        raise FloatingPointError("the model's logits are not finite numbers: its weights are damaged, or training diverged")
    return last


def sample_id(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, rng: np.random.Generator) -> int:
    """Draw an id from softmax(logits / temperature), restricted to the top_k likeliest (and their equals) and
    then to the smallest set whose probability reaches top_p ("The Curious Case of Neural Text
    Degeneration", Holtzman et al., 2020)."""
    if temperature == 0:
        return int(np.argmax(logits))
    logits = logits.astype(np.float64)
    if top_k is not None and top_k < len(logits):
        logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the likeliest to -inf, as it should
        p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_p is not None:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]  # probability of everything likelier
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return int(rng.choice(len(p), p=p))


def generate_text(
    model: GPT,
    tokenizer: CharTokenizer,
    prompt: str,
    settings: GenerateConfig,
    stop: Sequence[str] = (),
    sample: int = 0,
) -> Iterator[str]:
    """Pieces of the text that follows `prompt`, as they are drawn, ending before the first of the `stop` texts."""
    ids = generate_ids(
        model,
        tokenizer.encode(prompt or default_context(tokenizer)),
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.seed,
        sample,
    )
    return _until(stop, (tokenizer.itos[i] for i in ids))


def default_context(tokenizer: CharTokenizer) -> str:
    """What to continue when there is no prompt: a line break, as if a line were about to begin, where there is
    one, else the first character."""
    return "\n" if "\n" in tokenizer.stoi else tokenizer.itos[0]


def _until(stop: Sequence[str], pieces: Iterable[str]) -> Iterator[str]:
    """The pieces up to the first stop text, which may straddle them. What could still turn out to be the
    beginning of one is held back until that is settled."""
    held = ""
    longest = max(map(len, stop), default=1)
    for piece in pieces:
        held += piece
        ends = [end for s in stop if (end := held.find(s)) >= 0]
        if ends:
            yield held[: min(ends)]
            return
        sure = len(held) - (longest - 1)
        if sure > 0:
            yield held[:sure]
            held = held[sure:]
    yield held
