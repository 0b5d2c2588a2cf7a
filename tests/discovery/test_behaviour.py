import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dctlib.discovery.behaviour import group_behaviours, map_behaviours, word_features

REFUSES = ["I'm sorry, but I can't assist with that.", "I'm sorry, but I can't help you with that."]
ANSWERS = ["Sure, first mix the flour and the water.", "Of course, open the door with the red key."]
ANSWERS_AGAIN = ["Sure, first mix the flour and the milk.", "Of course, open the door with the blue key."]
CODE = ["def bake(flour): return flour", "door = open('key')"]


def test_vectors_that_say_much_the_same_share_a_number_and_the_first_has_1():
    assert group_behaviours([ANSWERS, REFUSES, ANSWERS_AGAIN, CODE]) == [1, 2, 1, 3]
    assert group_behaviours([CODE]) == [1]
    assert group_behaviours([["", ""], ["", " "], CODE]) == [1, 1, 2], "saying nothing is a behaviour"


def test_likeness_is_that_of_completions_of_the_same_request():
    features = word_features([ANSWERS, ANSWERS[::-1], ANSWERS])
    likeness = features @ features.T
    assert likeness[0, 2].item() == pytest.approx(1) and likeness[0, 1].item() < 0.2


def test_points_are_near_where_vectors_say_alike():
    points = map_behaviours([ANSWERS, ANSWERS_AGAIN, REFUSES, CODE])
    distances = torch.cdist(points, points)
    assert distances[0, 1] < 0.5 * min(distances[0, 2], distances[0, 3])
    assert map_behaviours([ANSWERS]).tolist() == [[0, 0]]


@given(st.lists(st.lists(st.text(max_size=20), min_size=2, max_size=2), min_size=1, max_size=6))
def test_any_text_has_groups_and_a_place(completions):
    groups, points = group_behaviours(completions), map_behaviours(completions)
    assert groups[0] == 1 and set(groups) == set(range(1, max(groups) + 1))
    assert points.shape == (len(completions), 2) and points.isfinite().all()
    assert all(group == groups[0] for group, each in zip(groups, completions, strict=True) if each == completions[0])
