"""The page to play with a model: a prompt, sliders, texts as they are drawn, the inside of what was written.

The page talks to the server that it came from (serving/). Here is only what it looks like.
"""

from __future__ import annotations

from npgpt.report.page import data_script, document, tag

SCRIPTS = ("inside.js", "play.js")


def play_page(name: str, description: str, longest: int, vocab_size: int) -> str:
    """The page as HTML. name: of the model. description: of the model, in a line. longest: the largest number of tokens that
    the server draws."""

    def slider(label: str, key: str, low: float, high: float, step: float, value: float) -> object:
        output = tag("output", for_=key, id=f"{key}-value")
        box = tag("input", type="range", id=key, min=low, max=high, step=step, value=value)
        return tag("div", tag("label", label, " ", output, for_=key), box)

    def field(label: str, key: str, **attributes: object) -> object:
        return tag("div", tag("label", label, for_=key), tag("input", id=key, **attributes))

    body = tag(
        "main",
        tag("h1", name),
        tag("p", description, class_="note"),
        tag("label", "Prompt", for_="prompt"),
        tag("textarea", id="prompt", rows=4, spellcheck="false", placeholder="The text to continue. Empty: a new text."),
        tag(
            "div",
            slider("temperature", "temperature", 0, 2, 0.05, 0.8),
            slider("top-k", "top-k", 0, min(vocab_size, 200), 1, 0),
            slider("top-p", "top-p", 0.05, 1, 0.01, 1),
            slider("tokens", "max-tokens", 1, min(longest, 2000), 1, min(longest, 300)),
            slider("samples", "n", 1, 8, 1, 1),
            field("seed", "seed", type="number", min=0, step=1, placeholder="random"),
            field("stop before", "stop", type="text", placeholder="nothing (\\n: new line)", autocomplete="off"),
            class_="controls",
        ),
        tag(
            "div",
            tag("button", "Write", type="button", id="write", class_="main"),
            tag("button", "Stop", type="button", id="stop-button", disabled="disabled"),
            tag("label", tag("input", type="checkbox", id="colour"), " colour by surprise (full colour: 8 bits or more)"),
            tag("label", tag("input", type="checkbox", id="skip"), " leave out unknown characters"),
            tag("span", id="status", class_="note", role="status"),
            class_="row",
        ),
        tag(
            "div",
            tag("label", "API key of this server", for_="key"),
            tag("input", type="password", id="key", autocomplete="off"),
            id="key-box",
            hidden="hidden",
        ),
        tag("p", id="error", class_="error", role="alert"),
        tag("div", id="texts", class_="side-by-side"),
        tag("section", id="inside", aria_label="inside of the model"),
        tag("noscript", tag("p", "This page needs JavaScript.")),
        data_script("settings", {"model": name}),
    )
    return document(name, [body], SCRIPTS, connects=True)
