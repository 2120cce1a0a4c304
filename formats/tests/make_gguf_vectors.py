"""Writes vectors/gguf_parity.json: what gguf-py reads from random blocks, and the blocks it makes of chosen rows.

    pip install gguf==0.19.0 numpy==2.4.6
    python formats/tests/make_gguf_vectors.py

The other vectors/gguf_*.json hold blocks made by ggml's own ggml_quantize_chunk, with the values gguf-py reads from them.

Long inputs come from SplitMix64, which the test repeats, and long outputs are given as FNV-1a hashes of their bytes.
Every NaN counts as 0x7fc00000.
"""

import json
import pathlib

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K,
         T.IQ4_NL, T.IQ4_XS, T.TQ1_0, T.TQ2_0, T.MXFP4]
ENCODED = [T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.TQ1_0, T.TQ2_0, T.MXFP4]
WIDTH = 256
SEED = 20
MASK = (1 << 64) - 1


class Random:
    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def bytes(self, count):
        words = b"".join(self.next().to_bytes(8, "little") for _ in range(-(-count // 8)))
        return np.frombuffer(words[:count], np.uint8).copy()


def fnv(array):
    value = 0xCBF29CE484222325
    for byte in array.tobytes():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return f"{value:016x}"


def hex_of(array):
    return array.tobytes().hex()


def values_of(data, ty):
    values = np.ascontiguousarray(dequantize(data, ty)).astype(np.float32).reshape(-1)
    bits = values.view(np.uint32).copy()
    bits[np.isnan(values)] = 0x7FC00000
    return bits


def decoded(ty):
    length, size = GGML_QUANT_SIZES[ty]
    random = Random(SEED)
    bits = values_of(random.bytes(8 * WIDTH // length * size), ty)
    while True:
        sample = random.bytes(WIDTH // length * size)
        if np.isfinite(values_of(sample, ty).view(np.float32)).all():
            break
    return {"id": int(ty), "rows": 8, "fnv": fnv(bits), "row": hex_of(sample), "values": hex_of(values_of(sample, ty))}


def rows():
    """Named rows of 256 values that are hard to round as ggml does."""
    rng = np.random.default_rng(5)
    normal = (rng.standard_normal(WIDTH) * 0.02).astype(np.float32)
    steps = np.arange(WIDTH)
    named = {
        "zeros": np.zeros(WIDTH),
        "zeros of both signs": np.where(steps % 3 == 1, -0.0, 0.0),
        "normal": normal,
        "halves, most of them ties": (steps % 33 - 16) / 2.0,
        "ties of 127": np.where(steps % 32 == 0, 127.0, (steps % 17 - 8) + 0.5),
        "the largest is negative": np.where(steps % 32 == 9, -1.0, normal),
        "equal peaks of both signs": np.where(steps % 32 == 3, 0.5, np.where(steps % 32 == 5, -0.5, normal)),
        "equal peaks, negative first": np.where(steps % 32 == 3, -0.5, np.where(steps % 32 == 5, 0.5, normal)),
        "one huge value": np.where(steps == 77, 6.0e37, normal),
        "beyond a half": np.where(steps % 32 == 8, -9.0e6, normal * 1e6),
        "denormals": rng.integers(-4000, 4000, WIDTH) * 1e-44,
        "the smallest denormals": (steps % 3 - 1) * 1.4e-45,
        "near the smallest normal": normal * 1e-36,
        "steps too small for a half": normal * 1e-7,
        "all equal": np.full(WIDTH, 0.3),
        "all equal and negative": np.full(WIDTH, -0.3),
        "just below powers of two": np.nextafter(np.float32(2.0) ** (steps // 32 * 7 - 24).astype(np.float32),
                                                 np.float32(0)) * np.where(steps % 2, -1, 1),
        "levels of four-bit floats and between": np.tile(
            [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 6.5], 16) * np.where(steps % 5 == 0, -1, 1),
    }
    return {name: row.astype(np.float32) for name, row in named.items()}


def many():
    """32 rows of random floats of very different sizes."""
    bits = Random(SEED + 1).bytes(32 * WIDTH * 4).view(np.uint32)
    exponent = (bits >> 23 & 0x1F) + 100
    return ((bits & np.uint32(0x807FFFFF)) | (exponent << 23).astype(np.uint32)).view(np.float32).reshape(32, WIDTH)


def main():
    inputs = rows()
    result = {
        "producer": "gguf-py 0.19.0, by formats/tests/make_gguf_vectors.py",
        "seed": SEED,
        "decoded": {ty.name: decoded(ty) for ty in TYPES},
        "rows": {name: hex_of(row) for name, row in inputs.items()},
        "encoded": {},
    }
    with np.errstate(all="ignore"):
        for ty in ENCODED:
            result["encoded"][ty.name] = {
                "rows": {name: hex_of(quantize(row.reshape(1, -1), ty)) for name, row in inputs.items()},
                "many": fnv(quantize(many(), ty)),
            }
    path = pathlib.Path(__file__).parent / "vectors" / "gguf_parity.json"
    path.write_text(json.dumps(result, indent=0) + "\n")


if __name__ == "__main__":
    main()
