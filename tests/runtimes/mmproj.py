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
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
NAMES = [
    "qwen2_5_vl_vision", "qwen2_5_vl_vision.q8_0", "qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_5_vision", "qwen3_5_moe_vision",
    "gemma3_vision", "gemma3_vision.q8_0", "gemma4_vision", "gemma4_sound", "mistral3_vision", "smolvlm_vision", "lfm2_vl_vision",
    "internvl_vision", "glm4v_moe_vision", "kimi_k25_vision", "qwen2_audio_sound", "voxtral_sound",
]  # fmt: skip
# What tells of the model, or of the program that wrote the file.
OTHERS = ("general.name", "general.basename", "general.finetune", "general.size_label", "general.version", "GGUF.")
PREPROCESSOR = {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.125, 1.0]}
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


def plain(value):
    return [plain(one) for one in value] if isinstance(value, list) else value


def listing(gguf, path: Path) -> dict:
    reader = gguf.GGUFReader(path)
    keys = {name: plain(field.contents()) for name, field in reader.fields.items() if not name.startswith(OTHERS)}
    tensors = [
        [t.name, t.tensor_type.name, [int(n) for n in reversed(t.shape)], hashlib.sha256(t.data.tobytes()).hexdigest()]
        for t in reader.tensors
    ]
    return {"keys": dict(sorted(keys.items())), "tensors": sorted(tensors)}


def main() -> None:
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source / "gguf-py"), str(FIXTURES)]
    import gguf
    from make_families import write_whole

    for listed in sys.argv[2:] or NAMES:
        name, _, kind = listed.partition(".")
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            write_whole(name, scratch)
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
