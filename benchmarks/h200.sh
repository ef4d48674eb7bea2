#!/usr/bin/env bash
# Measures on one NVIDIA H200, in three commands of nine, nine and eight minutes, each into a fresh folder:
#
#     benchmarks/h200.sh A|B|C [FOLDER]        (benchmarks/results/h200-A and so on if not given)
#
# A. Native tests of the kernels that no GPU has run (tail, router, Gluon); rows of the operators: forward, forward plus
#    backward by "auto" and by "gluon", SLA, the routed methods with profiles, a published kernel's size.
# B. Steps of whole models: Wan2.1-14B 720p, HunyuanVideo 720p, FLUX 4K, eager, then compiled.
# C. A profile of the forward and of dk and dv, every density, all tests of the kernels.
# Each writes rows as soon as they are measured, and ends with tables of its rows, and of the times that were predicted
# beside the measured ones. A folder that has files is refused; RESUME=1 continues it. The checkout need not be installed
# if its requirements are on PYTHONPATH.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PART=${1:-}
case $PART in A | B) LIMIT=${LIMIT:-525} ;; C) LIMIT=${LIMIT:-465} ;; *)
    echo "usage: benchmarks/h200.sh A|B|C [FOLDER]" >&2
    exit 2
    ;;
esac
FOLDER=${2:-benchmarks/results/h200-$PART}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
ROWS=$FOLDER/rows.jsonl
STEPS=$FOLDER/steps.jsonl
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

# steps SECONDS MODEL MODE...: one model's steps, one round each, for half a minute a round is the longest.
steps() {
    local limit=$1 model=$2 mode=$3
    shift 3
    say "$model, $mode"
    run "$limit" "$PYTHON" -m tools.steps.measure --device "$DEVICE" --seconds 0 --rounds 1 --resume \
        --output "$STEPS" --shape "$model" --mode "$mode" "$@" >>"$FOLDER/bench.txt"
}

tests() {
    local limit=$1
    shift
    run "$limit" "$PYTHON" -m pytest -q -n auto "$@" >>"$FOLDER/tests.txt" 2>&1
    tail -n 3 "$FOLDER/tests.txt"
}

"$PYTHON" -c "import torch; torch.zeros(1, device='$DEVICE')" 2>/dev/null || {
    echo "benchmarks/h200.sh needs a CUDA device and an installed checkout (make install)." >&2
    exit 2
}
if [ -z "${RESUME:-}" ] && [ -n "$(ls -A "$FOLDER" 2>/dev/null)" ]; then
    echo "$FOLDER has files. Name a fresh folder, or continue this one with RESUME=1." >&2
    exit 2
fi
mkdir -p "$FOLDER"

STATIC=(--method gna --method radial --method tile)
LARGE=(--shape hunyuan-768p --shape flux-4k --shape wan-14b-720p)
SLA=(--method sla:topk=0.05,block_q=128 --method sla:topk=0.05)
ROUTED=(--method sol --method sparge:topk=0.16,topp=0.0 --method rectified)
NAMED=(--method sol --method gna --method sla:topk=0.05,block_q=128)

if [ "$PART" = A ]; then
    say "native tests of what no GPU has run"
    tests 150 tests/kernels/tail tests/kernels/router tests/kernels/block_sparse/test_gluon.py \
        tests/kernels/block_sparse/test_gluon_backward.py tests/kernels/sla/test_gluon.py
    say "the large models at 10 %, forward"
    bench 90 "${LARGE[@]}" "${STATIC[@]}" --density 0.1 --direction forward
    say "forward plus backward, by auto and by gluon"
    for impl in auto gluon; do
        bench 60 --shape hunyuan-768p --shape wan-14b-720p --method gna --density 0.1 --direction both --impl "$impl"
    done
    say "SLA at 5 %"
    bench 40 --shape wan-14b-720p "${SLA[@]:0:2}" --direction forward --impl gluon
    bench 30 --shape wan-14b-720p "${SLA[@]}" --direction forward
    say "routed methods"
    bench 90 --shape wan-14b-720p --shape hunyuan-720p "${ROUTED[@]}" --direction forward
    say "a published kernel's size"
    bench 30 --shape anchor-110k
    say "profile of the routed methods"
    run 40 "$PYTHON" -m dit_accel bench --device "$DEVICE" --shape wan-14b-720p "${ROUTED[@]}" --direction forward \
        --seconds 0.1 --profile "$FOLDER/profile.txt" >/dev/null
fi
if [ "$PART" = B ]; then
    for mode in eager compiled; do
        steps 140 wan-14b-720p "$mode" "${NAMED[@]}"
        steps 140 hunyuan-720p "$mode" "${NAMED[@]:0:4}"
        steps 60 flux-4k "$mode"
    done
    steps 60 wan-1.3b-480p eager
    steps 60 wan-1.3b-480p compiled
fi
if [ "$PART" = C ]; then
    say "profile of the forward, and of dk and dv"
    for direction in forward backward; do
        run 30 "$PYTHON" -m dit_accel bench --device "$DEVICE" --shape wan-14b-720p --density 0.1 --method gna \
            --direction "$direction" --seconds 0.1 --profile "$FOLDER/profile-$direction.txt" >/dev/null
    done
    say "all tests of the kernels"
    tests 200 tests/kernels
    say "the other models at 10 %, forward"
    SHAPES=()
    for shape in wan-14b-480p wan-1.3b-480p hunyuan-720p mochi flux-2k cogvideox; do
        SHAPES+=(--shape "$shape")
    done
    bench 90 "${SHAPES[@]}" "${STATIC[@]}" --density 0.1 --direction forward
    say "every density"
    for direction in forward backward; do
        bench 90 "${STATIC[@]}" --shape wan-14b-720p --direction "$direction"
    done
    say "FlexAttention beside gna"
    bench 30 --shape wan-1.3b-480p --method gna --density 0.1 --direction forward --dtype bfloat16 --peer
fi

say "summary"
{
    if [ -s "$ROWS" ]; then "$PYTHON" -m dit_accel bench --read "$ROWS" || STATUS=1; fi
    if [ -s "$ROWS" ]; then "$PYTHON" -m tools.kernels.predict --rows "$ROWS" || STATUS=1; fi
    if [ -s "$STEPS" ]; then "$PYTHON" -m tools.steps.measure --read "$STEPS" || STATUS=1; fi
} >"$FOLDER/summary.txt"
if [ -s "$ROWS" ]; then
    "$PYTHON" -m dit_accel bench --read "$ROWS" --picture "$FOLDER/speedup.png" >/dev/null || echo "no picture (see above)"
fi
cat "$FOLDER/summary.txt"
wc -l "$FOLDER"/*.jsonl
echo "status $STATUS"
exit "$STATUS"
