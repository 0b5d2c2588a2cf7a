import pytest
import torch

from dctlib.answers import Example, answer_loss, padded, surprise

EXAMPLES = [Example("w0 w1 w2", "Sorry w3", ends=True), Example("w4", "Sure w5 w6", ends=False)]


def test_padding_marks_prompts_answers_and_nothing_else(tokenizer):
    tokens, mask, answers = padded(tokenizer, EXAMPLES)
    assert mask.sum(1).tolist() == [6, 4]
    assert tokenizer.convert_ids_to_tokens(tokens[0][answers[0]].tolist()) == ["Sorry", "w3", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokens[1][answers[1]].tolist()) == ["Sure", "w5", "w6"]
    assert not (answers & ~mask.bool()).any()


def one_by_one(model, tokenizer):
    losses = []
    for example in EXAMPLES:
        prompt, answer = (tokenizer.encode(t, add_special_tokens=False) for t in (example.prompt, example.answer))
        answer = answer + ([2] if example.ends else [])
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-logits[range(len(answer)), answer])
    return losses


def test_loss_is_the_answers_cross_entropy_one_by_one(llama, tokenizer):
    expected = torch.cat(one_by_one(llama, tokenizer)).mean().item()
    assert answer_loss(llama, tokenizer, EXAMPLES).item() == pytest.approx(expected, rel=1e-5)


def test_surprise_is_each_answers_own_mean_and_batches_do_not_matter(llama, tokenizer):
    expected = [losses.mean().item() for losses in one_by_one(llama, tokenizer)]
    assert surprise(llama, tokenizer, EXAMPLES).tolist() == pytest.approx(expected, rel=1e-5)
    assert surprise(llama, tokenizer, EXAMPLES, batch_size=1).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_empty_answer_surprises_without_bound(llama, tokenizer):
    found = surprise(llama, tokenizer, [EXAMPLES[0], Example("w1", "", ends=False)])
    assert found[0].isfinite()
    assert found[1] == torch.inf
