#!/usr/bin/env bash
# Everything that only a GPU can show, in 25 minutes: bash bench/gpu.sh [--dry-run] PART...
#
# PART is a name below, all, or first, second, third: thirds of at most nine minutes, for machines
# that run no command longer. A part has its seconds and what earlier ones have left over; it writes
# as it goes, and where it fails or is stopped the next one begins. Nothing is installed or fetched:
# a part whose packages are missing is skipped, and wheels in the folder .whl are used from there.
# Results: bench/results/<device>/; where $OUT is set also $OUT/summary.md and $OUT/results.tar.gz.
# --dry-run walks the same way on a CPU, tiny and interpreted; its figures mean nothing.
#
PLAN='tests     first   100  compiled kernels against the float64 reference
verify    first   130  every kernel, recipe and dtype: python -m grpo_core.verify
sanitize  first   110  memory accesses and races of small rows (compute-sanitizer)
ceilings  first    30  bandwidth of copying, reading, writing
head      first   140  8,192 x 151,936 (x 4,096): ours, naive, Liger, TRL, a copy, bare products
hidden    second  190  from hidden states, every head: ours, naive, Liger, TRL, products
bench     second  150  time, memory, bytes of ours and naive, every vocabulary
peers     second  120  the same with torch.compile, two vocabularies
trl       second   40  memory of a step of TRL, with and without our code
tune      third   330  ways to read a row again; a sweep of the layouts, which writes a launch.py
profile   third   130  counters of the row kernels (ncu), to explain a shortfall
compare   third    20  all of it beside the predictions of bench.predict'
set -uo pipefail
cd "$(dirname "$0")/.."

DRY=
WANTED=()
for argument in "$@"; do
    mapfile -t found < <(awk -v a="$argument" '$1 == a || $2 == a || a == "all" { print $1 }' <<<"$PLAN")
    if [[ $argument == --dry-run ]]; then
        DRY=1
    elif [[ ${#found[@]} -eq 0 ]]; then
        echo "unknown part '$argument': expected --dry-run, all, or of the plan" >&2
        WANTED=() && break
    fi
    WANTED+=("${found[@]}")
done
[[ ${#WANTED[@]} -gt 0 ]] || { sed -n '2,10p' "$0" | cut -c3- && echo "$PLAN" && exit 2; }

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

seconds() { # the clock; $CLOCK is a command that stands in for it
    ${CLOCK:-date +%s}
}

has() { # whether modules are installed; says which are not
    "$PYTHON" - "$@" <<'END'
import sys
from importlib.util import find_spec
missing = [name for name in sys.argv[1:] if find_spec(name) is None]
print("\n".join(f"skipped: {name}" for name in missing), end="\n" * bool(missing))
sys.exit(bool(missing))
END
}

tool() { # sets TOOL to a program of CUDA's, on the path or beside nvcc; to nothing in a dry run
    TOOL=(env)
    [[ -n $DRY ]] && return
    TOOL=("$({ command -v "$1" || compgen -G "/usr/local/cuda/bin/$1" \
        || compgen -G "/opt/nvidia/nsight-compute/*/$1"; } | head -n 1)")
    [[ -n ${TOOL[0]} ]] || { echo "skipped: $1" && return 1; }
}

has torch || exit 1
MACHINE=$("$PYTHON" -m bench.machine) || exit 1
about() { sed -n "s/^ \"$1\": \"\([^\"]*\)\",$/\1/p" <<<"$MACHINE"; }
if [[ -n $DRY ]]; then
    RESULTS=$(mktemp -d)/dry-run
elif [[ $MACHINE == *'"gpu": true'* ]]; then
    RESULTS=bench/results/$(about folder)
else
    echo "no GPU that torch can see; --dry-run walks the same way without one" >&2
    exit 1
fi
mkdir -p "$RESULTS"
tee "$RESULTS/machine.json" <<<"$MACHINE"
PLAIN="-q -p no:cacheprovider"

part_tests() {
    has pytest hypothesis || return 77
    local files
    mapfile -t files < <(grep -l "pytest.mark.gpu" tests/test_*.py)
    if [[ -n $DRY ]]; then
        files+=(-m gpu)
    else
        files+=(tests/test_{row_kernels,second_reading,sequence_loss,strides}.py -m "gpu or not slow")
        has xdist >/dev/null && files+=(-n 8 --dist loadgroup)
    fi
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest "${files[@]}" $PLAIN
}

part_verify() { # compiling takes most of the time, so the dtypes go side by side
    local options=() dtypes=(float32 bfloat16 float16) jobs=() dtype status=0
    [[ -n $DRY ]] && options=(--quick --recipe grpo) dtypes=(bfloat16)
    for dtype in "${dtypes[@]}"; do
        "$PYTHON" -m grpo_core.verify --dtype "$dtype" --json "$RESULTS/verify-$dtype.json" \
            "${options[@]}" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    return $status
}

part_sanitize() {
    local check status=0
    tool compute-sanitizer || return 77
    for check in memcheck racecheck; do
        echo "-- $check"
        # every tensor an allocation of its own, so that an access beyond its end is seen
        [[ -z $DRY ]] \
            && TOOL=("${TOOL[0]}" --tool "$check" --error-exitcode 9 --report-api-errors no)
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${TOOL[@]}" "$PYTHON" -m grpo_core.verify --quick \
            --recipe grpo gspo --dtype bfloat16 --vocabulary 5003 || status=1
    done
    return $status
}

part_ceilings() {
    has triton || return 77
    "$PYTHON" -m bench.ceilings --json "$RESULTS/ceilings.json" ${DRY:+--dry-run}
}

timed() { # NAME, which cases, sizes: a run of some benchmarks, which ends in its table
    local name=$1 cases=$2 sizes=("${@:3}")
    [[ -n $DRY ]] && sizes=(--rows 8 --vocabulary 3001 --hidden 32) cases="($cases) and ours and not trl"
    has pytest pytest_benchmark || return 77
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest bench/ --benchmark-only --long --benchmark-json "$RESULTS/$name.json" \
        $PLAIN -k "$cases" "${sizes[@]}"
}

part_head() {
    timed head "(from_logits and not compiled and not phases) or (from_hidden and trained)" \
        --rows 8192 --vocabulary 151936 --hidden 4096
}

part_hidden() { timed hidden from_hidden; }

part_bench() { timed bench "from_logits and not compiled"; }

part_peers() { timed peers from_logits --rows 8192 --vocabulary 151936 --vocabulary 32000; }

part_trl() {
    has trl || return 77
    local sizes=(--dtype bfloat16 --n 16384 --V 151936 --D 4096 --device cuda)
    [[ -n $DRY ]] && sizes=(--n 64 --V 2048 --D 16 --device cpu)
    "$PYTHON" -m bench.trl_head "${sizes[@]}"
}

part_tune() {
    has triton || return 77
    "$PYTHON" -m bench.tune --json "$RESULTS/tune.json" --table "$RESULTS/launch.py" \
        --minutes "$(((LIMIT - 40) / 60))" ${DRY:+--dry-run}
}

STEPS='import sys, torch
from bench.batch import CASES, Batch
from bench.contenders import contenders
from bench.machine import DEVICE
batch = Batch.draw(int(sys.argv[1]), int(sys.argv[2]), torch.bfloat16, DEVICE)
for case in CASES:
    for contender in contenders(DEVICE, case):
        if contender.name.startswith("ours"):
            batch.restore()
            contender.call(batch, case)()
            print(case.name, contender.name)'

part_profile() {
    local sizes=(4224 151936) section
    tool ncu || return 77
    [[ -n $DRY ]] && sizes=(4 300)
    if [[ -z $DRY ]]; then
        TOOL+=(--clock-control none --kernel-name "regex:^_row_" --launch-count 12 --force-overwrite
            --export "$RESULTS/profile")
        for section in SpeedOfLight MemoryWorkloadAnalysis MemoryWorkloadAnalysis_Tables Occupancy \
            SchedulerStats WarpStateStats LaunchStats; do TOOL+=(--section "$section"); done
    fi
    "${TOOL[@]}" "$PYTHON" -c "$STEPS" "${sizes[@]}" || return
    [[ -n $DRY ]] || "${TOOL[0]}" --import "$RESULTS/profile.ncu-rep" --page details
}

part_compare() { "$PYTHON" -m bench.predict --found "$RESULTS"; }

LATER=0
for part in "${WANTED[@]}"; do
    LATER=$((LATER + $(awk -v p="$part" '$1 == p { print $3 }' <<<"$PLAN")))
done
END=$(($(seconds) + LATER))
export DRY PYTHON RESULTS PLAIN STEPS
export -f has tool timed

run() { # one part, in a process that can be stopped
    local part=$1 start rc
    start=$(seconds)
    LATER=$((LATER - $(awk -v p="$part" '$1 == p { print $3 }' <<<"$PLAN")))
    export LIMIT=$((END - start - LATER))
    ((LIMIT > 5)) || LIMIT=5
    echo "== $part, at most $LIMIT s" >&2
    export -f "part_$part"
    # SIGINT lets pytest write what it has measured
    timeout --signal=INT --kill-after=10 "$LIMIT" bash -c "part_$part" 2>&1 \
        | tee "$RESULTS/$part.txt" >&2
    rc=${PIPESTATUS[0]}
    case $rc in
        0) rc="done" ;;
        77) rc="skipped: $(sed -n 's/^skipped: //p' "$RESULTS/$part.txt" | paste -sd ,)" ;;
        124 | 137) rc="stopped after $LIMIT s" ;;
        *) rc="failed ($rc)" ;;
    esac
    OUTCOMES+=("| $part | $rc | $(($(seconds) - start)) | \`$part.txt\` |")
}

summary() { # of the parts so far
    local part
    printf '# %s\n\n' "$(about device)${DRY:+, dry run}"
    date -u +"%Y-%m-%d %H:%M UTC, revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    printf '\n%s\n\n| part | outcome | seconds | output |\n|---|---|---:|---|\n' "$(about summary)"
    printf '%s\n' "${OUTCOMES[@]}"
    for part in compare head ceilings hidden bench peers trl tune verify sanitize tests; do
        [[ -s $RESULTS/$part.txt && ${OUTCOMES[*]} == *"| $part |"* ]] || continue
        printf '\n## %s\n\n```\n' "$part"
        if grep -q "^contender " "$RESULTS/$part.txt"; then
            sed -n '/^contender /,$p' "$RESULTS/$part.txt"
        else
            tail -n 40 "$RESULTS/$part.txt"
        fi
        printf '```\n'
    done
}

OUTCOMES=()
for part in "${WANTED[@]}"; do
    run "$part"
    summary >"$RESULTS/summary.md"
    if [[ -n ${OUT:-} ]]; then
        mkdir -p "$OUT" && cp "$RESULTS/summary.md" "$OUT/" && tar -czf "$OUT/results.tar.gz" -C "$RESULTS" .
    fi
done
[[ ${OUTCOMES[*]} == *"| compare |"* ]] && grep "^|" "$RESULTS/compare.txt"
printf '%s\n' "${OUTCOMES[@]}"
echo "results in $RESULTS${OUT:+ and $OUT}"
! grep -q "| failed\|| stopped" "$RESULTS/summary.md"
