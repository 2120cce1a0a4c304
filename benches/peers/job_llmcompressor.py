"""llm-compressor's GPTQ of one job (see run.py), as its examples do it: oneshot on a loaded model, then save compressed."""

import importlib.metadata
import json
import sys
import time

if __name__ == "__main__":
    job = json.load(open(sys.argv[1]))
    started = time.perf_counter()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokens = json.load(open(job["tokens"]))
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(ids) for ids in tokens]})
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    weights = {"num_bits": job["bits"], "type": "int", "symmetric": True, "strategy": "group", "group_size": job["group_size"]}
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    loaded = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        batch_size=job["batch"],
    )
    quantized = time.perf_counter()
    model.save_pretrained(job["out"], save_compressed=True)
    tokenizer.save_pretrained(job["out"])
    saved = time.perf_counter()
    times = {"load": loaded - started, "job": quantized - loaded, "save": saved - quantized}
    json.dump({**times, "version": importlib.metadata.version("llmcompressor")}, open(job["result"], "w"))
