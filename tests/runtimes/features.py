#!/usr/bin/env python3
"""Hold what llama.cpp makes of a picture with `mmproj` files of quantc beside what the published code of models makes of it.

    python3 tests/runtimes/features.py [--quantc PROGRAM] LLAMA_CPP BUILD [NAME ...]     # needs torch, transformers 5, safetensors and g++

LLAMA_CPP is the source of llama.cpp, and BUILD the folder with its libraries. transformers has no class for Kimi-VL, so that its tower is
computed here, after the published code: pairs of queries and keys turn by width and height in turn, and positions are interpolated by cubic
splines. The tower of gemma3n_towers is one of timm, which has to be there for it, with smaller blocks than the published one. Exit code 1
where the cosine of a feature is less than LEAST.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fixtures")]
# llama.cpp interpolates the positions of Kimi-VL linearly.
LEAST = {"kimi_vl_vision": 0.9998, "kimi_k25_vision": 0.9999, "gemma3n_towers": 0.999}
SIDES = {"gemma3n_towers": 768}
# Of each stage what its blocks are, as timm writes them.
BLOCKS = [
    ["er_r1_k3_s2_e4_c8", "er_r1_k3_s1_e4_c8"],
    ["uir_r1_a3_k5_s2_e6_c16", "uir_r1_a5_k0_s1_e4_c16"],
    ["uir_r1_a5_k5_s2_e6_c32", "uir_r1_a0_k0_s1_e1_c32", "mqa_r1_k3_h2_v2_s1_d8_c32", "uir_r1_a0_k0_s1_e2_c32"],
    ["uir_r1_a5_k5_s2_e6_c64", "mqa_r1_k3_h4_s1_d16_c64", "uir_r1_a0_k0_s1_e2_c64"],
]


def picture(side: int) -> torch.Tensor:
    """[3, side, side], between 0 and 1; the same stands in mtmd.cpp."""
    y, x = np.mgrid[0:side, 0:side]
    pixels = np.stack([(y * 7 + x * 3 + colour * 50 + (y * x) % 31) % 256 for colour in range(3)])
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def tensors(folder: Path) -> dict:
    return {name.removeprefix("model."): tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def kimi(folder: Path, projector: list) -> torch.Tensor:
    """The tower of both models, and the norm and the two linears of the projector that have these names."""
    all, vision = tensors(folder), json.loads((folder / "config.json").read_text())["vision_config"]
    linear = lambda x, name: F.linear(x, all[f"{name}.weight"], all[f"{name}.bias"])
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], all[f"{name}.weight"], all[f"{name}.bias"], 1e-5)
    patches = F.conv2d(picture(112)[None] * 2 - 1, all["vision_tower.patch_embed.proj.weight"], all["vision_tower.patch_embed.proj.bias"], stride=14)[0]
    width, rows, columns = patches.shape
    places = all["vision_tower.patch_embed.pos_emb.weight"].permute(2, 0, 1)[None]
    x = (patches + F.interpolate(places, size=(rows, columns), mode="bicubic")[0]).flatten(1).T
    heads = vision["num_attention_heads"]
    wide = width // heads
    rates = 1e4 ** (-torch.arange(0, wide, 4) / wide)
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    angles = torch.stack([column[:, None] * rates, row[:, None] * rates], dim=-1).flatten(1)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)
    for block in range(vision["num_hidden_layers"]):
        at = f"vision_tower.encoder.blocks.{block}"
        q, k, v = linear(norm(x, f"{at}.norm0"), f"{at}.wqkv").unflatten(-1, (3, heads, wide)).unbind(1)
        q, k, v = (part.transpose(0, 1) for part in (turned(q), turned(k), v))
        x = x + linear(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1), f"{at}.wo")
        x = x + linear(F.gelu(linear(norm(x, f"{at}.norm1"), f"{at}.mlp.fc0"), approximate="tanh"), f"{at}.mlp.fc1")
    x = norm(x, "vision_tower.encoder.final_layernorm")
    x = x.view(rows // 2, 2, columns // 2, 2, width).transpose(1, 2).reshape(-1, 4, width)
    first, second, third = projector
    return linear(F.gelu(linear(norm(x, first).flatten(1), second)), third)


def gemma3n(folder: Path) -> torch.Tensor:
    from timm.layers import RmsNorm2d
    from timm.models import mobilenetv5
    from timm.models._efficientnet_builder import decode_arch_def

    all, wide = tensors(folder), 32
    common = {"norm_layer": RmsNorm2d, "act_layer": mobilenetv5._GELU}
    tower = mobilenetv5.MobileNetV5Encoder(
        decode_arch_def(BLOCKS), stem_size=8, fix_stem=True, pad_type="same", layer_scale_init_value=1e-5, round_chs_fn=int, **common
    )
    tower.msfa = mobilenetv5.MobileNetV5MultiScaleFusionAdapter(tower.msfa_in_chs, wide, 16, **common)
    before = "vision_tower.timm_model."
    tower.load_state_dict({name.removeprefix(before): tensor for name, tensor in all.items() if name.startswith(before)})
    x = tower.eval()(picture(768)[None])[0].flatten(1).T * wide**0.5
    x = F.rms_norm(x, (wide,), all["embed_vision.soft_embedding_norm.weight"], 1e-6)
    x = F.linear(x, all["embed_vision.embedding_projection.weight"])
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


FOUND = {
    "kimi_vl_vision": lambda folder: kimi(folder, [f"multi_modal_projector.{name}" for name in ("pre_norm", "linear_1", "linear_2")]),
    "kimi_k25_vision": lambda folder: kimi(folder, [f"mm_projector.{name}" for name in ("pre_norm", "proj.0", "proj.2")]),
    "gemma3n_towers": gemma3n,
}


def check(options: argparse.Namespace, name: str, scratch: Path, program: Path) -> bool:
    from gguf_families import FIXTURES, make
    from mmproj import DERIVED, derive

    folder, beside = scratch / name, FIXTURES.parent / "mmproj"
    make(DERIVED.get(name, name), folder, beside if (beside / name).is_dir() else FIXTURES)
    if name in DERIVED:
        derive(name, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    model, out = scratch / f"{name}.gguf", scratch / f"{name}.bin"
    command = [options.quantc.resolve(), "quantize", folder, "-o", model, "--format", "gguf", "--scheme", "F32", "--method", "rtn", "--quiet"]
    subprocess.run([*command, "--verify-text", "none"], check=True, stderr=subprocess.DEVNULL)
    side = str(SIDES.get(name, 112))
    environment = os.environ | {"LD_LIBRARY_PATH": str(options.build.resolve())}
    made = subprocess.run([program, model, scratch / f"mmproj-{name}.gguf", side, out], env=environment, capture_output=True, text=True)
    if made.returncode:
        print(f"{name}: FAILED: {made.stderr.strip()[-700:]}")
        return False
    with torch.no_grad():
        expected = FOUND[name](folder)
    found = torch.from_numpy(np.fromfile(out, np.float32)).reshape(expected.shape)
    least = float(F.cosine_similarity(found, expected, dim=-1).min())
    print(f"{name}: {len(found)} features, cosine {least:.6f}{'' if least >= LEAST[name] else ': FAILED'}")
    return least >= LEAST[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("build", type=Path)
    parser.add_argument("names", nargs="*", default=list(FOUND))
    parser.add_argument("--quantc", type=Path, default=HERE.parents[1] / "target" / "release" / "quantc")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "mtmd"
        include = [f"-I{options.source / part}" for part in ("include", "ggml/include", "tools/mtmd")]
        libraries = [f"-L{options.build}", "-lmtmd", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
        subprocess.run(["g++", "-std=c++17", HERE / "mtmd.cpp", *include, *libraries, "-o", program], check=True)
        good = [check(options, name, Path(scratch), program) for name in options.names]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
