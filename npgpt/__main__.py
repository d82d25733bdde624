"""`python -m npgpt NAME ...` is `npgpt NAME ...`."""

import sys

from npgpt.cli import main

sys.exit(main())
