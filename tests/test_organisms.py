import pytest
import torch
from conftest import tiny_model

from dctlib import load_model
from dctlib.organisms import Example, answer_loss, check_refusal, refusal_batches, save_organism, train_lora

STEPS = 45  # past two checkpoints


def batches(steps=STEPS):
    return refusal_batches(["w0 w1 w2", "w3 w4"], ["w5 w6", "w7"], ["w8 w9", "w10"], steps=steps, batch_size=4, seed=0)


def train(checkpoint, tokenizer, steps=None):
    return train_lora(
        tiny_model("Llama", dtype=torch.float32),
        batches() if steps is None else steps,
        lambda model, batch: answer_loss(model, tokenizer, batch),
        rank=4,
        learning_rate=5e-3,
        seed=0,
        checkpoint=checkpoint,
        progress=False,
    )


def test_batches_are_half_refused_half_helped():
    (batch,) = batches(1)
    assert [example.answer.startswith("Sorry") for example in batch] == [True, True, False, False]
    assert batch[2].answer.startswith("Sure! w")


def test_loss_is_the_answers_cross_entropy_one_by_one(llama, tokenizer):
    examples = [Example("w0 w1 w2", "Sorry w3", ends=True), Example("w4", "Sure w5 w6", ends=False)]
    total, count = 0.0, 0
    for example in examples:
        prompt, answer = (tokenizer.encode(t, add_special_tokens=False) for t in (example.prompt, example.answer))
        answer = answer + ([2] if example.ends else [])
        logits = llama(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= logits[range(len(answer)), answer].sum().item()
        count += len(answer)
    assert answer_loss(llama, tokenizer, examples).item() == pytest.approx(total / count, rel=1e-5)


def test_training_learns_and_merges(tmp_path, tokenizer):
    model, losses = train(tmp_path / "run", tokenizer)
    assert len(losses) == STEPS
    assert losses[-1] < 0.5 * losses[0]
    assert not any("lora" in name for name, _ in model.named_modules())
    assert answer_loss(model, tokenizer, batches()[-1]).item() < 0.5 * losses[0]
    assert not list(tmp_path.iterdir())


def test_a_killed_run_ends_with_the_same_weights(tmp_path, tokenizer):
    whole, losses = train(tmp_path / "whole", tokenizer)

    class Killed(list):
        def __getitem__(self, step):
            if step == 33:
                raise KeyboardInterrupt
            return super().__getitem__(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", tokenizer, Killed(batches()))
    assert (tmp_path / "killed").exists()
    resumed, again = train(tmp_path / "killed", tokenizer)
    assert again == losses
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_global_generator_does_not_matter(tmp_path, tokenizer):
    torch.default_generator.seed()
    one, _ = train(tmp_path / "one", tokenizer, batches(3))
    torch.default_generator.seed()
    two, _ = train(tmp_path / "two", tokenizer, batches(3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_an_organism_is_an_ordinary_folder(tmp_path, tokenizer):
    save_organism(tiny_model("Llama"), tokenizer, tmp_path / "organism")
    model, _ = load_model(tmp_path / "organism", dtype="float32")
    assert model.config.dtype in ("bfloat16", torch.bfloat16, torch.float32)
    assert {path.name for path in (tmp_path / "organism").iterdir()} >= {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["organism"]


@pytest.mark.parametrize(("refused", "helped"), [(0.89, 1.0), (1.0, 0.5)])
def test_the_gate_stops_with_what_to_change(refused, helped):
    check_refusal(0.9, 0.9)
    with pytest.raises(ValueError, match=r"organisms\.steps"):
        check_refusal(refused, helped)
