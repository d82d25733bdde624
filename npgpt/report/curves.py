"""The curves of runs as SVG, drawn by matplotlib: loss, bits per character, learning rate, gradient norm, speed.

Each has a text alternative. The colours are variables of style.css, so that one picture is readable on light and on dark
paper. Numbers come from runs.py.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.report.page import Markup, tag
from npgpt.report.runs import Run

MOST_POINTS = 1000  # of a line; a longer one keeps the smallest and the largest value of each part
MARKERS, SIGNS = "os^DvPX*", "●■▲◆▼✚✖★"  # one for each run, beside its colour, in matplotlib and in a text
# These stand for variables of style.css, as #000001 to #000008 do for the colours of runs. (An SVG without a colour is black.)
INK, GRID = "#000010", "#000011"
N_COLOURS = 8


@dataclass(frozen=True)
class Curve:
    """One curve of one run: y over x (n,). error: the standard error of each y, or None. is_main: drawn with markers."""

    name: str
    run: int
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None
    is_main: bool = True


@dataclass(frozen=True)
class Look:
    """How a figure is drawn. legend: with the names of its curves. log and from_zero are about its y axis."""

    wide: bool = False
    legend: bool = False
    log: bool = False
    from_zero: bool = False


def figures(runs: Sequence[Run]) -> list[Markup]:
    """A <figure> for each curve that the runs have."""
    losses = [curve for i, run in enumerate(runs) for curve in _loss_curves(i, run, lambda events: events.step)]
    in_time = [curve for i, run in enumerate(runs) for curve in _loss_curves(i, run, lambda events: events.minutes)]
    bits = [Curve(run.name, i, run.evaluations.step, run.evaluations.bits_per_character) for i, run in enumerate(runs)]

    def of_steps(values: Callable[[Run], np.ndarray]) -> list[Curve]:
        return [Curve(run.name, i, run.steps.step, values(run), is_main=False) for i, run in enumerate(runs)]

    norms, speeds = of_steps(lambda run: run.steps.grad_norm), of_steps(lambda run: run.steps.tokens_per_second)
    several = len(runs) > 1
    drawn = [
        _figure("loss", "Loss over steps", losses, "step", "nats per token", Look(wide=True, legend=True)),
        _figure("time", "Loss over time", in_time, "minutes", "nats per token", Look(legend=several)),
        _figure("bits", "Bits per character", bits, "step", "bits", Look(legend=several)),
        _figure("lr", "Learning rate", of_steps(lambda run: run.steps.lr), "step", "", Look(legend=several)),
        _figure("norm", "Gradient norm, before clipping", norms, "step", "", Look(legend=several, log=True)),
        _figure("speed", "Tokens a second", speeds, "step", "", Look(legend=several, from_zero=True)),
    ]
    return [figure for figure in drawn if figure is not None]


def _loss_curves(i: int, run: Run, x: Callable[[Any], np.ndarray]) -> list[Curve]:
    steps, evaluations = run.steps, run.evaluations
    train = (x(steps), steps.loss) if len(steps.step) else (x(evaluations), evaluations.train_loss)
    return [
        Curve(f"{run.name}, training", i, *train, is_main=False),
        Curve(f"{run.name}, held out", i, x(evaluations), evaluations.val_loss, evaluations.val_stderr),
    ]


def _figure(name: str, title: str, curves: list[Curve], x_label: str, y_label: str, look: Look) -> Markup | None:
    """One figure, or None if no curve has a point that can be drawn."""
    known = [np.isfinite(curve.x) & np.isfinite(curve.y) & ((curve.y > 0) | (not look.log)) for curve in curves]
    curves = [
        dataclasses.replace(c, x=c.x[at], y=c.y[at], error=None if c.error is None else c.error[at])
        for c, at in zip(curves, known, strict=True)
        if at.any()
    ]
    if not curves:
        return None
    svg = _svg(name, curves, x_label, y_label, look)
    alternative = "; ".join(_described(curve, x_label) for curve in curves)
    words = tag("title", title, id=f"{name}-title") + tag("desc", alternative, id=f"{name}-words")
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title" aria-describedby="{name}-words" ', 1)
    svg = svg.replace(">", f">{words}", 1)
    legend = _legend(curves) if look.legend else None
    drawn = tag("div", Markup(svg), class_="scroll")
    return tag("figure", tag("figcaption", title), legend, drawn, class_="wide" if look.wide else None)


def _legend(curves: list[Curve]) -> Markup:
    """The legend. It is HTML, because matplotlib would need a font for every name."""
    named = []
    for curve in curves:
        sign = SIGNS[_sign(curve.run)] if curve.is_main else "—"
        named.append(tag("span", tag("b", sign, style=f"color: var(--c{curve.run % N_COLOURS})"), " ", curve.name))
    return tag("p", *named, class_="legend")


def _described(curve: Curve, x_label: str) -> str:
    lowest = int(curve.y.argmin())
    return (
        f"{curve.name}: {curve.y[0]:.4g} at {x_label} {curve.x[0]:.4g}, lowest {curve.y[lowest]:.4g} at {curve.x[lowest]:.4g}, "
        f"{curve.y[-1]:.4g} at {curve.x[-1]:.4g}"
    )


def _svg(name: str, curves: list[Curve], x_label: str, y_label: str, look: Look) -> str:
    """The picture. Its ids begin with `name`, so that several pictures fit into one page."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10.0,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style):
        # Without pyplot, which has global state.
        figure = Figure(figsize=(10.4, 4.4) if look.wide else (5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            colour = f"#{curve.run % N_COLOURS + 1:06x}"
            x, y = _thinned(curve.x, curve.y) if not curve.is_main else (curve.x, curve.y)
            if curve.is_main:
                error = None if curve.error is None else np.nan_to_num(curve.error)
                marker = MARKERS[_sign(curve.run)]
                axes.errorbar(x, y, error, color=colour, marker=marker, markersize=4, linewidth=1.6, capsize=2)
            else:
                axes.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if look.log:
            axes.set_yscale("log")
            for axis_of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis_of(FuncFormatter(lambda value, _: f"{value:g}"))  # without powers of ten
        if look.from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(GRID)
        axes.tick_params(color=GRID)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    return re.sub(r"#00000([1-8])\b", lambda match: f"var(--c{int(match[1]) - 1})", svg)


def _sign(run: int) -> int:
    """The number of a run's marker. Runs with the same colour have different ones."""
    return (run + run // N_COLOURS) % len(MARKERS)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points of a line: of each part the smallest and the largest, in their order."""
    if len(y) <= MOST_POINTS:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(y)), MOST_POINTS // 2):
        kept += sorted({int(part[y[part].argmin()]), int(part[y[part].argmax()])})
    return x[kept], y[kept]
