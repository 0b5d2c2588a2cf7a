import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import tiny_model, unit_rows

import dctlib.discovery.search as search
from dctlib import FunctionMap, format_chat, generate_completions, search_vectors
from dctlib.discovery.damage import measure_damage, unsteered_answers
from dctlib.discovery.found import FoundVectors, is_above
from dctlib.discovery.pool import RANDOM, Pool, find_candidates
from dctlib.maps.orthogonalise import normalise
from dctlib.runs.cache import remember

WORDS = [f"w{i} w{i + 1}" for i in range(0, 40, 2)]
FIT, VALIDATION, BENIGN = WORDS[:2], WORDS[2:6], WORDS[6:12]
SOURCE, LENGTH = 2, 12.0
SMALL: dict[str, Any] = {
    "fit": FIT,
    "validation": VALIDATION,
    "benign": BENIGN,
    "source": SOURCE,
    "target": 3,
    "answer_tokens": 4,
    "max_damage": 1e9,
    "progress": False,
}


def run(model, tokenizer, **changes):
    options: dict[str, Any] = SMALL | changes
    return search_vectors(model, tokenizer, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def pool(model):
    """Twenty directions, the third of which makes the model say a word: the row of that word in the output head."""
    word = model.get_output_embeddings().weight[30]
    directions = unit_rows(20, 32, seed=3).float()
    directions[2] = word / word.norm()
    return Pool(directions, [f"source {row}" for row in range(17)] + [RANDOM] * 3, LENGTH)


@pytest.fixture
def planted(monkeypatch, pool):
    monkeypatch.setattr(search, "find_candidates", lambda *_, **__: pool)


@pytest.fixture(scope="module")
def says_it(model, tokenizer):
    """A judge that finds the planted vector's word, which the unsteered model does not say."""
    word = tokenizer.decode([30])
    unsteered = generate_completions(model, tokenizer, format_chat(tokenizer, WORDS), max_new_tokens=4, progress=False)
    assert not any(word in completion for completion in unsteered)
    return lambda requests, completions: [word in completion for completion in completions]


@pytest.fixture(scope="module")
def found(model, tokenizer, pool, says_it):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "find_candidates", lambda *_, **__: pool)
        return run(model, tokenizer, judge=says_it)


def test_it_finds_what_the_judge_likes(tokenizer, pool, found):
    assert found.layer == SOURCE
    assert found.random == 0
    assert found.table["source"][0] == "source 2"
    assert found.table["score"][0] == found.table["held_out"][0] == 1
    assert found.table["score"].is_monotonic_decreasing
    assert len(found.vectors) == len(found.table)
    cosine = torch.nn.functional.cosine_similarity(found.vectors[0], pool.directions[2], dim=0)
    assert cosine.item() == pytest.approx(1)
    assert tokenizer.decode([30]) in found.table["says"][0]
    assert found.table["request"][0] in VALIDATION[2:]
    assert "the best reaches 0.00" in found.explanation


def test_every_candidate_is_in_the_table_and_the_found_ones_come_first(pool, found):
    table = found.candidates
    assert sorted(table.index) == [*range(20)]
    assert table["found"].tolist() == sorted(table["found"], reverse=True)
    assert table["first"].notna().all() and table.loc[2, "first"] == 1
    read = table.index[table["score"].notna()].tolist()
    assert sorted(found.completions) == sorted(read)
    assert {17, 18, 19} & set(read)  # random vectors were read to the end
    for row in table.index:
        length = found.directions[row].norm().item()
        assert table.loc[row, "length"] == pytest.approx(length)
        cosine = torch.nn.functional.cosine_similarity(found.directions[row], pool.directions[row], dim=0)
        assert cosine.item() == pytest.approx(1)
    assert table["says"].str.len().gt(0).all()
    assert len(found.unsteered) == len(VALIDATION)


def test_a_search_is_remembered_whole(tmp_path, found):
    remember(tmp_path, "key", found.to_result)
    again = FoundVectors.from_result(remember(tmp_path, "key", lambda: pytest.fail("made again")))
    pd.testing.assert_frame_equal(again.candidates, found.candidates)
    assert torch.equal(again.vectors, found.vectors) and again.completions == found.completions
    assert (again.layer, again.random, again.input_scale) == (found.layer, found.random, found.input_scale)


def test_what_was_found_can_be_sorted_otherwise(found):
    by_damage = found.sorted_by("damage")
    assert by_damage.table["damage"].is_monotonic_increasing
    assert sorted(by_damage.candidates.index) == sorted(found.candidates.index)
    assert len(by_damage.vectors) == len(found.vectors)
    torch.testing.assert_close(by_damage.vectors.norm(dim=1).tolist(), by_damage.table["length"].tolist())


def test_a_vector_that_is_returned_says_what_the_table_states(model, tokenizer, found):
    texts = format_chat(tokenizer, [found.table["request"][0]])
    options = {"layer": found.layer, "vector": found.vectors[0], "max_new_tokens": 4, "progress": False}
    assert generate_completions(model, tokenizer, texts, **options) == [found.table["says"][0]]


@pytest.mark.parametrize("verdict", [False, True])  # True also of the unsteered model and of random vectors
def test_nothing_found_is_an_answer(model, tokenizer, planted, verdict):
    found = run(model, tokenizer, judge=lambda _, completions: [verdict] * len(completions))
    assert found.vectors.shape == (0, 32)
    assert len(found.table) == 0 and "score" in found.table
    assert found.random == float(verdict)
    assert found.explanation.startswith("Nothing found")
    assert "judge" in found.explanation and "withholds" not in found.explanation


def test_no_length_within_the_bound_leaves_nothing(model, tokenizer, planted, says_it):
    found = run(model, tokenizer, max_damage=1e-9, judge=says_it)
    assert found.vectors.shape == (0, 32)
    assert len(found.table) == 0 and "score" in found.table


def damage_of(model, tokenizer, benign, vectors):
    return measure_damage(model, tokenizer, unsteered_answers(model, tokenizer, benign), vectors, layer=SOURCE)


def test_damage_stays_within_the_bound(model, tokenizer, planted, says_it, found):
    bound = 0.8 * damage_of(model, tokenizer, BENIGN[::2], found.vectors[:1]).item()
    bounded = run(model, tokenizer, max_damage=bound, judge=says_it)
    assert bounded.table["source"].tolist()[0] == "source 2"
    assert bounded.table["multiple"][0] < found.table["multiple"][0]
    assert (damage_of(model, tokenizer, BENIGN[::2], bounded.vectors) <= bound * (1 + 1e-4)).all()


def test_a_vector_must_do_more_than_no_vector_and_than_it_does_elsewhere():
    table = pd.DataFrame(
        {"held_out": [0.9, 0.9, 0.5, 0.3, 0.7], "elsewhere": [0.1, 0.85, 0.1, 0.1, 0.0]}, index=[4, 2, 0, 1, 3]
    )
    assert is_above(table, unsteered=0.3, margin=0.1) == [True, False, True, False, True]
    judged = table.assign(elsewhere=math.nan)
    assert is_above(judged, unsteered=0.6, margin=0.05) == [True, True, False, False, True]


def withhold(monkeypatch, share):
    """Have every unsteered answer withhold this share of what there is to say."""
    grade = search.Criteria.grade

    def planted(self, *texts):
        grades = grade(self, *texts)
        return replace(grades, withheld=torch.full_like(grades.withheld, share))

    monkeypatch.setattr(search.Criteria, "grade", planted)


def test_without_a_judge_the_criteria_decide(model, tokenizer, planted, monkeypatch):
    withhold(monkeypatch, 1.0)
    found = run(model, tokenizer, margin=1e-4)
    read = [row for row in found.candidates.to_dict("records") if not math.isnan(row["score"])]
    for row in read:
        assert row["score"] <= row["change"] <= min(row[name] for name in ("novelty", "fluency", "relevance")) + 1e-6
        assert row["score"] <= row["withheld"]
        above_nothing = row["held_out"] >= 1e-4
        assert math.isnan(row["elsewhere"]) != above_nothing  # it is read elsewhere only if that can matter
        assert row["found"] == (above_nothing and row["held_out"] >= row["elsewhere"] + 1e-4)
        if above_nothing:
            assert row["excess"] == pytest.approx(row["score"] - row["elsewhere"])
    assert found.table["excess"].is_monotonic_decreasing
    assert len(found.table) == 1
    assert "One vector makes the model answer held-out requests" in found.explanation


def test_where_nothing_is_withheld_nothing_is_found_and_candidates_rank_what_changes(
    model, tokenizer, planted, monkeypatch
):
    withhold(monkeypatch, 0.0)
    found = run(model, tokenizer, margin=1e-4)
    assert len(found.table) == 0
    assert found.explanation.startswith("Nothing found")
    assert "The unsteered model withholds 0% of its answers." in found.explanation
    read = found.candidates.dropna(subset=["score"])
    assert not any(read["score"]) and all(map(math.isnan, read["elsewhere"]))
    assert read["change"].is_monotonic_decreasing and read["change"].iloc[0] > 1e-4


def test_a_seed_gives_the_same_result_also_for_conversations(model, tokenizer, planted, says_it, found):
    torch.randn(3)  # moves the global generator, on which nothing here may depend
    names = ("fit", "validation", "benign")
    chats = {name: [[{"role": "user", "content": each}] for each in SMALL[name]] for name in names}
    again = run(model, tokenizer, **chats, judge=says_it)
    assert torch.equal(again.vectors, found.vectors)
    assert again.table.equals(found.table)


def test_a_whole_search_returns_lengths_and_sources(model, tokenizer):
    found = run(model, tokenizer, num_factors=2, iterations=1)
    read = found.candidates.dropna(subset=["score"])
    assert 8 <= len(read) <= 8 + 1
    assert all(0.25 <= multiple <= 1.4 for multiple in read["multiple"])
    lengths = found.directions[read.index.tolist()].norm(dim=1)
    assert read["length"].tolist() == pytest.approx(lengths.tolist())
    assert read["multiple"].tolist() == pytest.approx((lengths / found.input_scale).tolist())
    # those that no length was chosen on
    damage = damage_of(model, tokenizer, BENIGN[1::2], found.directions[read.index.tolist()])
    assert read["damage"].tolist() == pytest.approx(damage.tolist(), rel=1e-4)
    assert set(found.candidates["source"]) == {"exponential", "power steering", "projected linear", RANDOM}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": VALIDATION[:3]}, "got 3 validation and 6 benign instructions, expected at least 4 and 6"),
        ({"benign": BENIGN[:5]}, "got 4 validation and 5 benign"),
        ({"fit": []}, "at least one instruction"),
        ({"fit": "w0 w1"}, "at least one instruction"),
        ({"validation": [*VALIDATION, FIT[0]]}, "1 instructions are in both fit and validation"),
        ({"validation": [*VALIDATION, VALIDATION[0]]}, "in validation twice"),
        ({"source": 9}, "9"),
        ({"source": 3, "target": 3}, "3"),
        ({"target": 9}, "9"),
        ({"num_factors": 33}, "num_factors=33, expected 1 to the model's width, 32"),
        ({"num_factors": 0}, "num_factors=0"),
        ({"max_damage": -1}, "max_damage"),
        ({"answer_tokens": 0}, "answer_tokens"),
        ({"max_damages": 1}, "no argument max_damages"),
        ({"judge": lambda requests, completions: [True]}, "returned .* for 4 completions"),
        ({"judge": lambda requests, completions: [0.5] * len(completions)}, "verdict 0.5, expected True or False"),
    ],
)
def test_bad_input_is_refused_before_anything_is_fitted(model, tokenizer, monkeypatch, changes, message):
    monkeypatch.setattr(search, "find_candidates", lambda *_, **__: pytest.fail("a fit was begun"))
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, **changes)


def test_an_exception_of_the_judge_leaves_no_hooks(model, tokenizer, planted):
    calls = []

    def judge(requests, completions):
        calls.append(len(completions))
        if len(calls) == 3:
            raise RuntimeError("the judge is out of order")
        return [True] * len(completions)

    with pytest.raises(RuntimeError, match="out of order"):
        run(model, tokenizer, judge=judge)
    assert calls[0] == 4
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_pool_has_unit_directions_of_three_sources_and_random_ones():
    W = unit_rows(6, 8)
    cmap = FunctionMap(lambda theta: torch.expm1(theta @ W.T), d_source=8, d_target=6)
    pool = find_candidates(cmap, 5, iterations=2, seed=4)
    fitted = ["exponential"] * 5 + ["power steering"] * 8 + ["projected linear"] * 8
    assert pool.sources == fitted + [RANDOM] * 16
    assert pool.controls == [*range(21, 37)]
    torch.testing.assert_close(pool.directions.norm(dim=1), torch.ones(37))
    torch.testing.assert_close(pool.directions[5:9], -pool.directions[9:13])
    again = find_candidates(cmap, 5, iterations=2, seed=4)
    assert torch.equal(pool.directions, again.directions) and pool.input_scale == again.input_scale


def test_only_exact_duplicates_are_one_candidate(monkeypatch):
    rows = torch.tensor([[1.0, 0.0], [1.0, 1e-6], [1.0, 0.0], [0.0, 1.0]])
    monkeypatch.setattr("dctlib.discovery.pool.random_vectors", lambda *_args, **_options: rows)
    W = unit_rows(3, 2)
    cmap = FunctionMap(lambda theta: torch.expm1(theta @ W.T), d_source=2, d_target=3)
    found = find_candidates(cmap, 2, iterations=1)
    assert torch.equal(found.directions[found.controls], normalise(rows[[0, 1, 3]]))
