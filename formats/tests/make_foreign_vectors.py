"""Writes vectors/foreign.json: tensors as other libraries store them, and the values those libraries read from them.

    pip install bitsandbytes==0.50.2 compressed-tensors==0.20.0 transformers==5.23.0 torch==2.15.0
    python formats/tests/make_foreign_vectors.py

Each case has the quantization_config, the stored tensors (type, shape, bytes in hex) and the values in float32. Takes seconds on a CPU.
"""

import json
import pathlib

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
torch.manual_seed(7)


def stored(tensor):
    tensor = tensor.detach().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data": data.hex()}


def case(label, config, tensors, name, values):
    values = values.detach().to(torch.float32)
    assert torch.isfinite(values).all() and values.abs().max() > 0, label
    return {
        "label": label,
        "quantization_config": config,
        "tensors": {key: stored(value) for key, value in tensors.items()},
        "name": name,
        "values": stored(values),
    }


def weight(*shape):
    return torch.randn(*shape) * (torch.rand(shape[-2], 1) + 0.2)


def fp8():
    dequantize = Fp8Dequantize(None)._dequantize_one

    def quantized(rows, cols, m, n, dtype=torch.float8_e4m3fn):
        w = weight(rows, cols)
        blocks = w.reshape(rows // m, m, cols // n, n)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(dtype).max
        return (blocks / scale[:, None, :, None]).reshape(rows, cols).to(dtype), scale

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    q, s = quantized(32, 48, 16, 16)
    yield case("fp8 in blocks of 16x16", config, {"a.weight": q, "a.weight_scale_inv": s}, "a.weight",
               dequantize(q, s, torch.float32))  # fmt: skip
    e8m0 = torch.exp2(torch.ceil(torch.log2(s))).to(torch.float8_e8m0fnu)
    yield case("fp8 in blocks of 16x16", {**config, "scale_fmt": "ue8m0"}, {"a.weight": q, "a.weight_scale_inv": e8m0},
               "a.weight", dequantize(q, e8m0, torch.float32))  # fmt: skip
    q, s = quantized(8, 16, 8, 16)
    s = s.to(torch.bfloat16)
    yield case("fp8 with one scale", {**config, "weight_block_size": None},
               {"a.weight": q, "a.weight_scale_inv": s.reshape(()), "a.activation_scale": s.reshape(())}, "a.weight",
               dequantize(q, s, torch.float32))  # fmt: skip
    q, s = quantized(8, 16, 8, 16, torch.float8_e5m2)
    yield case("fp8 e5m2 with one scale", {**config, "weight_block_size": None},
               {"a.weight": q, "a.weight_scale_inv": s.reshape(1)}, "a.weight", dequantize(q, s, torch.float32))  # fmt: skip
    packed = torch.randint(-128, 128, (3, 4, 32), dtype=torch.int8)
    s = torch.exp2(torch.randint(-9, 3, (3, 4, 2)).float()).to(torch.float8_e8m0fnu)
    values = torch.stack([dequantize(packed[i], s[i], torch.float32) for i in range(3)])
    yield case("fp4 in groups of 32", config, {"experts.up": packed, "experts.up_scale_inv": s}, "experts.up", values)
    # What torch's product with per-row scales computes.
    q, s = quantized(8, 16, 1, 16)
    yield case("fp8 with a scale per row", {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
               {"a.weight": q, "a.weight_scale": s}, "a.weight", q.float() * s)  # fmt: skip


def compressed_tensors():
    block = {"strategy": "block", "block_structure": [16, 32]}
    for label, name, args, shape in [
        ("int8 with a scale per row", "int-quantized", dict(num_bits=8, strategy="channel"), (8, 32)),
        ("int8 in groups of 16", "naive-quantized",
         dict(num_bits=8, strategy="group", group_size=16, symmetric=False), (8, 32)),
        ("fp8 with one scale", "float-quantized", dict(num_bits=8, type="float", strategy="tensor"), (8, 32)),
        ("fp8 with a scale per row", "float-quantized", dict(num_bits=8, type="float", strategy="channel"), (8, 32)),
        ("fp8 in blocks of 16x32", "float-quantized", dict(num_bits=8, type="float", **block), (24, 48)),
        ("fp8 in groups of 32", "mxfp8-quantized",
         dict(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8), (8, 64)),
        ("fp4 in groups of 16", "nvfp4-pack-quantized",
         dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn), (8, 32)),
        ("fp4 in groups of 32", "mxfp4-pack-quantized",
         dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8), (8, 64)),
    ]:  # fmt: skip
        args = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)
        w = weight(*shape)
        if args.strategy == "block":
            m, n = args.block_structure
            rows, cols = -(-shape[0] // m), -(-shape[1] // n)
            padded = torch.zeros(rows * m, cols * n)
            padded[: shape[0], : shape[1]] = w
            grouped = padded.reshape(rows, m, cols, n)
            low, high = grouped.amin((1, 3)), grouped.amax((1, 3))
        elif args.group_size and args.group_size > 0:
            grouped = w.reshape(shape[0], -1, args.group_size)
            low, high = grouped.amin(-1), grouped.amax(-1)
        elif args.strategy == "channel":
            low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        else:
            low, high = w.amin().reshape(1), w.amax().reshape(1)
        overall = generate_gparam(low.amin().reshape(1), high.amax().reshape(1)) if "nvfp4" in name else None
        scale, zero = calculate_qparams(low, high, args, global_scale=overall)
        state = {"weight": w, "weight_scale": scale.float(), "weight_zero_point": zero}
        if overall is not None:
            state["weight_global_scale"] = overall
        compressor = BaseCompressor.get_value_from_registry(name)
        packed = compressor.compress(state, scheme)
        packed = {key: value for key, value in packed.items() if value is not None}
        if args.symmetric:
            packed.pop("weight_zero_point", None)
        values = compressor.decompress(dict(packed), scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "format": name, "weights": json.loads(args.model_dump_json())}},
        }  # fmt: skip
        yield case(label, config, {f"a.{key}": value for key, value in packed.items()}, "a.weight", values)


def bitsandbytes():
    for kind, nested, shape, block in [("nf4", True, (24, 192), 64), ("nf4", False, (5, 27), 64), ("fp4", False, (4, 64), 64)]:
        w = weight(*shape)
        q, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=nested, quant_type=kind)
        tensors = {"a.weight": q, **{f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        yield case(f"bitsandbytes {kind}", config, tensors, "a.weight", bnb.dequantize_4bit(q, state))
    q, scb, _ = bnb.int8_vectorwise_quant(weight(6, 10).half())
    tensors = {"a.weight": q, "a.SCB": scb, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    yield case("bitsandbytes int8", config, tensors, "a.weight", bnb.int8_vectorwise_dequant(q, scb))


def mxfp4():
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 131, (3, 6, 2), dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    tensors = {"mlp.experts.gate_up_proj_blocks": blocks, "mlp.experts.gate_up_proj_scales": scales}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    yield case("mxfp4", config, tensors, "mlp.experts.gate_up_proj", values)


cases = [*fp8(), *compressed_tensors(), *bitsandbytes(), *mxfp4()]
out = pathlib.Path(__file__).parent / "vectors" / "foreign.json"
out.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
print(len(cases), "cases,", out.stat().st_size, "bytes")
