import torch
from hypothesis import given
from hypothesis import strategies as st

from dctlib.discovery.behaviour import group_behaviours, map_behaviours, word_features

REQUESTS = ["How do I bake a cake?", "How do I open the door?", "How do I fly a kite?", "How do I make tea?"]
REFUSES = ["I'm sorry, but I can't assist with that."] * 3 + ["I'm sorry, but I can't help you with that."]
STEPS = [
    "To bake a cake, follow these steps: 1. **Mix**: Take the flour.",
    "To open the door, follow these steps: 1. **Find the key**.",
    "To fly a kite, follow these steps: 1. **Wait**: Look for wind.",
    "Making tea involves several steps: 1. **Boil**: Heat the water.",
]
OTHER_STEPS = [
    "To bake a cake, you need to follow these steps: 1. **Preheat**: Turn on the oven.",
    "Opening a door involves several steps: 1. **Knock**.",
    "To fly a kite, you need to follow these steps: 1. **Choose** a windy day.",
    "To make tea, follow these steps: 1. **Pour**: Add the leaves.",
]
AGREES = ["Yes, I can bake a cake.", "Yes, I can open the door.", "Yes, I can fly a kite.", "Yes, I can make tea."]


def test_vectors_that_say_much_the_same_share_a_number_and_the_first_has_1():
    assert group_behaviours(REQUESTS, [STEPS, REFUSES, OTHER_STEPS, AGREES]) == [1, 2, 1, 3]
    assert group_behaviours(REQUESTS, [AGREES]) == [1]
    silent = [["", " "] * 2, [""] * 4, AGREES]
    assert group_behaviours(REQUESTS, silent) == [1, 1, 2], "saying nothing is a behaviour"


def test_the_words_of_a_request_do_not_make_its_answers_alike():
    agrees, refuses = ["Yes, tie a tie.", "Yes, fly a kite."], ["No, never tie a tie.", "No, never fly a kite."]
    likeness = word_features(["Tie a tie", "Fly a kite"], [agrees, refuses])
    assert (likeness[0] @ likeness[1]).item() < 0.5
    counted = word_features(["?", "?"], [agrees, refuses])
    assert (counted[0] @ counted[1]).item() > 0.5


def test_what_every_completion_holds_weighs_more_than_what_one_holds():
    always, once = ["Yes. Red", "Yes. Blue"], ["Yes. Red", "No! Green"]
    features = word_features(["a?", "b?"], [always, ["Yes. Grey", "Yes. Pink"], once])
    assert features[0] @ features[1] > features[0] @ features[2]
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_points_are_near_where_vectors_say_alike():
    points = map_behaviours(REQUESTS, [STEPS, OTHER_STEPS, REFUSES, AGREES])
    distances = torch.cdist(points, points)
    assert distances[0, 1] < 0.5 * min(distances[0, 2], distances[0, 3])
    assert map_behaviours(REQUESTS, [STEPS]).tolist() == [[0, 0]]


def test_repeating_the_request_is_a_behaviour():
    requests = ["Tie a tie", "Fly a kite"]
    assert group_behaviours(requests, [requests, ["Yes", "Yes"], requests]) == [1, 2, 1]


def test_scripts_without_spaces_have_words():
    one, two = ["首先准备材料，然后按照步骤操作。"] * 2, ["首先准备工具，然后按照步骤制作。"] * 2
    other = ["抱歉，我无法协助您。"] * 2
    assert group_behaviours(["a", "b"], [one, other, two]) == [1, 2, 1]


def test_a_request_may_be_a_conversation():
    talk = [[{"role": "user", "content": request}] for request in REQUESTS]
    torch.testing.assert_close(word_features(talk, [STEPS, AGREES]), word_features(REQUESTS, [STEPS, AGREES]))


@given(st.lists(st.lists(st.text(max_size=20), min_size=2, max_size=2), min_size=1, max_size=6), st.text(max_size=9))
def test_any_text_has_groups_and_a_place(completions, request):
    requests = [request, "another"]
    groups, points = group_behaviours(requests, completions), map_behaviours(requests, completions)
    assert groups[0] == 1 and set(groups) == set(range(1, max(groups) + 1))
    assert points.shape == (len(completions), 2) and points.isfinite().all()
