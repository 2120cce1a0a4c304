#!/usr/bin/env python3
"""Whether a wheel is what its name says: all of it there, and nothing in it that needs a later glibc than its tag.

What builds a wheel looks at the module alone; the program in it has been linked by itself.
"""

import re
import sys
import zipfile

NEEDED = ["quantc/__init__.py", "quantc/_quantc.abi3.so", "quantc/_quantc.pyi", "quantc/py.typed"]
OLD_NAMES = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


def glibc_of(tag):
    """The glibc that a platform tag promises to do with, or None where it promises nothing."""
    if match := re.search(r"manylinux_(\d+)_(\d+)_", tag):
        return int(match[1]), int(match[2])
    return next((version for name, version in OLD_NAMES.items() if name in tag), None)


def glibc_needed(content):
    """The latest version of glibc's symbols that a file names."""
    return max(((int(a), int(b)) for a, b in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", content)), default=(0, 0))


def main(path):
    wheel = zipfile.ZipFile(path)
    names = wheel.namelist()
    program = next((name for name in names if name.endswith(".data/scripts/quantc")), None)
    faults = [f"{name} is missing" for name in NEEDED if name not in names]
    if program is None:
        sys.exit(f"{path}: the command is missing")
    tag = path.rsplit("-", 1)[1]
    promised = glibc_of(tag)
    for name in [program, *(name for name in names if name.endswith(".so"))]:
        needs = glibc_needed(wheel.read(name))
        if promised is not None and needs > promised:
            faults.append(f"{name} needs glibc {needs[0]}.{needs[1]}, and the name of the wheel promises {promised[0]}.{promised[1]}")
        print(f"{name}: {wheel.getinfo(name).file_size / 1e6:.1f} MB, glibc {needs[0]}.{needs[1]}")
    if faults:
        sys.exit("\n".join(f"{path}: {fault}" for fault in faults))


main(sys.argv[1])
