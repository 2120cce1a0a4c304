#!/usr/bin/env python3
"""Make tests/fixtures/mmproj/: what llama.cpp's own converter writes as `mmproj` of the tiny checkpoints that see.

    python3 mmproj.py LLAMA_CPP [NAME ...]      # needs torch, transformers 5 and safetensors; LLAMA_CPP is its source

A NAME may end in a type of matrices other than the checkpoint's own, as gemma3_vision.q8_0.

Of each checkpoint of make_families.py a file with the keys but for those that name the model, and [name, type, shape, sha256] of each
tensor. `tests/it/wrappers.rs` holds what quantc writes to it, bytes included.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
NAMES = [
    "qwen2_5_vl_vision", "qwen2_5_vl_vision.q8_0", "qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_5_vision", "qwen3_5_moe_vision",
    "gemma3_vision", "gemma3_vision.q8_0", "gemma4_vision", "gemma4_sound", "gemma4_unified_sound", "mistral3_vision", "smolvlm_vision", "lfm2_vl_vision",
    "internvl_vision", "glm4v_vision", "glm4v_moe_vision", "glm5_next_vision", "internvl_chat_vision",
    "kimi_vl_vision", "kimi_k25_vision", "qwen2_audio_sound", "voxtral_sound", "gemma3n_towers.f16",
]  # fmt: skip
# What tells of the model, or of the program that wrote the file.
OTHERS = ("general.name", "general.basename", "general.finetune", "general.size_label", "general.version", "GGUF.")
PREPROCESSOR = {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.125, 1.0], "min_image_tokens": 4, "max_image_tokens": 64}
# The converter knows as many linears of a projector as there are blocks, of which the tiny checkpoints have one or two.
WIDER = """
import runpy, sys
source = sys.argv.pop(1)
sys.path[:0] = [source, source + "/gguf-py"]
import gguf
names = gguf.get_tensor_name_map
gguf.get_tensor_name_map = lambda arch, blocks: names(arch, max(blocks, 8))
sys.argv[0] = source + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


DERIVED = {"internvl_chat_vision": "internvl_vision", "kimi_vl_vision": "kimi_k25_vision", "gemma4_unified_sound": "gemma4_unified_vision"}
# What InternVL's own code calls what transformers calls otherwise.
CHAT = {
    "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.", "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.", "model.vision_tower.": "vision_model.", "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding", "embeddings.position_embeddings": "embeddings.position_embedding",
    "encoder.layer.": "encoder.layers.", "attention.projection_layer": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2",
    "lambda_": "ls",
}  # fmt: skip
KIMI = {"mm_projector.pre_norm": "multi_modal_projector.pre_norm", "mm_projector.proj.0": "multi_modal_projector.linear_1",
        "mm_projector.proj.2": "multi_modal_projector.linear_2"}  # fmt: skip


def derive(name: str, folder: Path) -> None:
    """Rewrite a checkpoint of transformers' as other code publishes it."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if name == "gemma4_unified_sound":
        # Its converter asks for both.
        own = "model.embed_{}.embedding_projection.weight"
        tensors[own.format("audio")] = torch.zeros(64, 640, dtype=torch.bfloat16)
        config["audio_config"] = {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return
    chat = name == "internvl_chat_vision"
    for old in list(tensors):
        new = old
        for part, other in (CHAT if chat else KIMI).items():
            new = new.replace(part, other, 1)
        tensors[new] = tensors.pop(old)
    for first in [one for one in tensors if ".attention.q_proj." in one]:
        parts = [tensors.pop(first.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        tensors[first.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    if chat:
        vision = config["vision_config"] | {"model_type": "intern_vit_6b"}
        vision |= {key: vision[key][0] for key in ("image_size", "patch_size")}
        config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "llm_config": config["text_config"],
                  "vision_config": vision, "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2"}  # fmt: skip
    else:
        config |= {"architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl"}
        config["vision_config"]["model_type"] = "moonvit"
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def write(name: str, scratch: Path) -> None:
    """The checkpoint of that name as a folder in another."""
    from make_families import save, state_of, write_whole

    described = FIXTURES / "mmproj" / name
    if not described.is_dir():
        write_whole(DERIVED.get(name, name), scratch)
        if name in DERIVED:
            (scratch / DERIVED[name]).rename(scratch / name)
            derive(name, scratch / name)
        return
    shutil.copytree(described, scratch / name)
    tensors = json.loads((described / "tensors.json").read_text())
    # Of what Gemma 3n hears the converter knows not every name, and llama.cpp reads none of it.
    save(scratch / name, state_of([one for one in tensors if "audio" not in one[0]]))
    for file in (FIXTURES.parents[1] / "src/demo/model").glob("tokenizer*"):
        shutil.copy(file, scratch / name)


def plain(value):
    return [plain(one) for one in value] if isinstance(value, list) else value


def listing(gguf, path: Path) -> dict:
    reader = gguf.GGUFReader(path)
    keys = {name: plain(field.contents()) for name, field in reader.fields.items() if not name.startswith(OTHERS)}
    if keys.get("clip.audio.projector_type") == "gemma3na":
        keys = {name: value for name, value in keys.items() if "audio" not in name}
    tensors = [
        [t.name, t.tensor_type.name, [int(n) for n in reversed(t.shape)], hashlib.sha256(t.data.tobytes()).hexdigest()]
        for t in reader.tensors
    ]
    return {"keys": dict(sorted(keys.items())), "tensors": sorted(tensors)}


def main() -> None:
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source / "gguf-py"), str(FIXTURES)]
    import gguf

    for listed in sys.argv[2:] or NAMES:
        name, _, kind = listed.partition(".")
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            write(name, scratch)
            (scratch / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
            # transformers spells this class otherwise than the published model does.
            config = (scratch / name / "config.json").read_text()
            (scratch / name / "config.json").write_text(config.replace("Kimi_K25For", "KimiK25For"))
            tokenizer = json.loads((scratch / name / "tokenizer.json").read_text())
            tokenizer["added_tokens"].append({"id": 12, "content": "[IMG_BREAK]", "special": True})
            (scratch / name / "tokenizer.json").write_text(json.dumps(tokenizer))
            (scratch / name / "tokenizer_config.json").write_text("{}")
            out = scratch / "out.gguf"
            command = [sys.executable, "-c", WIDER, source, "--mmproj", "--outfile", out, scratch / name]
            command += ["--outtype", kind] if kind else []
            made = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(source / "gguf-py")})
            if made.returncode:
                print(f"{listed}: FAILED: {made.stderr.strip()[-700:]}")
                continue
            found = listing(gguf, out)
        lines = ",\n".join("  " + json.dumps(tensor) for tensor in found["tensors"])
        keys = json.dumps(found["keys"], indent=1)
        (FIXTURES / "mmproj" / f"{listed}.json").write_text(f'{{"keys": {keys},\n"tensors": [\n{lines}\n]}}\n')
        print(f"{listed}: {len(found['keys'])} keys, {len(found['tensors'])} tensors")


if __name__ == "__main__":
    main()
