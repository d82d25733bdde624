"""`python -m npgpt NAME ...` is `npgpt NAME ...`."""

import sys

try:
    from npgpt.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # before the command could see to it
    sys.exit(130)
