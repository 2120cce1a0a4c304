"""GPTQModel's GPTQ of one job (see run.py), as its README does it: load, quantize, save."""

import importlib.metadata
import json
import sys
import time

if __name__ == "__main__":
    job = json.load(open(sys.argv[1]))
    started = time.perf_counter()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(job["threads"])
    tokens = json.load(open(job["tokens"]))
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens]
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], device=job["device"])
    model = GPTQModel.load(job["model"], config)
    loaded = time.perf_counter()
    model.quantize(data, batch_size=job["batch"])
    quantized = time.perf_counter()
    model.save(job["out"])
    saved = time.perf_counter()
    times = {"load": loaded - started, "job": quantized - loaded, "save": saved - quantized}
    json.dump({**times, "version": importlib.metadata.version("gptqmodel")}, open(job["result"], "w"))
