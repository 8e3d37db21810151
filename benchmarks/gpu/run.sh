#!/usr/bin/env bash
# Everything about run-ahead decoding that needs a GPU, in a quarter of an hour: exactness and random
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
standin() {
    "$PYTHON" "$here/standins.py" --out "$results" --shares 0.25 --drives 7.4,17.5 "$@"
}
standin --model qwen3.5-397b --tokens 4
standin --model kimi-k2.5 --layers 8 --tokens 4
standin --model qwen3.5-397b --layers 8 --prompt 512
"$PYTHON" "$here/summary.py" "$results"
