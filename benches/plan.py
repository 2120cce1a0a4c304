#!/usr/bin/env python3
"""Says how near the time that `quantc plan` names is to the time that a run then takes.

    python3 benches/plan.py --quantc target/release/quantc --model MODEL        six runs of one model; nothing else should run beside
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

RUNS = {
    "W4A16, GPTQ": "--group-size 64 --samples 16 --seq-len 512 --verify-windows 1",
    "W4A16, AWQ": "--method awq --group-size 64 --samples 8 --seq-len 512 --verify-text none",
    "W4A16, RTN": "--method rtn --group-size 64 --verify-windows 1",
    "Q4_K_M, GPTQ": "--format gguf --scheme Q4_K_M --samples 16 --seq-len 512 --verify-windows 1",
    "Q4_K_M, RTN": "--format gguf --scheme Q4_K_M --method rtn --verify-windows 1",
    "MLX, 8 bits, RTN": "--format mlx --bits 8 --group-size 64 --method rtn --verify-windows 1",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantc", required=True)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    print("| run | planned, s | taken, s | ratio |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as room:
        for name, flags in RUNS.items():
            words = flags.split()
            planned = subprocess.run([args.quantc, "plan", args.model, *words, "--json"], check=True, capture_output=True)
            planned = json.loads(planned.stdout)["seconds"]["total"]
            out = pathlib.Path(room) / ("out.gguf" if "gguf" in words else "out")
            subprocess.run([args.quantc, "quantize", args.model, "-o", out, *words, "--force"], check=True, capture_output=True)
            report = out / "report.json" if out.is_dir() else out.with_name(out.name + ".report.json")
            taken = json.loads(report.read_text())["seconds"]["total"]
            print(f"| {name} | {planned:.1f} | {taken:.1f} | {planned / taken:.2f} |", flush=True)


if __name__ == "__main__":
    main()
