#!/usr/bin/env python3
"""Which classes of transformers ask a linear for its weight as they are made, so that they cannot be filled from packed weights.

    python3 tests/runtimes/asks.py

Loading gives every linear without a value to `_init_weights` of the model's class, and a linear of a packed checkpoint has no
`weight`. Prints the `model_type` of each class that fails on one. Needs torch and transformers (requirements.txt).
"""

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING


def asks(config) -> bool:
    of = MODEL_MAPPING.get(type(config), None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if of is None:
        return False
    of = of[0] if isinstance(of, (tuple, list)) else of
    packed = nn.Linear(4, 4)
    del packed.weight
    model = of.__new__(of)
    nn.Module.__init__(model)
    model.config = config
    try:
        with torch.no_grad():
            model._init_weights(packed)
    except AttributeError as error:
        return "no attribute 'weight'" in str(error)
    return False


def main() -> None:
    transformers.logging.set_verbosity_error()
    for model_type in CONFIG_MAPPING:
        try:
            if asks(CONFIG_MAPPING[model_type]()):
                print(model_type)
        except Exception as error:
            print(f"# {model_type} was not tried: {type(error).__name__}")


if __name__ == "__main__":
    main()
