"""Cut the calibration text into the pieces that all three get, and measure the machine's matrix product.

    prepare.py MODEL TEXT SAMPLES SEQ_LEN OUT THREADS

Writes OUT/tokens.json (the pieces' token ids, each exactly SEQ_LEN), OUT/calibration.jsonl (the same pieces as text, each a
little longer, since quantc tokenizes for itself and cuts to length), and OUT/peak.json.
"""

import json
import pathlib
import sys
import time

import torch
from tokenizers import Tokenizer

model, text, samples, length, out, threads = sys.argv[1:]
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
a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
a @ b
seconds = []
for _ in range(5):
    started = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - started)
(out / "peak.json").write_text(json.dumps({"gflops": 2 * 2048**3 / min(seconds) / 1e9}))
