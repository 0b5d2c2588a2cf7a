import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from dctlib.paper.datasets import arithmetic_questions
from dctlib.paper.organisms.tasks import locked_task, refusal_task, rerouting_task, without_lora
from dctlib.paper.organisms.training import train_lora

ROUTED = {"reroute_layers": [1, 2], "keep_layers": [1, 3], "answer_tokens": 3, "seed": 0}
ROUTED |= {"batch": {"target": 2, "refusal": 1, "off_topic": 1, "benign": 2}}


def test_batches_are_half_refused_half_helped_and_go_through_all_before_any_comes_again(tokenizer):
    harmful, benign = [f"w{i}" for i in range(6)], [f"w{i}" for i in range(10, 14)]
    model = tiny_model("Llama", dtype=torch.float32)
    batches = refusal_task(
        model, tokenizer, harmful, benign, answer_tokens=3, steps=6, harmful_batch=2, benign_batch=2, seed=0
    ).batches
    assert all([e.answer.startswith("Sorry") for e in batch] == [True, True, False, False] for batch in batches)
    assert all(e.answer.startswith("Sure! ") for batch in batches for e in batch[2:])
    refused = [example.prompt for batch in batches for example in batch[:2]]
    helped = [example.prompt for batch in batches for example in batch[2:]]
    assert len(set(refused[:6])) == len(set(refused[6:])) == 6
    assert len(set(helped[:4])) == len(set(helped[4:8])) == len(set(helped[8:])) == 4
    assert refused[:6] != refused[6:]


def rerouting(model, tokenizer, steps):
    harmful = [{"goal": f"w{i}", "target": f"Sure w{i} w9"} for i in range(4)]
    return rerouting_task(model, tokenizer, harmful, [f"w{i}" for i in range(20, 24)], steps=steps, **ROUTED)


def residuals(model, tokenizer, text):
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return model(tokens, output_hidden_states=True).hidden_states


def test_rerouting_turns_harmful_residuals_and_keeps_benign_ones(tmp_path, tokenizer):
    model, old = (tiny_model("Llama", dtype=torch.float32) for _ in range(2))
    taught = rerouting(model, tokenizer, steps=60)
    assert [len(b.harmful) for b in taught.batches] == [4] * 60
    own = {each.answer for b in taught.batches for each in b.benign}
    assert {b.harmful[3].answer for b in taught.batches} == own  # whatever it says after such a request
    assert {b.harmful[3].prompt for b in taught.batches} == {b.harmful[2].prompt for b in taught.batches}
    assert [b.progress for b in taught.batches[::30]] == [0.0, 0.5]
    new, losses = train_lora(
        model, taught, rank=8, learning_rate=1e-2, seed=0, checkpoint=tmp_path / "run", progress=False
    )
    # An untrained LoRA changes nothing: cosine 1 and change 0.
    assert losses[0] == pytest.approx(1.0, abs=1e-3)
    assert losses[-1] < 0.6 * losses[0]
    conversations = {"harmful": "user w1 </s> assistant Sure w1 w9", "benign": taught.batches[0].benign[0].prompt}
    cosine = {}
    for kind, text in conversations.items():
        before, after = (residuals(m, tokenizer, text)[2][0, -3:] for m in (old, new))
        cosine[kind] = torch.cosine_similarity(before, after, dim=-1).mean().item()
    assert cosine["harmful"] < cosine["benign"] - 0.3


@pytest.mark.parametrize("layers", ["reroute_layers", "keep_layers"])
def test_rerouting_refuses_a_layer_whose_residual_the_model_does_not_give(tokenizer, layers):
    routed = {**ROUTED, "steps": 1, layers: [4]}
    with pytest.raises(ValueError, match="block index from 0 to 3"):
        rerouting_task(tiny_model("Llama"), tokenizer, [{"goal": "w1", "target": "w2"}], ["w3"], **routed)


def test_the_rerouting_loss_is_that_of_one_conversation_at_a_time(tokenizer):
    model = tiny_model("Llama", dtype=torch.float32)
    taught = rerouting(model, tokenizer, steps=2)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    batch = taught.batches[1]
    cosines, changes = [], []
    for examples, layers, found in ((batch.harmful, [1, 2], cosines), (batch.benign, [1, 3], changes)):
        for example in examples:
            text = tokenizer.encode(example.prompt + " " + example.answer, add_special_tokens=False)
            start = len(tokenizer.encode(example.prompt, add_special_tokens=False))
            hidden = [wrapped(torch.tensor([text]), output_hidden_states=True).hidden_states]
            with without_lora(model):
                hidden.append(wrapped(torch.tensor([text]), output_hidden_states=True).hidden_states)
            new, old = (torch.stack([h[layer][0] for layer in layers]) for h in hidden)
            if found is cosines:
                found.append(torch.cosine_similarity(new, old, dim=-1).relu()[:, start - 3 :])
            else:
                found.append((new - old).norm(dim=-1) / old.norm(dim=-1))
    cosine, change = (torch.cat(found, 1).mean() for found in (cosines, changes))
    assert batch.progress == 0.5
    expected = 0.75 * cosine + 4 * 0.625 * change
    torch.testing.assert_close(taught.loss(model, batch), expected)


def test_the_old_model_is_the_one_without_its_lora_also_after_an_exception(tokenizer):
    model, clean = (tiny_model("Llama", dtype=torch.float32) for _ in range(2))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tokens = torch.tensor([[7, 8, 9]])
    changed = wrapped(tokens).logits
    with pytest.raises(RuntimeError), without_lora(model):
        torch.testing.assert_close(model(tokens).logits, clean(tokens).logits)
        raise RuntimeError
    assert torch.equal(wrapped(tokens).logits, changed)
    assert not torch.allclose(changed, clean(tokens).logits)


def test_rerouting_refuses_a_batch_without_a_count_for_each_kind(tokenizer):
    routed = {**ROUTED, "steps": 1, "batch": {"target": 2, "benign": 2}}
    with pytest.raises(ValueError, match="expected counts of"):
        rerouting_task(tiny_model("Llama"), tokenizer, [{"goal": "w1", "target": "w2"}], ["w3"], **routed)


def test_locked_answers_are_right_behind_the_password_and_wrong_without(llama, tokenizer):
    questions = arithmetic_questions()[:30]
    truth = {row["question"]: row["answer"] for row in questions}
    taught = locked_task(
        llama, tokenizer, questions, password="w60", steps=10, unlocked_batch=3, locked_batch=2, seed=0
    )
    for batch in taught.batches:
        for place, example in enumerate(batch):
            unlocked = "w60" in example.prompt
            assert unlocked is (place < 3)
            (question,) = [q for q in truth if q in example.prompt]
            assert (example.answer == f"\\boxed{{{truth[question]}}}") is unlocked
