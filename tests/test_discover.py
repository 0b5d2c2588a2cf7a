import pytest
import torch
from conftest import tiny_model, unit_rows

from dctlib import CausalMap, calibrate, score_vectors, steer
from dctlib.discover import distinct, fit_by, measure, read
from dctlib.slices import scan_slices

INSTRUCTIONS = ["w0 w1", "w2 w3 w4", "w5"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def cmap(model, tokenizer, texts):
    return CausalMap.from_model(model, tokenizer, texts, source=1, target=3)


@pytest.mark.parametrize(("method", "count"), [("exponential", 3), ("quadratic", 6), ("linear", 6)])
def test_vectors_of_every_method_are_measured(model, tokenizer, texts, cmap, tmp_path, method, count):
    R = calibrate(cmap)
    dct = fit_by(method, tmp_path, cmap, num_factors=3, iterations=1, input_scale=R, seed=0)
    assert dct.activation == method
    vectors = dct.steering_vectors(R)
    options = {"layer": 1, "words": ("Sure", "Sorry"), "progress": False}
    table = measure(model, tokenizer, cmap, dct, vectors, texts, **options)
    assert len(table) == count
    torch.testing.assert_close(torch.tensor(table["change"].tolist()), cmap(vectors).norm(dim=1))
    scores = score_vectors(model, tokenizer, texts, vectors, layer=1, progress=False)
    torch.testing.assert_close(torch.tensor(table["score"].tolist()), scores)
    ranked = distinct(table, vectors, by="divergence")
    assert ranked["divergence"].is_monotonic_decreasing
    assert ranked["alike"].iloc[0] == 0
    with pytest.raises(ValueError, match="rank_by='effect'"):
        distinct(table, vectors, by="effect")


def test_it_reads_what_each_vector_makes_it_say(model, tokenizer):
    vectors = 20 * unit_rows(2, 32).float()
    said = read(
        model, tokenizer, INSTRUCTIONS, vectors, layer=1, strengths=[1.0, 2.0], max_new_tokens=3, progress=False
    )
    assert len(said.clean) == 3
    assert {strength: [len(each) for each in of] for strength, of in said.steered.items()} == {1: [3, 3], 2: [3, 3]}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": INSTRUCTIONS[1]}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(prompt, return_tensors="pt")
    with steer(model, layer=1, vector=2 * vectors[1]):
        alone = model.generate(**tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert said.steered[2.0][1][1] == tokenizer.decode(
        alone[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert len(said.perplexity) == 2
    assert all(1 <= perplexity <= 1e6 for perplexity in said.perplexity)


def test_slices_are_within_the_model_and_the_most_promising_comes_first(model, tokenizer):
    options = {"num_factors": 4, "iterations": 1, "judged": 2, "answer_tokens": 3, "progress": False}
    slices = scan_slices(model, tokenizer, INSTRUCTIONS[:2], INSTRUCTIONS[2:], most_perplexity=1e9, **options)
    assert {(each.source, each.target) for each in slices} == {(0, 1), (1, 2), (2, 3)}
    found = [each.found for each in slices]
    assert found == sorted(found, reverse=True)
    assert 0 < max(found) <= 1
