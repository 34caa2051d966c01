#!/usr/bin/env bash
# One training in several processes; on GPUs each takes one. Losses and samples are those of a single process.
#
#     examples/cookbook/processes.sh PICTURES OUT 2
set -euo pipefail
pictures=$1 out=$2 count=$3
torchrun --standalone --nproc-per-node "$count" -m cmtool train --data "$pictures" --preset ect \
  --iterations "${STEPS:-600}" --stop-after "$((${STEPS:-600} / 2))" --out "$out" || true # stopped: torchrun says 1

# It goes on with any number of processes, here with one.
cmtool train --resume "$out"
torchrun --standalone --nproc-per-node "$count" -m cmtool sample --model "$out" --steps 2 --seeds 0-39 --grid "$out/made.png"
