#!/usr/bin/env bash
# Everything that only a GPU can show, in eight minutes, as one Markdown table; see gpu.py for the options.
#
#   bash benchmarks/gpu.sh [--wheels FOLDER] [options of gpu.py]
#
# --wheels: install the wheels in FOLDER into a temporary folder first, which comes before the machine's own packages. Nothing is
# downloaded, and packages without a wheel, such as torch, are those of the machine.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
if [ "${1-}" = --wheels ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$packages" "$2"/*.whl
    shift 2
fi
export PYTHONPATH="$packages:$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python3 "$root/benchmarks/gpu.py" "$@"
