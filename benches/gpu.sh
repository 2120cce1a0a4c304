#!/usr/bin/env bash
# Everything that has to be seen on a card, in one folder that can be carried to it.
#
#   bash benches/gpu.sh pack DIR     here: builds and packs the tests, quantc and this script (needs cargo)
#   bash DIR/gpu.sh [8b|1b|70b]      there: correctness, then each operation beside its floor, then whole runs (needs the driver,
#                                    NVRTC and cuBLAS; nothing else); WORK is the folder for models, SANITIZE=1 adds compute-sanitizer
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

if [ "${1:-}" = pack ]; then
    cd "$here/.."
    out="$2"
    mkdir -p "$out"
    cargo build --release
    # The paths of what cargo built, as it names them itself; it may build quantc along the way.
    find_built() {
        local name="$1"
        shift
        cargo "$@" --message-format=json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | grep "/$name-[0-9a-f]*$" | tail -n 1
    }
    cp "$(find_built kernels test --release -p quantc-kernels --lib --no-run)" "$out/kernel-tests"
    cp "$(find_built gpu bench --bench gpu --no-run)" "$out/gpu-bench"
    cp target/release/quantc "$out/quantc"
    cp "$here/gpu.sh" "$out/gpu.sh"
    strip "$out/kernel-tests" "$out/gpu-bench" "$out/quantc" 2>/dev/null || true
    du -sh "$out"
    exit 0
fi

shape="${1:-8b}"
work="${WORK:-$(mktemp -d)}"
step() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

step "devices"
date -u +%F
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
"$here/quantc" devices

step "kernels against plain loops, on the card"
export QUANTC_TEST_CARD=1
"$here/kernel-tests" cuda --test-threads 4

if [ -n "${SANITIZE:-}" ]; then
    step "memcheck"
    compute-sanitizer --tool memcheck --error-exitcode 1 "$here/kernel-tests" cuda::tests --test-threads 1
    step "racecheck"
    compute-sanitizer --tool racecheck --error-exitcode 1 "$here/kernel-tests" cuda::tests --test-threads 1
fi

step "the built-in model"
"$here/quantc" demo --device cuda

step "each operation"
"$here/gpu-bench"

step "a model of the shape $shape"
[ -e "$work/model-$shape/config.json" ] || "$here/gpu-bench" --synthesize "$work/model-$shape" "$shape"
run() {
    name="$1"
    shift
    printf '\n-- %s\n' "$name"
    # Once for the cache of files and kernels, then the figure.
    "$here/quantc" quantize "$work/model-$shape" -o "$work/out-$name" --force --device cuda --verify-text none "$@"
}
run w4a16-gptq --samples 128 --seq-len 2048
run w4a16-rtn --method rtn
run w4a16-awq --format awq --method awq --samples 128 --seq-len 512
run w4a16-gptq-8gib --samples 128 --seq-len 2048 --gpu-memory 8GiB
"$here/quantc" quantize "$work/model-$shape" -o "$work/out.gguf" --force --device cuda --verify-text none --scheme Q4_K_M --method rtn
step "done"
