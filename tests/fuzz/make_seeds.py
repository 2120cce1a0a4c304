"""Writes seeds/: small files of every kind that the readers take, written from the specifications alone.

    python tests/fuzz/make_seeds.py
"""

import json
import pathlib
import struct

HERE = pathlib.Path(__file__).parent / "seeds"
# Type ids with the weights and the bytes of a block.
TYPES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84), 11: (256, 110),
         12: (256, 144), 13: (256, 176), 14: (256, 210), 20: (32, 18), 23: (256, 136), 30: (1, 2), 34: (256, 54),
         35: (256, 66), 39: (32, 17)}


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def array(kind, items):
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def gguf(keys, tensors, version=3):
    """keys: (name, type, value bytes); tensors: (name, extents fastest first, type, data)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    for name, kind, value in keys:
        out += string(name) + struct.pack("<I", kind) + value
    offset = 0
    for name, extents, kind, data in tensors:
        out += string(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)
        offset += -(-len(data) // 32) * 32
    for data in [b"", *(data for _, _, _, data in tensors)]:
        out += data
        out += bytes(-len(out) % 32)
    return out


def model_keys():
    return [
        ("general.architecture", 8, string("llama")),
        ("llama.block_count", 4, struct.pack("<I", 2)),
        ("a.u8", 0, b"\x07"),
        ("a.i8", 1, b"\xf9"),
        ("a.u16", 2, b"\x07\x01"),
        ("a.i16", 3, b"\xf9\xff"),
        ("a.i32", 5, struct.pack("<i", -7)),
        ("a.f32", 6, struct.pack("<f", 1e-5)),
        ("a.bool", 7, b"\x01"),
        ("a.u64", 10, struct.pack("<Q", 1 << 40)),
        ("a.i64", 11, struct.pack("<q", -1 << 40)),
        ("a.f64", 12, struct.pack("<d", 0.1)),
        ("tokenizer.ggml.tokens", 9, array(8, [string("a"), string("\u2581b"), string("")])),
        ("tokenizer.ggml.scores", 9, array(6, [struct.pack("<f", -1.5)] * 3)),
        ("tokenizer.ggml.token_type", 9, array(5, [struct.pack("<i", 1)] * 3)),
        ("a.nested", 9, array(9, [array(4, [struct.pack("<I", 1)]), array(4, [])])),
    ]


def block_tensors():
    tensors = []
    for kind, (weights, size) in TYPES.items():
        extents = (256, 2) if weights == 1 else (weights, 2)
        count = extents[0] * 2 // weights * size
        tensors.append((f"blk.{kind}.w", extents, kind, bytes((37 * i + kind) % 64 for i in range(count))))
    return tensors


def legacy(entries, ending):
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += struct.pack(f"<{len(values)}f", *values)
    return out + ending


def safetensors(header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def varint(value):
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def message(*fields):
    """A protocol-buffers message: (number, value), where a value is an integer, a float or bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value % 2**64)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def sentencepiece(rules=b"", **trainer):
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x0A>", 0.0, 6), ("▁a", -0.5, 1), ("é", -1.5, 1),
              ("<sep>", 0.0, 4), ("old", -9.0, 5)]
    parts = [(1, message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in pieces]
    trainer = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2, 43: -1} | {int(key[1:]): value for key, value in trainer.items()}
    normalizer = [(1, b"identity"), (2, rules), (3, 1), (4, 0), (5, 1)]
    return message(*parts, (2, message(*trainer.items())), (3, message(*normalizer)), (7, b"unknown"))


def rules():
    """`a` becomes `b`: the root, whose children are at 256, its child, and the child's value."""
    units = [0] * 512
    units[0] = 1 << 18
    units[256 ^ ord("a")] = ord("a") | 1 << 8 | ord("a") << 10
    units[256] = 1 << 31
    return struct.pack("<I512I", 2048, *units) + b"b\0"


def main():
    floats = struct.pack("<4f", 1, 2, 3, 4)
    small = [("norm", (4,), 0, floats), ("w", (2, 1, 2), 1, bytes(8))]
    split = [("split.no", 2, b"\0\0"), ("split.count", 2, b"\2\0"), ("split.tensors.count", 5, struct.pack("<i", 4))]
    statistics = [("general.type", 8, string("imatrix")), ("imatrix.datasets", 9, array(8, [string("a.txt")])),
                  ("imatrix.chunk_count", 4, struct.pack("<I", 3)), ("imatrix.chunk_size", 4, struct.pack("<I", 512))]
    sums = [("a.weight.in_sum2", (4,), 0, floats), ("a.weight.counts", (1,), 0, struct.pack("<f", 8)),
            ("b.weight.in_sum2", (2, 2), 0, floats), ("b.weight.counts", (1, 2), 0, struct.pack("<2f", 8, 0))]
    entries = [("a.weight", 3, [1.0, 2.0, 0.5]), ("b.weight", 0, [1.0])]
    seeds = {
        "gguf/types": gguf(model_keys()[:1], block_tensors()),
        "gguf/metadata": gguf(model_keys(), small),
        "gguf/version_2": gguf(model_keys()[:2], small, version=2),
        "gguf/aligned_64": gguf([("general.alignment", 4, struct.pack("<I", 64))], small[:1]) + bytes(64),
        "gguf/split": gguf(split, small),
        "gguf/empty": gguf([], []),
        "imatrix/gguf": gguf(statistics, sums),
        "imatrix/legacy": legacy(entries, struct.pack("<ii", 7, 5) + b"a.txt"),
        "imatrix/legacy_old": legacy(entries, b""),
        "safetensors/one": safetensors({"__metadata__": {"format": "pt"}, "w": {
            "dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}, bytes(range(8))),
        "safetensors/types": safetensors({
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F16", "shape": [1, 3], "data_offsets": [8, 14]},
            "c": {"dtype": "I64", "shape": [], "data_offsets": [14, 22]},
            "d": {"dtype": "U8", "shape": [0, 5], "data_offsets": [22, 22]}}, bytes(22)),
        "safetensors/empty": safetensors({}, b""),
        "sentencepiece/bpe": sentencepiece(),
        "sentencepiece/rules": sentencepiece(rules(), f3=1, f35=0),
    }
    for name, data in seeds.items():
        path = HERE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
