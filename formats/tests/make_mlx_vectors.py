"""Writes vectors/mlx.json: weights as MLX packs them, and the values that it reads from them.

    pip install "mlx[cpu]==0.32.4"
    python formats/tests/make_mlx_vectors.py

Each case has the bits, the group, the type of scales and biases, the three parts (type, shape, bytes in hex), and the values in float32,
which MLX makes of scales and biases that were widened to float32 first. Takes seconds on a CPU.
"""

import json
import pathlib

import mlx.core as mx
import numpy as np

NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}


def stored(array):
    array = mx.contiguous(array)
    raw = np.array(array.view(mx.uint8) if array.dtype != mx.uint8 else array)
    return {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data": raw.tobytes().hex()}


def cases():
    random = np.random.default_rng(7)
    for bits, group, dtype in [
        (4, 32, mx.bfloat16), (4, 64, mx.bfloat16), (4, 128, mx.float16), (8, 32, mx.float16), (8, 64, mx.bfloat16),
        (8, 128, mx.float32), (2, 64, mx.float16), (3, 32, mx.bfloat16), (5, 64, mx.float16), (6, 64, mx.float16),
    ]:  # fmt: skip
        weight = random.standard_normal((3, 128)) * 0.05 + random.standard_normal((3, 1)) * 0.02
        # Nothing below zero, nothing above it, and nothing at all.
        weight[0, :32], weight[1, :32], weight[2, :group] = abs(weight[0, :32]), -abs(weight[1, :32]), 0
        packed, scales, biases = mx.quantize(mx.array(weight).astype(dtype), group_size=group, bits=bits)
        wide = scales.astype(mx.float32), biases.astype(mx.float32)
        values = mx.dequantize(packed, *wide, group_size=group, bits=bits)
        yield {
            "bits": bits,
            "group": group,
            "parts": {"weight": stored(packed), "scales": stored(scales), "biases": stored(biases)},
            "values": stored(values),
        }


text = ",\n".join(json.dumps(case) for case in cases())
pathlib.Path(__file__).with_name("vectors").joinpath("mlx.json").write_text(f"[\n{text}\n]\n")
