import copy

import pytest
import torch
from tiny import tiny_model
from tokenizers.processors import TemplateProcessing

from dctlib.models.chat import tokenize
from dctlib.models.likelihood import Example, answer_loss, mean_nll, pack_answers

EXAMPLES = [
    Example("w0 w1 w2", "Sorry w3", ends=True),
    Example("w0 w1 w2", "Sorry w9", ends=False),
    Example("w4", "Sure w5 w6", ends=False),
]


def test_answers_begin_behind_their_prompts(llama, tokenizer):
    planted = pack_answers(llama, tokenizer, EXAMPLES)
    assert [len(tree.paths) for tree, _ in planted] == [2, 1]
    said = [
        tokenizer.convert_ids_to_tokens(tree.tokens[0, path[start:]].tolist())
        for tree, starts in planted
        for path, start in zip(tree.paths, starts, strict=True)
    ]
    assert said == [["Sorry", "w3", "</s>"], ["Sorry", "w9"], ["Sure", "w5", "w6"]]


def test_prompts_begin_as_they_do_in_a_map(llama, tokenizer):
    """Where a tokenizer begins a text with a token of its own, the model learns to answer behind it."""
    begun = copy.deepcopy(tokenizer)
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ((tree, (start,)),) = pack_answers(llama, begun, [Example("w0 w1", "Sure", ends=False)])
    assert begun.convert_ids_to_tokens(tree.tokens[0].tolist()) == ["<s>", "w0", "w1", "Sure"]
    assert start == len(tokenize(begun, "w0 w1")[0]) == 3


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


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])  # Gemma 2 caps its logits
def test_surprise_is_each_answers_own_mean(family, tokenizer):
    model = tiny_model(family)
    expected = [losses.mean().item() for losses in one_by_one(model, tokenizer)]
    assert mean_nll(model, tokenizer, EXAMPLES).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_loss_has_the_gradient_of_one_by_one(tokenizer):
    models = [tiny_model("Llama", dtype=torch.float32).requires_grad_() for _ in range(2)]
    answer_loss(models[0].train(), tokenizer, EXAMPLES).backward()
    torch.cat(one_by_one(models[1], tokenizer)).mean().backward()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_an_empty_answer_surprises_without_bound(llama, tokenizer):
    found = mean_nll(llama, tokenizer, [EXAMPLES[0], Example("w1", "", ends=False)])
    assert found[0].isfinite()
    assert found[1] == torch.inf
