#!/usr/bin/env bash
# Images through pipes: every command reads `--image -` and writes `--out -`.
#
#   examples/pipeline.sh MODEL [FOLDER]      for example: examples/pipeline.sh demo/student demo/pipeline
#
# MODEL is a consistency model of 16x16 images (make demo trains one); the results go to FOLDER.
set -euo pipefail
model=${1:?usage: pipeline.sh MODEL [FOLDER]}
out=${2:-pipeline}
mkdir -p "$out"

# A digit in one network call.
cmtool sample --model "$model" --steps 1 --seeds 7 --labels 3 --out - > "$out/sample.png"

# The same digit in another colour: its luma is kept, the colour is made anew.
cmtool sample --model "$model" --steps 1 --seeds 7 --labels 3 --out - |
    cmtool colorize --model "$model" --image - --labels 3 --seeds 1 --out - > "$out/recoloured.png"

# A small picture, enlarged twofold.
small=$(cmtool data preview digits:test -n 1 --resolution 8 --out "$out/small")
cat "$small" | cmtool superres --model "$model" --image - --factor 2 --out - > "$out/large.png"

# The same as JSON: one object on stdout, everything else on stderr.
cmtool sample --model "$model" --seeds 0-3 --out "$out/four" --json |
    python -c 'import json, sys; print(len(json.load(sys.stdin)["images"]), "images")'

echo "results: $out"
