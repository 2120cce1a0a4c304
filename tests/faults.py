#!/usr/bin/env python3
"""Kills runs at random moments and lets system calls fail, and looks at what is left.

However a run ends, its output must be the old one or a new one, whole; beside it lie only the staging folder of a killed run, which
the next run removes or goes on with, and nothing else; and the exit code is 0, 1, 2, 3, or that of the signal that the run was asked to
end by. Where blocks were finished, the same command goes on after them: what it writes must be what an undisturbed run does.

    python3 tests/faults.py --quantc target/release/quantc                  300 kills, 200 faults; strace is needed for the faults
    python3 tests/faults.py --quantc target/release/quantc --kills 30 --faults 20
    python3 tests/faults.py --quantc target/release/quantc --kills 0 --faults 0 --full 1    the disk is full from every write on, of a
                                                                            model cut down to two blocks; with --blocks 4 of the whole one
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TEXT = pathlib.Path(__file__).resolve().parent.parent / "src/demo/calibration.txt"
FOLDER = "quantize model -o out --method rtn --verify-text none --group-size 64 --force"
SINGLE = "quantize model -o out.gguf --scheme Q8_0 --method rtn --verify-text none --force"
PARTS = "quantize model -o out.gguf --scheme Q8_0 --method rtn --verify-text none --split-max-size 2M --force"
CONVERT = "convert model -o out --dtype f32 --force"
# Calibrated runs, whose finished blocks stay.
CALIBRATED = f"--samples 12 --seq-len 256 --calibration {TEXT} --verify-text none --force"
GPTQ = f"quantize model -o out --format gptq --method awq+gptq --group-size 64 {CALIBRATED}"
PACKED = f"quantize model -o out --method gptq --scheme W4A16_ASYM --group-size 64 {CALIBRATED}"
ENDS = f"quantize model -o out --format mlx --group-size 64 {CALIBRATED}"
FLOATS = f"quantize model -o out --scheme NVFP4A16 --method gptq {CALIBRATED}"
BLOCKS = f"quantize model -o out.gguf --scheme Q5_K_S --method awq+gptq {CALIBRATED}"
SPLIT = f"quantize model -o out.gguf --scheme Q5_K_S --split-max-size 2M {CALIBRATED}"
KINDS = {
    "folder": FOLDER, "convert": CONVERT, "one file": SINGLE, "parts": PARTS,
    "calibrated folder": GPTQ, "calibrated codes": PACKED, "calibrated ends": ENDS, "calibrated floats": FLOATS, "calibrated file": BLOCKS, "calibrated parts": SPLIT,
}
# What makes an earlier output of the same kind that is told apart by its bytes.
EARLIER = {"64": "128", "f32": "f16", "Q8_0": "Q4_0", "Q5_K_S": "Q4_0", "awq+gptq": "rtn", "gptq": "rtn"}

# What fails, and how; none of these is met by a program that only computes.
FAULTS = [
    ("write", "ENOSPC"), ("write", "EIO"), ("pwrite64", "ENOSPC"), ("pwrite64", "EIO"), ("ftruncate", "ENOSPC"),
    ("fsync", "EIO"), ("fsync", "ENOSPC"), ("openat", "EMFILE"), ("openat", "EACCES"), ("mkdir", "EACCES"),
    ("renameat2", "EIO"), ("renameat2", "EINVAL"), ("rename", "EIO"), ("mmap", "ENOMEM"), ("unlink", "EIO"),
    ("unlinkat", "EIO"), ("rmdir", "EIO"), ("flock", "ENOLCK"), ("statx", "EIO"), ("clone3", "EAGAIN"), ("getdents64", "EIO"),
]


def cut(model, blocks):
    """Leaves the first so many blocks of a model."""
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    (model / "config.json").write_text(json.dumps(config))
    content = (model / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), b""
    for name, tensor in list(header.items()):
        block = name.removeprefix("model.layers.").split(".")[0]
        if name == "__metadata__" or block.isdigit() and int(block) >= blocks:
            del header[name]
            continue
        first, last = tensor["data_offsets"]
        tensor["data_offsets"] = [len(data), len(data) + last - first]
        data += content[start + first:start + last]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def outputs(room):
    """The output's files and their hashes; of a GGUF file all its parts."""
    found = {}
    for path in sorted(room.glob("out*")):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            # Times stand in the report.
            content = b"" if file.name.endswith("report.json") else file.read_bytes()
            found[str(file.relative_to(room))] = hashlib.sha256(content).hexdigest()
    return found


def finished_blocks(folder):
    """Whole lines of a journal after the first, which says whose it is."""
    journal = folder / ".quantc-journal"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


class Kind:
    """One way to write an output: what it gives, and how long it takes."""

    def __init__(self, quantc, room, name, words):
        self.quantc, self.room, self.name, self.words = quantc, room, name, words.split()
        self.clear()
        started = time.monotonic()
        self.run().check_returncode()
        self.seconds = time.monotonic() - started
        self.new = outputs(room)
        self.clear()
        self.resumes = name.startswith("calibrated")
        earlier = [EARLIER.get(word, word) if before != "--format" else word for before, word in zip(["", *self.words], self.words)]
        subprocess.run([quantc, *earlier], cwd=room, check=True, capture_output=True)
        self.old = outputs(room)
        assert self.old != self.new
        self.kept = pathlib.Path(tempfile.mkdtemp())
        for path in room.glob("out*"):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, self.kept / path.name)

    def run(self, before=(), env=None):
        return subprocess.run([*before, self.quantc, *self.words], cwd=self.room, capture_output=True, text=True, env=env)

    def clear(self):
        for path in list(self.room.iterdir()):
            if path.name != "model":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def put_old(self):
        self.clear()
        for path in self.kept.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, self.room / path.name)

    def check(self, what, had_old, killed):
        """Fails unless the output is whole, now or, of a killed run, after the next one has tidied up."""
        found, hidden = outputs(self.room), [p for p in self.room.iterdir() if p.name.startswith(".")]
        # Parts of an earlier output with another number of them are somebody's files, and stay.
        allowed = [{**self.old, **self.new} if had_old else self.new, self.old if had_old else {}]
        if not killed and hidden and not (self.resumes and all(finished_blocks(folder) for folder in hidden)):
            raise AssertionError(f"{self.name}, {what}: left {[p.name for p in hidden]}")
        # A switch of several files that was cut short is written down, and the next run does the rest.
        under_way = any((folder / ".switch.json").exists() for folder in hidden)
        if found not in allowed and not under_way:
            names = {n for one in allowed for n in one}
            raise AssertionError(f"{self.name}, {what}: neither old nor new: {sorted(set(found) ^ names) or sorted(found)}")
        if hidden:
            after = self.run()
            left = [p.name for p in self.room.iterdir() if p.name.startswith(".")]
            if after.returncode or left or outputs(self.room) != allowed[0]:
                raise AssertionError(f"{self.name}, {what}: after the next run: {left} {sorted(outputs(self.room))} {after.stderr}")


def kill(kind, number, generator):
    had_old = number % 2 == 0
    kind.put_old() if had_old else kind.clear()
    signal_sent = generator.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    whole_group = generator.random() < 0.5
    # Half of the kills near the end, where files are moved.
    late = generator.random() < 0.5
    wait = kind.seconds * (generator.uniform(0.8, 1.1) if late else generator.uniform(0.0, 1.0))
    if kind.resumes and generator.random() < 0.3:
        # Twice in a row.
        first = subprocess.Popen([kind.quantc, *kind.words], cwd=kind.room, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(kind.seconds * generator.uniform(0.3, 0.9))
        first.kill()
        first.wait()
        time.sleep(0.2)
    process = subprocess.Popen(
        [kind.quantc, *kind.words], cwd=kind.room, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(wait)
    try:
        os.killpg(process.pid, signal_sent) if whole_group else process.send_signal(signal_sent)
    except ProcessLookupError:
        pass
    code = process.wait()
    # A worker whose watcher was killed ends on its own.
    for _ in range(400):
        if subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).returncode != 0:
            break
        time.sleep(0.01)
    what = f"kill {number}: {signal_sent.name} after {wait:.3f} s"
    if code not in (0, -signal_sent):
        raise AssertionError(f"{kind.name}, {what}: exit code {code}")
    kind.check(what, had_old, killed=signal_sent == signal.SIGKILL)


def fault(kind, number, generator):
    had_old = number % 2 == 0
    kind.put_old() if had_old else kind.clear()
    call, error = FAULTS[number % len(FAULTS)]
    first = generator.choice([1, 1, 2, 3, generator.randrange(1, 40), generator.randrange(1, 400)])
    if call == "mmap":
        # Before that, the system's own loader is at work.
        first += 40
    lasting = "+" if generator.random() < 0.5 and call not in ("openat", "mmap", "statx", "clone3") else ""
    run = kind.run(["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={call}:error={error}:when={first}{lasting}"])
    what = f"fault {number}: {call} {error} from call {first}{lasting}"
    # Where the very start of the process fails, its loader ends it with 127.
    if run.returncode not in (0, 1, 2, 3) and "error while loading shared libraries" not in run.stderr:
        raise AssertionError(f"{kind.name}, {what}: exit code {run.returncode}: {run.stderr}")
    # Beside notes and errors stands what a run says of its memory when it begins.
    lines = [line for line in run.stderr.splitlines() if " takes up to about " not in line]
    told = [line for line in lines if not line.startswith(("note:", "error:"))]
    if told and "loading shared libraries" not in run.stderr:
        raise AssertionError(f"{kind.name}, {what}: {run.stderr}")
    # What could not be removed because removing fails is removed by the next run.
    removing = call in ("unlink", "unlinkat", "rmdir", "getdents64", "openat", "flock", "statx", "clone3", "mmap", "rename")
    kind.check(what, had_old, killed=removing)


def full_disk(folder):
    """Builds what lets the disk be full from one write on; where it lies."""
    library = folder / "full_disk.so"
    source = pathlib.Path(__file__).resolve().parent / "full_disk.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def full(kind, every, library):
    """Lets the disk be full from one write of a run on, for one write in `every`, and then runs the same command with room again."""
    kind.clear()
    count = library.with_suffix(".count")
    count.unlink(missing_ok=True)
    under = {"LD_PRELOAD": str(library), "FULL_UNDER": str(kind.room)}
    kind.run(env={**os.environ, **under, "FULL_COUNT": str(count)}).check_returncode()
    writes = sum(int(line) for line in count.read_text().split())
    for first in range(1, writes + 1, every):
        had_old = first % 2 == 0
        kind.put_old() if had_old else kind.clear()
        run = kind.run(env={**os.environ, **under, "FULL_FROM": str(first)})
        what = f"full from write {first} of {writes} on"
        # Who holds a folder is told as far as that can be written; nothing hangs on it.
        if run.returncode == 0 and outputs(kind.room) == kind.new:
            continue
        if run.returncode != 1 or "No space left" not in run.stderr:
            raise AssertionError(f"{kind.name}, {what}: exit code {run.returncode}: {run.stderr}")
        found = outputs(kind.room)
        if found != (kind.old if had_old else {}):
            raise AssertionError(f"{kind.name}, {what}: there is {sorted(found)}: {run.stderr}")
        after = kind.run()
        left = [p.name for p in kind.room.iterdir() if p.name.startswith(".")]
        expected = {**kind.old, **kind.new} if had_old else kind.new
        if after.returncode or left or outputs(kind.room) != expected:
            raise AssertionError(f"{kind.name}, {what}: with room again: {left} {sorted(outputs(kind.room))} {after.stderr}")
    return len(range(1, writes + 1, every))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantc", required=True)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--full", type=int, help="fill the disk at one write in so many")
    parser.add_argument("--blocks", type=int, help="blocks of the model; all of them, but 2 with --full")
    parser.add_argument("--kind", help="only kinds whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quantc = str(pathlib.Path(args.quantc).resolve())
    if args.faults and not shutil.which("strace"):
        sys.exit("strace is needed for --faults")
    room = pathlib.Path(tempfile.mkdtemp()).resolve()
    library = full_disk(pathlib.Path(tempfile.mkdtemp())) if args.full else None
    subprocess.run([quantc, "demo", "--export", str(room / "model")], check=True, capture_output=True)
    blocks = args.blocks or (2 if args.full else None)
    if blocks:
        cut(room / "model", blocks)
    kinds = [Kind(quantc, room, name, words) for name, words in KINDS.items() if (args.kind or "") in name]
    generator, failures = random.Random(args.seed), []
    for what, count in ((kill, args.kills), (fault, args.faults)):
        for number in range(count):
            try:
                what(kinds[(number // 2) % len(kinds)], number, generator)
            except AssertionError as error:
                failures.append(str(error))
                print(f"FAILED {error}", flush=True)
    for kind in kinds if args.full else []:
        try:
            print(f"{kind.name}: {full(kind, args.full, library)} writes failed", flush=True)
        except AssertionError as error:
            failures.append(str(error))
            print(f"FAILED {error}", flush=True)
    shutil.rmtree(room)
    print(f"{args.kills} kills and {args.faults} faults: {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
