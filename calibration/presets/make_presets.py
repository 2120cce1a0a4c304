#!/usr/bin/env python3
"""Build mixed.txt, the bundled calibration text, from its sources.

    python3 make_presets.py --wiki F --c4 F --stories F --gsm8k F --seed-tasks F --user-tasks F --chats F
        --mt-questions F --mt-answers F --python-lib DIR --crates DIR --held-out FILE... --out mixed.txt

Every document that shares a run of 13 words with a held-out text is left out, so that the preset never holds what
quality is later judged on. Standard library only; the same inputs give the same bytes. README.md beside this file
says what each source is and under which licence it is given on.
"""

import argparse
import collections
import json
import re
from pathlib import Path

SEPARATOR = "<|document|>"
RUN = 13  # words in a row that count as the same text

PYTHON = [  # under Lib/
    "bisect.py", "colorsys.py", "csv.py", "fnmatch.py", "graphlib.py", "heapq.py", "html/parser.py",
    "json/decoder.py", "queue.py", "sched.py", "shlex.py", "string.py", "textwrap.py",
]  # fmt: skip
CRATES = [  # crate folder without its version, file
    ("itoa", "src/lib.rs"), ("fastrand", "src/lib.rs"), ("either", "src/lib.rs"), ("once_cell", "src/race.rs"),
    ("equivalent", "src/lib.rs"), ("autocfg", "src/lib.rs"),
]  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str):
    w = words(text)
    return (hash(tuple(w[i : i + RUN])) for i in range(len(w) - RUN + 1))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def held_out_text(path: Path) -> str:
    """Everything a reader could see in a held-out file; of JSON, the strings."""
    if path.suffix != ".jsonl":
        return path.read_text(encoding="utf-8")
    return "\n".join(" ".join(str(v) for v in row.values()) for row in lines(path))


def spaced(documents: list[str], size: int) -> list[str]:
    """Documents evenly spaced through their source, to about `size` bytes."""
    total = sum(len(d.encode()) for d in documents)
    chosen, credit, have = [], 0.0, 0
    for document in documents:
        length = len(document.encode())
        credit += length * min(1.0, size / total)
        if credit >= have + length / 2:
            chosen.append(document)
            have += length
    return chosen


def wiki(path: Path) -> list[str]:
    parts = [re.sub(r"<doc [^>]*>", "", part).strip() for part in path.read_text(encoding="utf-8").split("</doc>")]
    return [part for part in parts if 600 <= len(part) <= 12_000]


def c4(path: Path) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        line = line.strip()
        # Pages that are mostly menus have few sentences for their length.
        if 500 <= len(line) <= 8_000 and len(re.findall(r"[a-z][.!?] ", line)) * 160 >= len(line):
            kept.append(line)
    return kept


def stories(path: Path) -> list[str]:
    return [part.strip() for part in path.read_text(encoding="utf-8").split("<|endoftext|>") if part.strip()]


def gsm8k(path: Path) -> list[str]:
    """Eight problems to a document, so that a window is not one problem long; calculator marks removed."""
    solved = [row["question"] + "\n" + re.sub(r"<<.*?>>", "", row["answer"]) for row in lines(path)]
    return ["\n\n".join(solved[i : i + 8]) for i in range(0, len(solved), 8)]


def tasks(path: Path) -> list[str]:
    found = []
    for row in lines(path):
        for instance in row["instances"][:1]:
            given = f"\n\n{instance['input'].strip()}" if instance["input"].strip() else ""
            found.append(f"User: {row['instruction'].strip()}{given}\n\nAssistant: {instance['output'].strip()}")
    return found


def chats(path: Path) -> list[str]:
    """The conversations are permutations of 28 answers: only those that bring a new answer are of use."""
    found, seen = [], set()
    for row in json.loads(path.read_text(encoding="utf-8")):
        answers = {m["value"] for m in row["conversations"] if m["from"] == "gpt"}
        if answers - seen:
            seen |= answers
            name = {"human": "User", "gpt": "Assistant"}
            found.append("\n\n".join(f"{name[m['from']]}: {m['value'].strip()}" for m in row["conversations"]))
    return found


def mt_bench(questions: Path, answers: Path) -> list[str]:
    replies = {row["question_id"]: row["choices"][0]["turns"] for row in lines(answers)}
    found = []
    for row in lines(questions):
        turns = []
        for i, turn in enumerate(row["turns"]):
            turns.append(f"User: {turn.strip()}")
            if row["question_id"] in replies:
                turns.append(f"Assistant: {replies[row['question_id']][i].strip()}")
        found.append("\n\n".join(turns))
    return found


def code(python_lib: Path, crates: Path) -> list[str]:
    """A file a document, the first 14 kB of long ones (ended at a line)."""
    files = [python_lib / name for name in PYTHON]
    for crate, name in CRATES:
        folders = sorted(d for d in crates.iterdir() if re.fullmatch(re.escape(crate) + r"-\d[\w.\-]*", d.name))
        if not folders:
            raise SystemExit(f"{crates}: no folder of crate {crate}")
        files.append(folders[-1] / name)
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        found.append((text if len(text) <= 14_000 else text[: text.rindex("\n", 0, 14_000)]).strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["wiki", "c4", "stories", "gsm8k", "seed-tasks", "user-tasks", "chats", "mt-questions", "mt-answers",
                 "python-lib", "crates", "out"]:  # fmt: skip
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    args = parser.parse_args()

    held = set()
    for path in args.held_out:
        held.update(runs(held_out_text(path)))

    domains = {
        "encyclopedic": (wiki(args.wiki), 430_000),
        "web": (c4(args.c4), 310_000),
        "mathematics": (gsm8k(args.gsm8k), 150_000),
        "instructions": (
            tasks(args.seed_tasks) + tasks(args.user_tasks) + chats(args.chats)
            + mt_bench(args.mt_questions, args.mt_answers),
            250_000,
        ),
        "stories": (stories(args.stories), 110_000),
        "code": (code(args.python_lib, args.crates), 200_000),
    }  # fmt: skip
    written, once = [], set()
    for name, (found, size) in domains.items():
        fresh = collections.OrderedDict()
        dropped = 0
        for document in found:
            document = document.replace("\r\n", "\n").replace("\0", "")
            if "<|" in document or document in once:
                continue
            if any(run in held for run in runs(document)):
                dropped += 1
                continue
            fresh[document] = None
        chosen = spaced(list(fresh), size)
        once.update(chosen)
        written += chosen
        bytes_ = sum(len(d.encode()) for d in chosen)
        print(f"{name}: {len(chosen)} documents, {bytes_} bytes ({dropped} share text with a held-out file)")
    args.out.write_text(f"\n{SEPARATOR}\n".join(written) + "\n", encoding="utf-8", newline="\n")
    print(f"{args.out.name}: {len(written)} documents, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
