"""The house rules: who may import whom, what import pulls in, what the documentation shows."""

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "npgpt"

# From the bottom up; a file may import only what stands above it in this list.
ORDER = [
    "kernels/__init__.py",
    "kernels/reference.py",
    "kernels/cpu.py",
    "kernels/products.py",
    "kernels/cuda.py",
    "backend.py",
    "tensor.py",
    "ops.py",
    "watch.py",
    "gradcheck.py",
    "nn.py",
    "optim.py",
    "config.py",
    "gpt.py",
    "tokenizer.py",
    "data.py",
    "files.py",
    "checkpoint.py",
    "parallel.py",
    "processes.py",
    "memory.py",
    "evaluate.py",
    "likeness.py",
    "decode.py",
    "generate.py",
    "train.py",
    "plan.py",
    "terminal.py",
    "commands/__init__.py",
    "commands/train.py",
    "commands/generate.py",
    "commands/judge.py",
    "commands/check.py",
    "cli.py",
]
SURFACE = {"__init__.py", "__main__.py"}  # what a user imports or runs; they may import anything
OF_GPUS = {"cupy", "ml_dtypes"}
MAY_IMPORT_THEM = {"backend.py"}
CORE = {"numpy", "threadpoolctl", "tqdm"}


def imports(path: Path) -> set[str]:
    """The modules a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | ({node.module} - {"npgpt"})
    return found


FILES = sorted(str(p.relative_to(PACKAGE).as_posix()) for p in PACKAGE.rglob("*.py"))


def test_every_file_has_its_place():
    assert set(FILES) == set(ORDER) | SURFACE


@pytest.mark.parametrize("file", ORDER)
def test_imports_point_upwards_only(file):
    above = {f.removesuffix(".py").replace("/", ".") for f in ORDER[: ORDER.index(file)]}
    below = {f.removesuffix(".py").replace("/", ".") for f in ORDER[ORDER.index(file) :]}
    for module in imports(PACKAGE / file):
        assert module != "npgpt" or file == "cli.py", f"{file} imports the whole package"
        if module.startswith("npgpt."):
            name = module.removeprefix("npgpt.")
            assert name not in below, f"{file} imports {module}, which stands below it"
            assert any(name == a or name.startswith(a + ".") for a in above) or file == "cli.py", f"{file}: {module}?"


def test_training_code_does_not_import_the_gradient_checker():
    for file in ("train.py", "evaluate.py", "generate.py", "gpt.py", "nn.py", "optim.py", "ops.py"):
        assert not any("gradcheck" in module for module in imports(PACKAGE / file))


@pytest.mark.parametrize("file", FILES)
def test_third_party_imports(file):
    roots = {module.split(".")[0] for module in imports(PACKAGE / file)}
    third = roots - set(sys.stdlib_module_names) - {"npgpt"}
    assert third - OF_GPUS <= CORE
    assert not third & OF_GPUS or file in MAY_IMPORT_THEM


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))


def test_import_needs_neither_cupy_nor_torch():
    """With both made unimportable, the package imports and works."""
    program = (
        "import sys; sys.modules['cupy'] = sys.modules['torch'] = None\n"
        "import npgpt\n"
        "assert npgpt.backend.select('auto').name in ('cpu', 'cuda')\n"
        "assert 'tqdm' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "npgpt.Tensor([1.0], requires_grad=True).sum().backward()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_readmes_python_runs(tmp_path):
    """The Python interface shown in the README, as written, one piece after the other, on the text it names."""
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


def test_the_tours_examples_are_what_python_prints():
    failures, tried = doctest.testfile(str(ROOT / "docs" / "tour.md"), module_relative=False)
    assert tried > 3
    assert failures == 0


def test_links_in_the_documentation_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_flags_named_in_the_documentation_exist():
    from npgpt.cli import COMMANDS

    known = {"--version", "--help"}
    for make_parser, _, _ in COMMANDS.values():
        known |= {flag for action in make_parser()._actions for flag in action.option_strings}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text(encoding="utf-8")))
        assert used <= known, f"{page.name}: {used - known}"
