"""Miles's entry point: `ray job submit … -- python3 train_async.py …` runs as it is.

It is `miles train` under the name that Miles's launch scripts call. In a submitted job it joins the
cluster of the job.
"""

from __future__ import annotations

import sys

from miles.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
