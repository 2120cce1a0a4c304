#!/usr/bin/env bash
# Everything that has to be seen on a card, in one file that can be carried to it.
#
#   bash benches/gpu.sh pack [DIR]   here: builds and packs the tests, the table, quantc and this script into DIR/pack.tgz (needs cargo)
#   bash gpu.sh [8b|1b|70b]          there, beside pack.tgz or what is in it: correctness, then each operation beside its floor, then whole
#                                    runs. Needs the driver, NVRTC and cuBLAS, and nothing else.
#
# No step that fails or hangs ends the others: each has its own limit, and what failed is said at the end, with exit code 1.
# WORK is the folder for models, OUT that for what each step says, LIMIT seconds for every step in place of its own;
# SANITIZE=1 adds compute-sanitizer.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# Bytes that the packed file may have.
largest=$((60 << 20))

if [ "${1:-}" = pack ]; then
    set -e
    cd "$here/.."
    out="${2:-target/gpu}"
    mkdir -p "$out"
    room="$(mktemp -d)"
    trap 'rm -rf "$room"' EXIT
    cargo build --release
    # The paths of what cargo built, as it names them itself; it may build quantc along the way.
    find_built() {
        local name="$1"
        shift
        cargo "$@" --message-format=json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | grep "/$name-[0-9a-f]*$" | tail -n 1
    }
    cp "$(find_built kernels test --release -p quantc-kernels --lib --no-run)" "$room/kernel-tests"
    cp "$(find_built gpu bench --bench gpu --no-run)" "$room/gpu-bench"
    cp "${CARGO_TARGET_DIR:-target}/release/quantc" "$room/quantc"
    cp "$here/gpu.sh" "$room/gpu.sh"
    strip "$room/kernel-tests" "$room/gpu-bench" "$room/quantc"
    tar czf "$out/pack.tgz" -C "$room" quantc kernel-tests gpu-bench gpu.sh
    cp "$here/gpu.sh" "$out/gpu.sh"
    bytes="$(wc -c <"$out/pack.tgz")"
    echo "$out/pack.tgz: $bytes bytes"
    if [ "$bytes" -gt "$largest" ]; then
        echo "more than the $largest bytes that may be carried to a machine with a card" >&2
        exit 1
    fi
    exit 0
fi

shape="${1:-8b}"
work="${WORK:-$(mktemp -d)}"
out="${OUT:-$work/logs}"
mkdir -p "$work" "$out"
[ -x "$here/quantc" ] || tar xzf "$here/pack.tgz" -C "$here" || exit 1
export QUANTC_TEST_CARD=1
failed=()

# step LIMIT NAME COMMAND…: runs a command for so many seconds at most, and shows the end of what it says.
step() {
    local limit="${LIMIT:-$1}" name="$2" log code
    shift 2
    log="$out/$(printf '%s' "$name" | tr -c 'a-zA-Z0-9\n' '-').txt"
    printf '\n== %s (%s s)\n' "$name" "$SECONDS"
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1
    code=$?
    tail -n "${LINES_SHOWN:-60}" "$log"
    [ "$code" = 0 ] && return 0
    [ "$code" = 124 ] && echo "stopped after $limit s"
    failed+=("$name: exit code $code, $log")
    return "$code"
}
# quantize LIMIT NAME ARGUMENTS…: a whole run.
quantize() {
    local limit="$1" name="$2"
    shift 2
    step "$limit" "$name" "$here/quantc" quantize "$work/model-$shape" --force --device cuda --verify-text none "$@"
}

date -u +%F
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
step 60 "devices" "$here/quantc" devices
step 180 "the built-in model" "$here/quantc" demo --device cuda
step 600 "kernels against plain loops" "$here/kernel-tests" cuda --skip compiled --test-threads 4
if [ -n "${SANITIZE:-}" ]; then
    for tool in memcheck racecheck; do
        step 1800 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$here/kernel-tests" cuda::tests --skip compiled --test-threads 1
    done
fi
step 300 "each operation" "$here/gpu-bench"
[ -e "$work/model-$shape/config.json" ] || step 900 "a model of the shape $shape" "$here/gpu-bench" --synthesize "$work/model-$shape" "$shape"
gptq=(--samples 128 --seq-len 2048)
# Once for the caches of files and kernels, then the figure.
quantize 900 "w4a16 gptq, warming up" -o "$work/out-w4a16-gptq" "${gptq[@]}"
quantize 600 "w4a16 gptq" -o "$work/out-w4a16-gptq" "${gptq[@]}" --report "$out/w4a16-gptq.json"
quantize 600 "w4a16 gptq, profile" -o "$work/out-w4a16-gptq" "${gptq[@]}" --profile
quantize 600 "w4a16 rtn" -o "$work/out-w4a16-rtn" --method rtn
quantize 900 "w4a16 awq" -o "$work/out-w4a16-awq" --format awq --method awq --samples 128 --seq-len 512
quantize 900 "w4a16 gptq in 8 GiB" -o "$work/out-w4a16-gptq-8gib" "${gptq[@]}" --gpu-memory 8GiB
# Little memory is slower, and gives the same bytes.
step 120 "the same bytes in 8 GiB" bash -c 'for file in "$1"/*.safetensors; do cmp "$file" "$2/${file##*/}" || exit 1; done' - \
    "$work/out-w4a16-gptq" "$work/out-w4a16-gptq-8gib"
quantize 600 "Q4_K_M rtn" -o "$work/out.gguf" --scheme Q4_K_M --method rtn

printf '\n== done (%s s)\n' "$SECONDS"
if [ "${#failed[@]}" != 0 ]; then
    echo "failed:"
    printf '  %s\n' "${failed[@]}"
    exit 1
fi
