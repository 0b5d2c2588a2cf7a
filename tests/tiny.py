"""Tiny random models of every family, a tokenizer for them, and the full model as the reference for the causal map."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "Sure", "Sorry", *(f"w{i}" for i in range(58))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
BLOCKS = 4
_SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads", "head_dim"}
_FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "Qwen3": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "Gemma3": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "GPT2": {},
}
FAMILIES = list(_FAMILIES)


def tiny_model(family: str, *, attention: str | None = None, dtype: torch.dtype = torch.float64):
    """A randomly initialised model whose residual stream has a norm of about 5, from a seed of its own."""
    settings: dict[str, Any] = {**_SMALL, **_FAMILIES[family]}
    if family in ("GPTNeoX", "GPT2", "Phi3"):
        settings = {k: v for k, v in settings.items() if k != "head_dim"}
    if family in ("GPTNeoX", "GPT2"):
        settings = {k: v for k, v in settings.items() if k != "num_key_value_heads"}
    if family == "GPT2":
        renamed = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        renamed |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
        settings = {renamed.get(k, k): v for k, v in settings.items()}
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    model_name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    config = getattr(transformers, config_name)(
        **settings, attn_implementation=attention or ("eager" if family == "Gemma2" else "sdpa")
    )
    model = getattr(transformers, model_name)(config).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name or "ln_" in name:
                centre = 0.0 if family.startswith("Gemma") or name.endswith("bias") else 1.0
                parameter.copy_(centre + 0.1 * noise)
            else:
                parameter.copy_(scaled(name, noise))
    return model.to(dtype).eval().requires_grad_(False)


def scaled(name, noise):
    """Return a random weight that is no norm's, at the scale that keeps the residual stream's norm about 5."""
    if noise.ndim == 1:
        return 0.1 * noise
    if "embed" in name or "wte" in name or "wpe" in name:
        return 0.9 * noise
    return noise * noise.shape[-1] ** -0.5


def compile_blocks(model):
    """Compile every block of a Llama in place."""
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def replace_blocks(model):
    """Put a compiled module in the place of every block of a Llama."""
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def hooked_residual(model, tokens, layer, target, vector=None):
    """The output of block target−1 of the full model, (batch, tokens, d), with `vector` added at the input of `layer`.

    It shares no code with dctlib: the reference that the replay is held to.
    """
    inner = model.base_model
    blocks = inner.layers if hasattr(inner, "layers") else inner.h
    caught = []

    def add(_module, args, kwargs):
        if vector is None:
            return None
        if args:
            return (args[0] + vector, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + vector}

    def catch(_module, _args, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[layer].register_forward_pre_hook(add, with_kwargs=True)]
    handles.append(blocks[target - 1].register_forward_hook(catch))
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return caught[0]


def full_model_map(model, tokenizer, texts, source, target, positions):
    """Δ of one θ, (d,) → (d,), by whole forward passes of the hooked model, one prompt at a time."""
    rows = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in texts]

    def delta(theta):
        changes = []
        for tokens in rows:
            moved = hooked_residual(model, tokens, source, target, theta)
            clean = hooked_residual(model, tokens, source, target)
            changes.append((moved - clean)[0, -positions:].mean(0))
        return torch.stack(changes).mean(0)

    return delta


def assert_near(found, expected, tolerance):
    """Relative error in norm: transformers rounds softmax and RMSNorm to float32 also in a float64 model."""
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


def unit_rows(*shape, seed=0, dtype=torch.float64):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return rows / rows.norm(dim=-1, keepdim=True)
