"""Pages: escaping, data for scripts, the content-security policy."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from support.hostile import HOSTILE

from npgpt.report.page import asset, content_security_policy, data_script, document, table, tag, text


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_stays_text(hostile):
    page = tag("p", hostile, tag("b", hostile, title=hostile), data_x=hostile)
    parsed = Parsed(page)
    assert [name for name, _ in parsed.elements] == ["p", "b"]
    assert parsed.elements[1][1]["title"] == parsed.elements[0][1]["data-x"]
    seen = "".join(parsed.words)
    assert page.encode("utf-8")  # no half of a surrogate pair is left
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    if hostile.isprintable():
        assert seen == hostile * 2


def test_control_characters_are_visible():
    assert text("a\x00\x1b\tb\n\x7f") == "a␀␛\tb\n\ufffd"
    assert text("\ud83d") == "\ufffd"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_data_for_scripts_cannot_end_its_element(hostile):
    written = data_script("it", {"text": hostile, hostile: [hostile]})
    inside = re.fullmatch(r'<script type="application/json" id="it">(.*)</script>', written, flags=re.DOTALL)[1]
    assert inside.isascii()
    assert not set("<>&") & set(inside)
    assert json.loads(inside) == {"text": hostile, hostile: [hostile]}


def test_numbers_that_json_does_not_have_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        data_script("it", [float("nan")])


def test_the_policy_allows_the_pages_own_scripts_by_their_hashes():
    page = document("a <title>", [tag("p", "<script>alert(1)</script>")], ("report.js",))
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert scripts == [asset("report.js")]
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = content_security_policy(("report.js",), connects=False)
    assert f"script-src 'sha256-{digest}';" in policy
    assert "connect-src 'none'" in policy
    assert "connect-src 'self'" in content_security_policy(("report.js",), connects=True)
    metas = [attributes for name, attributes in Parsed(page).elements if name == "meta"]
    assert policy in [attributes.get("content") for attributes in metas]
    assert "<title>a &lt;title&gt;</title>" in page


def test_a_table_names_its_rows_and_columns():
    parsed = Parsed(table(["", "a<b"], [["x", 1], ["y", "<i>"]]))
    assert [attributes.get("scope") for name, attributes in parsed.elements if name == "th"] == ["col", "col", "row", "row"]
    assert "".join(parsed.words) == "a<bx1y<i>"


@pytest.mark.parametrize("name", ["report.js", "live.js", "inside.js", "inside_start.js", "play.js"])
def test_scripts_put_nothing_into_a_page_as_html(name):
    """They use textContent and attributes of elements; and none of them could end its own element."""
    script = asset(name)
    for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "</script"):
        assert risky not in script
