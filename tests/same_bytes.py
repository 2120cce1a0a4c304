#!/usr/bin/env python3
"""Do two builds of quantc write the same weights? For a change that is meant to alter nothing.

Build once before the change and keep the binary, build again after it, and run

    python3 tests/same_bytes.py --old OLD/quantc --new target/release/quantc                  minutes on two cores
    python3 tests/same_bytes.py --old OLD/quantc --new NEW/quantc --filter 'gptq .*desc'      rows whose name matches
    python3 tests/same_bytes.py --old OLD/quantc --new NEW/quantc --all                       every row on every tiny checkpoint
    python3 tests/same_bytes.py --old OLD/quantc --new NEW/quantc --keep FILE                 what the old one wrote is kept there
    python3 tests/same_bytes.py --old OLD/quantc --new NEW/quantc --allow 'gguf IQ4_XS'       rows that may differ

Nothing but the Python that comes with the system is needed; any profile of the two builds does, the same for both.

Each row runs one command of both binaries on one model: the built-in one, and tiny checkpoints of tests/fixtures/families (a handful
of unlike ones without --all). Rows are every format, method and observer in a few schemes, and with the built-in model what else leads
to weight files: recipes, `--ignore`, importance files, GGUF and quantized checkpoints as inputs, `convert`.
Without --all, only the first schemes of a format go through every method and observer, the others through the usual ones.
Models are calibrated on 4 sequences of their own or of the built-in model's text and not measured.

The SHA-256 of every weight file (.safetensors, .gguf, and importance files) has to be equal under equal names. A row that both refuse
with the same exit code is equal; that their messages differ is a note, and so is any other file that differs, but for report.json,
which holds times, and README.md. `--allow REGEX` turns a difference in the rows it matches into a note, once for each --allow, and says
when it matched none that differ. `--new-args 'ARGS'` appends arguments to the new binary's commands, to see a difference found.

`--keep FILE` holds the old binary's hashes by the hashes of the binary and of this script, so that the next comparison with it takes half as long.

Names are `MODEL: FORMAT SCHEME METHOD/OBSERVER [flags]`. Exit code 0: all the same; 1: some row differs, each printed with its
command; 2: could not start.
"""

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAMILIES = ROOT / "tests/fixtures/families"
TEXT = ROOT / "src/demo/calibration.txt"
DEMO = "demo"
# Dense, tied head, biases in fused linears, transposed weights (Conv1D), experts one by one, experts in stacks, MXFP4 experts,
# latent attention, an image part that is not run.
DEFAULT = (
    "qwen2_plain", "qwen2_tied", "phi3_plain", "gpt2_plain", "mixtral_plain", "granitemoe_plain", "gpt_oss_mxfp4",
    "deepseek_v3_plain", "gemma3_vision",
)
METHODS = ("rtn", "awq", "gptq", "awq+gptq")
OBSERVERS = ("minmax", "mse", "imatrix", "clip")
SCHEMES = {
    "compressed-tensors": ("W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16_ASYM", "W4A16 --group-size -1"),
    "gptq": ("W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16", "W4A16 --desc-act", "W4A16_ASYM --act-order false"),
    "awq": ("W4A16_ASYM", "W4A16"),
    "mlx": ("W4A16", "W8A16 --group-size 32"),
    "gguf": (
        "Q4_K_M", "Q8_0", "Q2_K", "Q3_K_L", "Q5_K_S", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q5_1", "F16", "BF16", "TQ1_0", "TQ2_0",
        "MXFP4_MOE",
    ),
}
# What the schemes after the first go through, the first one through every method and observer.
USUAL = (("rtn", "mse"), ("awq", "clip"), ("gptq", "imatrix"))
WEIGHTS = (".safetensors", ".gguf", ".imatrix", ".dat")
RECIPE = """\
format = "compressed-tensors"
scheme = "W4A16"
group_size = 64
[[override]]
match = "re:.*down_proj"
bits = 8
[[override]]
match = "re:.*layers\\\\.0\\\\..*q_proj"
group_size = 32
symmetric = false
[[override]]
match = "layers.2.mlp.up_proj"
ignore = true
"""


def seed_of(name):
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def tensor_bytes(name, shape, dtype, center, amplitude):
    """A tensor's bytes by the rule that tests/fixtures/make_families.py states."""
    mask, seed, twice = 2**64 - 1, seed_of(name), 2.0 * amplitude
    reals = []
    for i in range(1, math.prod(shape) + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        reals.append((((z ^ (z >> 31)) >> 40) / 2.0**24 - 0.5) * twice + center)
    if dtype == "U8":
        return bytes(math.floor(x) for x in reals)
    bits = struct.unpack(f"<{len(reals)}I", struct.pack(f"<{len(reals)}f", *reals))
    upper = [(b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits]
    if dtype == "BF16":
        return struct.pack(f"<{len(upper)}H", *upper)
    if dtype == "F32":
        return struct.pack(f"<{len(upper)}I", *(u << 16 for u in upper))
    raise SystemExit(f"{name}: no values of type {dtype} are made")


def write_family(name, folder):
    """The tiny checkpoint `name` with a tokenizer of bytes, and a text."""
    folder.mkdir()
    shutil.copy(FAMILIES / name / "config.json", folder)
    header, data, digest = {}, [], hashlib.sha256()
    at = 0
    for tensor in json.loads((FAMILIES / name / "tensors.json").read_text()):
        found = tensor_bytes(*tensor)
        digest.update(found)
        header[tensor[0]] = {"dtype": tensor[2], "shape": tensor[1], "data_offsets": [at, at + len(found)]}
        data.append(found)
        at += len(found)
    recorded = json.loads((FAMILIES / "sha256.json").read_text())[name]
    if digest.hexdigest() != recorded:
        raise SystemExit(f"{name}: the weights made are not those of families/sha256.json")
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"".join(data))
    config = json.loads((folder / "config.json").read_text())
    size = config.get("text_config", config)["vocab_size"]
    # A token for each of the first bytes, in GPT-2's alphabet: GGUF knows no tokenizer of words.
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x1000)][:size]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": bytes_of, "post_processor": None, "decoder": bytes_of,
        "model": {"type": "BPE", "vocab": {chr(letter): id for id, letter in enumerate(letters)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    state, text = 1, []
    for _ in range(2048):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        text.append(chr(0x21 + (state >> 33) % min(size, 0x7F - 0x21)))
    (folder / "text.txt").write_text("".join(text))


def suffix(format):
    return ".gguf" if format == "gguf" else ""


def grid(model, every):
    """Rows of one model over formats, schemes, methods and observers: name and arguments, without the program."""
    if model == DEMO:
        common = f"--samples 4 --seq-len 128 --verify-text none --device cpu --calibration {shlex.quote(str(TEXT))}"
        group = ""
    else:
        # The text lies beside the model; groups of 32 are what its few columns divide into.
        common = f"--samples 4 --seq-len 24 --verify-text none --device cpu --calibration {model}/text.txt"
        group = "--group-size 32 "
    for format, schemes in SCHEMES.items():
        full = schemes if every else schemes[: 2 if model == DEMO and format != "gguf" else 1]
        for scheme in schemes:
            for method in METHODS:
                for observer in OBSERVERS:
                    if scheme not in full and (method, observer) not in USUAL:
                        continue
                    own = "" if format == "gguf" or "--group-size" in scheme else group
                    args = (
                        f"quantize {model} -o OUT{suffix(format)} --format {format} --scheme {scheme} {own}"
                        f"--method {method} --observer {observer} {common}"
                    )
                    yield f"{model}: {format} {scheme} {method}/{observer}", [args]


def others():
    """What else leads to weight files, on the built-in model: name and commands, each in the same folder."""
    few = f"--samples 4 --seq-len 128 --verify-text none --device cpu --calibration {shlex.quote(str(TEXT))}"
    none = "--method rtn --verify-text none --device cpu"
    yield "defaults", [f"quantize demo -o OUT {few}"]
    yield "defaults gguf", [f"quantize demo -o OUT.gguf {few}"]
    yield "the bundled text", ["quantize demo -o OUT --samples 2 --seq-len 64 --verify-text none --device cpu"]
    yield "f32 products", [f"quantize demo -o OUT --math f32 {few}"]
    yield "another seed", [f"quantize demo -o OUT --seed 7 {few}"]
    yield "three threads", [f"quantize demo -o OUT --threads 3 {few}"]
    yield "damping", [f"quantize demo -o OUT --damp 0.2 --method awq+gptq {few}"]
    yield "no act-order", [f"quantize demo -o OUT --act-order false {few}"]
    yield "left alone", [f"quantize demo -o OUT --ignore down_proj --ignore 're:.*layers.1..*' {few}"]
    yield "a recipe", [f"quantize demo -o OUT --recipe RECIPE {few}"]
    yield "gguf tensor types", [
        f"quantize demo -o OUT.gguf --scheme Q4_K_M --tensor-type ffn_down=Q8_0 --token-embedding-type Q4_0 {few}"
    ]
    yield "gguf pure", [f"quantize demo -o OUT.gguf --scheme Q4_K_S --pure {few}"]
    yield "gguf parts", [f"quantize demo -o OUT.gguf --scheme Q8_0 --split-max-size 2M {none}"]
    yield "importance saved", [f"quantize demo -o OUT.gguf --scheme Q4_K_M --save-imatrix OUT.imatrix {few}"]
    yield "importance read", [
        f"quantize demo -o A.gguf --scheme Q8_0 --save-imatrix A.imatrix.gguf {few}",
        f"quantize demo -o OUT.gguf --scheme IQ4_XS --method rtn --observer imatrix --imatrix A.imatrix.gguf --verify-text none --device cpu",
    ]
    yield "from gguf F16", [
        f"quantize demo -o A.gguf --scheme F16 {none}", f"quantize A.gguf -o OUT {few}", f"convert A.gguf -o OUT2 --dtype f32",
    ]
    yield "from gguf Q4_K_M", [
        f"quantize demo -o A.gguf --scheme Q4_K_M {none}", f"quantize A.gguf -o OUT {few}", f"convert A.gguf -o OUT2",
        f"quantize A.gguf -o OUT3.gguf --scheme Q6_K {none}",
    ]
    for format, scheme in (("compressed-tensors", "W4A16"), ("compressed-tensors", "W3A16_ASYM"), ("gptq", "W4A16 --desc-act"), ("awq", "W4A16_ASYM")):
        yield f"from {format} {scheme}", [
            f"quantize demo -o A --format {format} --scheme {scheme} {few}",
            f"convert A -o OUT --dtype f32", f"convert A -o OUT2", f"quantize A -o OUT3.gguf --scheme Q4_K_M {none}",
            f"quantize A -o OUT4 --scheme W8A16 {none}",
        ]
    yield "converted", ["convert demo -o OUT --dtype f32", "convert demo -o OUT2 --dtype f16"]


def digests(folder, inputs):
    """The SHA-256 of every file that a row wrote, weight files and others."""
    weights, beside = {}, {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file() or name in inputs:
            continue
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix in WEIGHTS:
            weights[name] = found
        elif not path.name.endswith("report.json") and path.name != "README.md":
            beside[name] = found
    return weights, beside


def run(binary, commands, models, extra):
    """Runs the commands in a folder of their own, up to the first that fails; exit code, message, digests."""
    with tempfile.TemporaryDirectory(prefix="same_bytes_") as room:
        room = pathlib.Path(room)
        for name in models.iterdir():
            (room / name.name).symlink_to(name)
        (room / "RECIPE").write_text(RECIPE)
        code, message = 0, ""
        for command in commands:
            words = shlex.split(command)
            # One thread each: the rows run side by side. Results do not depend on it.
            usual = [] if words[0] == "convert" else ["-q"] if "--threads" in words else ["-q", "--threads", "1"]
            done = subprocess.run(
                [binary, *words, *usual, *extra], cwd=room, capture_output=True, text=True, check=False, timeout=600
            )
            code, message = done.returncode, done.stderr.strip()
            if code:
                break
        return code, message, *digests(room, {"RECIPE"})


def compare(row, options, models):
    """What one row found: its name; `same`, `refused` or `differs`; what differs, or why it is refused; notes."""
    name, commands = row
    key = hashlib.sha256(json.dumps([options.old_hash, options.script_hash, commands]).encode()).hexdigest()
    if key not in options.kept:
        options.kept[key] = run(options.old, commands, models, [])
    old = tuple(options.kept[key])
    new = run(options.new, commands, models, shlex.split(options.new_args))
    notes = []
    if old[0] != new[0]:
        return name, "differs", [f"exit code {old[0]} was, {new[0]} is: {(new[1] or old[1]).splitlines()[-1:]}"], notes
    if old[1] != new[1]:
        last = [found[1].splitlines()[-1] if found[1] else "nothing" for found in (old, new)]
        notes.append(f"another message: {last[0]} -> {last[1]}")
    notes += [f"{file} differs" for file in sorted(old[3].keys() | new[3].keys()) if old[3].get(file) != new[3].get(file)]
    wrong = []
    for file in sorted(old[2].keys() | new[2].keys()):
        a, b = (found[2].get(file, "nothing")[:12] for found in (old, new))
        if old[2].get(file) != new[2].get(file):
            wrong.append(f"{file}: {a} was, {b} is")
    if not old[2] and old[0] == 0:
        wrong.append("no weight file was written; what does this row compare?")
    if wrong:
        return name, "differs", wrong, notes
    return name, "refused" if old[0] else "same", [old[1].splitlines()[-1]] if old[0] and old[1] else [], notes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, type=pathlib.Path, help="the binary that is right")
    parser.add_argument("--new", required=True, type=pathlib.Path, help="the binary to compare with it")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument("--allow", action="append", default=[], metavar="REGEX", help="rows that may differ; repeatable")
    parser.add_argument("--all", action="store_true", help="every tiny checkpoint, and every row on each")
    parser.add_argument("--new-args", default="", metavar="ARGS", help="appended to the new binary's commands")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FILE", help="keep what the old binary wrote")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at once; all cores by default")
    parser.add_argument("--refusals", action="store_true", help="print why both refuse what they refuse")
    parser.add_argument("--list", action="store_true", help="print the rows and do nothing")
    options = parser.parse_args()
    options.old, options.new = options.old.resolve(), options.new.resolve()
    for binary in (options.old, options.new):
        if not options.list and not os.access(binary, os.X_OK):
            parser.error(f"{binary}: no program")
    options.old_hash = "" if options.list else hashlib.sha256(options.old.read_bytes()).hexdigest()
    options.kept = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    wanted = re.compile(options.filter)
    known = sorted(path.name for path in FAMILIES.iterdir() if path.is_dir())
    rows = [row for row in grid(DEMO, options.all) if wanted.search(row[0])]
    rows += [(f"{DEMO}: {name}", commands) for name, commands in others() if wanted.search(f"{DEMO}: {name}")]
    for name in known if options.all else DEFAULT:
        rows += [row for row in grid(name, options.all) if wanted.search(row[0])]
    if options.list:
        print("\n".join(name for name, _ in rows))
        return 0
    if not rows:
        parser.error(f"no row's name matches {options.filter}")

    started = time.monotonic()
    count, table, differing, notes, refusals, allowed = 0, {}, [], {}, {}, {pattern: 0 for pattern in options.allow}
    with tempfile.TemporaryDirectory(prefix="same_bytes_models_") as models:
        models = pathlib.Path(models)
        needed = {name.split(":")[0] for name, _ in rows}
        if DEMO in needed:
            subprocess.run([options.old, "demo", "--export", models / DEMO, "-q"], check=True)
        for name in sorted(needed - {DEMO}):
            write_family(name, models / name)
        hashes = (hashlib.sha256(path.read_bytes()).hexdigest() for path in [pathlib.Path(__file__), TEXT])
        options.script_hash = " ".join(hashes)
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for name, outcome, wrong, said in pool.map(lambda row: compare(row, options, models), rows):
                count += 1
                if sys.stderr.isatty():
                    print(f"\r{count} of {len(rows)}", end="", file=sys.stderr)
                matching = [pattern for pattern in options.allow if re.search(pattern, name)]
                if outcome == "differs" and matching:
                    for pattern in matching:
                        allowed[pattern] += 1
                    outcome, said = "allowed", said + wrong
                elif outcome == "differs":
                    commands = dict(rows)[name]
                    differing.append(name)
                    print(f"\nDIFFERS {name}", *wrong, *(f"quantc {command}" for command in commands), sep="\n    ", flush=True)
                elif outcome == "refused":
                    refusals.setdefault(wrong[0] if wrong else "no message", []).append(name)
                for note in said:
                    notes.setdefault(note, []).append(name)
                tally = table.setdefault(name.split()[0] + " " + kind_of(name), {})
                tally[outcome] = tally.get(outcome, 0) + 1

    if options.keep:
        options.keep.write_text(json.dumps(options.kept))
    print("\n| model and format | same | both refuse | allowed | differ |\n|---|---|---|---|---|")
    for kind, tally in table.items():
        cells = (str(tally.get(outcome, "")) for outcome in ("same", "refused", "allowed", "differs"))
        print(f"| {kind} | {' | '.join(cells)} |")
    for message, names in refusals.items() if options.refusals else ():
        print(f"refused: {message} ({', '.join(names)})")
    for note, names in notes.items():
        print(f"note: {note} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})")
    for pattern, found in allowed.items():
        if not found:
            print(f"note: --allow '{pattern}' was not needed")
    print(f"{count} rows in {time.monotonic() - started:.0f} s: {'all the same' if not differing else f'{len(differing)} differ'}")
    return 1 if differing else 0


def kind_of(name):
    """The format of a row, for the table."""
    word = name.split(": ")[1].split()[0]
    return word if word in SCHEMES else "others"


if __name__ == "__main__":
    sys.exit(main())
