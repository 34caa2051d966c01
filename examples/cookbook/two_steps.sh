#!/usr/bin/env bash
# Your teacher (a run, OpenAI's .pt, EDM's .pkl, a diffusers folder) to a sampler of two well chosen steps.
#
#     examples/cookbook/two_steps.sh TEACHER PICTURES OUT
#
# STEPS=900 is how long the training is, COUNT=2000 how many samples a point of the search measures.
set -euo pipefail
teacher=$1 pictures=$2 out=$3 steps=${STEPS:-900} count=${COUNT:-2000}

cmtool info "$teacher"
cmtool distill --teacher "$teacher" --data "$pictures" --preset cd --iterations "$steps" --out "$out"

# Where the second step should start from: measured, kept in the model, used by --steps 2 from then on.
cmtool search --model "$out" --data "$pictures" --steps 2 -n "$count" ${POINTS:+--points "$POINTS"} --write
cmtool evaluate --model "$out" --data "$pictures" --steps 1,2 -n "$count"
cmtool sample --model "$out" --steps 2 --seeds 0-39 --grid "$out/two-steps.png"
