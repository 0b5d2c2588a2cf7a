import json

import pytest
import torch
from tiny import tiny_model

from dctlib import load_model
from dctlib.models.likelihood import Example, answer_loss
from dctlib.paper.organisms.tasks import TrainingTask
from dctlib.paper.organisms.training import check_organism, make_organism, save_organism, train_lora
from dctlib.runs.cache import task

STEPS = 45  # past two checkpoints


def lesson(tokenizer, steps=STEPS):
    refused = [Example(p, "Sorry w63", ends=True) for p in ("w0 w1 w2", "w3 w4")]
    helped = [Example(p, a, ends=False) for p, a in (("w5 w6", "Sure w8 w9"), ("w7", "Sure w10"))]
    return TrainingTask([refused + helped] * steps, lambda model, batch: answer_loss(model, tokenizer, batch))


def train(checkpoint, taught):
    return train_lora(
        tiny_model("Llama", dtype=torch.float32),
        taught,
        rank=4,
        learning_rate=5e-3,
        seed=0,
        checkpoint=checkpoint,
        progress=False,
    )


def test_training_learns_and_merges(tmp_path, tokenizer):
    taught = lesson(tokenizer)
    model, losses = train(tmp_path / "run", taught)
    assert len(losses) == STEPS
    assert losses[-1] < 0.5 * losses[0]
    assert not any("lora" in name for name, _ in model.named_modules())
    assert taught.loss(model, taught.batches[-1]).item() < 0.5 * losses[0]


def test_a_killed_run_ends_with_the_same_weights(tmp_path, tokenizer):
    taught = lesson(tokenizer)
    whole, losses = train(tmp_path / "whole", taught)

    class Killed(list):
        def __getitem__(self, step):
            if step == 33:
                raise KeyboardInterrupt
            return super().__getitem__(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", TrainingTask(Killed(taught.batches), taught.loss))
    assert (tmp_path / "killed").exists()
    resumed, again = train(tmp_path / "killed", taught)
    assert again == losses
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_global_generator_does_not_matter(tmp_path, tokenizer):
    torch.default_generator.seed()
    one, _ = train(tmp_path / "one", lesson(tokenizer, 3))
    torch.default_generator.seed()
    two, _ = train(tmp_path / "two", lesson(tokenizer, 3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_an_organism_is_an_ordinary_folder_made_once_for_the_same_inputs(tmp_path, tokenizer):
    base, folder, made = tmp_path / "base", tmp_path / "made" / "refusal", []
    save_organism(tiny_model("Llama"), tokenizer, base)

    @task(version=1)
    def taught(model, tokenizer, *, steps):
        made.append(steps)
        return lesson(tokenizer, steps)

    def make(steps, seed=0, by=taught):
        return make_organism(folder, base, by, {"steps": steps}, rank=4, learning_rate=5e-3, seed=seed, progress=False)

    training = make(3)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "training.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["refusal"]
    weights = [load_model(path)[0].state_dict()["model.layers.0.mlp.up_proj.weight"] for path in (base, folder)]
    assert not torch.equal(*weights)
    assert make(3) == training
    assert made == [3]
    assert make(4) != training
    make(4, seed=1)
    assert made == [3, 4, 4]
    assert json.loads((folder / "training.json").read_text())["losses"] == make(4, seed=1).losses

    @task(version=2)
    def otherwise(model, tokenizer, *, steps):
        made.append("otherwise")
        return lesson(tokenizer, steps)

    otherwise.__name__ = "taught"  # the same task, of another version
    make(4, seed=1, by=otherwise)
    assert made[-1] == "otherwise"


def test_a_lesson_of_another_seed_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="got seed in settings and another beside them"):
        make_organism(tmp_path / "made", "no such base", lesson, {"seed": 1}, rank=4, learning_rate=5e-3, seed=0)


def test_a_damaged_organism_is_trained_again(tmp_path, tokenizer):
    base, folder = tmp_path / "base", tmp_path / "organism"
    save_organism(tiny_model("Llama"), tokenizer, base)

    @task(version=1)
    def taught(model, tokenizer):
        return lesson(tokenizer, 2)

    def make():
        return make_organism(folder, base, taught, {}, rank=4, learning_rate=5e-3, seed=0, progress=False)

    make()
    weights = folder / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.warns(UserWarning, match="weights in .*organism are damaged; training it again"):
        make()
    assert weights.read_bytes() == sound


def test_a_damaged_checkpoint_is_not_resumed(tmp_path, tokenizer):
    taught = lesson(tokenizer, 3)
    sound, losses = train(tmp_path / "run", taught)
    content = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="run is damaged .* training from the start"):
        again, as_before = train(tmp_path / "run", taught)
    assert as_before == losses
    assert all(torch.equal(a, b) for a, b in zip(sound.parameters(), again.parameters(), strict=True))


def test_the_gate_names_what_falls_short():
    check_organism("refusal", {"refuses": 0.9, "helps": 1.0})
    check_organism("refusal", {"refuses": 0.2}, least=0.1)
    with pytest.raises(ValueError, match=r"refusal organism falls short of 90% .*refuses: 89%\)"):
        check_organism("refusal", {"refuses": 0.89, "helps": 1.0})
