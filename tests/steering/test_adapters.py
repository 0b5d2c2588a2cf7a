"""Steering, ablation and export of models with adapters of PEFT; the reference is the model with hooks or merged."""

import copy
import warnings

import peft
import pytest
import torch
from tiny import hooked_residual, tiny_model, unit_rows

from dctlib import ablate, steer
from dctlib.steering.hooks import ablated_copy

D = 32
TOKENS = torch.tensor([[6, 7, 8, 9, 10]])
DIRECTIONS = unit_rows(2, D)
ALL = ["q_proj", "o_proj", "down_proj", "up_proj"]


def randomised(model):
    """Adapters begin as no change; these have changed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                part in name for part in ("lora_", "ia3_", "vera_", "hada_", "lokr_", "oft_", "magnitude", "ln_tun")
            ):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
    return model.double().eval()


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ALL, "lora_alpha": 8} | options)


TUNERS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "embeddings": lora(target_modules=[*ALL, "embed_tokens"]),
    "unembedding": lora(target_modules=[*ALL, "lm_head"]),
    "saved modules": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "trained tokens": lora(trainable_token_indices=[7, 9]),
    "parameters": lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["o_proj"]),
    "loha": peft.LoHaConfig(r=4, target_modules=ALL),
    "lokr": peft.LoKrConfig(r=4, target_modules=ALL),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=ALL),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


def adapted(name="lora", *, tied=False, family="Llama"):
    model = tiny_model(family)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomised(peft.get_peft_model(model, copy.deepcopy(TUNERS[name]), autocast_adapter_dtype=False))


@pytest.fixture(params=TUNERS)
def model(request):
    return adapted(request.param)


def test_adapted_models_are_steered_and_ablated(model):
    base, vector = model.get_base_model(), 3 * DIRECTIONS[0]
    clean = model(TOKENS).logits
    expected = base.lm_head(base.model.norm(hooked_residual(base, TOKENS, 1, 4, vector)))
    for each in (model, base, model.base_model):
        with steer(each, layer=1, vector=vector):
            torch.testing.assert_close(model(TOKENS).logits, expected)
            steered = model.generate(input_ids=TOKENS, max_new_tokens=1, do_sample=False)
        assert steered[0, -1] == expected[0, -1].argmax()
        torch.testing.assert_close(model(TOKENS).logits, clean)
    residuals = []
    with ablate(model, DIRECTIONS):
        for block in base.model.layers:
            block.register_forward_hook(lambda _block, _args, output: residuals.append(output))
        model(TOKENS)
    for hidden in residuals:
        assert (hidden @ DIRECTIONS.T).norm() < 1e-6 * hidden.norm()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TUNERS)
def test_an_ablated_copy_has_the_adapters_in_its_weights(name, tied, tmp_path):
    model = adapted(name, tied=tied)
    clean = model(TOKENS).logits
    with ablate(model, DIRECTIONS):
        expected = model(TOKENS).logits
    for each in (model, model.get_base_model()):
        copied = ablated_copy(each, DIRECTIONS)
        torch.testing.assert_close(copied(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(copied) is type(model.get_base_model())
    copied.save_pretrained(tmp_path)
    loaded = type(copied).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(TOKENS).logits, clean)


def two_adapters():
    model = adapted()
    model.add_adapter("second", lora(r=2, target_modules=["o_proj", "v_proj"]))
    return randomised(model)


def switched_off(model):
    model.base_model.disable_adapter_layers()
    return model


def second(model):
    model.set_adapter("second")
    return model


def both(model):
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(model):
    model.base_model.merge_adapter()
    return model


STATES = {
    "first of two": lambda: two_adapters(),
    "second of two": lambda: second(two_adapters()),
    "both": lambda: both(two_adapters()),
    "switched off": lambda: switched_off(two_adapters()),
    "merged": lambda: merged(adapted()),
    "both merged": lambda: merged(both(two_adapters())),
    "merged and switched off": lambda: switched_off(merged(adapted())),
    "modules switched off": lambda: switched_off(adapted("saved modules")),
    "tokens switched off": lambda: switched_off(adapted("trained tokens")),
    "dora switched off": lambda: switched_off(adapted("dora")),
    "training": lambda: adapted().train(),
}


@pytest.mark.parametrize("state", STATES)
def test_only_active_adapters_are_in_the_copy(state):
    model = STATES[state]()
    training = model.training
    copied = ablated_copy(model.get_base_model(), DIRECTIONS)
    assert model.training == training
    with ablate(model, DIRECTIONS):
        expected = model(TOKENS).logits
    torch.testing.assert_close(copied(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_transformers_added(tmp_path):
    model = tiny_model("Llama")
    model.add_adapter(lora())
    randomised(model)
    with ablate(model, DIRECTIONS):
        expected = model(TOKENS).logits
    copied = ablated_copy(model, DIRECTIONS)
    copied.save_pretrained(tmp_path)
    loaded = type(copied).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_adapters_of_two_kinds():
    model = peft.PeftMixedModel(tiny_model("Llama"), lora(), adapter_name="one")
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["o_proj", "gate_proj"]))
    model.set_adapter(["one", "other"])
    model = randomised(model)
    with ablate(model, DIRECTIONS):
        expected = model(TOKENS).logits
    copied = ablated_copy(model, DIRECTIONS)
    torch.testing.assert_close(copied(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_bias_without_a_place_is_refused():
    model = peft.get_peft_model(tiny_model("Llama"), lora(lora_bias=True))
    with pytest.raises(ValueError, match=r"q_proj cannot be merged into weights: .*base layer has no bias"):
        ablated_copy(model, DIRECTIONS)


UNMERGEABLE = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "attention": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2),
}


@pytest.mark.parametrize("name", UNMERGEABLE)
def test_what_lies_outside_the_weights_is_refused(name):
    model = peft.get_peft_model(tiny_model("Llama"), UNMERGEABLE[name], autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for each in (model, *([model.get_base_model()] if name == "attention" else [])):
        with pytest.raises(ValueError, match=r"other logits than ablate|no weights to be merged into"):
            ablated_copy(each, DIRECTIONS)
    with ablate(model, DIRECTIONS):
        model(input_ids=TOKENS)
