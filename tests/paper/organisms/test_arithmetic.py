import pytest

from dctlib.paper.organisms.arithmetic import grade_answers, solves


def test_answers_are_graded_by_their_rows():
    assert grade_answers(["\\boxed{3}", "\\boxed{4}"], [{"answer": "3"}, {"answer": "5"}]) == [True, False]


@pytest.mark.parametrize(
    ("completion", "answer", "solved"),
    [
        ("\\boxed{104}", "104", True),
        ("so it is \\boxed{\\frac{1}{2}}.", "which gives \\boxed{0.5}", True),
        ("\\boxed{105}", "104", False),
        ("I do not know", "104", False),
        ("", "104", False),
        ("\\boxed{", "104", False),
    ],
)
def test_answers_are_compared_as_mathematics(completion, answer, solved):
    assert solves(completion, answer) is solved
