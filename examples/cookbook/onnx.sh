#!/usr/bin/env bash
# A model as ONNX, and samples of it with onnxruntime and numpy alone.
#
#     examples/cookbook/onnx.sh MODEL OUT
#
# TIMES=80,0.8 are the times of two calls; TIMES=80 is one.
set -euo pipefail
model=$1 out=$2
mkdir -p "$out"
cmtool convert "$model" "$out/model.onnx"
python "$(dirname "$0")/../onnx_sample.py" "$out/model.onnx" --times "${TIMES:-80,0.8}" --out "$out/made.png"
