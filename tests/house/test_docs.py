"""What the documentation shows: its Python runs, its links lead to files, its flags exist."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_readmes_python_runs(tmp_path):
    """The README's Python snippets run as they are written, one after the other, on the text that they name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert snippets
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.txt").write_bytes((ROOT / "data" / "tiny.txt").read_bytes())
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(snippets)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 6


def test_the_tours_examples_print_what_it_shows():
    failures, tried = doctest.testfile(str(ROOT / "docs" / "tour.md"), module_relative=False)
    assert tried > 3
    assert failures == 0


def test_links_in_the_documentation_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_flags_named_in_the_documentation_exist():
    from npgpt.cli import COMMANDS

    known = {"--version", "--help"}
    for command in COMMANDS.values():
        known |= {flag for action in command.parser()._actions for flag in action.option_strings}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text(encoding="utf-8")))
        assert used <= known, f"{page.name}: {used - known}"
