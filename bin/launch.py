"""Runs `npgpt NAME ...` from this checkout, with the Python that bin/npgpt has found. Says so if a package is missing."""

import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("npgpt needs Python 3.10 or later; this is Python " + sys.version.split()[0])
root = Path(__file__).resolve().parent.parent
sys.path[0] = str(root)  # instead of bin/, so that modules are found; the current folder is not searched
try:
    from npgpt.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"npgpt: the package {error.name} is missing; run 'make venv' in {root} first")
except KeyboardInterrupt:  # before `main` could handle it
    sys.exit(130)
sys.exit(main())
