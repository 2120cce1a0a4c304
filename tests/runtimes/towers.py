#!/usr/bin/env python3
"""Hold image features of outputs of `quantc quantize --towers quantize` beside the original's, in transformers.

    python3 tests/runtimes/towers.py [--quantc PROGRAM] [NAME ...]      # needs torch, transformers 5, compressed-tensors and pillow

Of each tiny checkpoint of make_families.py that sees the tower is quantized with 8 bits in compressed-tensors. Each linear of it has to be a
quantized one in transformers, and the cosine of each feature above LEAST. Where a note says that transformers does not load the output, it
is loaded as the note says. Exit code 1 where anything is otherwise.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
NAMES = [
    "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_5_vision", "glm4v_moe_vision", "mistral3_vision", "llava_vision", "internvl_vision", "gemma3_vision",
]  # fmt: skip
LEAST = 0.999
SCHEME = ["--scheme", "W8A16", "--group-size", "32", "--method", "rtn", "--verify-text", "none", "--towers", "quantize"]


def features(folder: Path, **loading):
    """Features of one picture, and the model."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **loading).eval()
    tower = model.config.vision_config
    # Some take pictures of one size alone.
    own = getattr(tower, "image_size", 112)
    side = {"pixtral": 112}.get(tower.model_type, own if isinstance(own, int) else own[0])
    pixels = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        # Packed linears are unpacked when the model is first called.
        model(input_ids=torch.tensor([[3, 4, 5]]))
        if hasattr(tower, "temporal_patch_size"):
            patch, merge = tower.patch_size, tower.spatial_merge_size
            side = side // (patch * merge) * patch * merge
            grid, blocks = side // patch, side // patch // merge
            cut = pixels[:, :side, :side].reshape(3, blocks, merge, patch, blocks, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
            twice = cut.unsqueeze(5).expand(*cut.shape[:5], tower.temporal_patch_size, patch, patch)
            found = model.model.get_image_features(twice.reshape(grid * grid, -1), torch.tensor([[1, grid, grid]]))
        else:
            sizes = {"image_sizes": torch.tensor([[side, side]])} if tower.model_type == "pixtral" else {}
            found = model.model.get_image_features(pixel_values=pixels[None], **sizes)
    found = getattr(found, "pooler_output", found)
    found = found[0] if isinstance(found, (list, tuple)) else found
    return found.reshape(-1, found.shape[-1]), model


def check(quantc: Path, name: str, scratch: Path) -> bool:
    from make_families import write_whole

    write_whole(name, scratch)
    output = scratch / f"{name}-quantized"
    subprocess.run([quantc, "quantize", scratch / name, "-o", output, "--quiet", *SCHEME], check=True, stderr=subprocess.DEVNULL)
    notes = json.loads((output / "report.json").read_text())["notes"]
    packed = any("class of the tower" in note for note in notes)
    before, _ = features(scratch / name)
    after, model = features(output, **{"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {})
    linears = sum(hasattr(module, "quantization_scheme") and "language" not in at for at, module in model.named_modules())
    least = float(torch.nn.functional.cosine_similarity(before, after, dim=-1).min())
    good = least > LEAST and not torch.equal(before, after) and (packed or linears > 0)
    print(f"{name}: cosine {least:.6f}, {linears} linears of the tower{', unpacked as it is loaded' if packed else ''}{'' if good else ': FAILED'}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--quantc", type=Path, default=ROOT / "target" / "release" / "quantc")
    options = parser.parse_args()
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        good = [check(options.quantc.resolve(), name, Path(scratch)) for name in options.names or NAMES]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
