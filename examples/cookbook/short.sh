#!/usr/bin/env bash
# Every script of the cookbook with almost no work: does it run?
#
#     examples/cookbook/short.sh TEACHER OUT        TEACHER is a diffusion model of digits
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
teacher=$1 out=$2
export STEPS=2 COUNT=16 POINTS=3 SEEDS=0 SIDE=16
rm -rf "$out"
mkdir -p "$out"
cmtool data preview digits:test -n 160 --out "$out/pictures" > /dev/null

one() { "$here/two_steps.sh" "$teacher" digits:test "$out/two" && "$here/compare.sh" "$teacher" digits:test "$out/both" cd scd; }
two() { "$here/own_folder.sh" "$out/pictures" "$out/own" && "$here/processes.sh" "$out/pictures" "$out/many" 2; }
one > "$out/one.log" 2>&1 &
first=$!
two > "$out/two.log" 2>&1 || { cat "$out/two.log"; exit 1; }
wait "$first" || { cat "$out/one.log"; exit 1; }
ls "$out"/two/two-steps.png "$out"/both/report.html "$out"/own/report.html "$out"/many/made.png
