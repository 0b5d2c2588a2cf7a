from typing import Any

import pytest
import torch

from dctlib.steering import generation
from dctlib.steering.sampling import sample_completions

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


def test_a_prompt_that_is_sampled_often_runs_once(llama, tokenizer, monkeypatch):
    options: dict[str, Any] = {"count": 5, "max_new_tokens": 3, "seed": 1, "progress": False}
    prompt = [" ".join(f"w{i}" for i in range(12))]
    rows, begin = [], generation._begin
    monkeypatch.setattr(generation, "_begin", lambda *given: rows.append(int(given[2].max()) + 1) or begin(*given))
    generation.resumes_exactly(llama)
    rows.clear()
    shared = sample_completions(llama, tokenizer, prompt, **options)
    assert rows == [1]
    monkeypatch.setattr(generation, "_SHARED", 99)
    assert sample_completions(llama, tokenizer, prompt, **options) == shared
