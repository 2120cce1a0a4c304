"""What the module does: results are the reports, failures are exceptions, and the work can be watched and stopped."""

import _thread
import ast
import hashlib
import json
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import pytest

import quantc
from conftest import QUICK


def left_in(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digest(folder: pathlib.Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_quantize_returns_the_report(model, tmp_path):
    seen = []
    report = quantc.quantize(
        model, tmp_path / "out", scheme="W4A16", max_kld=10.0, progress=lambda *told: seen.append(told), **QUICK
    )
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"]["passed"] and report["recipe"]["scheme"]["group"] == 64
    stages = {stage for stage, _, _ in seen}
    assert "quantizing" in stages and len(stages) > 1
    assert all(0 <= share <= 1 and (left is None or left >= 0) for _, share, left in seen)


def test_several_outputs_give_a_list(model, tmp_path):
    target = [{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b"), "bits": 3}]
    reports = quantc.quantize(model, target=target, method="rtn", verify_text="none", group_size=64)
    assert [report["recipe"]["scheme"]["bits"] for report in reports] == [4, 3]
    assert left_in(tmp_path) == ["a", "b"]


def test_a_missed_limit_has_the_report(model, tmp_path):
    with pytest.raises(quantc.LimitsError, match="KL") as caught:
        quantc.quantize(model, tmp_path / "out", max_kld=1e-9, **QUICK)
    assert caught.value.report["verdict"]["passed"] is False and caught.value.exit_code == 3
    assert (tmp_path / "out" / "model.safetensors").exists()
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is quantc.LimitsError and again.report == caught.value.report


def test_failures_are_told_apart(model, tmp_path):
    for wrong, words in [
        ({"grup_size": 64}, "did you mean `group_size`"),
        ({"scheme": "W5A16"}, "W5A16"),
        ({"scheme": float("nan")}, "scheme|JSON"),
        ({"ignore": [object()]}, "quantize"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"threads": 0}, "at least 1"),
        ({"samples": "many"}, '`samples`: .*"many", expected a whole number'),
        ({"group_size": 64, "damp": [1]}, "`damp`: .*expected a number"),
    ]:
        with pytest.raises(quantc.UsageError, match=words):
            quantc.quantize(model, tmp_path / "out", **wrong)
    with pytest.raises(ValueError):
        quantc.plan(model, nothing=1)
    with pytest.raises(quantc.FailedError, match="nowhere"):
        quantc.inspect(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in os.listdir(model):
        (broken / name).write_bytes((model / name).read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(quantc.FailedError, match="model.safetensors") as caught:
        quantc.quantize(broken, tmp_path / "out")
    assert isinstance(caught.value, quantc.Error) and caught.value.report is None
    assert left_in(tmp_path) == ["broken"]


def test_plan_writes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = quantc.plan(model, scheme="W4A16", group_size=64, runtime="vllm", context=256)
    assert planned["outputs"] and left_in(tmp_path) == []


def test_evaluate_one_and_several(model):
    settings = {"context": 64, "windows": 2, "device": "cpu"}
    alone = quantc.evaluate(model, reference=model, **settings)
    assert alone["kld_mean"] < 1e-6
    both = quantc.evaluate([model, str(model)], reference=model, **settings)
    assert [one["perplexity"] for one in both] == [alone["perplexity"]] * 2
    with pytest.raises(quantc.LimitsError) as caught:
        quantc.evaluate(model, reference=model, min_top1=1.0, max_ppl_ratio=0.5, **settings)
    assert caught.value.report["perplexity"] == alone["perplexity"]


def test_compare_returns_the_table(model, tmp_path):
    folder = tmp_path / "report"
    settings = {"method": "rtn", "group_size": 64, "context": 64, "windows": 1, "tasks": "none", "device": "cpu"}
    table = quantc.compare(model, ["W4A16", "W8A16"], folder, **settings)
    assert table == json.loads((folder / "compare.json").read_text())
    assert [row["name"] for row in table["rows"]][-2:] == ["W4A16", "W8A16"]


def test_inspect_tells_of_tensors_and_program(model):
    found = quantc.inspect(model)
    assert found["tensors"] and "program" not in found
    assert quantc.inspect(str(model), program=True)["program"]


def test_ctrl_c_stops_the_work_and_leaves_nothing(model, tmp_path):
    def interrupt(stage, share, left):
        if stage == "quantizing":
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        quantc.quantize(model, tmp_path / "out", progress=interrupt, **QUICK)
    assert not (tmp_path / "out").exists()
    # What is finished is kept out of sight, and the same call goes on after it.
    report = quantc.quantize(model, tmp_path / "out", **QUICK)
    assert report["outputs"] and left_in(tmp_path) == ["out"]


def test_a_signal_of_the_system_stops_the_work(model, tmp_path):
    script = f"""
import os, signal, quantc
def stop(stage, share, left):
    if stage == "quantizing":
        os.kill(os.getpid(), signal.SIGINT)
quantc.quantize({str(model)!r}, {str(tmp_path / "out")!r}, group_size=64, samples=4, seq_len=64, progress=stop)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "KeyboardInterrupt" in done.stderr and done.returncode != 0
    assert not (tmp_path / "out").exists()


def test_what_the_callback_raises_comes_out(model, tmp_path):
    def refuse(stage, share, left):
        raise LookupError(stage)

    with pytest.raises(LookupError):
        quantc.quantize(model, tmp_path / "out", progress=refuse, **QUICK)
    assert not (tmp_path / "out").exists()


def test_two_calls_in_threads_do_not_see_each_other(model, tmp_path):
    reports, counted = {}, 0

    def call(name, bits):
        reports[name] = quantc.quantize(model, tmp_path / name, bits=bits, **QUICK)

    threads = [threading.Thread(target=call, args=(f"out{bits}", bits)) for bits in (3, 4)]
    for thread in threads:
        thread.start()
    # The interpreter goes on while they work.
    while any(thread.is_alive() for thread in threads):
        counted += 1
        time.sleep(0.01)
    assert counted > 3
    assert {name: report["recipe"]["scheme"]["bits"] for name, report in reports.items()} == {"out3": 3, "out4": 4}
    alone = quantc.quantize(model, tmp_path / "alone", bits=3, threads=1, **QUICK)
    assert alone["outputs"] and digest(tmp_path / "alone") == digest(tmp_path / "out3")


def ask_in_child(path):
    try:
        quantc.inspect(path)
    except quantc.FailedError as error:
        os._exit(7 if "spawn" in str(error) else 8)
    os._exit(9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_is_told_why_it_cannot(model):
    quantc.inspect(model)
    child = multiprocessing.get_context("fork").Process(target=ask_in_child, args=(model,))
    child.start()
    child.join(60)
    assert child.exitcode == 7


def keys_of(*classes: str) -> set[str]:
    """The keys of TypedDicts in the module's source, which are there for type checkers alone."""
    assert quantc.__file__ is not None
    tree = ast.parse(pathlib.Path(quantc.__file__).read_text())
    found = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    keys: set[str] = set()
    for name in classes:
        keys |= {item.target.id for item in found[name].body if isinstance(item, ast.AnnAssign)}
    return keys


def known_to(call) -> set[str]:
    with pytest.raises(quantc.UsageError) as caught:
        call(qqqqqqqqqqqqqqqqqqqq=1)
    return set(str(caught.value).split("there are ")[1].split(", "))


def test_types_name_every_setting(model):
    own = {"model", "output", "scheme"}
    quantize = keys_of("Settings", "Request", "Bounds", "Compute") | own
    # The two of a target's own table have no meaning for the whole.
    assert known_to(lambda **wrong: quantc.quantize(model, **wrong)) == quantize | {"path", "lead"}
    evaluate = keys_of("EvaluateSettings", "Bounds", "Compute") | {"models", "reference"}
    assert known_to(lambda **wrong: quantc.evaluate(model, **wrong)) == evaluate
    compare = keys_of("CompareSettings", "Request", "Compute") | {"model", "schemes", "folder"}
    found = known_to(lambda **wrong: quantc.compare(model, ["W4A16"], "report", **wrong))
    assert found == compare | {"path", "lead", "scheme", "target", "report"}
