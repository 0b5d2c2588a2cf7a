import pandas as pd
import pytest

from dctlib.discover import Reading
from dctlib.strength_slider import strength_slider

READING = Reading(
    ["no", "no"], {1.0: [["yes", "sure"], ["a", "b"]], 0.5: [["y", "s"], ["c", "d"]]}, [1.0, 2.0], [1.0, 1.0]
)


def test_under_papermill_it_is_a_table_of_the_first_vector_at_the_first_strength(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    table = strength_slider(READING, ["one", "two"], [7, 3], characters=2)
    assert isinstance(table, pd.DataFrame)
    assert list(table) == ["instruction", "without", "vector 7, ×1"]
    assert table["vector 7, ×1"].tolist() == ["ye …", "su …"]


def test_under_jupyter_it_follows_its_slider(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "discover.ipynb")
    widget = strength_slider(READING, ["one", "two"], [7, 3], characters=9)
    vector, strength = widget.children[:2]
    assert strength.options == (0.5, 1.0)
    vector.value, strength.value = 3, 0.5
    widget.update()
    assert widget.result["vector 3, ×0.5"].tolist() == ["c", "d"]
    with pytest.raises(Exception, match="Invalid selection"):
        strength.value = 9.0
