import pytest
import torch
from tiny import tiny_model, unit_rows

from dctlib import ablate, score_vectors
from dctlib.fits.compare import similarity
from dctlib.paper.experiments.aggregates import ablate_each, add_each, aggregates, qualifying_vectors
from dctlib.steering.scoring import score_texts

D, R = 32, 6.0


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    return unit_rows(5, D).float()


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.0, [2, 0, 3]), (0.5, [2, 0, 3]), (2.0, [2, 0]), (9.0, [2, 0]), (-9.0, [2, 0, 3, 1])]
)
def test_those_qualify_that_reach_the_threshold_best_first_and_two_at_least(threshold, expected):
    assert qualifying_vectors([2.0, -1.0, 3.0, 0.5], threshold) == expected


def test_aggregates_are_the_mean_direction_and_the_one_that_most_of_the_rows_share():
    axis = torch.zeros(D).double()
    axis[0] = 1
    rows = torch.nn.functional.normalize(axis + 0.05 * unit_rows(8, D), dim=1)
    mean, singular = aggregates(rows)
    torch.testing.assert_close(mean, rows.mean(0) / rows.mean(0).norm())
    torch.testing.assert_close(singular.norm(), torch.tensor(1.0).double())
    assert (rows @ singular).square().sum() >= (rows @ mean).square().sum() - 1e-12
    assert singular[0].abs() > 0.99


def test_each_is_added_at_one_length_and_the_sign_is_chosen_on_validation(model, tokenizer, texts, rows):
    validation, test = texts[:1], texts[1:]
    found = add_each(model, tokenizer, rows, layer=1, norm=R, validation=validation, test=test)
    mean = rows.mean(0) / rows.mean(0).norm()
    singular = torch.linalg.svd(rows).Vh[0]
    signs = torch.stack([singular, -singular])
    chosen = signs[score_vectors(model, tokenizer, validation, R * signs, layer=1).argmax()]
    expected = score_vectors(model, tokenizer, test, R * torch.stack([*rows, mean, chosen]), layer=1)
    torch.testing.assert_close(torch.tensor([*found.scores, found.v_avg, found.v_svd]), expected)
    other = score_vectors(model, tokenizer, test, -R * chosen[None], layer=1)
    assert found.v_svd_negated == pytest.approx(other.item(), abs=1e-4)
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high
        assert low < high
    assert found.average == pytest.approx(expected[:5].mean().item(), rel=1e-4)
    assert found.max == max(found.scores)
    assert found.condition_number == similarity(rows).condition_number


def test_each_is_ablated_alone_and_nothing_stays_behind(model, tokenizer, texts, rows):
    before = score_texts(model, tokenizer, texts)
    found = ablate_each(model, tokenizer, rows, test=texts)
    for direction, score in zip([*rows, rows.mean(0)], [*found.scores, found.v_avg], strict=True):
        with ablate(model, direction):
            assert score_texts(model, tokenizer, texts).mean().item() == pytest.approx(score, abs=1e-4)
    assert len({round(score, 4) for score in found.scores}) == 5
    assert found.v_svd_negated is None
    assert torch.equal(score_texts(model, tokenizer, texts), before)
