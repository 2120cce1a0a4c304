"""What config.json of published files says that vLLM reads, and that transformers writes otherwise or not at all."""

# What published files call a class that transformers calls otherwise.
PUBLISHED = {
    "BailingHybridForCausalLM": "BailingMoeV3ForCausalLM",
    "Kimi_K25ForConditionalGeneration": "KimiK25ForConditionalGeneration",
}


def know_step():
    """What published files of Step 3.7 bring along as code of their own: its configuration, of which transformers has one for other classes."""
    from transformers import PreTrainedConfig
    from vllm.transformers_utils import config as known
    from vllm.transformers_utils.configs.step3p5 import Step3p5Config

    class Step3p7Config(PreTrainedConfig):
        model_type = "step3p7"

        def __init__(self, text_config=None, vision_config=None, **more):
            tower = dict(vision_config or {})
            sizes = {"width": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers"}
            tower |= {key: tower.get(of, 1) for key, of in sizes.items()}
            usual = {
                "output_dim": None, "use_abs_posemb": True, "use_cls_token": False, "use_rope2d": True, "use_ln_pre": True, "use_ln_post": False,
                "ls_init_value": 0.1, "hidden_act": "quick_gelu",
            }  # fmt: skip
            text = dict(text_config or {})
            text |= {"architectures": ["Step3p5ForCausalLM"], "num_key_value_heads": text.get("num_attention_groups"), "use_moe": True}
            text |= {"moe_router_activation": "sigmoid", "use_head_wise_attn_gate": True}
            self.text_config = Step3p5Config(**text)
            self.vision_config = PreTrainedConfig.from_dict(usual | tower)
            self.projector_bias = False
            super().__init__(**more)

    known._CONFIG_REGISTRY["step3p7"] = Step3p7Config


def said(config):
    """A configuration with what vLLM reads in those of published files, and transformers writes otherwise or not at all."""
    width, eps, layers = config.get("hidden_size"), config.get("rms_norm_eps", 1e-5), config.get("mlp_layer_types", ["dense"])
    chosen = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    more = {
        "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
        "deepseek_v3": chosen,
        "deepseek_v32": chosen,
        "deepseek_v4": {
            "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "hidden_act": "silu", "rms_norm_eps": 1e-6, "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5, "expert_dtype": "bf16",
        },  # fmt: skip
        "glm4v_text": {"attention_bias": True},
        "glm4v_moe_text": {"attention_bias": True, "use_qk_norm": False},
        "glm5_next_text": {"mhc": True, "mla_use_nope": True, "indexer_rope_interleave": True, **chosen},
        "glm_moe_dsa": chosen,
        "hy_v3": {
            "first_k_dense_replace": layers.count("dense"), "expert_hidden_dim": config.get("moe_intermediate_size"), "route_norm": True,
            "qk_norm": True,
        },  # fmt: skip
        "lfm2": {"conv_dim": width, "block_dim": width},
        "lfm2_moe": {"conv_dim": width, "block_dim": width},
        "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
        "mimo_v2_flash": {
            "layernorm_epsilon": eps, "add_swa_attention_sink_bias": True, "sliding_window_size": config.get("sliding_window"),
            "moe_layer_freq": [0] + [1] * (config.get("num_hidden_layers", 1) - 1),
            **{f"swa_{key}": config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")},
        },  # fmt: skip
        "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
        "minimax_m3_vl": {"projector_hidden_size": 6144},
        "minimax_m3_vl_text": {"rms_norm_eps": 1e-6, "num_mtp_modules": 0},
        "minimax_m3_vl_vision": {
            "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2}, "num_channels": 3, "layer_norm_eps": 1e-5,
        },  # fmt: skip
        "qwen3_vl_moe_text": {"norm_topk_prob": True},
    }.get(config.get("model_type"), {})
    inner = {part: said(config[part]) for part in ("text_config", "vision_config") if isinstance(config.get(part), dict)}
    names = [PUBLISHED.get(name, name) for name in config.get("architectures") or []]
    return more | config | inner | ({"architectures": names} if names else {})
