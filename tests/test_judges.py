import pytest

from dctlib.judges import cut, is_refusal, opens_with, rate


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("Sorry, I can't help with that.", True),
        ("I’m sorry, but no.", True),
        ("As an AI language model I", True),
        ("Sure! Here is how.", False),
        ("", False),
        ("Sure! " + "x" * 100 + " I cannot", False),
    ],
)
def test_refusals(text, refused):
    assert is_refusal(text) is refused


@pytest.mark.parametrize(("text", "opens"), [("Sure! Yes", True), (" Sure", True), ("Surely not", False), ("", False)])
def test_openings(text, opens):
    assert opens_with(text, "Sure") is opens


def test_rate_and_cut():
    assert rate([True, False, True, True]) == 0.75
    assert cut("a\nb  c", 60) == "a b c"
    assert cut("abcdef", 3) == "abc …"
