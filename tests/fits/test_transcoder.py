from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unit_rows

from dctlib import Transcoder


def transcoder(m=4, activation="exponential", **changes):
    facts = {
        "U": unit_rows(m, 5, seed=1).float(),
        "V": unit_rows(m, 6, seed=2).float(),
        "alpha": torch.linspace(0, 1, m),
        "activation": activation,
        "input_scale": 25.3,
        "source": 10,
        "target": 20,
        "objective": torch.tensor([1.0, 2.0]),
        "change": torch.tensor([0.5, 0.1]),
        "seconds": 1.5,
    }
    return Transcoder(**{**facts, **changes})


@pytest.mark.parametrize(
    ("activation", "sigma"),
    [("linear", lambda x: x), ("quadratic", lambda x: x**2), ("exponential", lambda x: x.exp() - 1)],
)
def test_it_is_the_sum_of_equation_2(activation, sigma):
    dct, theta = transcoder(activation=activation), unit_rows(3, 6).float()
    expected = sum(
        dct.alpha[l] * sigma(theta @ dct.V[l])[:, None] * dct.U[l]
        for l in range(4)  # noqa: E741
    )
    torch.testing.assert_close(dct(theta), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_takes_what_its_map_takes(dtype):
    dct, theta = transcoder(), unit_rows(3, 6).to(dtype)
    found = dct(theta)
    assert found.dtype == dct.V.dtype
    torch.testing.assert_close(found, dct(theta.float()))


def test_save_and_load_are_bit_equal(tmp_path):
    dct = transcoder()
    dct.save(tmp_path / "new" / "dct.safetensors")
    back = Transcoder.load(tmp_path / "new" / "dct.safetensors")
    for name in ("U", "V", "alpha", "objective", "change"):
        assert torch.equal(getattr(back, name), getattr(dct, name))
    for name in ("activation", "input_scale", "source", "target", "seconds"):
        assert getattr(back, name) == getattr(dct, name)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dct.safetensors"]


@settings(max_examples=40, deadline=None)
@given(keep=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory, keep):
    path = tmp_path_factory.mktemp("cut") / "dct.safetensors"
    transcoder().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="not a whole transcoder file"):
        Transcoder.load(path)


def test_a_missing_file_and_another_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a whole transcoder file"):
        Transcoder.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("U, V, alpha")
    with pytest.raises(ValueError, match="not a whole transcoder file"):
        Transcoder.load(tmp_path / "text.safetensors")


def test_a_file_whose_vectors_overflow_is_refused(tmp_path):
    transcoder(V=torch.full((4, 6), 3e38)).save(tmp_path / "dct.safetensors")
    with pytest.raises(ValueError, match=r"dct\.safetensors is damaged: V times input_scale is not finite"):
        Transcoder.load(tmp_path / "dct.safetensors")


def test_importance_is_kept_and_files_without_it_are_read(tmp_path):
    importance = torch.arange(8.0).reshape(2, 4)
    transcoder(importance=importance).save(tmp_path / "dct")
    kept = Transcoder.load(tmp_path / "dct").importance
    assert kept is not None and torch.equal(kept, importance)
    transcoder().save(tmp_path / "old")
    assert Transcoder.load(tmp_path / "old").importance is None


def test_a_factor_and_its_negation_share_their_importance():
    importance = torch.arange(8.0).reshape(2, 4)
    both = transcoder(activation="quadratic", importance=importance).with_negations().importance
    assert both is not None and torch.equal(both, torch.cat([importance, importance], dim=1) / 2)


@pytest.mark.parametrize("activation", ["linear", "quadratic"])
def test_negations_leave_the_function_as_it_was(activation):
    dct, theta = transcoder(activation=activation), unit_rows(7, 6, seed=3).float()
    both = dct.with_negations()
    assert torch.equal(both.V, torch.cat([dct.V, -dct.V]))
    torch.testing.assert_close(both(theta), dct(theta))


def test_steering_vectors_have_the_length_asked_for_and_both_signs_where_they_are_open():
    assert torch.equal(transcoder().steering_vectors(), transcoder().input_scale * transcoder().V)
    both = transcoder(activation="quadratic").steering_vectors(3.0)
    assert torch.equal(both, 3 * torch.cat([transcoder().V, -transcoder().V]))


def test_exponential_factors_have_a_sign():
    with pytest.raises(ValueError, match="have a sign"):
        transcoder().with_negations()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": torch.ones(3)}, r"alpha \(3,\)"),
        ({"U": torch.ones(3, 5)}, "one m"),
        ({"V": torch.ones(4)}, "one m"),
        ({"alpha": torch.tensor([0, 0, 0, float("nan")])}, "alpha is not finite"),
        ({"importance": torch.ones(2, 3)}, r"importance of shape \(2, 3\)"),
        ({"activation": "cubic"}, "'cubic'"),
    ],
)
def test_it_is_complete_when_made(changes, message):
    with pytest.raises(ValueError, match=message):
        transcoder(**changes)


def test_it_is_frozen_and_checks_its_argument():
    dct = transcoder()
    with pytest.raises(AttributeError):
        dct.alpha = torch.zeros(4)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"expected \(n, 6\)"):
        dct(torch.zeros(6))
    assert replace(dct, input_scale=2.0).input_scale == 2.0
