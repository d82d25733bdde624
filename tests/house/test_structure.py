"""The rules of the house: which room may import which, third-party imports, docstrings, and the folders of tests/."""

import ast
import sys
from pathlib import Path

import pytest
from studies.mutation import BUGS

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "npgpt"
TESTS = ROOT / "tests"


# The rooms from left to right, in stages. A file may import from its own room and from rooms of earlier stages.
STAGES = "config kernels | engine | model text | storage parallel | exchange generation evaluation | "
STAGES += "training | report | serving | console | commands | cli"


STAGE_OF = {room: i for i, stage in enumerate(STAGES.split("|")) for room in stage.split()}
SURFACE = {"__init__.py", "__main__.py"}  # what a user imports or runs; these files may import any room
# Packages of extras, and the files that may import them.
OF_EXTRAS = {
    "cupy": {"engine/backend.py"},
    "ml_dtypes": {"engine/backend.py"},
    "zstandard": {"text/sources.py"},
    "tokenizers": {"text/bpe.py"},
    "gguf": {"exchange/gguf.py"},
    "matplotlib": {"report/curves.py"},
    "starlette": {"serving/app.py", "serving/live.py", "serving/streams.py"},
    "uvicorn": {"serving/server.py"},
    "prometheus_client": {"serving/metrics.py"},
    "tensorboardX": {"report/tensorboard.py"},
    "mpi4py": {"parallel/ranks.py"},
}
CORE = {"numpy", "threadpoolctl", "tqdm"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | ({node.module} - {"npgpt"})
    return found


FILES = sorted(str(p.relative_to(PACKAGE).as_posix()) for p in PACKAGE.rglob("*.py"))


def room_of(file: str) -> str:
    return file.removesuffix(".py").split("/")[0]


def test_every_file_is_in_a_room():
    assert {room_of(file) for file in FILES if file not in SURFACE} == set(STAGE_OF)


@pytest.mark.parametrize("file", sorted(set(FILES) - SURFACE))
def test_imports_point_to_the_left_only(file):
    own = room_of(file)
    for module in imports(PACKAGE / file):
        assert module != "npgpt" or own == "cli", f"{file} imports the whole package"
        if module.startswith("npgpt."):
            other = module.split(".")[1]
            if own == "cli" and other not in STAGE_OF:
                continue  # a name in npgpt/__init__.py, such as the version
            assert other in STAGE_OF, f"{file} imports {module}, which is in no room"
            assert other == own or STAGE_OF[other] < STAGE_OF[own], f"{file} imports {module}, which is further right"


def test_training_code_does_not_import_the_gradient_checker():
    for file in (
        "training/trainer.py",
        "evaluation/loss.py",
        "generation/generate.py",
        "model/gpt.py",
        "model/module.py",
        "engine/ops.py",
    ):
        assert not any("gradcheck" in module for module in imports(PACKAGE / file))


@pytest.mark.parametrize("file", FILES)
def test_third_party_imports(file):
    roots = {module.split(".")[0] for module in imports(PACKAGE / file)}
    later = {"compression"}  # in the standard library from Python 3.14 on
    third = roots - set(sys.stdlib_module_names) - {"npgpt"} - later
    assert third - OF_EXTRAS.keys() <= CORE
    for package in third & OF_EXTRAS.keys():
        assert file in OF_EXTRAS[package]


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the tests

TEST_FILES = sorted(p.relative_to(TESTS).as_posix() for p in TESTS.rglob("*.py"))
SHARED = {"conftest.py", "support", "studies"}  # what a test file may import from tests/
OTHER_FOLDERS = {"support", "house", "studies", "benchmarks"}  # folders of tests/ that are not rooms


@pytest.mark.parametrize("file", TEST_FILES)
def test_no_file_imports_a_test_file(file):
    """A helper that two test files need must be in support/ or in a conftest.py."""
    own_names = {path.split("/")[0].removesuffix(".py") for path in TEST_FILES}
    for module in imports(TESTS / file):
        names = module.split(".")
        assert names[0] != "tests", f"{file} imports {module}; write it without `tests.`"
        assert not any(name.startswith("test_") or name == "conftest" for name in names), f"{file} imports {module}"
        if names[0] in own_names and not file.startswith("benchmarks/"):
            assert names[0] in SHARED, f"{file} imports {module}, which is in another folder of tests"


@pytest.mark.parametrize("file", [file for file in TEST_FILES if file.split("/")[-1].startswith("test_")])
def test_every_test_file_is_in_the_folder_of_a_room(file):
    folder = file.split("/")[0]
    assert folder in set(STAGE_OF) | OTHER_FOLDERS
    assert ast.get_docstring(ast.parse((TESTS / file).read_text(encoding="utf-8"))), f"{file} does not say what it tests"


def test_every_planted_bug_has_its_place():
    """`make mutation` takes minutes; this finds at once which of its bugs no longer fit the code."""
    misfits = [name for name, file, right, _ in BUGS if (PACKAGE / file).read_text(encoding="utf-8").count(right) != 1]
    assert not misfits
