#!/usr/bin/env bash
# Everything that is measured on one NVIDIA H200, in one call of less than nine minutes:
#
#     benchmarks/h200.sh [FOLDER]        (benchmarks/results/h200 if not given)
#
# 1. the kernels' tests, natively; 2. the declared rows, the most telling first, each written when it is measured: a run
# cut short keeps what it has, and another call goes on from there; 3. the table and the picture of all rows. Needs an
# installed checkout (make install).
# It has not been run on an H200 yet: no row of one is committed, and the time limits below are guesses.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FOLDER=${1:-benchmarks/results/h200}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
ROWS=$FOLDER/rows.jsonl
END=$((SECONDS + 515))
STATUS=0

say() { printf '\n== %s (%d s gone)\n' "$*" "$SECONDS"; }

# run SECONDS COMMAND...: at most so long, and never past the end; a failure is kept for the exit status.
run() {
    local limit=$1 left=$((END - SECONDS)) status=0
    shift
    [ "$left" -gt 5 ] || { echo "no time left for: $*"; STATUS=1; return; }
    timeout --signal=INT --kill-after=5 "$((limit < left ? limit : left))" "$@" || status=$?
    [ "$status" -eq 0 ] || { echo "status $status: $*"; STATUS=1; }
}

bench() {
    local limit=$1
    shift
    run "$limit" "$PYTHON" -m dit_accel bench --device cuda --seconds 0.5 --resume --output "$ROWS" "$@" \
        >>"$FOLDER/bench.txt"
}

"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null || {
    echo "benchmarks/h200.sh needs a CUDA device and an installed checkout (make install)." >&2
    exit 2
}
mkdir -p "$FOLDER"

say "tests of the kernels"
run 120 "$PYTHON" -m pytest -q -x tests/kernels >"$FOLDER/tests.txt" 2>&1
tail -n 3 "$FOLDER/tests.txt"

say "FlexAttention beside gna"
bench 30 --shape wan-1.3b-480p --method gna --density 0.1 --direction forward --dtype bfloat16 --peer
METHODS="--method gna --method sla --method radial --method tile"
say "all models at 10 %, forward"
# shellcheck disable=SC2086 # the methods are words
bench 100 $METHODS --density 0.1 --direction forward
say "forward plus backward at 10 %"
# shellcheck disable=SC2086
bench 60 $METHODS --shape hunyuan-768p --shape wan-14b-480p --shape wan-14b-720p --density 0.1 --direction both
for direction in forward backward; do
    for shape in wan-14b-480p wan-14b-720p wan-1.3b-480p; do
        say "$shape, every density, $direction"
        # shellcheck disable=SC2086
        bench 120 $METHODS --shape "$shape" --direction "$direction"
    done
done

say "summary"
"$PYTHON" -m dit_accel bench --read "$ROWS" | tee "$FOLDER/summary.txt" || STATUS=1
"$PYTHON" -m dit_accel bench --read "$ROWS" --picture "$FOLDER/speedup.png" >/dev/null || echo "no picture (see above)"
echo "$ROWS: $(wc -l <"$ROWS") rows; status $STATUS"
exit "$STATUS"
