"""Drawing text from a model: the logits of the next token, one drawn from them, appended, and so on.

Keys and values of what was seen are kept, so a token costs one position while the text fits block_size. The
positions are learned, so past it every key would be another one: then the last block_size tokens are looked at
anew for each token, or, with window "half", the first half of them is forgotten and the rest kept again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.engine.backend import Stream, generator
from npgpt.engine.tensor import no_grad
from npgpt.generation.decode import Decoder
from npgpt.model.gpt import GPT, KVCache
from npgpt.parallel.step import blas_threads
from npgpt.text.characters import CharTokenizer

SIDE_BY_SIDE = 32  # samples drawn together: more take more memory, and hardly less time each


def generate(
    model: GPT,
    context_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[int]:
    """The context followed by max_new_tokens drawn ids. For the other arguments see `GenerateConfig`.

    Raises RequestError for anything out of range, an empty context among it.
    """
    settings = GenerateConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return [int(i) for i in context_ids] + [token.id for token in Drawing(model, context_ids, settings)]


@dataclass(frozen=True)
class Token:
    """One drawn token. `logprob` is the natural logarithm of the probability the model gave it, before temperature and
    everything that restricts the choice."""

    sample: int
    id: int
    logprob: float


class Drawing:
    """Samples drawn side by side from one context: iterate to get a Token at a time.

    With a seed, sample k is the same whichever others are drawn beside it, as far as the rounding of a product with
    more rows lets it: a draw within a millionth of a boundary may fall on the other side. Raises RequestError for a
    context that is empty or has ids outside the vocabulary, and, while drawing, FloatingPointError when the model's
    logits are not finite.
    """

    def __init__(self, model: GPT, context_ids: Sequence[int], settings: GenerateConfig, samples: Sequence[int] = (0,)) -> None:
        context = [int(i) for i in context_ids]
        if not context:
            raise RequestError("the context must have at least one token, got none")
        if not all(0 <= i < model.config.vocab_size for i in context):
            raise RequestError(f"context ids must lie in 0..{model.config.vocab_size - 1}, got {min(context)}..{max(context)}")
        entropy = settings.seed if settings.seed is not None else secrets.randbits(64)
        self.model, self.settings = model, settings
        self._rows = {k: _Row(list(context), generator(entropy, Stream.SAMPLE, k)) for k in samples}
        self._next = _NextLogits(model, settings.window, settings.threads)

    def stop(self, sample: int) -> None:
        """Draw no more of this sample."""
        row = list(self._rows).index(sample)
        del self._rows[sample]
        self._next.keep([i for i in range(len(self._rows) + 1) if i != row])

    def __iter__(self) -> Iterator[Token]:
        for _ in range(self.settings.max_new_tokens):
            if not self._rows:
                return
            texts = [row.ids for row in self._rows.values()]
            logits = self._next(texts)
            ids = sample_ids(logits, self.settings, [row.rng for row in self._rows.values()], texts)
            for text, chosen in zip(texts, ids.tolist(), strict=True):
                text.append(chosen)
            # A list, since whoever takes a token may stop its sample.
            yield from list(map(Token, self._rows, ids.tolist(), _log_softmax_at(logits, ids).tolist()))


@dataclass
class _Row:
    ids: list[int]
    rng: np.random.Generator = field(repr=False)


class _NextLogits:
    """The logits of the token after each of some texts of equal length, called as they grow by one token."""

    def __init__(self, model: GPT, window: str, threads: int) -> None:
        self._model, self._window, self._threads = model, window, threads
        self._cache: KVCache | None = None
        self._decode: Decoder | None = None  # with that cache, on a CPU

    def keep(self, rows: list[int]) -> None:
        """Go on with these texts alone."""
        if self._cache:
            self._cache.keep(rows)

    @no_grad()
    def __call__(self, texts: list[list[int]]) -> np.ndarray:
        """-> (len(texts), V), float64."""
        with blas_threads(self._threads), np.errstate(over="ignore", invalid="ignore"):  # told below
            if self._cache is None or self._cache.length == self._model.config.block_size:
                last = self._look_anew(texts)
            elif self._decode:
                last = self._decode(np.array([ids[-1] for ids in texts]))
            else:
                last = self._model(np.array([ids[-1:] for ids in texts]), cache=self._cache)[0].numpy()[:, 0]
        last = last.astype(np.float64)
        if not np.isfinite(last).all():
            raise FloatingPointError("the model's logits are not finite numbers: its weights are damaged, or training diverged")
        return last

    def _look_anew(self, texts: list[list[int]]) -> np.ndarray:
        """The logits after the last tokens of the texts, whose keys and values are kept where there is a use for them."""
        block_size = self._model.config.block_size
        beyond = len(texts[0]) > block_size
        seen = max(1, block_size // 2) if beyond and self._window == "half" else block_size
        windows = [ids[-seen:] for ids in texts]
        same = all(ids == windows[0] for ids in windows)  # as at first, when all they have is the prompt
        if same:
            windows = windows[:1]
        # Exact beyond block_size: the next token would need every key at another position.
        self._cache = None if beyond and self._window == "exact" else KVCache(self._model, len(windows))
        on_cpu = self._model.backend.name == "cpu"
        self._decode = Decoder(self._model, self._cache, self._threads) if self._cache and on_cpu else None
        logits, _ = self._model(np.array(windows), cache=self._cache, last=True)
        rows = [0] * len(texts) if same else list(range(len(texts)))
        if self._cache and same:
            self._cache.keep(rows)
        return logits.numpy()[rows, 0]


def sample_ids(
    logits: np.ndarray, settings: GenerateConfig, rngs: Sequence[np.random.Generator], texts: Sequence[Sequence[int]]
) -> np.ndarray:
    """Draw an id for each row of logits (B, V) with the row's own generator -> (B,). What a row draws depends on its own
    logits, generator and text alone. Temperature 0: the likeliest, of equals the first."""
    weights = _restricted(logits, settings, texts)
    if settings.temperature == 0:
        return weights.argmax(axis=1)
    reached = np.cumsum(weights, axis=1)
    drawn = np.array([rng.random() for rng in rngs]) * reached[:, -1]
    return (reached > drawn[:, None]).argmax(axis=1)


def _restricted(logits: np.ndarray, settings: GenerateConfig, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """softmax(logits / temperature) up to a factor (with temperature 0: the logits), restricted in this order:
    `repetition_penalty` on the logits of what is in the text ("CTRL", Keskar et al., 2019: divided by it when positive,
    else multiplied), the `top_k` likeliest and their equals, the smallest set of the likeliest whose probability reaches
    `top_p` ("The Curious Case of Neural Text Degeneration", Holtzman et al., 2020), those with at least `min_p` times the
    highest probability ("Turning Up the Heat: Min-p Sampling", Nguyen et al., 2024)."""
    logits = np.array(logits, dtype=np.float64)
    if settings.repetition_penalty != 1:
        penalty = settings.repetition_penalty
        for own, ids in zip(logits, texts, strict=True):
            seen = np.unique(np.asarray(ids, dtype=np.int64))
            own[seen] = np.where(own[seen] > 0, own[seen] / penalty, own[seen] * penalty)
    if settings.temperature == 0:
        return logits
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        logits[logits < np.partition(logits, -settings.top_k)[:, -settings.top_k, None]] = -np.inf
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the likeliest to -inf, as it should
        p = np.exp((logits - logits.max(axis=1, keepdims=True)) / settings.temperature)
    if settings.top_p is not None:
        p /= p.sum(axis=1, keepdims=True)
        order = np.argsort(-p, axis=1, kind="stable")
        descending = np.take_along_axis(p, order, axis=1)
        likelier = np.cumsum(descending, axis=1) - descending  # probability of everything likelier
        descending[likelier >= settings.top_p] = 0
        np.put_along_axis(p, order, descending, axis=1)
    if settings.min_p is not None:
        p[p < settings.min_p * p.max(axis=1, keepdims=True)] = 0
    return p


def _log_softmax_at(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The log-probability of one id a row."""
    top = logits.max(axis=1)
    return logits[np.arange(len(ids)), ids] - top - np.log(np.exp(logits - top[:, None]).sum(axis=1))


@dataclass(frozen=True)
class Piece:
    """A piece of one sample's text, ready to be shown; `done` with its last one, which may be empty, and `stopped` when that
    was before a stop text."""

    sample: int
    text: str
    done: bool = False
    stopped: bool = False


def generate_texts(
    model: GPT,
    tokenizer: CharTokenizer,
    prompt: str,
    settings: GenerateConfig,
    stop: Sequence[str] = (),
    samples: Sequence[int] | None = None,
    tokens: list[Token] | None = None,
) -> Iterator[Piece]:
    """The texts that follow `prompt`, `settings.num_samples` of them, some side by side, as they are drawn; each ends before
    the first of its `stop` texts. Every drawn token is also appended to `tokens`. Raises RequestError, at the call, for
    characters of the prompt that the model does not know."""
    samples = range(settings.num_samples) if samples is None else samples
    context = tokenizer.encode(prompt or default_context(tokenizer))
    groups = [samples[i : i + SIDE_BY_SIDE] for i in range(0, len(samples), SIDE_BY_SIDE)]
    return (
        piece
        for group in groups
        for piece in _pieces(Drawing(model, context, settings, group), tokenizer, {k: _End(stop) for k in group}, tokens)
    )


def _pieces(drawing: Drawing, tokenizer: CharTokenizer, ends: dict[int, _End], tokens: list[Token] | None) -> Iterator[Piece]:
    for token in drawing:
        if tokens is not None:
            tokens.append(token)
        text, found = ends[token.sample].take(tokenizer.itos[token.id])
        if found:
            del ends[token.sample]
            drawing.stop(token.sample)
        if text or found:
            yield Piece(token.sample, text, found, found)
    for sample, end in ends.items():
        yield Piece(sample, end.held, done=True)


def generate_text(
    model: GPT,
    tokenizer: CharTokenizer,
    prompt: str,
    settings: GenerateConfig,
    stop: Sequence[str] = (),
    sample: int = 0,
) -> Iterator[str]:
    """Pieces of the text that follows `prompt`, as they are drawn, ending before the first of the `stop` texts."""
    return (piece.text for piece in generate_texts(model, tokenizer, prompt, settings, stop, [sample]))


def default_context(tokenizer: CharTokenizer) -> str:
    """What to continue when there is no prompt: a line break, as if a line were about to begin, where there is
    one, else the first character."""
    return "\n" if "\n" in tokenizer.stoi else tokenizer.itos[0]


class _End:
    """Looks for stop texts, which may straddle tokens: as many characters are held back as could still turn out to be the
    beginning of the longest."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self.held = stop, ""
        self._longest = max(map(len, stop), default=1)

    def take(self, piece: str) -> tuple[str, bool]:
        """(what is sure to come before any stop text, whether one was found)."""
        self.held += piece
        ends = [end for s in self._stop if (end := self.held.find(s)) >= 0]
        if ends:
            return self.held[: min(ends)], True
        sure = max(0, len(self.held) - (self._longest - 1))
        text, self.held = self.held[:sure], self.held[sure:]
        return text, False
