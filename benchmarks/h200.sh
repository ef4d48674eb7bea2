#!/usr/bin/env bash
# Everything that is measured on one NVIDIA H200, in one call of less than nine minutes:
#
#     benchmarks/h200.sh [FOLDER]        (benchmarks/results/h200 if not given)
#
# 1. the kernels' tests, natively; 2. the declared rows, the most telling first, each written when it is measured, so that
# a run cut short keeps what it has; 3. the table and the picture of all rows. Needs an installed checkout (make install).
# It has not been run on an H200 yet: no row of one is committed, and the shares of time below are estimates.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FOLDER=${1:-benchmarks/results/h200}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
ROWS=$FOLDER/rows.jsonl
END=$((SECONDS + 520))
STATUS=0
mkdir -p "$FOLDER"

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
    run "$limit" "$PYTHON" -m dit_accel bench --device cuda --seconds 0.5 --output "$ROWS" "$@" >>"$FOLDER/bench.txt"
}

"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' || {
    echo "benchmarks/h200.sh needs a CUDA device and an installed checkout (make install)." >&2
    exit 2
}

say "tests of the kernels"
run 150 "$PYTHON" -m pytest -q -x tests/kernels 2>&1 | tee "$FOLDER/tests.txt" | tail -n 3
grep -qE '^[0-9]+ passed' "$FOLDER/tests.txt" && ! grep -qE '[0-9]+ (failed|error)' "$FOLDER/tests.txt" || STATUS=1

say "10 %: all shapes, forward"
bench 110 --density 0.1 --direction forward
say "forward plus backward at 10 %"
bench 60 --shape wan-14b-480p --shape wan-14b-720p --shape hunyuan-768p --density 0.1 --direction both
say "every density, forward and backward, at 32,760 tokens"
bench 100 --shape wan-1.3b-480p --shape wan-14b-480p --direction forward --direction backward
say "every density, forward and backward, at 75,600 tokens"
bench 110 --shape wan-14b-720p --direction forward --direction backward
say "FlexAttention beside gna"
bench 40 --shape wan-14b-480p --method gna --density 0.1 --direction forward --peer

say "summary"
"$PYTHON" -m dit_accel bench --read "$ROWS" | tee "$FOLDER/summary.txt" || STATUS=1
"$PYTHON" -m dit_accel bench --read "$ROWS" --picture "$FOLDER/speedup.png" >/dev/null || echo "no picture (see above)"
echo "$ROWS: $(wc -l <"$ROWS") rows; status $STATUS"
exit "$STATUS"
