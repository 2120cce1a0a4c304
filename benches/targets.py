#!/usr/bin/env python3
"""What several outputs from one calibration cost beside a run for each: processor seconds, wall time, peak memory, KL.

    cargo build --release
    python3 benches/targets.py --model MODEL

Prints a markdown table. Processor seconds (user and system) hang less on what else the machine does than wall time.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGETS = ("compressed-tensors:W4A16:g64", "gguf:Q4_K_M", "awq:W4A16_ASYM:g64")


def measured(command):
    """Wall seconds, processor seconds and the peak of resident memory in MB of a command and what it starts."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def report(path):
    return json.loads((path / "report.json" if path.is_dir() else path.with_name(path.name + ".report.json")).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target/release/quantc")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--verify-windows", default="4", help="0 to measure nothing")
    args = parser.parse_args()
    room = pathlib.Path(tempfile.mkdtemp())
    common = ["--samples", args.samples, "--seq-len", args.seq_len, "--quiet"]
    common += ["--verify-text", "none"] if args.verify_windows == "0" else ["--verify-windows", args.verify_windows]
    place = lambda run, index: room / (f"{run}-{index}" + (".gguf" if TARGETS[index].startswith("gguf") else ""))
    rows, base = [], [args.quantc, "quantize", args.model]
    alone = [measured([*base, "--target", f"{what}={place('alone', i)}", *common]) for i, what in enumerate(TARGETS)]
    rows += [(what, *numbers, [i], "alone") for i, (what, numbers) in enumerate(zip(TARGETS, alone))]
    seconds, processor, memory = zip(*alone)
    rows.append(("the three, one after the other", sum(seconds), sum(processor), max(memory), [], "alone"))
    for name, flags in (("all three from one calibration", []), ("all three with --independent", ["--independent"])):
        run = "each" if flags else "one"
        words = [word for i, what in enumerate(TARGETS) for word in ("--target", f"{what}={place(run, i)}")]
        rows.append((name, *measured([*base, *words, *flags, *common]), [0, 1, 2], run))
    print("| | processor, s | wall, s | peak memory, MB | KL, mean |")
    print("|---|---|---|---|---|")
    for name, wall, processor, memory, outputs, run in rows:
        of = lambda index: (report(place(run, index)).get("quality") or {}).get("kld_mean")
        kld = " / ".join(f"{of(i):.4f}" for i in outputs if of(i) is not None)
        print(f"| {name} | {processor:.1f} | {wall:.1f} | {memory:.0f} | {kld or '–'} |")
    shutil.rmtree(room)


if __name__ == "__main__":
    main()
