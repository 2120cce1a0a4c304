#!/usr/bin/env python3
"""Quantizes a model with every method at 4 and 3 bits and prints a markdown table of what each costs in quality.

    cargo build --release
    python3 benches/quality.py --model MODEL --text wiki.test.raw

Every row is measured on the files written, with `quantc eval --reference MODEL`, on the same windows of the text.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--quantc", default=str(ROOT / "target" / "release" / "quantc"))
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--methods", default="rtn,awq,gptq")
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--context", default="2048")
    parser.add_argument("--windows", default="6")
    parser.add_argument("--out", type=pathlib.Path, help="keep the artifacts here, and use again what is there")
    args = parser.parse_args()
    room = args.out or pathlib.Path(tempfile.mkdtemp())
    print("| | bpw | perplexity | ratio to the original | KL, mean | KL, 99 % | top-1 |")
    print("|---|---|---|---|---|---|---|")
    first = True
    for bits in args.bits.split(","):
        for method in args.methods.split(","):
            out = room / f"{method}-{bits}"
            if not (out / "report.json").exists():
                command = [args.quantc, "quantize", args.model, "-o", out, "--bits", bits, "--method", method]
                command += ["--group-size", args.group_size, "--samples", args.samples, "--seq-len", args.seq_len]
                subprocess.run([*command, "--verify-text", "none", "--quiet"], check=True)
            measured = room / f"{method}-{bits}.json"
            if not measured.exists() or not measured.stat().st_size:
                command = [args.quantc, "eval", out, "--reference", args.model, "--text", args.text, "--json", "--quiet"]
                command += ["--context", args.context, "--windows", args.windows]
                measured.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            report, q = json.loads((out / "report.json").read_text()), json.loads(measured.read_text())
            if first:
                first = False
                original = report["bpw"]["original_file"]
                print(f"| original | {original:.2f} | {q['reference_perplexity']:.3f} | 1 | 0 | 0 | 100 % |")
            print(
                f"| {method.upper()}, {bits} bits | {report['bpw']['quantized']:.2f} | {q['perplexity']:.3f} "
                f"| {q['perplexity_ratio']:.4f} ± {q['perplexity_ratio_stderr']:.4f} "
                f"| {q['kld_mean']:.4f} ± {q['kld_stderr']:.4f} | {q['kld_p99']:.2f} "
                f"| {100 * q['top1_agreement']:.1f} % |",
                flush=True,
            )
    print(f"\n{q['tokens']} tokens, context {q['context']}; {args.samples} × {args.seq_len} calibration tokens.")


if __name__ == "__main__":
    main()
