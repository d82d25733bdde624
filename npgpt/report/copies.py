"""How the newest samples of a run resemble its training text. What counts is in evaluation/likeness.py; no HTML here."""

from __future__ import annotations

from dataclasses import dataclass

from npgpt.config.fields import RequestError
from npgpt.evaluation.judged_text import judged_text
from npgpt.evaluation.likeness import LARGEST_TEXT, Likeness, copied_spans, likeness
from npgpt.report.runs import Run
from npgpt.text.reading import Track

SAMPLES = 5  # the newest samples, which are compared with the training text
SHORTEST_COPY = 16  # characters; shorter spans are common phrases


@dataclass(frozen=True)
class Copies:
    """samples: (step, text) of each sample. spans: of each sample, the (start, end) of what is copied."""

    likeness: Likeness
    samples: list[tuple[float, str]]
    spans: list[list[tuple[int, int]]]


def copies_of(run: Run, track: Track | None = None) -> Copies | str:
    """The comparison, or why there is none. track: shows the progress of reading."""
    evaluations = run.evaluations
    at = [i for i, sample in enumerate(evaluations.samples) if sample][-SAMPLES:]
    if not at:
        return "The log has no samples to compare with the training text."
    record = run.checkpoint.text
    if record and record.n_characters and record.n_characters > LARGEST_TEXT:
        return f"The training text has more than {LARGEST_TEXT:,} characters; `evaluate` compares samples with its beginning."
    try:
        text = judged_text(run.checkpoint, [], "give one to `evaluate`", track)
    except RequestError as error:
        return f"The likeness is unknown: {error}."
    if text.trained_on is None:
        return "The likeness is unknown: the checkpoint does not say which part of its text it was trained on."
    training = run.checkpoint.tokenizer.decode(text.trained_on)
    samples = [evaluations.samples[i] for i in at]
    steps = [float(evaluations.step[i]) for i in at]
    spans = [copied_spans(sample, training, SHORTEST_COPY) for sample in samples]
    return Copies(likeness(samples, training), list(zip(steps, samples, strict=True)), spans)
