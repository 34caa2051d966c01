#!/usr/bin/env bash
# Two methods, fairly: one network, one teacher, the same images, steps and seeds, the same judge.
#
#     examples/cookbook/compare.sh TEACHER PICTURES OUT cd scd
#
# STEPS=300 is how long each training is, COUNT=2000 how many samples are judged, SEEDS="0 1" shows the spread.
set -euo pipefail
teacher=$1 pictures=$2 out=$3
shift 3
for preset in "$@"; do
  for seed in ${SEEDS:-0 1}; do
    run=$out/$preset-$seed
    cmtool distill --teacher "$teacher" --data "$pictures" --preset "$preset" --seed "$seed" \
      --iterations "${STEPS:-300}" --out "$run"
    cmtool evaluate --model "$run" --data "$pictures" --steps 1,2 -n "${COUNT:-2000}" --out "$run/quality.json"
  done
done

# One page: curves, samples side by side, quality against calls, and the protocol of each number.
cmtool report "$out"/*-[0-9] --out "$out/report.html"
