#!/usr/bin/env python3
"""Install what the checks of a CI run need of transformers and llama.cpp, where they look for it, and run none of them.

    python3 tests/runtimes/fetch.py

The checks install it themselves where it is missing; done beforehand it takes no time of theirs.
"""

import pathlib
import sys

import check
import cpu_torch
import llama


def main():
    cache = check.ROOT / ".venv" / "runtimes"
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [pathlib.Path(check.HERE, "requirements-transformers.txt")]
    cpu_torch.environment(cache / "transformers", check.TORCH["transformers"], wanted)
    llama.libraries(cache)
    llama.environment(cache / "llama")
    return 0


if __name__ == "__main__":
    sys.exit(main())
