#!/usr/bin/env bash
# Every script of the cookbook, one after another, with what each printed and made in OUT/kept.
#
#     examples/cookbook/all.sh OUT
#
# The pictures are handwritten digits. STEPS, COUNT, SEEDS and POINTS are those of the scripts; SHORT=1 does almost no
# work.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 digits=digits count=1797
if [ -n "${SHORT:-}" ]; then
  export STEPS=2 COUNT=16 POINTS=3 SEEDS=0
  digits=digits:test count=160
fi
export SIDE=16
rm -rf "$out"
mkdir -p "$out/kept"
cmtool data preview "$digits" -n "$count" --out "$out/pictures" > "$out/pictures.txt"

# Run a script and keep what it says; where it fails, show that.
keep() {
  local name=$1
  shift
  { echo "\$ $(basename "$1") ${*:2}"; "$@"; } 2>&1 | sed "s#$PWD/##g" > "$out/kept/$name.txt" ||
    { cat "$out/kept/$name.txt"; exit 1; }
  echo "$out/kept/$name.txt"
}

# Ask the server for one picture, as a client would.
serve.py() {
  python "$here/serve.py" "$@" > "$out/address" &
  local server=$!
  until [ -s "$out/address" ]; do sleep 0.2; done
  cat "$out/address"
  python -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' "$(cat "$out/address")" "$out/kept/serve.png"
  kill "$server"
}

keep own_folder "$here/own_folder.sh" "$out/pictures" "$out/own"
keep two_steps "$here/two_steps.sh" "$out/own/teacher" "$out/pictures" "$out/two"
keep compare "$here/compare.sh" "$out/own/teacher" "$out/pictures" "$out/both" cd flow-cd
keep processes "$here/processes.sh" "$out/pictures" "$out/many" 2
keep pipeline "$here/../pipeline.sh" digits-small "$out/pipeline"
keep serve serve.py --model digits-small --port 0
keep onnx "$here/onnx.sh" digits-small "$out/onnx"
cp "$out/own/one-step.png" "$out/kept/own_folder.png"
cp "$out/two/two-steps.png" "$out/kept/two_steps.png"
cp "$out/many/made.png" "$out/kept/processes.png"
cp "$out/pipeline/recoloured.png" "$out/kept/pipeline.png"
cp "$out/onnx/made.png" "$out/kept/onnx.png"
