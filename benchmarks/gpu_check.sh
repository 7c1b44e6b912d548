#!/usr/bin/env bash
# Tests and times on a GPU, as one dated result: DATE-gpu.md in benchmarks/results, and the times in DATE-gpu.csv.
#
#     benchmarks/gpu_check.sh               # on CUDA, every part, each within ten minutes
#     benchmarks/gpu_check.sh cuda costs    # the parts whose names start so
#     benchmarks/gpu_check.sh mps tests     # on an Apple GPU, for which there are tests alone
#     benchmarks/gpu_check.sh cpu           # a rehearsal with tiny models, written to build/
#
# Each part leaves its section in build/gpu_check/, and each call writes the result anew from all sections: on a machine
# that is paid by the minute, run the parts one by one. The exit code is 1 if a part failed. PYTHON is the interpreter,
# and LIMIT the seconds that a part may take.

# shellcheck disable=SC2016  # the backticks are Markdown's

set -eo pipefail
cd "$(dirname "$0")/.."

device=${1:-cuda} wanted=${2:-} python=${PYTHON:-python} limit=${LIMIT:-570}
sections=build/gpu_check/$device
result=benchmarks/results/$(date +%F)-gpu.md
rehearsal=()
case $device in
    cuda) tests=gpu ;;
    mps) tests=mps result=benchmarks/results/$(date +%F)-mps.md ;;
    cpu) tests="not gpu and not mps" result=$sections/result.md rehearsal=(--tiny --rounds 1 --threads 1) ;;
    *) echo "error: $device: give cuda, mps or cpu" >&2 && exit 2 ;;
esac
failed=0 ran=0

limited() {
    if command -v timeout >/dev/null; then timeout "$limit" "$@"; else "$@"; fi
}

# part NAME COMMAND...: runs it, unless another part is wanted, and writes its section.
part() {
    local name=$1 outcome="done" status=0
    shift
    [[ $name == "$wanted"* ]] || return 0
    ran=1
    echo "$name: $*"
    limited "$@" >"$sections/$name.log" 2>&1 || status=$?
    case $status in
        0) ;;
        124) failed=1 outcome="**stopped after $limit s**" ;;
        *) failed=1 outcome="**failed**" ;;
    esac
    {
        printf '## %s: %s\n\n`%s` at commit %s\n\n' "$name" "$outcome" "$*" "$(commit)"
        if [[ $name == costs-* && -f $sections/$name.table ]]; then
            sed -n '/^## /,$p' "$sections/$name.table" | sed 's/^## /### /'
        else
            printf '```\n%s\n```\n' "$(tail -n 15 "$sections/$name.log")"
        fi
    } >"$sections/$name.md"
    tail -n 1 "$sections/$name.log"
}

commit() {
    local hash
    hash=$(git rev-parse --short HEAD 2>/dev/null) || hash=unknown
    if [[ -n $(git status --porcelain --untracked-files=no 2>/dev/null) ]]; then hash+=" with local changes"; fi
    echo "$hash"
}

costs() {
    local table=$sections/costs-$1.table peers=()
    [[ costs-$1 == "$wanted"* ]] || return 0
    rm -f "$table" "${table%.table}.csv"
    if [[ -d outputs/peers ]]; then peers=(--peers outputs/peers); fi
    part "costs-$1" "$python" benchmarks/costs.py --device "$device" --only "$1" "${peers[@]}" "${rehearsal[@]}" \
        --output "$table"
}

mkdir -p "$sections" "$(dirname "$result")"
for file in parity training costs; do
    part "tests-$file" "$python" -m pytest -n 0 -q -m "$tests" -p no:cacheprovider "tests/gpu/test_device_$file.py"
done
if [[ $device != mps ]]; then
    for group in step bookkeeping optimizers ire admire curvature augmentation; do
        costs "$group"
    done
fi
if [[ $ran == 0 ]]; then
    echo "error: $wanted: no part has a name that starts so" >&2
    exit 2
fi

{
    printf '# Tests and times on %s (%s)\n\n' "$device" "$(date +%F)"
    printf 'Command: `benchmarks/gpu_check.sh %s`. Each section names the commit that it ran at.\n\n' "$device"
    "$python" -m hf_gr.cli.command env | sed 's/^/- /'
    for section in "$sections"/tests-*.md "$sections"/costs-*.md; do
        if [[ -f $section ]]; then echo && cat "$section"; fi
    done
} >"$sections/result"
mv "$sections/result" "$result"
if compgen -G "$sections/costs-*.csv" >/dev/null; then  # as one table, of which the docs show the newest
    awk 'FNR > 1 || NR == 1' "$sections"/costs-*.csv >"${result%.md}.csv"
fi
echo "Written to $result"
exit "$failed"
