#!/usr/bin/env bash
# Everything that only a GPU can show: bash bench/gpu.sh [--dry-run] PART...
#
#   tests     compiled kernels against the float64 reference           needs pytest, hypothesis
#   verify    every kernel, recipe and dtype: python -m grpo_core.verify
#   ceilings  bandwidth of copying, reading, writing                   needs triton
#   bench     time, memory, bytes of ours and naive, every vocabulary  needs pytest-benchmark
#   peers     the same with torch.compile, two vocabularies            needs pytest-benchmark
#   hidden    from hidden states: ours, naive, Liger, TRL, products   needs pytest-benchmark
#   trl       memory of a step of TRL, with and without our code        needs trl
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

has() { # whether modules are installed; says which are not
    "$PYTHON" - "$@" <<'END'
import sys
from importlib.util import find_spec
missing = [name for name in sys.argv[1:] if find_spec(name) is None]
print("\n".join(f"skipped: {name}" for name in missing), end="\n" * bool(missing))
sys.exit(bool(missing))
END
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
MARKED=$(grep -l "pytest.mark.gpu" tests/test_*.py)
PLAIN="-q -p no:cacheprovider"

part_tests() {
    has pytest hypothesis || return 77
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest $MARKED -m gpu $PLAIN
}

part_verify() {
    local options=()
    [[ -n $DRY ]] && options=(--quick --recipe grpo)
    "$PYTHON" -m grpo_core.verify --json "$RESULTS/verify.json" "${options[@]}"
}

part_ceilings() {
    has triton || return 77
    "$PYTHON" -m bench.ceilings --json "$RESULTS/ceilings.json" ${DRY:+--dry-run}
}

timed() { # NAME, options of pytest: a run of some benchmarks, which ends in its table
    local name=$1
    shift
    has pytest pytest_benchmark || return 77
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest bench/ --benchmark-only --long --benchmark-json "$RESULTS/$name.json" $PLAIN "$@"
}

part_bench() {
    local sizes=(-k "from_logits and not compiled")
    [[ -n $DRY ]] && sizes=(-k "from_logits and inplace" --rows 8 --vocabulary 3001)
    timed bench "${sizes[@]}"
}

part_peers() {
    local sizes=(-k from_logits --rows 8192 --vocabulary 151936 --vocabulary 32000)
    [[ -n $DRY ]] && sizes=(-k "from_logits and phases and naive" --rows 8 --vocabulary 3001)
    timed peers "${sizes[@]}"
}

part_hidden() {
    local sizes=(-k from_hidden)
    [[ -n $DRY ]] && sizes=(-k "from_hidden and ours" --rows 8 --vocabulary 3001 --hidden 32)
    timed hidden "${sizes[@]}"
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
    # SIGINT lets pytest write what it has measured
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
    echo "# $(about device)${DRY:+, dry run}"
    echo
    date -u +"%Y-%m-%d %H:%M UTC, revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo
    about summary
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
        [[ " ${WANTED[*]} " == *" $name "* ]] || continue
        printf '\n## %s\n\n```\n' "$name"
        sed -n '/^contender /,$p' "$RESULTS/$name.txt"
        printf '```\n'
    done
} >"$RESULTS/summary.md"

if [[ -n ${OUT:-} ]]; then
    mkdir -p "$OUT" && cp -r "$RESULTS/." "$OUT/"
fi
grep "^|" "$RESULTS/summary.md" | head -n $((2 + ${#WANTED[@]}))
echo "results in $RESULTS${OUT:+ and $OUT}"
! grep -q "| failed\|| stopped" "$RESULTS/summary.md"
