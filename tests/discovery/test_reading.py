from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dctlib.discovery.criteria import Criteria, Grades
from dctlib.discovery.reading import Reader, Reading, ask_judge, halve

REQUESTS = [f"w{i} w{i + 1}" for i in range(12)]


def graded(product):
    """A reading without a judge, whose grades have this product."""
    product = torch.tensor(product)
    passed = torch.ones(product.shape, dtype=torch.bool)
    one = torch.ones(product.shape)
    return Grades(product, one, one, one, passed, passed)


class ByFirstCoordinate:
    """Reads into each vector the score of its first coordinate."""

    def __init__(self):
        self.rounds = []

    def read(self, requests, vectors, *, max_new_tokens):
        self.rounds.append((len(vectors), len(requests), max_new_tokens))
        return Reading([], [], graded(vectors[:, :1].repeat(1, len(requests)).tolist()), None)


@pytest.mark.parametrize(
    ("count", "most", "rounds"),
    [
        (60, 16, [(60, 4, 12), (20, 8, 24)]),
        (200, 16, [(200, 4, 12), (67, 8, 24), (23, 12, 48)]),
        (20, 16, [(20, 4, 12)]),
        (20, 3, [(20, 4, 12), (7, 8, 24)]),
        (16, 16, []),
    ],
)
def test_a_halving_reads_fewer_vectors_on_more_text(count, most, rounds):
    reader: Any = ByFirstCoordinate()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([order / count, torch.zeros(count)], 1)
    halving = halve(reader, REQUESTS, vectors, most=most, least=8, max_new_tokens=48)
    assert reader.rounds == rounds
    assert [len(rows) for rows, _ in halving.rounds] == [size for size, *_ in rounds]
    assert len(halving.rows) <= most and halving.controls == []
    if rounds:
        assert order[halving.rows].tolist() == [*range(count - 1, count - 1 - len(halving.rows), -1)]


def test_controls_compete_with_each_other_alone():
    reader: Any = ByFirstCoordinate()
    scores = torch.linspace(1, 0, 60)
    scores[[5, 50, 55]] = torch.tensor([0.0, 0.1, 0.2])
    vectors = torch.stack([scores, torch.zeros(60)], 1)
    halving = halve(reader, REQUESTS, vectors, controls=[5, 50, 55], most=16, least=8, max_new_tokens=48)
    assert halving.controls == [55, 50]
    assert halving.rows == [0, 1, 2, 3, 4, 6, 7, 8]
    assert [size for size, *_ in reader.rounds] == [60, 19 + 2]


def test_a_score_is_that_of_the_worst_three_quarters():
    reading = Reading([], [], graded([[0.0, 0.0, 0.0, 1.0], [0.2, 0.3, 0.4, 0.3], [0.0, 0.8, 0.4, 0.8]]), None)
    assert reading.scores() == pytest.approx([0, 0.8 / 3, 0.4])
    assert reading.scores(slice(2, None)) == pytest.approx([0.5, 0.35, 0.6])
    assert reading.order() == [2, 1, 0]


def test_where_nothing_is_withheld_vectors_are_sorted_by_what_they_change():
    grades = graded([[0.2, 0.4], [0.3, 0.1], [0.4, 0.5]])
    answered = replace(grades, withheld=torch.zeros(3, 2))
    reading = Reading([], ["w0", "w1"], answered, None)
    assert reading.scores() == [0, 0, 0]
    assert reading.changes() == pytest.approx([0.3, 0.2, 0.45])
    assert reading.order() == [2, 0, 1]
    assert reading.shown(slice(None)) == [1, 0, 1]
    assert reading.shown(slice(1, None)) == [1, 1, 1]


def test_a_completion_that_the_judge_likes_is_shown():
    verdicts = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    reading = Reading([], ["w0", "w1", "w2"], graded([[0.9, 0.1, 0.9], [0.1, 0.9, 0.2]]), verdicts)
    assert reading.shown(slice(None)) == [1, 2]


def test_a_judge_decides_and_grades_order_its_equals():
    verdicts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    reading = Reading([], [], graded([[0.1, 0.1], [0.9, 0.9], [0.0, 0.0]]), verdicts)
    assert reading.scores() == [0.5, 0.5, 1.0]
    assert reading.order() == [2, 1, 0]


@pytest.mark.parametrize(
    "verdicts", [[True, False], (True, False), np.array([1, 0], bool), torch.tensor([True, False])]
)
def test_a_judge_gives_bools_in_any_sequence(verdicts):
    assert ask_judge(lambda requests, completions: verdicts, ["w0", "w1"], ["w2", "w3"]) == [True, False]
    assert ask_judge(lambda *_: pd.Series([True, False]), ["w0", "w1"], ["w2", "w3"]) == [True, False]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ([True], r"returned \[True\] for 2 completions"),
        (True, "returned True for 2 completions"),
        (None, "returned None for 2 completions"),
        ("no", "returned 'no' for 2 completions"),
        ([0.5, True], "verdict 0.5, expected True or False"),
        ([True, 1], "verdict 1, expected True or False"),
        ([None, True], "verdict None"),
        (["yes", "no"], "verdict 'yes'"),
    ],
)
def test_other_verdicts_are_refused(verdicts, message):
    with pytest.raises(ValueError, match=message):
        ask_judge(lambda requests, completions: verdicts, ["w0", "w1"], ["w2", "w3"])


def test_a_reading_pairs_every_completion_with_its_request(llama, tokenizer):
    asked = []

    def judge(requests, completions):
        asked.extend(zip(requests, completions, strict=True))
        return [request == "w1 w2" for request in requests]

    reader = Reader(llama, tokenizer, 1, Criteria(llama, tokenizer, 9.0), judge)
    vectors = 6 * torch.eye(32)[:3]
    reading = reader.read(REQUESTS[:2], vectors, max_new_tokens=3)
    assert reading.verdicts is not None and reading.verdicts.tolist() == [[0, 1]] * 3
    flat = [completion for each in reading.completions for completion in each]
    assert asked == list(zip(REQUESTS[:2] * 3, flat, strict=True))
    alone = reader.read(REQUESTS[:2], vectors[1:2], max_new_tokens=3)
    assert alone.completions == reading.completions[1:2]
    torch.testing.assert_close(alone.grades.change[0], reading.grades.change[1])
