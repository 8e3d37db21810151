#!/bin/sh
# Generate with a model that the machines of a hostfile share:
#   examples/two_machines/run.sh HOSTFILE MODEL [options of mlx_streamexperts.generate]
set -e
hostfile=$1 model=$2
shift 2
python=${PYTHON:-python3}  # the same path on every machine: a virtual environment's, say
exec "$(dirname "$(command -v "$python")")/mlx.launch" --backend ring --hostfile "$hostfile" -- \
    "$python" -m mlx_streamexperts.generate --pipeline --model "$model" "$@"
