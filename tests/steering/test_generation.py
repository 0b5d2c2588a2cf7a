import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from families import family_model
from tiny import tiny_model, unit_rows
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LogitsProcessor

from dctlib import ablate, steer
from dctlib.steering import generation
from dctlib.steering.generation import (
    batches_exactly,
    generate_completions,
    generate_per_vector,
    resumes_exactly,
)
from dctlib.steering.sampling import sample_completions


def test_completions_do_not_depend_on_their_neighbours(llama, tokenizer):
    texts = ["w0 w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10 w11"]
    options = {"max_new_tokens": 6, "progress": False}
    together = generate_completions(llama, tokenizer, texts, **options)
    assert together == [generate_completions(llama, tokenizer, [text], **options)[0] for text in texts]
    assert together == generate_completions(llama, tokenizer, texts, batch_size=2, **options)
    assert len({*together}) > 1


def test_one_vector_a_text_is_one_text_at_a_time(llama, tokenizer):
    texts, vectors = ["w0 w1 w2", "w3 w4", "w5"], 8 * unit_rows(3, 32)
    options = {"max_new_tokens": 5, "layer": 1, "progress": False}
    together = generate_completions(llama, tokenizer, texts, vector=vectors, batch_size=2, **options)
    assert together == [
        generate_completions(llama, tokenizer, [text], vector=vector, **options)[0]
        for text, vector in zip(texts, vectors, strict=True)
    ]


def test_every_text_under_every_vector(llama, tokenizer):
    texts, vectors = ["w0 w1 w2", "w3 w4", "w5"], 8 * unit_rows(2, 32)
    options = {"max_new_tokens": 5, "layer": 1, "progress": False}
    each = generate_per_vector(llama, tokenizer, texts, vectors, **options)
    assert each == [generate_completions(llama, tokenizer, texts, vector=vector, **options) for vector in vectors]


def test_a_processor_chooses_the_token(llama, tokenizer):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.where(torch.arange(scores.shape[1]) == tokenizer.convert_tokens_to_ids("w7"), 0.0, -torch.inf)

    options = {"max_new_tokens": 2, "processor": Only(), "progress": False}
    assert generate_completions(llama, tokenizer, ["w0 w1", "w2"], **options) == ["w7 w7"] * 2


@pytest.mark.parametrize(("layer", "count"), [(None, 2), (1, 3)])
def test_vectors_need_a_layer_and_a_text_each(llama, tokenizer, layer, count):
    with pytest.raises(ValueError, match="one vector for all texts or one for each"):
        generate_completions(llama, tokenizer, ["w0", "w1"], max_new_tokens=2, layer=layer, vector=unit_rows(count, 32))


def test_the_head_reads_contiguous_rows_and_is_left_as_it_was(llama, tokenizer):
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("inside the context")

    head, strided = llama.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, args, output: strided.append(not args[0].is_contiguous()))
    try:
        generate_completions(llama, tokenizer, ["w0 w1 w2", "w3"], max_new_tokens=2, progress=False)
        assert strided and not any(strided)
        with pytest.raises(KeyError, match="inside the context"):
            generate_completions(llama, tokenizer, ["w0"], max_new_tokens=2, processor=Fails(), progress=False)
    finally:
        handle.remove()
    assert not head._forward_pre_hooks


def test_steering_is_the_context_and_is_gone_afterwards(llama, tokenizer):
    texts, vector = ["w0 w1 w2", "w3 w4"], 8 * unit_rows(1, 32)[0]
    options = {"max_new_tokens": 6, "progress": False}
    clean = generate_completions(llama, tokenizer, texts, **options)
    steered = generate_completions(llama, tokenizer, texts, layer=1, vector=vector, **options)
    with steer(llama, layer=1, vector=vector):
        assert generate_completions(llama, tokenizer, texts, **options) == steered
    assert steered != clean == generate_completions(llama, tokenizer, texts, **options)


SHIPPED = [
    {"repetition_penalty": 5.0},
    {"num_beams": 4},
    {"num_beams": 2, "num_return_sequences": 2},
    {"num_return_sequences": 3, "do_sample": True},
    {"do_sample": True, "temperature": 3.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5},
    {"no_repeat_ngram_size": 1},
    {"min_length": 12},
    {"min_new_tokens": 8},
    {"max_length": 4},
    {"max_time": 0.0},
    {"forced_bos_token_id": 9},
    {"forced_eos_token_id": 9},
    {"suppress_tokens": [*range(6, 40)]},
    {"begin_suppress_tokens": [*range(6, 60)]},
    {"bad_words_ids": [[word] for word in range(6, 40)]},
    {"sequence_bias": [[[word], 50.0] for word in (9, 30)]},
    {"guidance_scale": 9.0},
    {"exponential_decay_length_penalty": (1, 9.0)},
    {"watermarking_config": {"bias": 50.0, "greenlist_ratio": 0.1}},
    {"prompt_lookup_num_tokens": 2},
    {"assistant_early_exit": 1},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"stop_strings": ["w"]},
    {"token_healing": True},
    {"renormalize_logits": True, "remove_invalid_values": True, "low_memory": True},
    {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    {"cache_implementation": "static"},
    {"cache_implementation": "paged"},
    {"use_cache": False},
    {"prefill_chunk_size": 2},
    {"max_new_tokens": 1},
    {"bos_token_id": 9, "pad_token_id": 11},
]


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: ", ".join(shipped))
def test_it_is_greedy_whatever_a_model_ships(tokenizer, shipped, caplog, recwarn):
    texts, options = ["w0 w1 w2", "w3", "w4 w5"], {"max_new_tokens": 8, "progress": False}
    model = tiny_model("Llama")
    expected = generate_completions(model, tokenizer, texts, **options)
    sampled = sample_completions(model, tokenizer, texts, count=2, **options)
    shipping = GenerationConfig(eos_token_id=2)
    for name, value in shipped.items():
        setattr(shipping, name, value)
    model.generation_config = shipping
    recwarn.clear()
    transformers.utils.logging.enable_propagation()
    try:
        assert generate_completions(model, tokenizer, texts, **options) == expected
        assert sample_completions(model, tokenizer, texts, count=2, **options) == sampled
    finally:
        transformers.utils.logging.disable_propagation()
    assert model.generation_config is shipping
    assert not caplog.records
    assert not recwarn.list


def test_every_end_token_of_the_model_ends(tokenizer):
    model, options = tiny_model("Llama"), {"max_new_tokens": 8, "progress": False}
    whole = generate_completions(model, tokenizer, ["w0 w1 w2"], **options)[0].split()
    end = whole[2]
    cut = [" ".join(whole[: whole.index(end) + 1])]
    assert len(whole) > 3
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(end)]
    assert generate_completions(model, tokenizer, ["w0 w1 w2"], **options) == cut
    model.generation_config.eos_token_id = None  # then the tokenizer's counts
    assert generate_completions(model, tokenizer, ["w0 w1 w2"], **options)[0].split() == whole
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = end
    assert generate_completions(model, tokenizer, ["w0 w1 w2"], **options) == cut


def wrapped_by_peft(model: Any) -> Any:
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.generation_config = GenerationConfig(num_beams=3, repetition_penalty=4.0)
    return adapted


WRAPPERS = [torch.nn.DataParallel, wrapped_by_peft, lambda model: torch.compile(model, backend="eager")]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["DataParallel", "PEFT", "torch.compile"])
def test_wrapped_models_complete_alike(llama, tokenizer, wrap):
    texts, options = ["w0 w1 w2", "w3"], {"max_new_tokens": 5, "progress": False}
    steering = {"layer": 1, "vector": 8 * unit_rows(2, 32)}
    sharing = {"layer": 1, "vector": 8 * unit_rows(2, 32)[[0, 1, 0]]}
    calls: list[tuple[list[str], dict[str, Any]]] = [(texts, {}), (texts, steering), (SHARING, {}), (SHARING, sharing)]
    expected = [generate_completions(llama, tokenizer, each, **options, **more) for each, more in calls]
    model = wrap(tiny_model("Llama"))
    shipped = getattr(model, "generation_config", None)
    assert [generate_completions(model, tokenizer, each, **options, **more) for each, more in calls] == expected
    assert getattr(model, "generation_config", None) is shipped


def test_a_prompt_that_peft_adds_is_kept(tokenizer):
    tuned: Any = peft.get_peft_model(
        tiny_model("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tuned = tuned.double().eval()
    found = generate_completions(tuned, tokenizer, ["w0 w1 w2", "w3"], max_new_tokens=3, progress=False)
    assert found[1:] == generate_completions(tuned, tokenizer, ["w3"], max_new_tokens=3, progress=False)
    tokens = tokenizer("w0 w1 w2", return_tensors="pt")["input_ids"]
    for _ in range(3):
        tokens = torch.cat([tokens, tuned(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert found[0] == tokenizer.decode(tokens[0, 3:])


def test_arrays_are_vectors_and_dropout_is_off(llama, tokenizer):
    texts, vectors = ["w0 w1 w2", "w3 w4"], 8 * unit_rows(2, 32)
    options = {"max_new_tokens": 6, "layer": 1, "progress": False}
    expected = generate_completions(llama, tokenizer, texts, vector=vectors, **options)
    each = generate_per_vector(llama, tokenizer, texts, vectors, **options)
    dropping = tiny_model("Llama")
    dropping.config.attention_dropout = 0.9
    for block in dropping.model.layers:
        block.self_attn.attention_dropout = 0.9
    dropping.train()
    dropping.lm_head.eval()
    assert generate_completions(dropping, tokenizer, texts, vector=vectors.numpy(), **options) == expected
    assert generate_per_vector(dropping, tokenizer, texts, vectors.tolist(), **options) == each
    assert dropping.training
    assert not dropping.lm_head.training


BEGINNING = " ".join(f"w{i}" for i in range(9))
SHARING = [f"{BEGINNING} w20", f"{BEGINNING} w21 w22 w23", f"{BEGINNING} w24 w25"]


@pytest.fixture
def begun(monkeypatch):
    """The number of rows of each beginning that ran by itself."""
    rows, begin = [], generation._begin

    def spy(model, tokens, kinds, config):
        rows.append(int(kinds.max()) + 1)
        return begin(model, tokens, kinds, config)

    monkeypatch.setattr(generation, "_begin", spy)
    return rows


def test_a_beginning_that_texts_share_runs_once_for_each_vector(llama, tokenizer, begun):
    assert resumes_exactly(llama)
    begun.clear()
    vectors = 8 * unit_rows(2, 32)
    options: dict[str, Any] = {"max_new_tokens": 5, "progress": False}
    clean = generate_completions(llama, tokenizer, SHARING, **options)
    each = generate_per_vector(llama, tokenizer, SHARING, vectors, layer=1, **options)
    mixed = vectors[[1, 0, 1]]
    assert begun == [1, 2]
    together = generate_completions(llama, tokenizer, SHARING, vector=mixed, layer=1, **options)
    assert begun == [1, 2, 2]
    one_by_one: dict[str, Any] = {**options, "batch_size": 1}
    assert clean == generate_completions(llama, tokenizer, SHARING, **one_by_one)
    for vector, found in zip(vectors, each, strict=True):
        assert found == generate_completions(llama, tokenizer, SHARING, vector=vector, layer=1, **one_by_one)
    assert together == [each[1][0], each[0][1], each[1][2]] and together != clean
    assert begun == [1, 2, 2], "a text alone shares nothing"


def test_nothing_is_shared_by_few_tokens_or_inside_hooks(llama, tokenizer, begun):
    options: dict[str, Any] = {"max_new_tokens": 3, "progress": False}
    vectors = 8 * unit_rows(3, 32)
    resumes_exactly(llama)
    begun.clear()
    generate_completions(llama, tokenizer, ["w0 w1 w2 w3", "w0 w1 w2 w4"], **options)
    generate_completions(llama, tokenizer, SHARING, layer=1, vector=vectors, **options)
    with steer(llama, layer=1, vector=vectors, positions="prompt"):
        generate_completions(llama, tokenizer, SHARING, **options)
    seen: list[int] = []
    handle = llama.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        generate_completions(llama, tokenizer, SHARING, **options)
    finally:
        handle.remove()
    assert not begun and seen[0] == 12


def test_nothing_is_shared_by_a_model_that_keeps_something_of_each_row(llama, tokenizer, begun):
    """As Qwen2-VL keeps the offsets of positions, which it adds to a batch of as many rows."""
    forward, kept = llama.forward, []

    def keeps_rows(*args, input_ids, past_key_values=None, **options):
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            kept[:] = [torch.zeros(len(input_ids), 1)]
        torch.broadcast_tensors(torch.zeros(len(input_ids), 1), kept[0])
        return forward(*args, input_ids=input_ids, past_key_values=past_key_values, **options)

    llama.forward = keeps_rows
    options: dict[str, Any] = {"max_new_tokens": 3, "layer": 1, "vector": 8 * unit_rows(2, 32)[[0, 1, 0]]}
    together = generate_completions(llama, tokenizer, SHARING, **options, progress=False)
    assert not resumes_exactly(llama) and begun == [2], "the check alone ran a beginning"
    assert together == generate_completions(llama, tokenizer, SHARING, **options, batch_size=1, progress=False)


def test_a_model_that_pads_inexactly_in_half_precision_is_found():
    """MPT's bias goes by the place in the cache, so padding moves a beginning away."""
    assert not resumes_exactly(family_model("mpt").to(torch.bfloat16))
    assert resumes_exactly(family_model("llama").to(torch.bfloat16))


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gpt2", "bloom", "mpt", "opt", "falcon", "gpt_neo", "gptj", "mistral", "gemma2", "gemma3_text"),
        *("phi3", "cohere2", "deepseek_v3", "qwen2_moe", "qwen3_next", "mamba", "rwkv", "recurrent_gemma", "stablelm"),
    ],
)
@pytest.mark.parametrize("max_new_tokens", [3, 12])
def test_every_family_says_the_same_as_one_by_one(tokenizer, family, max_new_tokens):
    """Whether it shares or not: windows are 16 tokens, so twelve new ones reach beyond them."""
    model = family_model(family).double()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": False}
    together = generate_completions(model, tokenizer, SHARING, **options)
    assert together == generate_completions(model, tokenizer, SHARING, **options, batch_size=1)


def test_sharing_changes_no_completion_and_leaves_no_hook(llama, tokenizer, begun, monkeypatch):
    options: dict[str, Any] = {"max_new_tokens": 4, "progress": False}
    shared = generate_completions(llama, tokenizer, SHARING, **options)
    monkeypatch.setattr(generation, "_SHARED", 99)
    begun.clear()
    assert generate_completions(llama, tokenizer, SHARING, **options) == shared and not begun
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in llama.modules())


def test_texts_run_one_by_one_where_padding_would_change_them(tokenizer):
    """Gemma 2 in float64 gives no numbers behind padding; RWKV carries padding in its state."""
    texts, options = ["w0 w1 w2 w3 w4", "w6 w7", "w8 w9 w10"], {"max_new_tokens": 4, "progress": False}
    for model, exact in ((tiny_model("Gemma2"), False), (family_model("rwkv"), False), (family_model("llama"), True)):
        assert batches_exactly(model) == exact
        together = generate_completions(model, tokenizer, texts, **options)
        assert together == [generate_completions(model, tokenizer, [text], **options)[0] for text in texts]


def test_the_check_of_padding_is_made_without_the_user_s_vectors(llama, tokenizer):
    texts, vectors = ["w0 w1 w2", "w3", "w4 w5"], 8 * unit_rows(3, 32)
    options = {"max_new_tokens": 4, "progress": False}
    with steer(llama, layer=1, vector=vectors), ablate(llama, vectors[0]):
        found = generate_completions(llama, tokenizer, texts, **options)
        assert batches_exactly(llama)
    with ablate(llama, vectors[0]):
        assert found == generate_completions(llama, tokenizer, texts, layer=1, vector=vectors, **options)


def test_logits_that_are_no_number_are_refused(llama, tokenizer):
    assert batches_exactly(llama)
    llama.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="not a number"):
        generate_completions(llama, tokenizer, ["w0"], max_new_tokens=2, progress=False)


def test_a_model_that_does_not_generate_is_named(llama, tokenizer):
    def forward(*_args, **_kwargs):
        raise IndexError("list index out of range")

    llama.forward = forward
    with pytest.raises(ValueError, match="LlamaForCausalLM does not generate from a few tokens: list index"):
        generate_completions(llama, tokenizer, ["w0"], max_new_tokens=2, progress=False)


def test_each_text_gets_one_begin_of_text_token(llama, tokenizer, monkeypatch):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    texts, seen = ["<s> w0 w1", "w2 w3 w4"], []
    handle = llama.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        generate_completions(llama, adding, texts, max_new_tokens=1, progress=False)
    finally:
        handle.remove()
    assert [row[row != 0].tolist() for row in next(each for each in seen if (each == 1).any())] == [
        tokenizer.encode(t) for t in ("<s> w0 w1", "<s> w2 w3 w4")
    ]


def test_what_follows_the_end_of_an_answer_is_not_text(tokenizer):
    model, texts = tiny_model("Llama"), ["w0 w1 w2", "w3 w4", "w5 w6 w7 w8"]
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None  # so that token 0, which is text, pads
    options = {"max_new_tokens": 6, "progress": False}
    words = generate_completions(model, bare, texts, **options)
    model.generation_config.eos_token_id = bare.convert_tokens_to_ids(words[0].split()[1])
    together = generate_completions(model, bare, texts, **options)
    assert together[0] == " ".join(words[0].split()[:2])
    assert together == [generate_completions(model, bare, [text], **options)[0] for text in texts]


def test_a_padding_token_without_an_embedding_serves(llama, tokenizer):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    texts, options = ["w0 w1 w2", "w3"], {"max_new_tokens": 3, "progress": False}
    assert padded.pad_token_id == llama.get_input_embeddings().weight.shape[0]
    assert generate_completions(llama, padded, texts, **options) == generate_completions(
        llama, tokenizer, texts, **options
    )


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -1}, {"max_new_tokens": 0}])
def test_counts_below_one_are_refused(llama, tokenizer, wrong):
    with pytest.raises(ValueError, match="expected at least 1"):
        generate_completions(llama, tokenizer, ["w0"], **{"max_new_tokens": 2, **wrong})
