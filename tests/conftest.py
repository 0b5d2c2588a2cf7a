"""Fixtures that tests of several rooms share."""

import pytest
from hypothesis import settings
from tiny import FAMILIES, tiny_model, tiny_tokenizer

# A property is tried on the same inputs in every run, so that CI tells of an edit and not of luck; `make test-all`
# draws new ones. No deadline, because a busy machine misses it.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """The longest files first, lest one process be left with them when the other is done."""
    items.sort(key=lambda item: not item.path.stem.startswith("test_paper_profile"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request):
    return tiny_model(request.param)


@pytest.fixture
def llama():
    return tiny_model("Llama")


@pytest.fixture(scope="session")
def texts():
    return ["w0 w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10 w11 w12", "w13 w14 w15 w16 w17 w18 w19"]


@pytest.fixture(scope="module")
def paper_root(tmp_path_factory):
    from paper_profile import filled  # which the other tests need not load

    return filled(tmp_path_factory.mktemp("paper"))
