#!/bin/sh
# Train on all GPUs of one machine, or on as many processes as PROCESSES says:
#   PROCESSES=4 sh scripts/launch/one_node.sh --data_dir data/training --results_dir results/first --max_steps 20000
set -eu
exec cimd-train --ngpu "${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}" "$@"
