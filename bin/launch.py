"""Runs `npgpt NAME ...` from this checkout with whatever Python bin/npgpt has found, or says what is missing."""

import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("npgpt needs Python 3.10 or later, this is " + sys.version.split()[0])
root = Path(__file__).resolve().parent.parent
sys.path[0] = str(root)  # in place of bin/; the folder the user stands in is not searched
try:
    from npgpt.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"npgpt: the package {error.name} is missing; run 'make venv' in {root} first")
except KeyboardInterrupt:  # before the command could see to it
    sys.exit(130)
sys.exit(main())
