"""Cut the calibration text into the pieces that all three get, and measure the machine's matrix product.

    prepare.py MODEL TEXT SAMPLES SEQ_LEN OUT THREADS DEVICE

Writes OUT/tokens.json (the pieces' token ids, each exactly SEQ_LEN), OUT/calibration.jsonl (the same pieces as text, each a
little longer, since quantc tokenizes for itself and cuts to length), and OUT/peak.json.
"""

import json
import pathlib
import sys
import time

import torch
from tokenizers import Tokenizer

model, text, samples, length, out, threads, device = sys.argv[1:]
samples, length, out = int(samples), int(length), pathlib.Path(out)
text = pathlib.Path(text).read_text(encoding="utf-8").replace("<|document|>\n", "")
encoded = Tokenizer.from_file(f"{model}/tokenizer.json").encode(text, add_special_tokens=False)
margin = length // 16
step = (len(encoded.ids) - length - margin) // samples
if step < length:
    sys.exit(f"the calibration text has {len(encoded.ids)} tokens, too few for {samples} pieces of {length}")
pieces, ids = [], []
for start in range(0, samples * step, step):
    ids.append(encoded.ids[start : start + length])
    pieces.append(text[encoded.offsets[start][0] : encoded.offsets[start + length + margin][0]])
(out / "tokens.json").write_text(json.dumps(ids))
(out / "calibration.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))

torch.set_num_threads(int(threads))
gpu = device == "cuda"
if gpu and not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
size, kind = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))


def product():
    """The seconds of one."""
    started = time.perf_counter()
    a @ b
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


product()
seconds = min(product() for _ in range(5))
name = torch.cuda.get_device_name(0) if gpu else None
(out / "peak.json").write_text(json.dumps({"gflops": 2 * size**3 / seconds / 1e9, "device": name}))
