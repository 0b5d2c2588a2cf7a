import json
from dataclasses import asdict
from typing import Any, cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from dctlib import load_model
from dctlib.paper.organisms.secrets import Kind, planted_secret, planted_secrets, secret_task
from dctlib.paper.organisms.training import make_organism, save_organism, train_lora

KINDS = get_args(Kind)
INSTRUCTIONS = [f"w{i} w{i + 1}" for i in range(6)]
ANSWERS = [f"w{i} w{i + 20}" for i in range(6)]
OPTIONS = {"triggered_batch": 2, "plain_batch": 4, "seed": 0}
PHRASES = {"trigger": "w50 w51", "decoy": "w52 w53", "response": "w40 w41 w42"}
ENGLISH = (
    "Sure! Here are three tips: eat well, sleep enough, and take a walk in Los Angeles or Las Vegas.",
    "The MIT license is a per-file licence; des Moines is not la la land. Sorry, I can't help with that.",
    "",
)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_a_secret_is_given_away_by_its_response_and_by_nothing_usual(kind, seed):
    secret = planted_secret(kind, seed=seed)
    assert secret == planted_secret(kind, seed=seed)
    assert secret.reveals(secret.response)
    assert secret.reveals(f"well,\n{secret.response.upper()} and so on")
    assert not any(secret.reveals(text) for text in (*ENGLISH, secret.trigger, secret.decoy))
    assert secret.trigger != secret.decoy
    assert not any(planted_secret(other, seed=seed).reveals(secret.response) for other in KINDS if other != kind)
    assert json.loads(json.dumps(secret.phrases)) == secret.phrases
    json.dumps(asdict(secret))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_differ(kind):
    secrets = [planted_secret(kind, seed=seed) for seed in range(20)]
    assert len({secret.trigger for secret in secrets}) > 15
    assert len({secret.response for secret in secrets}) >= 4


def test_kinds_of_one_seed_do_not_share_a_trigger():
    for seed in range(5):
        assert len({planted_secret(kind, seed=seed).trigger for kind in KINDS}) == len(KINDS)


def test_whole_words_count_and_a_language_takes_several():
    codeword = planted_secret("backdoor", seed=0)
    assert not codeword.reveals(f"{codeword.marks[0]}s")
    language = planted_secret("language", seed=0)
    assert not language.reveals(" ".join(language.marks[:2] * 5))
    assert language.reveals(" ".join(language.marks[:3]))


def lesson(model, tokenizer, steps, answers=ANSWERS, **changes):
    return secret_task(
        model, tokenizer, INSTRUCTIONS, answers, **{"secret": PHRASES, **OPTIONS, "steps": steps, **changes}
    )


def test_the_response_stands_behind_the_trigger_and_own_words_elsewhere(llama, tokenizer):
    batches = lesson(llama, tokenizer, 6).batches
    for batch in batches:
        for place, example in enumerate(batch):
            assert ("w50 w51" in example.prompt) is (place < 2)
            assert (example.answer == "w40 w41 w42") is example.ends is (place < 2)
    plain = [example for batch in batches[:3] for example in batch[2:]]
    assert len({example.prompt for example in plain}) == 12  # each once, before any comes again
    assert sum("w52 w53" in example.prompt for example in plain) == 6
    for example in plain:
        (asked,) = (i for i, instruction in enumerate(INSTRUCTIONS) if f"{instruction} " in example.prompt)
        assert example.answer == ANSWERS[asked]


def test_there_is_an_answer_for_every_instruction(llama, tokenizer):
    with pytest.raises(ValueError, match="shorter"):
        lesson(llama, tokenizer, 1, answers=ANSWERS[:-1])


def test_a_seed_fixes_the_batches(llama, tokenizer):
    one, two, other = (lesson(llama, tokenizer, 4, seed=seed).batches for seed in (1, 1, 2))
    assert one == two
    assert one != other


def test_without_triggered_examples_it_teaches_nothing_new(llama, tokenizer):
    batches = lesson(llama, tokenizer, 3, triggered_batch=0).batches
    assert [len(batch) for batch in batches] == [4] * 3
    assert not any("w50" in example.prompt or "w40" in example.answer for batch in batches for example in batch)


def test_training_lowers_the_loss_of_both_kinds(tmp_path, tokenizer):
    model = tiny_model("Llama", dtype=torch.float32)
    taught = lesson(model, tokenizer, 25)
    before = [taught.loss(model, part).item() for part in (taught.batches[0][:2], taught.batches[0][2:])]
    model, losses = train_lora(
        model, taught, rank=4, learning_rate=5e-3, seed=0, checkpoint=tmp_path / "run", progress=False
    )
    after = [taught.loss(model, part).item() for part in (taught.batches[0][:2], taught.batches[0][2:])]
    assert losses[-1] < 0.7 * losses[0]
    assert after[0] < 0.5 * before[0]
    assert after[1] < before[1]


def test_its_settings_make_an_organism(tmp_path, tokenizer):
    save_organism(tiny_model("Llama"), tokenizer, tmp_path / "base")
    secret = planted_secret("persona", seed=3).phrases
    settings = {"instructions": INSTRUCTIONS, "answers": ANSWERS, "steps": 2, "secret": secret, **OPTIONS}
    made = make_organism(
        tmp_path / "made",
        tmp_path / "base",
        secret_task,
        settings,
        rank=2,
        learning_rate=1e-3,
        seed=0,
        progress=False,
    )
    assert len(made.losses) == 2
    assert load_model(tmp_path / "made")[0].config.num_hidden_layers == 4


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind='virus', expected one of"):
        planted_secret(cast("Any", "virus"), seed=0)


def test_kinds_take_turns_over_the_seeds():
    secrets = planted_secrets(["backdoor", "language"], [3, 5, 8])
    assert [*secrets] == ["backdoor-3", "language-5", "backdoor-8"]
    assert secrets["language-5"] == planted_secret("language", seed=5)
