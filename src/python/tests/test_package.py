"""What is installed: the command, the types, and documentation whose examples run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import quantc

DOCS = pathlib.Path(__file__).resolve().parents[3] / "docs"
COMMAND = pathlib.Path(sys.executable).parent / "quantc"


def test_the_command_is_the_program_and_needs_no_python(model, tmp_path):
    assert COMMAND.read_bytes()[:4] == b"\x7fELF" or sys.platform != "linux"
    # It starts itself once more; with nothing on the path it can only find itself.
    done = subprocess.run(
        [COMMAND, "quantize", model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", "64", "--verify-text", "none"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    version = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.split() == ["quantc", quantc.__version__]


def test_every_function_says_what_it_does():
    for name in quantc.__all__:
        if name != "__version__":
            assert getattr(quantc, name).__doc__, name


@pytest.mark.parametrize("page", ["python.md"])
def test_the_examples_of_the_documentation_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantc.demo_model("model")
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    assert len(blocks) >= 4
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


RIGHT = """
import pathlib
import quantc

def told(stage: str, share: float, left: float | None) -> None: ...

report = quantc.quantize("model", pathlib.Path("out"), scheme="W4A16", group_size=64, ignore=["a"], progress=told)
quantc.plan("model", runtime="vllm", tensor_parallel=2)["outputs"]
quantc.evaluate(["a", "b"], reference="model", windows=2)
"""
WRONG = {
    'import quantc\nquantc.quantize("model", "out", grup_size=64)\n': "grup_size",
    'import quantc\nquantc.quantize("model", "out", group_size="64")\n': "int",
    'import quantc\nquantc.compare("model", schemes=4, folder="report")\n': "schemes",
    'import quantc\nquantc.inspect("model").tensors\n': "tensors",
}


def test_the_types_hold(tmp_path):
    def mypy(*words: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MYPY_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "mypy", "--strict", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    package = mypy("--python-version", "3.10", "-p", "quantc")
    assert package.returncode == 0, package.stdout + package.stderr
    (tmp_path / "right.py").write_text(RIGHT)
    for index, text in enumerate(WRONG):
        (tmp_path / f"wrong{index}.py").write_text(text)
    found = mypy("right.py", *(f"wrong{index}.py" for index in range(len(WRONG)))).stdout
    assert "right.py" not in found, found
    for index, words in enumerate(WRONG.values()):
        lines = [line for line in found.splitlines() if line.startswith(f"wrong{index}.py")]
        assert lines and words in lines[0], found


def test_the_stub_of_the_native_part_is_right(tmp_path):
    if shutil.which("stubtest", path=str(pathlib.Path(sys.executable).parent)) is None:
        pytest.skip("stubtest is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "quantc._quantc"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
