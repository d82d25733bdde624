"""Generating ids and texts: several samples side by side, streamed piece by piece, ended by stop texts.

side_by_side.py draws the tokens: decode.py computes their logits, and sampling.py chooses an id.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from npgpt.config.settings import GenerateConfig
from npgpt.generation.decode import window_for
from npgpt.generation.side_by_side import SideBySide, Token
from npgpt.generation.stops import StopFinder
from npgpt.model.gpt import GPT
from npgpt.text.tokenizer import Tokenizer

SIDE_BY_SIDE = 32  # samples generated together; more would need more memory and hardly less time for each


def generate(
    model: GPT,
    context_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[int]:
    """The context ids, followed by max_new_tokens new ids. `GenerateConfig` describes the other arguments.

    Raises RequestError for a value out of range, an empty context, or a context id outside the vocabulary.
    """
    settings = GenerateConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return [int(i) for i in context_ids] + [token.id for token in TokenStream(model, context_ids, settings)]


class TokenStream:
    """Samples of the same context, generated side by side. Iterating yields one Token after another.

    With a seed, sample k does not depend on the other samples.
    """

    def __init__(
        self,
        model: GPT,
        context_ids: Sequence[int],
        settings: GenerateConfig,
        samples: Sequence[int] = (0,),
        vocab_size: int | None = None,
    ) -> None:
        """samples: the numbers of the samples. vocab_size: ids from here on are padding and are never drawn.

        Raises RequestError for an empty context, an id outside the vocabulary, or a window that the model cannot have.
        Iterating raises FloatingPointError if the logits are not finite.
        """
        entropy = settings.seed if settings.seed is not None else secrets.randbits(64)
        self._max_new_tokens = settings.max_new_tokens
        self._texts = SideBySide(model, settings.window, settings.threads, vocab_size)
        for sample in samples:
            self._texts.add(sample, context_ids, settings, entropy, sample)

    def stop(self, sample: int) -> None:
        """End this sample. The other samples continue."""
        self._texts.remove(sample)

    def __iter__(self) -> Iterator[Token]:
        for _ in range(self._max_new_tokens):
            if not len(self._texts):
                return
            yield from self._texts.step()


@dataclass(frozen=True)
class TextPiece:
    """A piece of one sample's text, ready to be shown.

    `done` is true for the last piece of a sample, which may be empty. `stopped` is true if a stop text or the tokenizer's
    end_id ended the sample.
    """

    sample: int
    text: str
    done: bool = False
    stopped: bool = False


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerateConfig,
    stop: Sequence[str] = (),
    samples: Sequence[int] | None = None,
    tokens: list[Token] | None = None,
) -> Iterator[TextPiece]:
    """Generate texts that continue `prompt`, and yield their pieces as they come, several texts side by side.

    A text ends before the first of the `stop` texts, and before the tokenizer's end_id. samples: the numbers of the samples to
    generate, by default 0 .. settings.num_samples - 1. tokens: a list to which every new Token is appended.

    Raises RequestError, at the call, for characters of the prompt that the tokenizer does not know, and for a window that the
    model cannot have.
    """
    samples = range(settings.num_samples) if samples is None else samples
    window_for(model, settings.window)
    context = tokenizer.encode(prompt) if prompt else tokenizer.start_ids
    groups = [samples[i : i + SIDE_BY_SIDE] for i in range(0, len(samples), SIDE_BY_SIDE)]
    return (
        piece
        for group in groups
        for piece in _text_pieces(
            TokenStream(model, context, settings, group, tokenizer.vocab_size), tokenizer, group, stop, tokens
        )
    )


def _text_pieces(
    stream: TokenStream, tokenizer: Tokenizer, samples: Sequence[int], stop: Sequence[str], tokens: list[Token] | None
) -> Iterator[TextPiece]:
    finders = {k: StopFinder(stop, tokenizer.stream()) for k in samples}
    for token in stream:
        if tokens is not None:
            tokens.append(token)
        finder = finders[token.sample]
        text, found = finder.end() if token.id == tokenizer.end_id else finder.add(token.id)
        if found:
            del finders[token.sample]
            stream.stop(token.sample)
        if text or found:
            yield TextPiece(token.sample, text, found, found)
    for sample, finder in finders.items():
        yield TextPiece(sample, finder.end()[0], done=True)


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerateConfig,
    stop: Sequence[str] = (),
    sample: int = 0,
) -> Iterator[str]:
    """Like `generate_texts` for one sample: yields the pieces of its text."""
    return (piece.text for piece in generate_texts(model, tokenizer, prompt, settings, stop, [sample]))
