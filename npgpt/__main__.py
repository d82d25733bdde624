"""`python -m npgpt NAME ...` is the same as `npgpt NAME ...`."""

import sys

try:
    from npgpt.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # before `main` could handle it
    sys.exit(130)
