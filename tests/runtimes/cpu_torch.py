"""Install PyPI's torch for the CPU alone, without the 2 GB of NVIDIA wheels that it names as dependencies.

PyPI has no CPU build of torch for Linux: the wheel there is linked with CUDA's libraries, and the loader refuses
`import torch` when they are missing, though nothing on a CPU calls them. In their place this writes small libraries
that have the right names and symbols, where every function answers cudaErrorNoDevice. torch then reports that it has
no GPU, and runs on the CPU. Needs a C compiler and binutils (which a Rust toolchain needs too), and Linux on x86-64.

    python cpu_torch.py VENV 2.15.0

`environment` makes a whole venv in this way, for the scripts here and in benches/peers.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import time
import venv

NO_DEVICE = 100  # cudaErrorNoDevice: torch takes it for "no GPU here", not for a broken driver
CODES = {"cudaGetLastError", "cudaPeekAtLastError"}  # these answer with a number, ncclGetLastError with words
DRIVER_ONLY = {"libcuda.so.1"}  # opened on demand, never at start


def run(*command: str) -> str:
    """The output of a command that has to succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_stub(soname: str, symbols: dict[str, set[str]], folder: pathlib.Path) -> None:
    """Compile `folder/soname`: `symbols` are the names to define, by version node ("" = without a version)."""
    names = sorted(set().union(*symbols.values()))
    with tempfile.TemporaryDirectory() as work:
        source, script = pathlib.Path(work, "stub.s"), pathlib.Path(work, "versions")
        lines = [".text", "stub:", f"  mov ${NO_DEVICE}, %eax", "  ret"]
        # torch puts the words for an error into its exception, and some callers expect and catch that exception.
        lines += ["words:", "  lea message(%rip), %rax", "  ret", 'message: .asciz "no CUDA on this machine"']
        for name in names:
            answer = "words" if re.search(r"(Error|Status|Result)(String|Name)$|LastError$", name) and name not in CODES else "stub"
            lines.append(f".globl {name}\n.type {name}, @function\n.set {name}, {answer}")
        lines.append('.section .note.GNU-stack,"",@progbits')
        source.write_text("\n".join(lines) + "\n")
        nodes = {node: names for node, names in symbols.items() if node}
        script.write_text("".join(f"{node} {{ {' '.join(f'{n};' for n in sorted(names))} }};\n" for node, names in nodes.items()))
        options = [f"-Wl,--version-script={script}"] if nodes else []
        run("cc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}", *options, "-o", str(folder / soname), str(source))


def write_stubs(lib: pathlib.Path) -> list[str]:
    """Write what torch's libraries in `lib` ask for and the machine lacks; the names of what was written."""
    wanted: dict[str, dict[str, set[str]]] = {}
    loose: set[str] = set()
    defined: set[str] = set()
    objects = sorted(lib.glob("*.so*")) + sorted(lib.parent.glob("*.so"))
    for path in objects:
        for line in run("readelf", "-dW", str(path)).splitlines():
            if (m := re.search(r"\(NEEDED\).*\[(.+)\]", line)) and re.match(r"lib(cu|nv|nccl)", m[1]):
                wanted.setdefault(m[1], {})
    missing = {name for name in wanted if not (lib / name).exists()} - DRIVER_ONLY
    for path in objects:
        # Which library a version node belongs to is in the "version needs" section.
        nodes, file = {}, None
        for line in run("readelf", "-VW", str(path)).splitlines():
            if m := re.search(r"File: (\S+)", line):
                file = m[1]
            elif (m := re.search(r"Name: (\S+)\s+Flags", line)) and file:
                nodes[m[1]] = file
        for line in run("nm", "-D", str(path)).splitlines():
            kind, name = line.split()[-2:]
            name, _, node = name.partition("@")
            node = node.lstrip("@")
            if kind not in "Uw":
                defined.add(name)
            elif nodes.get(node) in missing:
                wanted[nodes[node]].setdefault(node, set()).add(name)
            elif not node:
                loose.add(name)
    # Symbols without a version do not say whose they are; the loader looks in all libraries, so one holds them all.
    prefixes = r"_*(cu|cuda|cublas|cudnn|cufft|cusparse|cusolver|cufile|nccl|nvrtc|nvJit|nvshmem|nvtx|cupti)[A-Z_]|nvshmem|cuf|pnccl"
    versioned = set().union(*(names for nodes in wanted.values() for names in nodes.values()), set())
    loose = {name for name in loose - defined - versioned if re.match(prefixes, name) or "nvshmem" in name}
    for soname in sorted(missing):
        symbols = wanted[soname]
        if soname.startswith("libcudart"):
            symbols = {**symbols, "": loose}
        write_stub(soname, symbols or {"": set()}, lib)
    return sorted(missing)


def install(venv: pathlib.Path, version: str) -> None:
    """Put torch `version` into `venv` (which has pip), without its dependencies, and make it start."""
    python = str(venv / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps", f"torch=={version}")
    [lib] = venv.glob("lib/python*/site-packages/torch/lib")
    write_stubs(lib)


def environment(folder: pathlib.Path, torch: str, requirements: list[pathlib.Path], cuda: bool = False) -> pathlib.Path:
    """The Python of the venv `folder` with this torch and these files of pinned packages; what is there is kept.

    The files are complete, so that nothing is resolved: pip would else insist on torch's own dependencies, which `cuda` lets it have.
    """
    python, done = folder / "bin" / "python", folder / "installed.txt"
    have = done.read_text().split() if done.exists() else []
    missing = [path for path in requirements if path.name not in have]
    if not missing:
        return python
    started = time.time()
    print(f"installing into {folder}: torch {torch}, {', '.join(p.name for p in missing)}", file=sys.stderr, flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    if not have and cuda:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"torch=={torch}"], check=True, stdout=sys.stderr)
    elif not have:
        install(folder, torch)
    for path in missing:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps", "-r", str(path)]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        have.append(path.name)
        done.write_text("\n".join(have) + "\n")
    print(f"{folder}: ready after {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    return python


if __name__ == "__main__":
    install(pathlib.Path(sys.argv[1]), sys.argv[2])
