#!/usr/bin/env python3
"""Quantize tiny models of families that quantc does not know, and load them in transformers with compressed-tensors.

For each family, with random weights of transformers' own class:

1. `quantc quantize` writes it with 8 bits, in groups of 32, by rounding;
2. transformers loads that with `output_loading_info`: no key may be missing or unexpected that is not so in the original too;
3. its logits are compared with those of `quantc convert ARTIFACT`, what quantc holds the file to mean: the largest difference
   may be TOLERANCE of the largest logit;
4. they are compared with the original's: a mean KL divergence of KL nats is allowed, and the original has to be far enough
   from betting on all tokens alike for that to say something;
5. every matrix in the file that has no codes has to be left out by the configuration, and every other not, as the runtimes
   themselves read it: of compressed-tensors by the library, of GPTQ (`dynamic`) and AWQ (`modules_to_not_convert`) by the
   rules of vLLM and transformers;
6. the report's note that the file loads only with `dequantize=True` has to be there where that is so, and nowhere else.

    python3 tests/runtimes/unknown.py                                # all
    python3 tests/runtimes/unknown.py --fast                         # what CI runs
    python3 tests/runtimes/unknown.py --docs docs/runtimes.md        # all, and the table into the documentation

Exit code 0: all hold; 1: one does not; 2: could not start.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import families
from ending import end
from families import HERE, ROOT, place_everything, quantc, say

MARKS = "<!-- unknown.py begins -->\n", "<!-- unknown.py ends -->"
COMMON = "--group-size 32 --method rtn --verify-text none --quiet"
LAYOUTS = {
    "ct": f"--format compressed-tensors --scheme W8A16 {COMMON}",
    "gptq": f"--format gptq --scheme W8A16 {COMMON}",
    "awq": f"--format awq --scheme W4A16_ASYM {COMMON}",
}
# Where it unpacks all while it loads, transformers rounds to the type of the scales, which is float16 where there are no experts.
KL, TOLERANCE, VOCABULARY = 0.01, 5e-3, 160
FAST = ["opt", "gpt_bigcode", "jamba", "phimoe", "zamba2", "t5", "bert", "nomic_bert", "luke"]

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 8, "mamba_n_groups": 1}
GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
BART = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

# The model_type, the class where it is no causal model, and the settings.
CASES = {
    "bloom": ("bloom", None, {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "opt": ("opt", None, SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "max_position_embeddings": 64}),
    "opt_untied": ("opt", None, SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": False, "max_position_embeddings": 64}),
    "falcon": ("falcon", None, SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode": ("gpt_bigcode", None, GPT),
    "mpt": ("mpt", None, {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gptj": ("gptj", None, GPT | {"rotary_dim": 8}),
    "codegen": ("codegen", None, GPT | {"rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", None, {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}),
    "biogpt": ("biogpt", None, SIZES | {"max_position_embeddings": 64}),
    "persimmon": ("persimmon", None, SIZES),
    "mamba": ("mamba", None, {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32}),
    "mamba2": ("mamba2", None, {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", None, {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32}),
    "jamba": ("jamba", None, GROUPED | EXPERTS | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 32, "use_mamba_kernels": False}),
    "zamba2": ("zamba2", None, GROUPED | {"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "mamba_d_state": 16, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 32, "use_shared_attention_adapter": False}),
    "recurrent_gemma": ("recurrent_gemma", None, GROUPED | {"intermediate_size": 128, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 32}),
    "phimoe": ("phimoe", None, GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "roberta_prelayernorm": ("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM", SIZES | {"max_position_embeddings": 66}),
    "rwkv": ("rwkv", None, {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64, "intermediate_size": 96, "context_length": 64}),
    "jetmoe": ("jetmoe", None, GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "num_key_value_heads": 4}),
    "xglm": ("xglm", None, {"vocab_size": VOCABULARY, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "max_position_embeddings": 64}),
    "bert": ("bert", "BertForMaskedLM", SIZES | {"max_position_embeddings": 64}),
    "nomic_bert": ("nomic_bert", "NomicBertForMaskedLM", SIZES | {"max_position_embeddings": 64, "head_dim": 16}),
    "luke": ("luke", "LukeForMaskedLM", SIZES | {"max_position_embeddings": 66, "entity_vocab_size": 16, "entity_emb_size": 32}),
    "modernbert": ("modernbert", "ModernBertForMaskedLM", SIZES | {"pad_token_id": 0}),
    "t5": ("t5", "T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}),
    "t5_gated": ("t5", "T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 2, "d_ff": 96, "num_layers": 2, "num_heads": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("umt5", "UMT5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}),
    "longt5": ("longt5", "LongT5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}),
    "switch_transformers": ("switch_transformers", "SwitchTransformersForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "num_experts": 2}),
    "modernbert_decoder": ("modernbert-decoder", None, SIZES | {"pad_token_id": 0}),
    "nanochat": ("nanochat", None, GROUPED),
    "dbrx": ("dbrx", None, {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}),
    "bart": ("bart", "BartForConditionalGeneration", BART),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Inside a venv: `unknown.py --worker JOB.json` makes the models, or loads them, and writes a line for each.


def model_class(folder):
    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def make(name, folder):
    """A model whose logits differ by some nats, so that wrong weights cannot go unseen."""
    import torch
    import transformers

    kind, cls, settings = CASES[name]
    torch.manual_seed(7)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **special | settings)
    cls = getattr(transformers, cls) if cls else transformers.AutoModelForCausalLM._model_mapping[type(config)]
    model = cls(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1 / max(weight.shape) ** 0.5)
            elif weight.dim() == 3:
                weight.normal_(0, 1 / max(weight.shape[1:]) ** 0.5)
            elif weight.std() == 0:
                weight.add_(0.1 * torch.randn_like(weight))
        for _ in range(2):  # A head that is the embedding changes more than the logits.
            model.get_output_embeddings().weight.mul_(1.5 / logits(model, tokens()).std())
    model.save_pretrained(folder)


def tokens():
    import torch

    return torch.randint(3, VOCABULARY - 8, (4, 24), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    import torch

    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits.float()


def loaded(folder, idle=None, **options):
    """A model; without `idle`, the original, and the names that it has no place for."""
    import torch

    settings = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    model, info = model_class(folder).from_pretrained(folder, output_loading_info=True, **settings)
    unexpected = set(info["unexpected_keys"])
    place_everything(model, info, unexpected if idle is None else idle)
    return (model.eval(), unexpected)


def named(folder):
    """Modules of a file that have codes, and those of its matrices that have none."""
    from safetensors import safe_open

    codes, plain = set(), set()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            module, _, part = name.rpartition(".")
            if part in ("weight_packed", "qweight"):
                codes.add(module)
            elif part == "weight" and len(file.get_slice(name).get_shape()) == 2:
                plain.add(module)
    return codes, plain


def skipped(config):
    """What the runtimes make of a configuration: whether a module is left out, by the rule of each."""
    from compressed_tensors.utils.match import match_name
    from transformers.quantizers.quantizers_utils import should_convert_module

    if config["quant_method"] == "compressed-tensors":
        return {"compressed-tensors": lambda module: any(match_name(module, target) for target in config["ignore"])}
    if config["quant_method"] == "gptq":
        rules = [rule.removeprefix("-:") for rule in config.get("dynamic", {}) if rule.startswith("-:")]
        return {"GPTQModel and vLLM": lambda module: any(re.match(rule, module) for rule in rules)}
    skip = config["modules_to_not_convert"] or []
    return {
        "vLLM": lambda module: any(part in module for part in skip),
        "transformers": lambda module: not should_convert_module(module, skip),
    }


def check_names(folder):
    """Fails unless a configuration leaves out what has no codes, and nothing else. Embeddings are no runtime's linears."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    codes, plain = named(folder)
    for runtime, leaves in skipped(config).items():
        # The head has a setting of its own in GPTQ.
        head = "lm_head" if config["quant_method"] == "gptq" else None
        if unnamed := sorted(m for m in plain if not leaves(m) and m.rpartition(".")[2] != head):
            raise RuntimeError(f"{len(unnamed)} matrices have no codes and are not named for {runtime}: {', '.join(unnamed[:4])}")
        if lost := sorted(filter(leaves, codes)):
            raise RuntimeError(f"{len(lost)} modules have codes, and {runtime} leaves them out: {', '.join(lost[:4])}")
    return len(codes), len(plain)


def compare(item):
    import torch
    from transformers import CompressedTensorsConfig

    folder = {what: pathlib.Path(path) for what, path in item["folders"].items()}
    answer = {}
    for layout in LAYOUTS:
        if layout in folder:
            answer[f"{layout}_names"] = check_names(folder[layout])
    ids = tokens()
    original, idle = loaded(folder["original"])
    plain, _ = loaded(folder["plain"], idle)
    try:
        found, _ = loaded(folder["ct"], idle)
    except AttributeError as error:
        # Some classes' `_init_weights` asks for the weights of linears while they are compressed.
        if "has no attribute 'weight'" not in str(error):
            raise
        answer["dense"] = True
        found, _ = loaded(folder["ct"], idle, quantization_config=CompressedTensorsConfig(dequantize=True))
    original, plain, found = (logits(model, ids) for model in (original, plain, found))
    expected = original.log_softmax(-1)
    entropy = -(expected.exp() * expected).sum(-1).mean().item()
    if not entropy < 0.9 * torch.tensor(float(original.shape[-1])).log().item():
        raise RuntimeError(f"the original bets on all tokens alike ({entropy:.2f} nats), so that a comparison says nothing")
    answer["kl"] = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean().item()
    answer["difference"] = ((found - plain).abs().max() / plain.abs().max()).item()
    return answer


def worker(path):
    import traceback

    import torch

    torch.set_num_threads(1)
    job = json.loads(pathlib.Path(path).read_text())
    with open(job["result"], "a") as out:
        for item in job["items"]:
            print(f"==== {item['name']}", flush=True)
            try:
                answer = compare(item) if "folders" in item else make(item["name"], pathlib.Path(item["make"])) or {}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps({"name": item["name"], "column": None} | answer) + "\n")
            out.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Outside: write the artifacts, start the worker, judge.


def artifacts(options, folder, name):
    """Writes a model in every layout, and what compressed-tensors means."""
    folders, refused = {"original": str(folder / name)}, {}
    for layout, arguments in LAYOUTS.items():
        out = folder / f"{name}-{layout}"
        code, said = quantc(options.quantc, "quantize", folder / name, "-o", out, *arguments.split())
        if code == 2 and layout != "ct":
            refused[layout] = said.removeprefix("error: ")
        elif code:
            raise RuntimeError(f"quantc ended with {code}: {said[-600:]}")
        else:
            folders[layout] = str(out)
    code, said = quantc(options.quantc, "convert", folders["ct"], "-o", folder / f"{name}-plain", "--dtype", "f32")
    if code:
        raise RuntimeError(f"quantc convert ended with {code}: {said[-600:]}")
    notes = json.loads((folder / f"{name}-ct" / "report.json").read_text())["notes"]
    return folders | {"plain": str(folder / f"{name}-plain")}, refused, any("dequantize=True" in note for note in notes)


def judge(found, noted):
    if "error" in found:
        return found["error"]
    if bool(found.get("dense")) != noted:
        return f"the report {'says' if noted else 'does not say'} that it loads with dequantize=True alone"
    if not found["kl"] <= KL:  # nor is NaN
        return f"KL {found['kl']:.1e}"
    if not found["difference"] <= TOLERANCE:
        return f"logits differ by {found['difference']:.1e} of the largest from what quantc reads"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="FAMILY", help=f"only these of {', '.join(CASES)}")
    parser.add_argument("--fast", action="store_true", help="one of each kind")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--artifacts", type=pathlib.Path, help="keep what is written in this new folder")
    parser.add_argument("--docs", type=pathlib.Path, help="write the table into this file, between its marks")
    parser.add_argument("--verbose", action="store_true", help="show the runtime's whole output")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    names = options.names or (FAST if options.fast else list(CASES))
    if unknown := {*names} - {*CASES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not options.quantc.exists():
        parser.error(f"{options.quantc} does not exist")
    options.quantc = options.quantc.resolve()
    import cpu_torch
    from check import TORCH

    started, wrong, lines = time.time(), [], []
    folder = (options.artifacts or pathlib.Path(tempfile.mkdtemp(prefix="quantc-unknown-"))).resolve()
    folder.mkdir(exist_ok=True)
    try:
        wanted = [HERE / "requirements-transformers.txt"]
        python = cpu_torch.environment(options.venv.resolve() / "transformers", TORCH["transformers"], wanted)
        items = [{"name": name, "column": None, "make": str(folder / name)} for name in names]
        made = families.run_job(python, options, items, folder, script=pathlib.Path(__file__).name)
        for item in items:
            found = made[item["name"], None]
            if "error" not in found:
                try:
                    item["folders"], item["refused"], item["noted"] = artifacts(options, folder, item["name"])
                except RuntimeError as error:
                    found["error"] = str(error)
        say(f"written after {time.time() - started:.0f} s")
        compared = [item for item in items if "folders" in item]
        made |= families.run_job(python, options, compared, folder, script=pathlib.Path(__file__).name)
    finally:
        if not options.artifacts:
            shutil.rmtree(folder, ignore_errors=True)
    for item in items:
        found = made[item["name"], None]
        if problem := judge(found, item.get("noted")):
            wrong.append(f"{item['name']}: {problem[:600]}")
            continue
        codes, plain = found["ct_names"]
        others = [
            "yes" if f"{layout}_names" in found else "no: " + families.short(item["refused"][layout]) for layout in ("gptq", "awq")
        ]
        name = f"({item['name']})" if found.get("dense") else item["name"]
        lines.append(f"| {name} | {codes} | {plain} | {found['kl']:.1e} | {found['difference']:.0e} | {' | '.join(others)} |")
    head = "| family | quantized | left and named | KL | difference from quantc's reading | GPTQ names all | AWQ names all |"
    result = "\n".join([head, "|---" * 7 + "|", *lines]) + "\n"
    summary = f"{len(items)} families, {len(wrong)} damaged; {time.time() - started:.0f} s"
    return end(options, MARKS, result, wrong, summary, say)


if __name__ == "__main__":
    sys.exit(main())
