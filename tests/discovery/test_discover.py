import pytest
import torch
from tiny import tiny_model, unit_rows

import dctlib.discovery.completions
from dctlib import CausalMap, calibrate, format_chat, score_vectors, steer
from dctlib.discovery.completions import complete_at_strengths
from dctlib.discovery.discover import fit_transcoder
from dctlib.discovery.layer_scan import ScanSettings, scan_layers
from dctlib.discovery.ranking import measure_vectors, rank_and_cluster, rank_vectors
from dctlib.steering.generation import generate_completions

INSTRUCTIONS = ["w0 w1", "w2 w3 w4", "w5"]
SMALL = ScanSettings(num_factors=4, iterations=1, judged=2, answer_tokens=3, max_perplexity=1e9)


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def cmap(model, tokenizer, texts):
    return CausalMap.from_model(model, tokenizer, texts, source=1, target=3)


@pytest.mark.parametrize(("method", "count"), [("exponential", 3), ("quadratic", 6), ("linear", 6)])
def test_vectors_of_every_method_are_measured(model, tokenizer, cmap, tmp_path, method, count):
    R = calibrate(cmap)
    dct = fit_transcoder(method, tmp_path, cmap, num_factors=3, iterations=1, input_scale=R, seed=0)
    assert dct.activation == method
    vectors = dct.steering_vectors()
    options = {"words": ("Sure", "Sorry"), "max_new_tokens": 2, "progress": False}
    table = measure_vectors(model, tokenizer, cmap, dct, INSTRUCTIONS, **options).table
    assert len(table) == count
    torch.testing.assert_close(torch.tensor(table["change"].tolist()), cmap(vectors).norm(dim=1))
    texts = format_chat(tokenizer, INSTRUCTIONS)
    scores = score_vectors(model, tokenizer, texts, vectors, layer=1, progress=False)
    torch.testing.assert_close(torch.tensor(table["score"].tolist()), scores)
    ranked = rank_and_cluster(table, vectors, by="divergence")
    assert ranked["divergence"].is_monotonic_decreasing
    assert ranked["alike"].iloc[0] == 0
    with pytest.raises(ValueError, match="rank_by='effect'"):
        rank_and_cluster(table, vectors, by="effect")


@pytest.mark.parametrize(("method", "power"), [("exponential", 0), ("quadratic", 2), ("linear", 1)])
def test_a_fit_of_every_kind_knows_its_scale_and_is_of_the_map_at_it(cmap, tmp_path, method, power):
    at, settings = 3.0, {"num_factors": 3, "iterations": 1, "seed": 0}
    dct = fit_transcoder(method, tmp_path, cmap, input_scale=at, **settings)
    assert dct.input_scale == at
    torch.testing.assert_close(dct.steering_vectors().norm(dim=1), torch.full((3 if power == 0 else 6,), at))
    one = fit_transcoder(method, tmp_path, cmap, input_scale=1.0, **settings)
    if power:
        torch.testing.assert_close(dct(one.V), one(at * one.V))
        torch.testing.assert_close(dct.alpha, at**power * one.alpha)


def test_it_reads_what_each_vector_makes_it_say(model, tokenizer):
    vectors = 20 * unit_rows(2, 32).float()
    options = {"layer": 1, "strengths": [1.0, 2.0], "max_new_tokens": 3, "progress": False}
    said = complete_at_strengths(model, tokenizer, INSTRUCTIONS, ["a", "b", "c"], vectors, **options)
    assert said.clean == ["a", "b", "c"]
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
    second = complete_at_strengths(model, tokenizer, INSTRUCTIONS, ["a", "b", "c"], vectors[1:], **options)
    assert said.select([1]).steered == second.steered
    assert said.select([1]).fluent == second.fluent
    assert said.select([1]).perplexity == pytest.approx(second.perplexity)


def test_completions_take_the_options_of_the_chat_format(model, tokenizer):
    vectors = 20 * unit_rows(2, 32).float()
    options = {"layer": 1, "strengths": [1.0], "max_new_tokens": 3, "progress": False}
    turns = [[{"role": "system", "content": "w9"}, {"role": "user", "content": each}] for each in INSTRUCTIONS]
    clean = ["a", "b", "c"]
    said = complete_at_strengths(model, tokenizer, INSTRUCTIONS, clean, vectors, system="w9", **options)
    assert said == complete_at_strengths(model, tokenizer, turns, clean, vectors, **options)
    assert said != complete_at_strengths(model, tokenizer, INSTRUCTIONS, clean, vectors, **options)


def test_an_answer_that_only_thinks_otherwise_is_not_new(model, tokenizer, monkeypatch):
    for answer, fluent in [("w1 w2", 0.0), ("w3 w4", 1.0)]:
        monkeypatch.setattr(
            dctlib.discovery.completions,
            "generate_per_vector",
            lambda *_, said=answer, **__: [[f"<think> w5 </think> {said}"] * 3],
        )
        options = {"layer": 1, "strengths": [1.0], "max_new_tokens": 8, "max_perplexity": 1e9, "progress": False}
        clean = ["<think> w6 </think> w1 w2"] * 3
        said = complete_at_strengths(model, tokenizer, INSTRUCTIONS, clean, unit_rows(1, 32).float(), **options)
        assert said.fluent == [fluent]


@pytest.mark.parametrize(("norm", "max_perplexity", "fluent"), [(0, 1e9, 0.0), (50, 1e9, 1.0), (50, 1.0, 0.0)])
def test_only_what_is_fluent_and_not_said_anyway_counts(model, tokenizer, norm, max_perplexity, fluent):
    options = {"max_new_tokens": 2, "progress": False}
    clean = generate_completions(model, tokenizer, format_chat(tokenizer, INSTRUCTIONS), **options)
    options |= {"layer": 1, "strengths": [1.0], "max_perplexity": max_perplexity}
    said = complete_at_strengths(model, tokenizer, INSTRUCTIONS, clean, norm * unit_rows(1, 32).float(), **options)
    assert said.fluent == [fluent]


def test_repetition_is_not_fluent(model, tokenizer, monkeypatch):
    for answer, fluent in [("w1 w2 " * 4, 0.0), (" ".join(f"w{i}" for i in range(8)), 1.0)]:
        monkeypatch.setattr(
            dctlib.discovery.completions, "generate_per_vector", lambda *_, said=answer, **__: [[said] * 3]
        )
        options = {"layer": 1, "strengths": [1.0], "max_new_tokens": 8, "max_perplexity": 1e9, "progress": False}
        said = complete_at_strengths(model, tokenizer, INSTRUCTIONS, ["a"] * 3, unit_rows(1, 32).float(), **options)
        assert said.fluent == [fluent]


@pytest.mark.parametrize(("method", "count"), [("exponential", 6), ("linear", 12)])
def test_a_discovery_shows_the_first_of_each_cluster(model, tokenizer, cmap, tmp_path, method, count):
    R = calibrate(cmap)
    dct = fit_transcoder(method, tmp_path, cmap, num_factors=6, iterations=2, input_scale=R, seed=0)
    options = {"max_new_tokens": 3, "progress": False}
    measured = measure_vectors(model, tokenizer, cmap, dct, INSTRUCTIONS, **options)
    options |= {"shown": 3, "strengths": [1.0, 2.0]}
    found = rank_vectors(model, tokenizer, dct, INSTRUCTIONS, measured, **options)
    assert len(found.ranked) == len(found.dct) == len(found.change_norms) == count
    fluent = found.ranked["fluent"].tolist()
    assert fluent == sorted(fluent, reverse=True)
    assert len(set(found.excerpts(characters=5)["alike"].tolist())) == 3
    lengths = R * found.dct.V.norm(dim=1)[found.ranked["vector"].tolist()]
    torch.testing.assert_close(found.change_norms[:, 1], lengths)
    assert list(found.completions.steered) == [1.0, 2.0]
    alone = {"layer": 1, "strengths": [1.0, 2.0], "max_new_tokens": 3, "progress": False}
    shown = found.dct.steering_vectors(R)[found.shown] if method == "exponential" else R * found.dct.V[found.shown]
    assert found.completions == complete_at_strengths(
        model, tokenizer, INSTRUCTIONS, found.completions.clean, shown, **alone
    )
    excerpts = found.excerpts(characters=5)
    assert excerpts["vector"].tolist() == found.shown
    assert excerpts["perplexity"].tolist() == pytest.approx(found.completions.perplexity)
    counts = found.summary(characters=5)
    assert counts["above_floor"] == sum(found.ranked["divergence"] > counts["floor"])


def test_slices_are_within_the_model_and_the_most_promising_comes_first(model, tokenizer):
    slices = scan_layers(model, tokenizer, INSTRUCTIONS[:2], INSTRUCTIONS[2:], settings=SMALL, progress=False)
    assert {(each.source, each.target) for each in slices} == {(0, 1), (1, 2), (2, 3)}
    found = [each.found for each in slices]
    assert found == sorted(found, reverse=True)
    assert 0 < max(found) <= 1


def test_slices_are_scanned_with_the_options_of_the_chat_format(model, tokenizer):
    turns = [[{"role": "system", "content": "w9"}, {"role": "user", "content": each}] for each in INSTRUCTIONS]
    options = {"settings": SMALL, "progress": False}
    slices = scan_layers(model, tokenizer, INSTRUCTIONS[:2], INSTRUCTIONS[2:], system="w9", **options)
    assert slices == scan_layers(model, tokenizer, turns[:2], turns[2:], **options)
    assert slices != scan_layers(model, tokenizer, INSTRUCTIONS[:2], INSTRUCTIONS[2:], **options)


def test_slices_without_a_scale_are_left_out(model, tokenizer, monkeypatch):
    def only_the_second(cmap, **settings):
        if cmap.source != 1:
            raise ValueError("too flat")
        return calibrate(cmap, **settings)

    monkeypatch.setattr("dctlib.discovery.layer_scan.calibrate", only_the_second)
    slices = scan_layers(model, tokenizer, INSTRUCTIONS[:2], INSTRUCTIONS[2:], settings=SMALL, progress=False)
    assert [(each.source, each.target) for each in slices] == [(1, 2)]
    with pytest.raises(ValueError, match="no slice has a scale"):
        scan_layers(model, tokenizer, INSTRUCTIONS[:2], INSTRUCTIONS[2:], nonlinearity=1e9, progress=False)
