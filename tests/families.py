"""Tiny random models of every family of causal language models in transformers, from one set of small numbers."""

import inspect
from typing import Any

import torch
from tiny import WORDS, scaled
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

WIDTH, LAYERS = 32, 4

FAMILIES = """
    afmoe apertus arcee aria_text axk1 bailing_hybrid bamba bart beam bert big_bird biogpt bitnet blenderbot bloom
    codegen cohere cohere2 cohere2_moe ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama doge dots1 electra ernie4_5
    ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3_text
    gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss
    gptj granite granite_swa granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hy_v4 hyperclovax jais2 jamba jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text mamba mamba2 minicpm3
    minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo
    olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe prophetnet qwen2 qwen2_moe qwen3 qwen3_5_text
    qwen3_moe qwen3_next recurrent_gemma roberta rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma
    xlnet xlstm youtu zamba2
""".split()  # noqa: SIM905
"""Keys of transformers' CONFIG_MAPPING whose small configuration is a model of text."""

# What families call the same thing; a configuration takes the names that it has.
_WIDTHS = ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "lru_width")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size", "shared_intermediate_size")
_EXPERT_INNER = (
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "expert_ffn_hidden_size",
)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "mamba_n_heads")
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SMALL: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_EXPERT_INNER, 24),
    **dict.fromkeys(_DEPTHS, LAYERS),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_LENGTHS, 64),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window", "attention_window_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_expand", "expand", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_num_heads", "linear_num_value_heads"), 4),
    "mamba_d_ssm": 64,
    "vocab_size": len(WORDS),
    "vocab_size_per_layer_input": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What some families need besides, and a smooth activation where theirs has kinks, at which nothing has derivatives.
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LATENT_ATTENTION = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **{family: {"head_dim": 4, "num_key_value_heads": 4} for family in _LATENT_ATTENTION},
    "gemma3n_text": {"num_kv_shared_layers": 2, **_ALTERNATING, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "opt": {"activation_function": "gelu"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
}


def family_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return a small configuration of a family, a key of transformers' CONFIG_MAPPING."""
    kind = type(CONFIG_MAPPING[family]().get_text_config())
    names = set(inspect.signature(kind.__init__).parameters)
    for parent in kind.__mro__:
        names |= set(getattr(parent, "__annotations__", {}))
    return kind(**{name: value for name, value in _SMALL.items() if name in names} | _OWN.get(family, {}) | changes)


def family_model(family: str, *, dtype: torch.dtype = torch.float64, **changes: Any):
    """Return a random model whose residual stream has a norm of about 5, the same one every time."""
    config = family_config(family, **changes)
    torch.manual_seed(0)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind(config).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            name = name.lower()
            if "a_log" in name or name.endswith(".d"):  # a state space's decay, which must keep its sign
                continue
            if "norm" in name or "ln_" in name:
                parameter.copy_(parameter.mean().round() + 0.1 * noise)
            else:
                parameter.copy_(scaled(name, noise))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products take no float64
    return model.to(dtype).eval().requires_grad_(False)
