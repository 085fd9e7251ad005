#!/usr/bin/env bash
# Everything a GPU can tell about this repository: bash bench/gpu.sh [--dry-run] PART...
#
#   tests     compiled kernels against the float64 reference           needs pytest, hypothesis
#   verify    every kernel, recipe and dtype: python -m grpo_core.verify
#   ceilings  bandwidth of copying, reading, writing                   needs triton
#   bench     time, memory, bytes of ours and naive, every vocabulary  needs pytest-benchmark
#   peers     the same with torch.compile, two vocabularies            needs pytest-benchmark
#   hidden    from hidden states: ours, naive, Liger, TRL, products   needs pytest-benchmark
#   trl       what a step of TRL's holds, with our code at its hook    needs trl
#   tune      sweeps the layouts, writes a launch.py to copy back      needs triton
#   all       these, in this order
#
# No part takes more than ten minutes (LIMIT seconds), needs the network, or stops the next one.
# Results: bench/results/<device>/, and a copy in $OUT where that is set. Packages that are missing
# (liger-kernel, trl, ...) are looked for in the wheels of the folder .whl, where there is one.
# --dry-run walks the same way on a CPU, tiny and interpreted; its figures mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=(tests verify ceilings bench peers hidden trl tune)
LIMIT=${LIMIT:-560}
DRY=
WANTED=()
for argument in "$@"; do
    case $argument in
        --dry-run) DRY=1 ;;
        all) WANTED+=("${PARTS[@]}") ;;
        tests | verify | ceilings | bench | peers | hidden | trl | tune) WANTED+=("$argument") ;;
        *) echo "unknown part '$argument': expected --dry-run, all, ${PARTS[*]}" >&2 && exit 2 ;;
    esac
done
[[ ${#WANTED[@]} -gt 0 ]] || { sed -n '2,18p' "$0" | cut -c3- && exit 2; }

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if compgen -G ".whl/*.whl" >/dev/null; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$SITE" .whl/*.whl \
        && export PYTHONPATH=$PYTHONPATH:$SITE
fi
[[ -n $DRY ]] && export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1

has() { # whether modules can be imported; says which cannot, and why
    local missing=0 module why
    for module in "$@"; do
        why=$("$PYTHON" -c "import $module" 2>&1) && continue
        echo "skipped: $module (${why##*$'\n'})" && missing=1
    done
    return $missing
}

has torch || exit 1
if [[ -z $DRY ]] && ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "no GPU that torch can see; --dry-run walks the same way without one" >&2
    exit 1
fi
if [[ -n $DRY ]]; then
    RESULTS=$(mktemp -d)/dry-run
else
    RESULTS=bench/results/$("$PYTHON" -m bench.machine --folder)
fi
mkdir -p "$RESULTS"
"$PYTHON" -m bench.machine | tee "$RESULTS/machine.json"
MARKED=$(grep -l "pytest.mark.gpu" tests/test_*.py)
PLAIN="-q -p no:cacheprovider"

part_tests() {
    has pytest hypothesis || return 77
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest $MARKED -m gpu $PLAIN
}

part_verify() {
    has grpo_core.verify || return 77
    local options=()
    [[ -n $DRY ]] && options=(--quick --recipe grpo)
    "$PYTHON" -m grpo_core.verify --json "$RESULTS/verify.json" "${options[@]}"
}

part_ceilings() {
    has triton || return 77
    "$PYTHON" -m bench.ceilings --json "$RESULTS/ceilings.json" ${DRY:+--dry-run}
}

timed() { # NAME, FILE, options of pytest: a run of some benchmarks, and its report
    local name=$1 file=$2 rc
    shift 2
    has pytest pytest_benchmark || return 77
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest "bench/$file.py" --benchmark-only --benchmark-json "$RESULTS/$name.json" $PLAIN "$@"
    rc=$?
    # a run that was interrupted has written what it had
    [[ -s $RESULTS/$name.json ]] && "$PYTHON" -m bench.report "$RESULTS/$name.json" >/dev/null
    return $rc
}

part_bench() {
    local sizes=()
    [[ -n $DRY ]] && sizes=(--rows 8 --vocabulary 3001 --vocabulary 5003)
    timed bench bench_loss -k "not compiled" "${sizes[@]}"
}

part_peers() {
    local sizes=(--rows 8192 --vocabulary 151936 --vocabulary 32000)
    # compiling takes most of a minute and shows nothing on the way
    [[ -n $DRY ]] && sizes=(--rows 8 --vocabulary 3001 -k "naive and not entropy")
    timed peers bench_loss "${sizes[@]}"
}

part_hidden() {
    local sizes=()
    [[ -n $DRY ]] && sizes=(--rows 8 --vocabulary 3001 --hidden 32 -k "ours or naive")
    timed hidden bench_hidden "${sizes[@]}"
}

part_trl() {
    has trl || return 77
    local sizes=(--dtype bfloat16 --n 16384 --V 151936 --D 4096 --device cuda)
    [[ -n $DRY ]] && sizes=(--n 64 --V 2048 --D 16 --device cpu)
    "$PYTHON" -m bench.trl_head "${sizes[@]}"
}

part_tune() {
    has triton || return 77
    "$PYTHON" -m bench.tune --json "$RESULTS/tune.json" --table "$RESULTS/launch.py" ${DRY:+--dry-run}
}

run() { # one part, in a process that can be stopped
    local part=$1 start=$SECONDS rc
    echo "== $part" >&2
    export -f has timed "part_$part"
    export PYTHON RESULTS DRY MARKED PLAIN
    # SIGINT lets pytest write what it has
    timeout --signal=INT --kill-after=15 "$LIMIT" bash -c "part_$part" 2>&1 \
        | tee "$RESULTS/$part.txt" >&2
    rc=${PIPESTATUS[0]}
    case $rc in
        0) rc="done" ;;
        77) rc="skipped: $(sed -n 's/^skipped: //p' "$RESULTS/$part.txt" | paste -sd ,)" ;;
        124 | 137) rc="stopped after $LIMIT s" ;;
        *) rc="failed ($rc)" ;;
    esac
    echo "| $part | $rc | $((SECONDS - start)) | \`$part.txt\` |"
}

{
    echo "# $("$PYTHON" -c 'import bench.machine as m; print(m.device_name())')${DRY:+, dry run}"
    echo
    date -u +"%Y-%m-%d %H:%M UTC, revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo
    "$PYTHON" -c 'import bench.machine as m
print(", ".join(f"{name} {version}" for name, version in m.versions().items() if version))'
    echo
    echo "| part | outcome | seconds | output |"
    echo "|---|---|---:|---|"
    for part in "${WANTED[@]}"; do run "$part"; done
    for part in ceilings trl tune verify tests; do
        [[ -s $RESULTS/$part.txt && " ${WANTED[*]} " == *" $part "* ]] || continue
        printf '\n## %s\n\n```\n' "$part"
        tail -n 40 "$RESULTS/$part.txt"
        printf '```\n'
    done
    for name in bench peers hidden; do
        [[ -s $RESULTS/$name/report.md && " ${WANTED[*]} " == *" $name "* ]] || continue
        printf '\n'
        sed "s/^# /## /; s/^## Figures/### Figures/; s#](#]($name/#" "$RESULTS/$name/report.md"
    done
} >"$RESULTS/summary.md"

if [[ -n ${OUT:-} ]]; then
    mkdir -p "$OUT" && cp -r "$RESULTS/." "$OUT/"
fi
grep "^|" "$RESULTS/summary.md" | head -n $((2 + ${#WANTED[@]}))
echo "results in $RESULTS${OUT:+ and $OUT}"
! grep -q "| failed\|| stopped" "$RESULTS/summary.md"
