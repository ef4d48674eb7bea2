#!/usr/bin/env bash
# Measures everything on one NVIDIA H200, in one call of less than nine minutes:
#
#     benchmarks/h200.sh [FOLDER]        (benchmarks/results/h200 if not given)
#
# 1. the declared rows of the operators, the most telling first; 2. steps of whole models; 3. a profile; 4. the kernels'
# tests, natively; 5. one page: the tables of all rows, and the picture.
# Every row is written as soon as it is measured: a run that is cut short keeps its rows, and the next call continues.
# It needs an installed checkout (make install). PARTS=rows or PARTS=steps measures those alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FOLDER=${1:-benchmarks/results/h200}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
ROWS=$FOLDER/rows.jsonl
STEPS=$FOLDER/steps.jsonl
LIMIT=${LIMIT:-515} # seconds
DEVICE=${DEVICE:-cuda}
END=$((SECONDS + LIMIT))
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
    run "$limit" "$PYTHON" -m dit_accel bench --device "$DEVICE" --seconds 0.5 --resume --output "$ROWS" "$@" \
        >>"$FOLDER/bench.txt"
}

# steps SECONDS MODEL MODE...: one model's steps; half a minute a round for the longest, so no time beyond the rounds.
steps() {
    local limit=$1 model=$2 mode=$3
    shift 3
    say "$model, $mode"
    run "$limit" "$PYTHON" -m tools.steps.measure --device "$DEVICE" --seconds 0 --resume --output "$STEPS" \
        --shape "$model" --mode "$mode" "$@" >>"$FOLDER/bench.txt"
}

"$PYTHON" -c "import torch; torch.zeros(1, device='$DEVICE')" 2>/dev/null || {
    echo "benchmarks/h200.sh needs a CUDA device and an installed checkout (make install)." >&2
    exit 2
}
mkdir -p "$FOLDER"

wants() { [[ " ${PARTS:-rows steps rest} " == *" $1 "* ]]; }

METHODS=(--method gna --method sla --method radial --method tile)
LARGE=(--shape hunyuan-768p --shape flux-4k --shape wan-14b-720p --shape wan-14b-480p)
SLA=(--method sla:topk=0.05,block_q=128 --method sla:topk=0.05)
if wants rows; then
    say "the large models at 10 %, forward"
    bench 150 "${LARGE[@]}" "${METHODS[@]}" --density 0.1 --direction forward
    say "SLA at 5 %"
    bench 40 --shape wan-14b-720p --shape hunyuan-768p "${SLA[@]}" --direction forward
    say "forward plus backward"
    bench 90 --shape hunyuan-768p --shape wan-14b-720p --method gna --method radial --density 0.1 --direction both
    bench 40 --shape wan-14b-720p "${SLA[@]}" --direction both
fi
if wants steps; then
    steps 60 wan-1.3b-480p eager
    steps 120 wan-14b-720p eager --method radial --method gna --method sla
    steps 120 hunyuan-720p eager --method gna
    steps 60 flux-4k eager
    steps 40 wan-14b-480p eager
    steps 40 cogvideox eager
    steps 60 wan-1.3b-480p compiled
fi
if wants rest; then

say "profile"
run 20 "$PYTHON" -m dit_accel bench --device "$DEVICE" --shape wan-14b-480p --density 0.1 --dtype bfloat16 \
    --direction forward "${METHODS[@]}" --seconds 0.1 --profile "$FOLDER/profile.txt" >/dev/null

say "tests of the kernels"
run 240 "$PYTHON" -m pytest -q -n auto tests/kernels >"$FOLDER/tests.txt" 2>&1
tail -n 3 "$FOLDER/tests.txt"
say "the other models at 10 %, forward"
SHAPES=()
for shape in wan-1.3b-480p hunyuan-720p mochi flux-2k cogvideox; do
    SHAPES+=(--shape "$shape")
done
bench 100 "${SHAPES[@]}" "${METHODS[@]}" --density 0.1 --direction forward
say "FlexAttention beside gna"
bench 30 --shape wan-1.3b-480p --method gna --density 0.1 --direction forward --dtype bfloat16 --peer
for direction in forward backward; do
    for shape in wan-14b-480p wan-14b-720p wan-1.3b-480p; do
        say "$shape, every density, $direction"
        bench 120 "${METHODS[@]}" --shape "$shape" --direction "$direction"
    done
done
for model in wan-14b-480p wan-14b-720p flux-4k cogvideox hunyuan-720p; do
    steps 120 "$model" compiled
done

fi

say "summary"
{
    if [ -s "$ROWS" ]; then "$PYTHON" -m dit_accel bench --read "$ROWS" || STATUS=1; fi
    if [ -s "$STEPS" ]; then "$PYTHON" -m tools.steps.measure --read "$STEPS" || STATUS=1; fi
} >"$FOLDER/summary.txt"
if [ -s "$ROWS" ]; then
    "$PYTHON" -m dit_accel bench --read "$ROWS" --picture "$FOLDER/speedup.png" >/dev/null || echo "no picture (see above)"
fi
cat "$FOLDER/summary.txt"
wc -l "$FOLDER"/*.jsonl
echo "status $STATUS"
exit "$STATUS"
