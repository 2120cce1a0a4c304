#!/usr/bin/env python3
"""Which classes of transformers ask a linear for its weight as they are made, so that they cannot be filled from packed weights.

    python3 tests/runtimes/asks.py

Loading gives every module without a value to `_init_weights` of the model's class, or of the part's that it is in, and a linear of a
packed checkpoint has no `weight`: some classes ask the linears for it, others ask for it where these are used. Takes the weights of the
linears that quantc would quantize out of a model of each class and prints the `model_type` of each that fails then. Needs torch and
transformers (requirements.txt).
"""

import re
import sys
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
from make_renames import classes, make  # noqa: E402


def words(name: str) -> list:
    """A list of src/families/unknown.rs."""
    source = (ROOT / "src" / "families" / "unknown.rs").read_text()
    return re.findall(r'"(\w+)"', re.search(rf"const {name}: &\[&str\] = &\[(.*?)\];", source, re.S)[1])


KEPT, ENDS, WHOLE, LANGUAGE = (words(name) for name in ("KEPT", "KEPT_ENDS", "KEPT_WHOLE", "LANGUAGE"))


def quantized(model) -> list:
    """The names of linears in numbered layers, of the language model's where it has one, as quantc finds them."""

    def kept(part):
        gate = part in ("gate_proj", "gate_up_proj", "gate_up")
        return any(word in part and not (gate and word == "gate") for word in KEPT) or part.endswith(tuple(ENDS)) or part in WHOLE

    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    found = [name for name in linears if re.search(r"\.\d+\.", name) and not any(map(kept, name.split(".")))]
    language = [name for name in found if set(name.split(".")) & set(LANGUAGE)]
    wrapped = any(getattr(model.config, part, None) is not None for part in ("text_config", "vision_config", "audio_config"))
    return language if wrapped and language else found


def asks(model) -> bool:
    names = quantized(model)
    for name in names:
        del model.get_submodule(name).weight
    parts = {}
    for name, module in model.named_modules():
        inside = name.rpartition(".")[0] if name else ""
        parts[name] = module if isinstance(module, transformers.PreTrainedModel) else parts[inside]
        holds = name in names or any(other.startswith(f"{name}." if name else "") for other in names)
        try:
            if holds:
                with torch.no_grad():
                    parts[name]._init_weights(module)
        except AttributeError as error:
            if "no attribute 'weight'" in str(error):
                return True
        except Exception:
            continue
    return False


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for model_type, names in sorted(classes().items()):
        found = [getattr(transformers, name, None) for name in names]
        models = [(of, make(model_type, of)) for of in found if of is not None and model_type in transformers.CONFIG_MAPPING]
        if not any(model is not None for _, model in models):
            print(f"# {model_type} was not tried")
        elif any(model is not None and asks(model) for _, model in models):
            print(model_type, flush=True)


if __name__ == "__main__":
    main()
