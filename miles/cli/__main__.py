"""Run the `miles` command as a module: `python -m miles.cli`."""

import sys

from miles.cli import main

sys.exit(main())
