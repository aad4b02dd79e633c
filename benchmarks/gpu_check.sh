#!/usr/bin/env bash
# Everything that a GPU can tell of miles, in one command of under 8 minutes.
#
#     benchmarks/gpu_check.sh [PART ...]      parts: tests demo train estimate ray; all by default
#
#     OUT=runs/gpu-check       where the results go, each as its part ends
#     BUDGET_SECONDS=480       no part begins later, and none runs on
#     PYTHON=python3           default: that of .venv, where `make setup` has made one
#     WHEELS=.gpu-wheels       what benchmarks/gpu_wheels.sh has collected: installed into a folder
#                              of their own, where Ray or Megatron is missing
#     GPU_CHECK_TINY=1         on the CPU at a tiny size, also where there is a GPU
#
# Without a GPU it runs at the tiny size. A part that fails shows the end of its error, and the next
# one goes on.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
WHEELS=${WHEELS:-.gpu-wheels}
SITE=${SITE:-${TMPDIR:-/tmp}/miles-gpu-site}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

lacks_packages() {
  "$PYTHON" - << 'EOF'
import importlib.util, sys
needed = ("ray", "megatron", "msgspec", "orjson", "tenacity", "shtab", "zstandard")
sys.exit(not any(importlib.util.find_spec(name) is None for name in needed))
EOF
}

if lacks_packages; then
  if ! ls "$WHEELS"/*.whl > /dev/null 2>&1; then
    echo "packages are missing here and $WHEELS has no wheels: run benchmarks/gpu_wheels.sh" >&2
    exit 1
  fi
  if [ ! -e "$SITE/.complete" ]; then
    rm -rf "$SITE"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
      --target "$SITE" "$WHEELS"/*.whl && touch "$SITE/.complete"
  fi
  export PYTHONPATH=$SITE:$PYTHONPATH
fi

if [ "${GPU_CHECK_TINY:-}" = 1 ]; then
  export CUDA_VISIBLE_DEVICES=
fi
exec "$PYTHON" benchmarks/_gpu_check.py "$@"
