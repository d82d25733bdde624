"""An HTML page in one file: its shell, its look, and the escaping of everything it shows. No particular page.

What a page shows comes from texts, models and logs of strangers. So text gets into a page only in two ways: as a child or
an attribute of `tag`, which escapes it, or as data of `data_script`, which JavaScript puts into the page as text. The
content-security policy of a page allows its own scripts, by their hashes, and no other.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from npgpt.storage.files import atomic_write

ASSETS = Path(__file__).parent / "assets"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
SURROGATE = re.compile("[\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already."""


def text(value: object) -> Markup:
    """A value as text in HTML. Control characters become visible, and half a surrogate pair becomes U+FFFD."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(SURROGATE.sub("\ufffd", visible_controls(str(value)))))


def visible_controls(value: str) -> str:
    """The text with a visible sign for each control character. Line feeds and tabs stay."""
    return CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\ufffd", value)


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element: `tag("p", "a < b", class_="note")`. Children that are no Markup are escaped. None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value is not None
    )
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """Several elements, one after the other."""
    return Markup("".join(text(child) for child in children if child is not None))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table whose first column names the rows. It scrolls sideways where it does not fit."""
    body = [
        tag("tr", *[tag("th", cell, scope="row") if i == 0 else tag("td", cell) for i, cell in enumerate(row)]) for row in rows
    ]
    names = tag("tr", *[tag("th", cell, scope="col") for cell in head])
    return tag("div", tag("table", tag("thead", names), tag("tbody", *body)), class_="scroll")


def data_script(name: str, data: Any) -> Markup:
    """Data for the page's scripts, as JSON in an element that is not run. Nothing in it can end the element."""
    written = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only
    for sign in "<>&":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(f'<script type="application/json" id="{text(name)}">{written}</script>')


def save_page(path: Path, page: str) -> int:
    """Write a page. A file at `path` is replaced only once the new one is complete. Returns its size in bytes."""
    raw = page.encode()
    with atomic_write(path, lambda _: None) as file:
        file.write(raw)
    return len(raw)


@cache
def asset(name: str) -> str:
    """The text of a file of this room."""
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def content_security_policy(scripts: tuple[str, ...], connects: bool) -> str:
    """The policy of a page with these scripts. connects: whether they may talk to the server that the page came from."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(asset(name).encode()).digest()).decode()}'" for name in scripts
    )
    connect = "'self'" if connects else "'none'"
    # Styles: the curves have style attributes. A style cannot run anything, and there is nowhere to send anything to.
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )


def document(title: str, body: Iterable[object], scripts: tuple[str, ...], connects: bool = False) -> str:
    """A whole page. scripts: names of assets, which run in this order when the page is there."""
    policy = content_security_policy(scripts, connects)
    head = [
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup('<link rel="icon" href="data:,">'),  # else a browser asks the server for one
        tag("title", title),
        Markup(f"<style>{asset('style.css')}</style>"),
    ]
    code = Markup("".join(f"<script>{asset(name)}</script>" for name in scripts))
    return f'<!doctype html>\n<html lang="en"><head>{joined(head)}</head><body>{joined(body)}{code}</body></html>\n'
