import copy

import pytest
import torch
from tiny import tiny_model, unit_rows
from tokenizers.processors import TemplateProcessing
from transformers import LogitsProcessor

from dctlib import steer
from dctlib.steering.generation import generate_completions, generate_per_vector, sample_completions


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


def test_it_is_greedy_whatever_penalty_a_model_ships(tokenizer):
    model, options = tiny_model("Llama"), {"max_new_tokens": 8, "progress": False}
    expected = generate_completions(model, tokenizer, ["w0 w1 w2", "w3"], **options)
    model.generation_config.repetition_penalty = 5.0
    tokens = tokenizer("w0 w1 w2", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model.generate(tokens, max_new_tokens=8)[0, 3:], skip_special_tokens=True) != expected[0]
    assert generate_completions(model, tokenizer, ["w0 w1 w2", "w3"], **options) == expected


def test_it_is_greedy_whatever_number_of_beams_a_model_ships(tokenizer):
    texts, options = ["w0 w1 w2", "w3"], {"max_new_tokens": 8, "progress": False}
    model = tiny_model("Llama")
    expected = generate_completions(model, tokenizer, texts, **options)
    sampled = sample_completions(model, tokenizer, texts, count=2, **options)
    model.generation_config.num_beams = 4
    tokens = tokenizer("w0 w1 w2", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model.generate(tokens, max_new_tokens=8)[0, 3:], skip_special_tokens=True) != expected[0]
    assert generate_completions(model, tokenizer, texts, **options) == expected
    assert sample_completions(model, tokenizer, texts, count=2, **options) == sampled


def test_each_text_gets_one_begin_of_text_token(llama, tokenizer, monkeypatch):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    texts, seen = ["<s> w0 w1", "w2 w3 w4"], []
    handle = llama.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        generate_completions(llama, adding, texts, max_new_tokens=1, progress=False)
    finally:
        handle.remove()
    assert [row[row != 0].tolist() for row in seen[0]] == [tokenizer.encode(t) for t in ("<s> w0 w1", "<s> w2 w3 w4")]


TEXTS = ["w0 w1 w2 w3", "w4"]


def test_a_seed_fixes_the_samples_and_leaves_the_global_generator_alone(llama, tokenizer):
    options = {"count": 3, "max_new_tokens": 4, "progress": False}
    before = torch.get_rng_state()
    one, again, other = (sample_completions(llama, tokenizer, TEXTS, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one == again != other
    assert [len(completions) for completions in one] == [2, 2, 2]
    assert len({text for completions in one for text in completions}) > 2


def test_it_draws_from_the_model_s_own_distribution(llama, tokenizer):
    drawn = sample_completions(llama, tokenizer, ["w0 w1 w2 w3"] * 500, count=4, max_new_tokens=1, progress=False)
    words = [tokenizer.convert_tokens_to_ids(text) for completions in drawn for text in completions if text]
    tokens = tokenizer("w0 w1 w2 w3", return_tensors="pt")["input_ids"]
    expected = llama(tokens).logits[0, -1].softmax(-1)
    found = torch.bincount(torch.tensor(words), minlength=len(expected)) / 2000
    special = torch.tensor(tokenizer.all_special_ids)  # decoded to nothing
    expected[special] = found[special] = 0
    assert (found - expected).abs().sum() < 0.25  # total variation of 2,000 draws of 60 words: about 0.14
    assert (found - expected.new_full(expected.shape, 1 / 64)).abs().sum() > 0.3


def test_a_low_temperature_is_greedy(llama, tokenizer):
    (cold,) = sample_completions(llama, tokenizer, TEXTS, count=1, temperature=1e-4, max_new_tokens=3, progress=False)
    tokens = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    greedy = llama.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert cold[1] == tokenizer.decode(greedy[0, tokens.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("bad", [{"texts": []}, {"texts": "w0"}, {"count": 0}, {"temperature": 0.0}])
def test_bad_input_is_named(llama, tokenizer, bad):
    options = {"texts": TEXTS, "count": 1, "max_new_tokens": 1} | bad
    with pytest.raises(ValueError, match="expected a list and both above 0"):
        sample_completions(llama, tokenizer, options.pop("texts"), **options)
