#!/usr/bin/env bash
# Collect the wheels that benchmarks/gpu_check.sh needs on a GPU machine without a network.
#
#     benchmarks/gpu_wheels.sh [FOLDER]     FOLDER: .gpu-wheels, which git ignores
#
# The GPU machine is taken to have Python 3.12, the CUDA build of torch 2.11, transformers, pyarrow,
# tokenizers, tiktoken and pytest. What is collected is the rest: about 50 MB, of which Ray, without
# its Java and its browser parts, is most. Copy the folder beside the sources; gpu_check.sh installs
# from it, outside of the machine's own packages.
set -euo pipefail
cd "$(dirname "$0")/.."

FOLDER=${1:-.gpu-wheels}
PYTHON=${PYTHON:-python3}
MAX_MIB=60

PACKAGES=(
  ray megatron-core liger-kernel
  orjson tenacity zstandard msgspec shtab
  # needed by Ray
  jsonschema jsonschema-specifications referencing rpds-py
)

# The versions that are known to work together, where there is one.
requirements=()
for name in "${PACKAGES[@]}"; do
  requirements+=("$(grep -E "^${name//-/[-_]}==" constraints.txt | cut -d' ' -f1 || true)")
  [ -n "${requirements[-1]}" ] || requirements[-1]=$name
done

# pip compares the names of platforms exactly.
platforms=()
for libc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do
  platforms+=(--platform "manylinux_${libc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

rm -rf "$FOLDER"
mkdir -p "$FOLDER"
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$FOLDER" "${requirements[@]}"
"$PYTHON" benchmarks/_slim_wheel.py "$FOLDER"/ray-*.whl ray/jars ray/rllib ray/dashboard/client

ls -l "$FOLDER" | awk 'NR > 1 { printf "%6.1f MB  %s\n", $5 / 1e6, $9 }'
size=$(du --summarize --bytes "$FOLDER" | cut -f1)
echo "$FOLDER: $((size >> 20)) MiB"
if [ $((size >> 20)) -ge $MAX_MIB ]; then
  echo "more than $MAX_MIB MiB: name further folders to _slim_wheel.py that are not needed" >&2
  exit 1
fi
