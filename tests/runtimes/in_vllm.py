#!/usr/bin/env python3
"""Load the tiny checkpoints of every family in vLLM on the CPU, and compare its logits with quantc's reading.

For each checkpoint of tests/fixtures/families and each layout of families.py:

1. `quantc quantize` writes it and `quantc convert` writes what it means, which transformers runs in float32: the reference;
2. vLLM loads the artifact. Every tensor of the file has to be read and every parameter of vLLM's classes to be filled;
3. it is fed the same tokens, and the largest difference of its logits may be TOLERANCE of the largest logit. Where it is more, or
   nothing loads, vLLM is given the reference's plain weights too: what it makes of those in the same way is not the artifact's doing.

    python3 tests/runtimes/in_vllm.py                                      # every family with 4 bits (several GB of packages)
    python3 tests/runtimes/in_vllm.py mixtral_plain --layouts ct,gptq
    python3 tests/runtimes/in_vllm.py --json FILE --docs docs/runtimes.md  # the table into the documentation

vLLM's products of packed matrices on CPUs exist in half precision, for some widths, and for experts on some processors alone. So here
its classes choose, make and fill the packed parameters as always, and then the weights are unpacked in single precision and multiplied
so; and attention, whose kernels know some widths of heads alone, is computed in plain steps. What is measured is what vLLM finds in the
file, and how it computes with it; check.py measures the kernels themselves. Where another operation does not exist on CPUs, what is left
is that everything found its place: `loads`.

An engine does not leave its process: each artifact has one of its own, a copy of one that has imported everything. With `--json FILE`
outcomes of earlier runs stay in FILE but for what this one tries, and the table is of all that FILE has.

What vLLM cannot load is no failure if the report's notes name vLLM; a note that names it where it does load is one. Exit code 0: all is
as quantc says; 1: it is not; 2: could not start.
"""

import argparse
import collections
import gc
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import typing

from ending import beside_earlier, end
from families import FIXTURES, HERE, LAYOUTS, ROOT, family_of, loaded, logits, quantc, restack, say
from published import know_step, said

MARKS = "<!-- in_vllm.py begins -->\n", "<!-- in_vllm.py ends -->"
TOLERANCE = 1e-3
TITLES = {
    "ct": "W4A16", "ct-attention": "experts as they are", "ct-asym": "W4A16_ASYM", "gptq": "GPTQ", "awq": "AWQ", "ct-w8a8": "W8A8",
    "ct-fp8": "FP8_DYNAMIC",
}  # fmt: skip

# As the engine is started where the process is already.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "", "VLLM_KIMI_K3_GEMM_AR": "0", "VLLM_ENABLE_GEMM_RS": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}  # fmt: skip
SECONDS = 300
# Parameters that no checkpoint has to have, and whose first values are what the runtime computes with otherwise.
OWN = r"\.(weight_shape|w13_weight_shape|w2_weight_shape|w13_bias|w2_bias|[qkv]_scale|[qkv]_zero_point|prob_scale|g_idx)$"
loading = {}


def prepare():
    """Imports what every engine needs, and puts the plain products in the place of the packed ones."""
    os.environ.update(ENVIRONMENT)
    import vllm.model_executor.models.registry as registry

    for name in (
        "vllm", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker",
        "vllm.v1.worker.cpu_model_runner", "vllm.v1.attention.backends.cpu_attn", "vllm.model_executor.models.transformers",
        *(f"vllm.model_executor.models.{one}" for one in ("qwen3_next", "deepseek_v2", "mixtral", "nemotron_h", "gemma3_mm", "qwen3_vl")),
        "transformers.models.auto.modeling_auto",
    ):  # fmt: skip
        try:
            importlib.import_module(name)
        except ImportError:
            traceback.print_exc()
    # It would import all of vLLM once more in another process, to ask a class what it is able to do.
    registry._run_in_subprocess = lambda ask: ask()
    refuse_less()
    know_step()
    unpack_linears()
    widen_linears()
    unpack_experts()
    attend_plainly()
    recur_plainly()
    watch_loading()
    # Looking through all that is imported is most of what an engine's start takes.
    gc.freeze()
    gc.collect = lambda *_: 0


def refuse_less():
    """Lets it make on a CPU what it only ever computes elsewhere, and towers without what prepares images for them."""
    import torch
    from vllm import triton_utils
    from vllm.config import ModelConfig
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.triton_utils import dispatcher

    given = FusedMoEConfig.__post_init__
    # GPTQ and AWQ it computes in half precision alone, with kernels for GPUs where they are made for some widths.
    for module, name in (("auto_gptq", "AutoGPTQConfig"), ("auto_awq", "AutoAWQConfig")):
        module = importlib.import_module(f"vllm.model_executor.layers.quantization.{module}")
        getattr(module, name).get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])
        module.verify_marlin_supported = lambda *_, **__: None
        module.check_moe_marlin_supports_layer = lambda *_, **__: True

    def of_experts(self):
        try:
            given(self)
        except NotImplementedError:
            # The last thing it looks at: experts without a gate.
            pass

    FusedMoEConfig.__post_init__ = of_experts
    ModelConfig._supports_multimodal_inputs = lambda self: False
    triton_utils.triton.set_allocator = lambda *_: None
    triton_utils.triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    # It looks into all there is, and some of that has something else in the place of a dictionary.
    dispatcher.vars = lambda value: found if isinstance(found := value.__dict__, dict) else {}


def unpacked(codes, scales, zeros, kind):
    """Weights [..., rows, columns] of the codes and scales that a parameter holds by rows, in single precision."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    codes = unpack_quantized_values_into_int32(codes, kind, codes.dim() - 1)
    zero = kind.bias if zeros is None else unpack_quantized_values_into_int32(zeros, kind, zeros.dim() - 2)
    width = codes.shape[-1] // scales.shape[-1]
    if zeros is not None:
        zero = zero.repeat_interleave(width, -1)
    return (codes - zero).float() * scales.float().repeat_interleave(width, -1)


def unpack_linears():
    import torch
    from vllm.model_executor.kernels.linear import MPLinearKernel

    class Unpacked(MPLinearKernel):
        get_min_capability = classmethod(lambda cls: -1)
        can_implement = classmethod(lambda cls, config: (True, None))

        def process_weights_after_loading(self, layer):
            codes, scales, zeros = self._get_weight_params(layer)
            # GPTQ stores zeros of symmetric codes, too.
            zeros = zeros if self.config.zero_points else None
            by_rows = codes.input_dim == 1
            scales = scales if scales.output_dim == 0 else scales.t()
            if zeros is not None and zeros.output_dim != 0:
                zeros = zeros.t()
            weight = unpacked(codes if by_rows else codes.t(), scales, zeros, self.config.weight_type)
            layer.register_buffer("unpacked", weight.to(self.config.act_type))

        def apply_weights(self, layer, x, bias=None):
            return torch.nn.functional.linear(x, layer.unpacked, bias)

    for module in (
        "compressed_tensors.schemes.compressed_tensors_wNa16", "auto_gptq", "auto_awq",
    ):  # fmt: skip
        module = importlib.import_module(f"vllm.model_executor.layers.quantization.{module}")
        module.choose_mp_linear_kernel = lambda *_, **__: Unpacked


def widen_linears():
    """Weights of a byte, by rows or, as some are before they reach a kernel, by columns; what a linear reads stays as it is."""
    import torch

    class Widened:
        input_quant_key = lambda self: None

        def process_weights_after_loading(self, layer):
            weight = layer.weight.float()
            weight = weight.t() if getattr(layer.weight, "input_dim", 1) == 0 else weight
            layer.register_buffer("unpacked", weight * layer.weight_scale.float())

        def apply_weights(self, layer, x, bias=None):
            return torch.nn.functional.linear(x, layer.unpacked.to(x.dtype), bias)

    schemes = importlib.import_module("vllm.model_executor.layers.quantization.compressed_tensors.schemes")
    for module, name in (
        ("w8a8_int8", "init_int8_linear_kernel"), ("w8a8_fp8", "init_fp8_linear_kernel"), ("w8a16_fp8", "init_wfp8_a16_linear_kernel"),
    ):  # fmt: skip
        module = importlib.import_module(f"{schemes.__name__}.compressed_tensors_{module}")
        setattr(module, name, lambda *_, **__: Widened())


def activated(layer, x):
    """What lies between the matrices of an expert."""
    import torch.nn.functional as F
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation as Kind

    kind, moe = layer.activation, layer.moe_config
    if not kind.is_gated:
        plain = {
            Kind.RELU2_NO_MUL: lambda x: F.relu(x).square(), Kind.SILU_NO_MUL: F.silu, Kind.GELU_NO_MUL: F.gelu,
            Kind.GELU_TANH_NO_MUL: lambda x: F.gelu(x, approximate="tanh"),
        }  # fmt: skip
        return plain[kind](x)
    gate, up = (x[:, ::2], x[:, 1::2]) if kind == Kind.SWIGLUOAI else x.chunk(2, -1)
    setting = lambda name: next((v for v in (getattr(layer, name, None), getattr(moe, name, None)) if v is not None), None)
    limit = setting("swiglu_limit")
    if kind in (Kind.SWIGLUOAI, Kind.SWIGLUOAI_UNINTERLEAVE):
        alpha, beta = setting("swiglu_alpha"), setting("swiglu_beta")
        alpha, beta, limit = 1.702 if alpha is None else alpha, 1.0 if beta is None else beta, 7.0 if limit is None else limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + beta) * gate * (gate * alpha).sigmoid()
    if kind == Kind.SWIGLUSTEP:
        limit = 7.0 if limit is None else limit
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    of = {Kind.SILU: F.silu, Kind.GELU: F.gelu, Kind.GELU_TANH: lambda x: F.gelu(x, approximate="tanh")}
    return of[kind](gate) * up


def mixed(layer, first, last, x, weights, experts):
    """The weighted sum of what the chosen experts make of each token; `first` and `last` are [experts, rows, columns]."""
    import torch

    out = torch.zeros(len(x), last.shape[1], dtype=x.dtype)
    before, after = getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None)
    for expert in experts.unique().tolist():
        token, place = (experts == expert).nonzero(as_tuple=True)
        if not 0 <= expert < len(first):
            continue
        share, given = weights[token, place].to(x.dtype)[:, None], x[token]
        if layer.apply_router_weight_on_input:
            given, share = given * share, 1
        inner = given @ first[expert].to(x.dtype).t()
        inner = activated(layer, inner if before is None else inner + before[expert])
        made = inner @ last[expert].to(x.dtype).t()
        out.index_add_(0, token, (made if after is None else made + after[expert]) * share)
    return out


def weights_of(method, layer, part):
    """The matrices of one part of all experts [experts, rows, columns], as each layout has them packed."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    held = lambda name: None if (found := getattr(layer, f"{part}_{name}", None)) is None else found.data
    if held("weight") is not None:
        return held("weight").float() * held("weight_scale")
    if held("weight_packed") is not None:
        return unpacked(held("weight_packed"), held("weight_scale"), held("weight_zero_point"), method.quant_type)
    codes, scales = held("qweight"), held("scales").transpose(1, 2)
    if type(method).__name__ == "AutoGPTQMoEMethod":
        return unpacked(codes.transpose(1, 2), scales, None, method.quant_config.quant_type)
    # AWQ packs eight rows into a word, the even ones first.
    order = [0, 4, 1, 5, 2, 6, 3, 7]

    def rows(words):
        found = unpack_quantized_values_into_int32(words, method.quant_type, 2)
        return found.view(*found.shape[:2], -1, 8)[..., order].reshape(found.shape).transpose(1, 2)

    codes, zeros = rows(codes), rows(held("qzeros"))
    width = codes.shape[-1] // scales.shape[-1]
    return (codes - zeros.repeat_interleave(width, -1)).float() * scales.float().repeat_interleave(width, -1)


def unpack_experts():
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as plain
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    class Chosen:
        """In the place of a kernel's class."""

        is_monolithic = staticmethod(lambda: False)

    def process(self, layer):
        layer.unpacked = weights_of(self, layer, "w13"), weights_of(self, layer, "w2")

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        return mixed(layer, *layer.unpacked, x, topk_weights, topk_ids)

    of = "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_"
    for module, name, select in (
        (f"{of}wna16", "CompressedTensorsWNA16MoEMethod", "wna16"), (f"{of}w8a8_int8", "CompressedTensorsW8A8Int8MoEMethod", "int8"),
        (f"{of}w8a8_fp8", "CompressedTensorsW8A8Fp8MoEMethod", "fp8"), ("auto_gptq", "AutoGPTQMoEMethod", "wna16"),
        ("auto_awq", "AutoAWQMoEMethod", "wna16"),
    ):  # fmt: skip
        module = importlib.import_module(f"vllm.model_executor.layers.quantization.{module}")
        setattr(module, f"select_{select}_moe_backend", lambda *_, **__: (None, Chosen))
        kind = getattr(module, name)
        kind.process_weights_after_loading, kind.apply, kind.get_fused_moe_quant_config = process, apply, lambda *_: None

    class Plain(plain.UnquantizedFusedMoEMethod):
        """Experts as they are: the kernel for CPUs lacks some activations and widths."""

        def __init__(self, moe):
            FusedMoEMethodBase.__init__(self, moe)
            self.unquantized_backend = plain.UnquantizedMoeBackend.CPU

        def process_weights_after_loading(self, layer):
            pass

        def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
            return mixed(layer, layer.w13_weight, layer.w2_weight, x, topk_weights, topk_ids)

    for module in list(sys.modules.values()):
        if module is not plain and vars(module).get("UnquantizedFusedMoEMethod") is plain.UnquantizedFusedMoEMethod:
            module.UnquantizedFusedMoEMethod = Plain


def attended(query, key, value, scale, window=-1, cap=0, slopes=None, sinks=None):
    """Causal attention [tokens, heads, width of values] of one sequence to itself, in plain steps: kernels know some widths alone."""
    import torch

    tokens, times = len(query), query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = torch.tanh(scores / cap) * cap if cap else scores
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * back
    scores = scores.masked_fill((back < 0) | ((back >= window) if window > 0 else False), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, tokens, 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :tokens], value)


def attend_plainly():
    """Attention of whatever width, in the place of that with a cache: a prompt is all that is ever run."""
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers.attention import mla_attention
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    filled = {}

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *_, **__):
        if attn_metadata is None:
            return output
        tokens = attn_metadata.num_actual_tokens
        if self.kv_sharing_target_layer_name:
            key, value = filled[self.kv_sharing_target_layer_name]
        filled[layer.layer_name] = key, value
        found = attended(
            query[:tokens], key[:tokens], value[:tokens], self.scale, self.sliding_window, self.logits_soft_cap, self.alibi_slopes,
            self.sinks,
        )  # fmt: skip
        output[:tokens] = found.reshape(output[:tokens].shape)
        return output

    def latent(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, **_):
        if attn_metadata is None:
            return output.fill_(0)
        both = self.kv_b_proj(k_c_normed)[0].view(len(q), self.num_heads, -1)
        key, value = both.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        key = torch.cat([key, k_pe.view(len(q), 1, -1).expand(-1, self.num_heads, -1)], -1)
        found = attended(q.view(len(q), self.num_heads, -1), key, value, self.scale, self.sliding_window or -1)
        output.copy_(found.reshape(output.shape))
        return output

    _custom_ops.cpu_attn_get_scheduler_metadata = lambda *_, **__: None
    cpu_attn.CPUAttentionBackend.get_supported_head_sizes = classmethod(lambda cls: [])
    cpu_attn.CPUAttentionBackendImpl.forward = forward
    cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update = lambda *_, **__: None
    mla_attention.MLAAttention.forward_impl = latent
    mla_attention.MLAAttention.update_kv_cache = lambda *_, **__: None
    mla_attention.MLACommonBackend.get_supported_head_sizes = classmethod(lambda cls: [])
    given = CpuPlatform.get_attn_backend_cls.__func__

    def backend(cls, selected_backend, attn_selector_config, num_heads=None):
        # Where each token attends to chosen ones alone there is no backend, and it is made as if it attended to all.
        sparse = attn_selector_config.use_sparse
        return AttentionBackendEnum.CPU_MLA.get_path() if sparse else given(cls, selected_backend, attn_selector_config, num_heads)

    CpuPlatform.get_attn_backend_cls = classmethod(backend)


def recur_plainly():
    """The gated delta rule, of which the kernel for CPUs is in half precision."""
    import torch
    import torch.nn.functional as F
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    def recurred(mixed_qkv, b, a, core_attn_out, layer_name):
        context = get_forward_context()
        layer = context.no_compile_layers[gdn_attention._resolve_layer_name(layer_name)]
        if context.attn_metadata is None:
            return
        tokens = context.attn_metadata[layer.prefix].num_actual_tokens
        taps = gdn_attention._unpacked_conv_weight(layer).to(mixed_qkv.dtype)
        x = F.pad(mixed_qkv[:tokens].t()[None], (taps.shape[1] - 1, 0))
        x = F.silu(F.conv1d(x, taps[:, None], layer.conv1d.bias, groups=len(taps)))[0].t().contiguous()
        query, key, value = (part[0] for part in layer.rearrange_mixed_qkv(x))
        unit = lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        times = value.shape[1] // key.shape[1]
        query, key = (unit(part).repeat_interleave(times, 1) for part in (query, key))
        query = query * query.shape[-1] ** -0.5
        kept = (-layer.A_log.float().exp() * F.softplus(a[:tokens].float() + layer.dt_bias)).exp()
        state = torch.zeros(value.shape[1], key.shape[2], value.shape[2])
        for t in range(tokens):
            state = state * kept[t, :, None, None]
            change = (value[t] - torch.einsum("hk,hkv->hv", key[t], state)) * b[t].sigmoid()[:, None]
            state = state + key[t, :, :, None] * change[:, None]
            core_attn_out[t] = torch.einsum("hk,hkv->hv", query[t], state)

    # What it is registered by.
    recurred.__annotations__ = typing.get_type_hints(gdn_attention.cpu_gdn_attention_core) | {"return": None}
    gdn_attention.cpu_gdn_attention_core = recurred


def watch_loading():
    """Has `loading` tell which tensors of the file nothing read, and which parameters nothing filled."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.given, self.kept = {}, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                for leaf in tree_leaves((args, kwargs)):
                    if isinstance(leaf, torch.Tensor):
                        self.given.pop(leaf.untyped_storage().data_ptr(), None)
            return func(*args, **(kwargs or {}))

    given, given_all = DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights

    def all_weights(self, *args):
        for name, tensor in given_all(self, *args):
            reads = loading["reads"]
            # Each in memory of its own, that lives as long as all is watched.
            copy = tensor.clone().contiguous()
            reads.kept.append(copy)
            reads.given[copy.untyped_storage().data_ptr()] = name
            yield name, copy

    def mark(kind):
        if kind.is_floating_point:
            return float("nan")
        return {torch.int32: 0x5A5A5A5A, torch.int64: 0x5A5A5A5A5A5A5A5A, torch.int8: -128, torch.uint8: 171}.get(kind)

    def load_weights(self, model, *args):
        places = {name: (p, p.data.clone()) for name, p in model.named_parameters() if mark(p.dtype) is not None}
        for place, _ in places.values():
            place.data.fill_(mark(place.dtype))
        reads = loading["reads"] = Reads()
        # It looks itself where nothing is quantized, and would end there.
        self.enable_weights_track = False
        with reads:
            given(self, model, *args)
        missing = []
        for name, (place, first) in places.items():
            now = dict(model.named_parameters(remove_duplicate=False)).get(name, place)
            if now.data.shape != first.shape or now.dtype != first.dtype:
                continue
            bare = now.data.isnan() if now.is_floating_point() else now.data == mark(now.dtype)
            if not now.is_floating_point():
                # A code may be the mark by chance.
                rows = bare.reshape(*bare.shape[:1], -1).all(-1)
                bare = rows.reshape(-1, *[1] * (bare.dim() - 1)).expand_as(bare)
            if bare.any():
                now.data = torch.where(bare, first, now.data)
                if not re.search(OWN, name):
                    missing.append(name)
        # The layers that predict further tokens are loaded after the model, and share its embedding and head.
        what = "further" if "missing" in loading else "missing"
        loading[what] = [name for name in missing if what == "missing" or not re.search("embed_tokens|lm_head|embedding", name)]
        loading.setdefault("unread", sorted(reads.given.values()))
        reads.kept.clear()

    DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights = load_weights, all_weights


def answered(folder, ids, further=False):
    """Log-probabilities of the first text's tokens but the last; `further`: with the layers that predict further tokens."""
    import torch
    from vllm import LLM, SamplingParams

    path = pathlib.Path(folder) / "config.json"
    config = said(json.loads(path.read_text()))
    path.write_text(json.dumps(config))
    size = config.get("text_config", config)["vocab_size"]
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=len(ids[0]) + 8, max_num_seqs=1,
        max_num_batched_tokens=2048, max_logprobs=size, enable_prefix_caching=False, kv_cache_memory_bytes=64 << 20,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if further else None,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=size, detokenize=False)
    answer = llm.generate({"prompt_token_ids": ids[0].tolist()}, sampling, use_tqdm=False)[0].prompt_logprobs[1:]
    found = torch.full((len(answer), size), float("nan"))
    for row, entry in enumerate(answer):
        found[row, list(entry)] = torch.tensor([entry[token].logprob for token in entry])
    return found


def measured(folder, ids, further=False):
    """What vLLM makes of a folder, in a process that is a copy of this one: `found` or `error`, and what was not loaded."""
    import torch

    path = pathlib.Path(f"{folder}.answer")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            try:
                answer = {"found": answered(folder, ids, further)}
            except BaseException as error:
                traceback.print_exc()
                last = traceback.extract_tb(error.__traceback__)[-1]
                answer = {"error": f"{type(error).__name__}: {error}", "at": f"{pathlib.Path(last.filename).name}:{last.lineno}"}
            if "missing" in loading:
                answer |= {what: loading[what] for what in ("missing", "unread", "further") if what in loading}
            torch.save(answer, path)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(0)
    started = time.time()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.time() - started > SECONDS:
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
        time.sleep(0.05)
    if not path.exists():
        return {"error": f"the process ended after {time.time() - started:.0f} s"}
    answer = torch.load(path)
    path.unlink()
    return answer


def compared(item):
    """
    What vLLM makes of an artifact beside the reference and, where that is not the same, beside what it makes of the reference's own
    weights, which no quantization is in.
    """
    import torch
    from safetensors.torch import load_file

    ids = load_file(pathlib.Path(item["original"]) / "golden.safetensors")["input_ids"]
    answer, expected = measured(item["artifact"], ids), torch.load(f"{item['reference']}.pt")
    found = answer.pop("found", None)
    far = lambda found, expected: (found - expected).abs().max().item() / (expected.abs().max().item() or 1)
    if found is not None and not isinstance(expected, str):
        answer["difference"] = far(found, expected[0, : len(found)].log_softmax(-1))
    if not answer.get("difference", 1) <= TOLERANCE:
        plain = measured(item["reference"], ids)
        if found is not None and "found" in plain:
            # Where it computes no numbers, it does so for both.
            same = found.isnan().equal(plain["found"].isnan())
            answer["plainly"] = far(found.nan_to_num(), plain["found"].nan_to_num()) if same else float("nan")
        answer["plain"] = plain.get("error") or next((f"`{name}` is not filled" for name in plain.get("missing", [])), "runs")
        # What plain weights do not fill is not in the checkpoint, and a class that reads nothing of a module does not have it.
        module = lambda name: name.rpartition(".")[0]
        known = {
            "missing": {module(n) for n in plain.get("missing", [])},
            "unread": {module(n) for n in plain.get("unread", []) if not n.endswith(".bias")},
        }
        answer |= {what: [n for n in answer[what] if module(n) not in known[what]] for what in known if what in answer}
    if item["checkpoint"].endswith("_further") and "missing" in answer:
        ours, plain = (measured(item[which], ids, further=True) for which in ("artifact", "reference"))
        answer["further"] = {"missing": ours["further"]} if "further" in ours else {"error": ours.get("error"), "plain": plain.get("error")}
    return answer


def worker(path):
    """Loads what a job lists, in the venv of vLLM; a line of JSON for each."""
    import torch

    torch.set_num_threads(1)
    job = json.loads(pathlib.Path(path).read_text())
    prepare()
    with open(job["result"], "a") as out:
        for item in job["items"]:
            print(f"==== {item['checkpoint']} {item['layout']}", flush=True)
            started = time.time()
            answer = compared(item)
            print(f"---- {json.dumps(answer)[:600]}", flush=True)
            key = {"checkpoint": item["checkpoint"], "layout": item["layout"]}
            out.write(json.dumps(key | answer | {"seconds": round(time.time() - started, 1)}) + "\n")
            out.flush()


def refer(path):
    """Computes the logits of what a job lists, in the venv of transformers."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    for item in json.loads(pathlib.Path(path).read_text())["items"]:
        ids = load_file(pathlib.Path(item["original"]) / "golden.safetensors")["input_ids"]
        try:
            restack(item["reference"], item["original"])
            found = logits(loaded(item["reference"])[0], ids)
        except Exception as error:
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
        torch.save(found, f"{item['reference']}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Outside: write the checkpoints and the artifacts, start the workers, judge.


def artifact(options, folder, name, layout):
    """Writes a checkpoint in a layout and what it means; its notes, or why there is none."""
    out = folder / f"{name}-{layout}"
    code, said = quantc(options.quantc, "quantize", folder / name, "-o", out, *LAYOUTS[layout].split())
    if code == 2:
        return {"refused": said.removeprefix("error: ")}
    if not code:
        # What GPTQ and AWQ have besides codes is of 16 bits, and vLLM takes it into 32.
        code, said = quantc(options.quantc, "convert", out, "-o", f"{out}-f32", "--dtype", "f32")
    if code:
        raise RuntimeError(f"{name}: quantc ended with {code}: {said[-600:]}")
    return {"notes": json.loads((out / "report.json").read_text())["notes"]}


def unplaced(name, found):
    """What was read by nothing or filled by nothing, of what has to be."""
    config = json.loads((FIXTURES / "families" / name / "config.json").read_text())
    text = config.get("text_config", config)
    layers = text.get("num_hidden_layers", text.get("n_layer", 0))

    def further(tensor):
        # vLLM loads layers for further tokens as a model of their own.
        layer = re.search(r"layers\.(\d+)\.", tensor)
        return re.search(r"(^|\.)mtp", tensor) or layer and int(layer[1]) >= layers

    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    # Which group a column of GPTQ is in is read by nothing where they lie in order.
    known = lambda tensor: further(tensor) or tied and "lm_head" in tensor or tensor.endswith(".g_idx")
    unread = [t for t in found["unread"] if not known(t)]
    return [f"{len(all)} {what} (`{all[0]}`)" for what, all in (("not read", unread), ("not filled", found["missing"])) if all]


def outcome(made, found):
    """What stands in the table, and what is wrong with it if anything is."""
    if "refused" in made:
        return f"refused: {made['refused']}", None
    told = [note for note in made["notes"] if re.search(r"vLLM(?! loads| does[,;]| takes| know| read)", note) and "tokenizer" not in note]
    error, difference, plainly = (found.get(what) for what in ("error", "difference", "plainly"))
    lost = unplaced(found["checkpoint"], found) if "missing" in found else []
    layers = found.get("further", {})
    further = layers.get("missing") or layers.get("error") != layers.get("plain")
    if further:
        lost.append(f"of layers for further tokens: {layers.get('error') or layers['missing'][0]}")
    if difference is not None and difference <= TOLERANCE and not further:
        return "agrees", f"a note says otherwise: {told[0]}" if told and "may" not in told[0] else None
    if plainly is not None and plainly <= TOLERANCE and not lost:
        # A setting that its class does not know.
        return f"as the original, which it computes otherwise than transformers (by {difference or 0:.0e})", None
    if error and "missing" in found and not lost:
        return f"loads ({error})", None
    if not error and not lost and found.get("plain", "").endswith("is not filled"):
        return f"does not load the original: {found['plain']}", None
    # What it does not find is packed in one and plain in the other.
    bare = lambda text: text.split("The available parameters")[0].replace("_packed", "").replace("qweight", "weight")
    if error and "missing" not in found and bare(found.get("plain", "")) == bare(error):
        return f"does not load the original: {error}", None
    problem = "; ".join([*([error] if error else [f"logits differ by {difference or plainly or 0:.1e} of the largest"]), *lost])
    return f"no: {problem}", None if told else problem


# What messages come to, in a few words.
SHORT = {
    r"loads \(.*": "loads",
    r"as the original.*": "as the original",
    r"does not load the original.*": "does not load the original",
    r"no: .*not read \(`[^`]*\.bias`\).*": "no: leaves out biases",
    r"no: .*not read \(`lm_head.*": "no: leaves out the head",
    r"no: .*not read \(`[^`]*experts.*": "no: does not find experts",
    r"no: .*of layers for further tokens: .*": "no: does not find layers for further tokens",
    r"no: .*'MergedColumnParallelLinear' object has no attribute 'data'.*": "no: fails at g_idx",
    r"no: .*PLE embedding does not support.*": "no: refuses the layout",
    r"no: logits differ.*": "no: other logits",
    r"refused: tensor `.*cannot hold it: ([^;]*).*": r"refused: \1",
    r"refused: tensor `.*: (runtimes look for linears.*)": r"refused: \1",
}


def short(text):
    """A reason in a few words."""
    text = " ".join(text.split())
    pattern, words = next(((p, w) for p, w in SHORT.items() if re.fullmatch(p, text)), ("(.*)", r"\1"))
    return re.sub(f"^{pattern}$", words, text).split("; ")[0].replace("|", "/")[:90]


def table(rows):
    """Markdown: a row for each family; what differs between its checkpoints is said by name."""
    layouts = [layout for layout in TITLES if any(row["layout"] == layout for row in rows)]
    families = collections.defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["checkpoint"]):
        families[family_of(row["checkpoint"])][row["checkpoint"], row["layout"]] = short(row["cell"])
    lines = ["| family | " + " | ".join(map(TITLES.get, layouts)) + " |", "|---" * (len(layouts) + 1) + "|"]
    for family, cells in families.items():
        columns = []
        for layout in layouts:
            texts = {name: text for (name, of), text in cells.items() if of == layout}
            usual = collections.Counter(texts.values()).most_common(1)[0][0] if texts else "not tried"
            others = [f"{name.removeprefix(family + '_')}: {text}" for name, text in texts.items() if text != usual]
            columns.append("; ".join([usual, *others]))
        lines.append(f"| {family} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def run(python, mode, job, options):
    """Runs this script inside a venv; what it printed is kept beside the job."""
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    with (job.parent / f"log{mode}.txt").open("w") as sink:
        command = [str(python), str(HERE / "in_vllm.py"), mode, str(job)]
        code = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT).returncode
    if options.verbose or code:
        say((job.parent / f"log{mode}.txt").read_text(errors="replace"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="CHECKPOINT", help="only these (default: all)")
    parser.add_argument("--layouts", default="ct", help=f"some of {', '.join(TITLES)} (default: ct)")
    parser.add_argument("--quantc", type=pathlib.Path, default=ROOT / "target" / "release" / "quantc")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".venv" / "runtimes")
    parser.add_argument("--artifacts", type=pathlib.Path, help="keep what is written in this folder")
    parser.add_argument("--docs", type=pathlib.Path, help="write the table into this file, between its marks")
    parser.add_argument("--json", type=pathlib.Path, help="keep outcomes in this file, beside those of earlier runs")
    parser.add_argument("--verbose", action="store_true", help="show the runtimes' whole output")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--refer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker or options.refer:
        return worker(options.worker) if options.worker else refer(options.refer)
    known = sorted(p.name for p in (FIXTURES / "families").iterdir() if p.is_dir() and p.name != "gpt_oss_mxfp4")
    names, layouts = options.names or known, options.layouts.split(",")
    if unknown := {*names} - {*known} | {*layouts} - {*TITLES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not options.quantc.exists():
        parser.error(f"{options.quantc} does not exist")
    options.quantc = options.quantc.resolve()
    import cpu_torch
    from check import TORCH

    started = time.time()
    folder = (options.artifacts or pathlib.Path(tempfile.mkdtemp(prefix="quantc-vllm-"))).resolve()
    try:
        pythons = {
            venv: cpu_torch.environment(options.venv.resolve() / venv, TORCH[venv], [HERE / f"requirements-{venv}.txt"])
            for venv in ("transformers", "vllm")
        }
        write = [pythons["transformers"], FIXTURES / "make_families.py", "--write", folder, *names]
        subprocess.run([str(part) for part in write], check=True)
        made = {(name, layout): artifact(options, folder, name, layout) for name in names for layout in layouts}
        say(f"{len(made)} artifacts after {time.time() - started:.0f} s")
        result, job = folder / "result.jsonl", folder / "job.json"
        result.unlink(missing_ok=True)
        outs = {(name, layout): folder / f"{name}-{layout}" for (name, layout), of in made.items() if "refused" not in of}
        items = [
            {"checkpoint": n, "layout": layout, "original": str(folder / n), "artifact": str(out), "reference": f"{out}-f32"}
            for (n, layout), out in outs.items()
        ]
        job.write_text(json.dumps({"items": items, "result": str(result)}))
        run(pythons["transformers"], "--refer", job, options)
        say(f"references after {time.time() - started:.0f} s")
        run(pythons["vllm"], "--worker", job, options)
        lines = result.read_text().splitlines() if result.exists() else []
        found = {(row["checkpoint"], row["layout"]): row for row in map(json.loads, lines)}
    finally:
        if not options.artifacts:
            shutil.rmtree(folder, ignore_errors=True)
    rows, wrong = [], []
    for key, of in made.items():
        answer = {"checkpoint": key[0], "layout": key[1]} | found.get(key, {"error": "the worker did not come so far"})
        cell, problem = outcome(of, answer)
        rows.append({**answer, **of, "cell": cell})
        if problem:
            wrong.append(f"{key[0]} {key[1]}: {problem[:400]}")
    summary = f"{len(rows)} cells, {len(wrong)} not as quantc says; {time.time() - started:.0f} s"
    rows = beside_earlier(options.json, rows, ("checkpoint", "layout"), made)
    return end(options, MARKS, table(rows), wrong, summary, say)


if __name__ == "__main__":
    sys.exit(main())
