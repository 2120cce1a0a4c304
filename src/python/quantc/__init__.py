"""Quantizes large language models, and measures what that costs.

Every function takes what the program's command of that name takes, under the names that recipes and quantc.toml have for it, and returns what
the command prints as JSON: plain dicts and lists. A setting that is not known is an error.

    import quantc

    report = quantc.quantize("model", "model-w4", scheme="W4A16", group_size=64)
    print(report["quality"]["kld_mean"])

The work runs in this process, without the interpreter's lock, on all cores or as many `threads` as are given. Ctrl-C stops it after the
linear that is at work; no output appears, and the same call goes on after the blocks that are finished.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Union

from . import _quantc
from ._quantc import __version__

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import Unpack

    Path = Union[str, "os.PathLike[str]"]
    Report = Dict[str, Any]
    Progress = Callable[[str, float, Optional[float]], Any]

    class Compute(TypedDict, total=False):
        """Where it is computed."""

        device: str
        threads: int
        gpu_memory: str
        math: str
        profile: bool

    class Bounds(TypedDict, total=False):
        """Limits on the quality."""

        max_ppl_ratio: float
        max_kld: float
        min_top1: float
        min_cosine: float
        min_spearman: float
        baseline: Path
        max_regression: str

    class Request(TypedDict, total=False):
        """The keys of a recipe, without those that are arguments of their own."""

        format: str
        bits: int
        group_size: int
        symmetric: bool
        method: str
        observer: str
        damp: float
        act_order: bool
        refine: bool
        desc_act: bool
        moe_all_experts: bool
        ignore: Sequence[str]
        allow_uneven: bool
        unknown_tensors: str
        mtp: str
        towers: str
        adapter: Path
        calibration: Path
        samples: int
        seq_len: int
        seed: int
        tensor_type: Sequence[str]
        tensor_type_file: Path
        output_tensor_type: str
        token_embedding_type: str
        pure: bool
        pre: str
        imatrix: Path
        save_imatrix: Path
        split_max_size: str
        override: Sequence[Dict[str, Any]]

    class Settings(Request, Bounds, Compute, total=False):
        """What `quantize` takes beside the model, its place and the scheme."""

        target: Sequence[Dict[str, Any]]
        targets: Sequence[str]
        recipe: Path
        report: Path
        verify_text: Path
        verify_windows: int
        independent: bool
        force: bool
        no_resume: bool
        wait: bool

    class PlanSettings(Settings, total=False):
        """What `plan` takes beside that."""

        context: int
        batch: int
        runtime: str
        gpu: str
        tensor_parallel: int

    class EvaluateSettings(Bounds, Compute, total=False):
        """What `evaluate` takes beside the models and the reference."""

        adapter: Path
        reference_adapter: Path
        text: Path
        context: int
        windows: int
        protocol: str
        activations: str

    class CompareSettings(Request, Compute, total=False):
        """What `compare` takes beside the model, the schemes and the folder."""

        also: Sequence[Path]
        recipe: Path
        text: Path
        context: int
        windows: int
        tasks: Path
        independent: bool
        keep: bool


__all__ = [
    "Error",
    "FailedError",
    "LimitsError",
    "UsageError",
    "__version__",
    "compare",
    "demo_model",
    "evaluate",
    "inspect",
    "plan",
    "quantize",
]


class Error(Exception):
    """What quantc found fault with, in one sentence that names files and tensors, and what to do.

    `report` is what there is to tell all the same, or None; `exit_code` is the one that the program ends with.
    """

    exit_code = 1

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.report)


class UsageError(Error, ValueError):
    """The request cannot be met as it was made. Nothing was written."""

    exit_code = 2


class FailedError(Error):
    """The work could not be done. No output was written; of `compare`, `report` has the rows that were made."""


class LimitsError(Error):
    """The output was written, or the model measured, and a limit is missed. `report` is what the call would have returned."""

    exit_code = 3


_KINDS = {2: UsageError, 3: LimitsError}

# Threads do not go along into a process that is forked, so that work would wait for them there without end.
_has_computed = False
_is_forked = False


def _forked() -> None:
    global _is_forked
    _is_forked = _has_computed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _run(command: str, asked: Dict[str, Any], progress: Optional[Progress] = None) -> Any:
    global _has_computed
    if _is_forked:
        raise FailedError("this process was forked from one that had called quantc, whose threads it lacks: start it by multiprocessing's `spawn`")
    given = {key: value for key, value in asked.items() if value is not None}
    try:
        text = json.dumps(given, allow_nan=False, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{command}: {error}") from None
    _has_computed = True
    code, text = _quantc.run(command, text, progress)
    answer = json.loads(text)
    if code != 0:
        raise _KINDS.get(code, FailedError)("; ".join(answer["why"]), answer["found"])
    return answer["found"]


def _all(models: Union[Path, Sequence[Path]]) -> List[Path]:
    return [models] if isinstance(models, (str, os.PathLike)) else list(models)


def quantize(
    model: Path,
    output: Optional[Path] = None,
    *,
    scheme: Optional[str] = None,
    progress: Optional[Progress] = None,
    **settings: Unpack[Settings],
) -> Any:
    """Quantize a model, open the result again, and measure it beside the original.

    `model` is a Hugging Face directory, a GGUF file, or org/name[@revision] of a model on the Hugging Face hub. `output` is a directory, or
    for GGUF a file. Returns what report.json holds; without `output`, where `target` names places, a list with the report of each.

    `progress` is called as progress(stage, share, seconds_left) when a stage begins and about twice a second: `share` goes from 0 to 1 in
    each stage, and `seconds_left` is None while too little is known. What it raises stops the run.

    `settings` are the keys of a recipe (format, group_size, method, calibration, samples, ignore, ...), limits (max_kld, max_ppl_ratio,
    min_top1, min_cosine, min_spearman, baseline), what is measured (verify_text, verify_windows), and force, device and threads.

    Raises UsageError, FailedError, and LimitsError if a limit is missed; the output stays then.
    """
    return _run("quantize", {"model": model, "output": output, "scheme": scheme, **settings}, progress)


def plan(
    model: Path,
    output: Optional[Path] = None,
    *,
    scheme: Optional[str] = None,
    progress: Optional[Progress] = None,
    **settings: Unpack[PlanSettings],
) -> Report:
    """Say what quantize would do with the same arguments: sizes to the byte, memory, time, and what becomes of every tensor.

    With `runtime` ("vllm", "sglang", "llama.cpp", "transformers", "mlx"), and `gpu`, `tensor_parallel`, `context` and `batch`, also whether the
    result can be served. Reads no weights and writes nothing.
    """
    return _run("plan", {"model": model, "output": output, "scheme": scheme, **settings}, progress)  # type: ignore[no-any-return]


def evaluate(
    model: Union[Path, Sequence[Path]],
    *,
    reference: Optional[Path] = None,
    progress: Optional[Progress] = None,
    **settings: Unpack[EvaluateSettings],
) -> Any:
    """Measure the perplexity of a model, and its divergence from a `reference`.

    Returns what `quantc eval --json` prints: a dict for one model, a list of them for several. Raises LimitsError if a limit is missed.
    """
    return _run("evaluate", {"models": _all(model), "reference": reference, **settings}, progress)


def compare(
    model: Path,
    schemes: Sequence[str],
    folder: Path,
    *,
    progress: Optional[Progress] = None,
    **settings: Unpack[CompareSettings],
) -> Report:
    """Quantize a model by each of `schemes`, measure what was made beside the original, and write the report of it all to `folder`.

    A scheme is "W4A16", "Q4_K_M" or "gptq:W4A16:g64". Returns what compare.json holds. Raises FailedError if a row failed; its `report` has the
    others.
    """
    return _run("compare", {"model": model, "schemes": list(schemes), "folder": folder, **settings}, progress)  # type: ignore[no-any-return]


def inspect(model: Path, *, program: bool = False) -> Report:
    """Show what is in a checkpoint; with `program` also what the model computes. Reads no weights."""
    return _run("inspect", {"model": model, "program": program})  # type: ignore[no-any-return]


def demo_model(folder: Path) -> None:
    """Write the small built-in model to `folder` as a Hugging Face checkpoint, to try things with."""
    _run("demo_model", {"folder": folder})
