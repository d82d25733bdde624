"""The report of one run or of several: curves, samples as they grew, settings, likeness to the training text, advice.

`report_page` makes the page from the data of runs.py. serving/live.py shows a run that goes on with the same page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from npgpt.evaluation.likeness import NGRAM
from npgpt.report.copies import SHORTEST_COPY, Copies
from npgpt.report.curves import N_COLOURS, figures
from npgpt.report.page import Markup, data_script, document, joined, table, tag
from npgpt.report.runs import Run, differing
from npgpt.training.advice import with_out

SCRIPTS = ("report.js",)
LIVE_SCRIPTS = ("report.js", "live.js")


def report_page(runs: Sequence[Run], copies: Sequence[Copies | str], time_left: str | None = None) -> str:
    """The report as HTML.

    copies: for each run, how its samples resemble its training text, or why that is not known.
    time_left: for a run that goes on, how long it will still take, in words.
    """
    title = ", ".join(run.name for run in runs)
    is_live = time_left is not None
    return document(f"{title}: report", [_body(runs, copies, time_left)], LIVE_SCRIPTS if is_live else SCRIPTS, is_live)


def _body(runs: Sequence[Run], copies: Sequence[Copies | str], time_left: str | None) -> Markup:
    """The part of the page that changes while a run goes on."""
    drawn = figures(runs)
    no_curves = tag("p", "There are no results yet: neither a log nor an evaluation.", class_="note")
    return tag(
        "main",
        tag("h1", ", ".join(run.name for run in runs)),
        *[part for i, run in enumerate(runs) for part in _facts(i, run, len(runs) > 1, time_left)],
        tag("h2", "Curves"),
        *(_notes(runs) if drawn else []),
        tag("div", *drawn, class_="curves") if drawn else no_curves,
        *_samples(runs),
        tag("h2", "Likeness to the training text"),
        *[part for i, run in enumerate(runs) for part in _likeness(run, copies[i], len(runs) > 1)],
        tag("h2", "What was trained"),
        *_settings(runs),
        tag("h2", "Text and machine"),
        _origins(runs),
    )


def _facts(i: int, run: Run, several: bool, time_left: str | None) -> list[Markup]:
    evaluations, best = run.evaluations, run.best
    facts: list[tuple[str, str]] = []
    if best is not None:
        loss, error, bits = evaluations.val_loss[best], evaluations.val_stderr[best], evaluations.bits_per_character[best]
        if math.isfinite(loss):
            plus_minus = f" ± {error:.4f}" if math.isfinite(error) else ""
            facts.append(("lowest held-out loss", f"{loss:.4f}{plus_minus}"))
        else:
            facts.append(("lowest training loss", f"{evaluations.train_loss[best]:.4f}"))
        if math.isfinite(bits):
            facts.append(("bits per character", f"{bits:.4f}"))
        facts.append(("reached at step", f"{evaluations.step[best]:,.0f}"))
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    facts.append(("steps", f"{run.step:,}{of}"))
    facts.append(("parameters", f"{run.checkpoint.config.num_parameters():,}"))
    if run.seconds and run.seconds[-1] > 0:
        facts.append(("time", f"{run.seconds[-1] / 60:.1f} min"))
    if run.end and (time_left is not None or run.end.get("outcome") != "finished"):
        facts.append(("ended", str(run.end.get("outcome", "")).replace("_", " ")))
    elif time_left is not None and not run.end:
        facts.append(("time left", time_left))
    parts = []
    if several:
        key = tag("span", class_="key", style=f"background: var(--c{i % N_COLOURS})")
        parts.append(tag("h3", key, run.name))
    parts.append(tag("dl", *[tag("div", tag("dt", name), tag("dd", value)) for name, value in facts], class_="facts"))
    if time_left is not None and run.total_steps and not run.end:
        parts.append(tag("progress", value=run.step, max=run.total_steps, aria_label="steps done"))
    if run.end and run.end.get("reason"):
        parts.append(tag("p", str(run.end["reason"]), class_="error"))
    if run.end and run.end.get("advice"):
        parts.append(tag("p", with_out(str(run.end["advice"]), run.out), class_="advice"))
    return parts


def _notes(runs: Sequence[Run]) -> list[Markup]:
    notes = []
    if without := [run.name for run in runs if not run.events]:
        notes.append(f"There is no log beside {', '.join(without)}, so the losses that the checkpoint holds are drawn.")
    if len({run.checkpoint.tokenizer.is_characters for run in runs}) > 1:
        notes.append("The runs have different tokens. Their losses per token cannot be compared, but bits per character can.")
    return [tag("p", note, class_="note") for note in notes]


def _samples(runs: Sequence[Run]) -> list[Markup]:
    """The samples of all evaluations; a slider chooses one. Without JavaScript, and on paper, the newest one is there."""
    with_samples = [(i, run) for i, run in enumerate(runs) if any(run.evaluations.samples)]
    if not with_samples:
        return []
    parts, data = [tag("h2", "Samples as they grew")], []
    for i, run in with_samples:
        evaluations = run.evaluations
        at = [k for k, sample in enumerate(evaluations.samples) if sample]
        losses = [_first_finite(evaluations.val_loss[k], evaluations.train_loss[k]) for k in at]
        what = [f"step {evaluations.step[k]:,.0f}, loss {loss}" for k, loss in zip(at, losses, strict=True)]
        data.append([[words, evaluations.samples[k]] for words, k in zip(what, at, strict=True)])
        name = f"sample-{i}"
        slider = tag("input", type="range", min=0, max=len(at) - 1, value=len(at) - 1, id=name, data_run=len(data) - 1)
        parts += [
            tag("h3", run.name) if len(runs) > 1 else Markup(),
            tag("label", "evaluation: ", tag("output", data[-1][-1][0], for_=name), for_=name),
            slider,
            tag("div", data[-1][-1][1], class_="text", id=f"{name}-text"),
        ]
    return [*parts, data_script("samples", data)]


def _first_finite(*values: float) -> str:
    return next((f"{value:.4f}" for value in values if math.isfinite(value)), "unknown")


def _likeness(run: Run, copies: Copies | str, several: bool) -> list[Markup]:
    parts = [tag("h3", run.name)] if several else []
    if isinstance(copies, str):
        return [*parts, tag("p", copies, class_="note")]
    like = copies.likeness
    rows = [(kind, f"{ours:.1%}", f"{theirs:.1%}") for kind, (ours, theirs) in like.rates.items()]
    words = "" if like.known_words is None else f"{like.known_words:.0%} of the samples' words occur in the training text. "
    new = "" if like.new_ngrams is None else f"{like.new_ngrams:.0%} of their {NGRAM}-character spans do not occur in it. "
    parts += [
        table(["share of characters", "in the samples", "in the training text"], rows),
        tag(
            "p",
            f"The last {len(copies.samples)} samples, {like.characters:,} characters, were compared with {like.of:,} "
            f"characters of the training text. {words}{new}The longest copy has {len(like.longest_copy)} characters. Spans of "
            f"{SHORTEST_COPY} characters or more that occur in the training text are marked.",
        ),
    ]
    shown = []
    for (step, sample), spans in zip(copies.samples, copies.spans, strict=True):
        pieces: list[object] = []
        at = 0
        for start, end in spans:
            pieces += [sample[at:start], tag("mark", sample[start:end], title=f"{end - start} characters")]
            at = end
        shown.append(joined([tag("p", f"step {step:,.0f}", class_="note"), tag("div", *pieces, sample[at:], class_="text")]))
    earlier = tag("details", tag("summary", "earlier samples"), *reversed(shown[:-1])) if len(shown) > 1 else None
    return [*parts, shown[-1], *([earlier] if earlier else [])]


def _settings(runs: Sequence[Run]) -> list[Markup]:
    names = dict.fromkeys(name for run in runs for name in run.settings())
    changes = [tag("p", f"{f'{run.name}: ' if len(runs) > 1 else ''}{change}") for run in runs for change in run.changes()]
    if len(runs) == 1:
        pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in runs[0].settings().items()]
        return [tag("dl", *pairs, class_="settings"), *changes]
    different = differing(list(runs))
    head = ["setting", *[run.name for run in runs]]

    def rows(of: list[str]) -> list[list[str]]:
        return [[name, *[run.settings().get(name, "") for run in runs]] for name in of]

    same = [name for name in names if name not in different]
    return [
        *changes,
        table(head, rows(different)) if different else tag("p", "All settings are the same."),
        tag("details", tag("summary", f"{len(same)} settings that are the same"), table(head, rows(same))),
    ]


def _origins(runs: Sequence[Run]) -> Markup:
    columns = []
    for run in runs:
        checkpoint, found = run.checkpoint, {}
        for name, record in (("text", checkpoint.text), ("held-out text", checkpoint.val_text)):
            if record:
                size = "" if record.n_characters is None else f"{record.n_characters:,} characters"
                found[name] = ", ".join(part for part in (str(record) if record.sources else "", size) if part)
        columns.append(found | (checkpoint.machine or {}))
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *[column.get(name, "") for column in columns]] for name in names]
    return table(["", *[run.name for run in runs]], rows)
