#!/usr/bin/env bash
# Everything about run-ahead decoding that needs a GPU, in about twelve minutes: exactness and random
# schedules, speed with nothing missing, and the headline models' stand-ins on played drives.
#
#     bash benchmarks/gpu/run.sh RESULTS
#
# Installs into a fresh virtual environment beside RESULTS, unless PYTHON names an interpreter that
# has the package and MLX's backend for the GPU. Each script leaves a JSON file in RESULTS as soon as
# it has figures; summary.py makes tables of them. Takes 15 GB of disk meanwhile.
set -euo pipefail
results=$(realpath -m "${1:?usage: run.sh RESULTS}")
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$results.venv"
    PYTHON="$results.venv/bin/python"
    extra=cuda
    [ "$(uname)" = Darwin ] && extra=pack # Metal comes with mlx itself
    "$PYTHON" -m pip install --quiet "$here/../..[$extra]"
fi
"$PYTHON" "$here/exact.py" --out "$results"
"$PYTHON" "$here/speed.py" --out "$results"
"$PYTHON" "$here/standins.py" --out "$results" --model qwen3.5-397b --shares 0.25 --tokens 4 \
    --drives 7.4,17.5
"$PYTHON" "$here/standins.py" --out "$results" --model kimi-k2.5 --layers 8 --shares 0.25 --tokens 4 \
    --drives 7.4,17.5
"$PYTHON" "$here/standins.py" --out "$results" --model qwen3.5-397b --layers 8 --shares 0.25 --prompt 512 \
    --drives 7.4,17.5
"$PYTHON" "$here/summary.py" "$results"
