from contextlib import ExitStack, nullcontext

import pytest
from families import family_model
from tiny import tiny_tokenizer

from dctlib import steer
from dctlib.discovery.check import check_model


@pytest.mark.parametrize(
    ("family", "refused"),
    [
        ("llama", set()),
        ("mixtral", {"export of an ablated copy"}),
        ("doge", {"ablate", "export of an ablated copy"}),
        ("hy_v4", {"steer", "replay", "derivatives", "logits", "ablate", "export of an ablated copy"}),
    ],
)
def test_the_table_says_what_works(family, refused):
    table = check_model(family_model(family), tiny_tokenizer())
    assert set(table.loc[~table["works"], "capability"]) == refused
    assert table["detail"].str.len().min() > 10


def test_a_hook_that_does_not_reach_the_stream_is_found(llama, monkeypatch):
    monkeypatch.setattr("dctlib.discovery.check.steer", lambda *_args, **_kwargs: pytest.MonkeyPatch.context())
    table = check_model(llama, tiny_tokenizer()).set_index("capability")
    assert not table.loc["steer", "works"]


def test_a_vector_that_stays_after_the_block_is_found(llama, monkeypatch):
    with ExitStack() as stack:

        def steer_and_stay(model, **options):
            stack.enter_context(steer(model, **options))
            return nullcontext()

        monkeypatch.setattr("dctlib.discovery.check.steer", steer_and_stay)
        table = check_model(llama, tiny_tokenizer()).set_index("capability")
    assert "leaves something of its vector" in table.loc["steer", "detail"]
