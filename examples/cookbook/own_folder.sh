#!/usr/bin/env bash
# Your own folder of pictures to a one-step generator.
#
#     examples/cookbook/own_folder.sh PICTURES OUT
#
# SIDE=32 is the side of the pictures that are made; STEPS=900 how long each of the two trainings is.
set -euo pipefail
pictures=$1 out=$2 side=${SIDE:-32} steps=${STEPS:-900}

# What is in it, and what becomes of it: centre crops of that side.
cmtool data inspect "$pictures"
mkdir -p "$out"
cmtool data preview "$pictures" --resolution "$side" --upscale --out "$out/preview.png"

# A diffusion teacher, then a student that needs one call where the teacher needs 35.
cmtool train --data "$pictures" --resolution "$side" --upscale --preset edm --iterations "$steps" --out "$out/teacher"
cmtool distill --teacher "$out/teacher" --data "$pictures" --resolution "$side" --upscale --preset cd \
  --iterations "$steps" --out "$out/student"

cmtool sample --model "$out/student" --seeds 0-39 --grid "$out/one-step.png"
cmtool report "$out/teacher" "$out/student" --out "$out/report.html"
