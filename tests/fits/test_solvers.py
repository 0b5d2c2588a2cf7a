from typing import Any, cast

import pytest
import torch
from tiny import tiny_model, unit_rows

from dctlib import CausalMap, FunctionMap, calibrate, fit_exponential, fit_linear, fit_quadratic
from dctlib.fits.compare import recovery
from dctlib.maps.orthogonalise import orthonormal_rows
from dctlib.maps.synthetic import synthetic_map
from dctlib.runs.cache import cached_fit

D = 48


def planted(count, d=D, seed=0):
    made = synthetic_map(count, d, seed=seed, dtype=torch.float64)
    return made.U, made.V, made.cmap


def linear(rank=D, d=D):
    singular = torch.logspace(1, -1, rank, dtype=torch.float64)
    U, V = orthonormal_rows(unit_rows(rank, d, seed=3)), orthonormal_rows(unit_rows(rank, d, seed=4))
    return U, V, singular, FunctionMap(lambda t: (t @ V.T * singular) @ U, d_source=d, d_target=d, dtype=torch.float64)


def test_linear_is_the_svd_of_the_jacobian():
    U, V, singular, cmap = linear()
    dct = fit_linear(cmap, num_factors=20)
    torch.testing.assert_close(dct.alpha, singular[:20])
    assert (dct.V * V[:20]).sum(1).abs().min() > 0.999
    assert (dct.U * U[:20]).sum(1).abs().min() > 0.999
    assert ((dct.V * V[:20]).sum(1).sign() == (dct.U * U[:20]).sum(1).sign()).all()


def test_linear_on_a_transformer_equals_the_dense_jacobian(tokenizer, texts):
    cmap = CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3)
    cmap.chunk_size = 5
    eye = torch.eye(32, dtype=torch.float64)
    dense = cmap.jvp(torch.zeros_like(eye), eye).T  # columns by forward mode; the fit takes rows by reverse mode
    dct = fit_linear(cmap, num_factors=32)
    torch.testing.assert_close(dct(eye).T, dense, rtol=1e-4, atol=1e-5)
    assert dct.source == 1
    assert dct.target == 3


def test_projected_linear_finds_the_leading_directions():
    _, V, _, cmap = linear()
    dct = fit_linear(cmap, num_factors=40, projections=32)
    torch.testing.assert_close(dct.V @ dct.V.T, torch.eye(40, dtype=torch.float64))
    leading = torch.linalg.svdvals(V[:3] @ dct.V[:8].T)
    assert leading.min() > 0.9
    image = cmap.jvp(torch.zeros_like(dct.V), dct.V)
    torch.testing.assert_close(dct.alpha[:, None] * dct.U, image)
    assert dct.alpha[:8].mean() > 3 * dct.alpha[32:].mean()


@pytest.mark.parametrize(("init", "iterations"), [("projected", 10), ("random", 100)])
def test_exponential_recovers_planted_factors(init, iterations):
    _, V, cmap = planted(16, d=256)
    dct = fit_exponential(cmap, num_factors=64, input_scale=calibrate(cmap), iterations=iterations, init=init)
    found = recovery(V, dct.V)
    assert found.mean_max_cosine > 0.95
    assert found.recovered > 0.7
    assert recovery(V, unit_rows(64, 256, seed=9)).mean_max_cosine < 0.3


@pytest.mark.parametrize(("init", "iterations"), [("projected", 20), ("random", 60)])
def test_soft_orthogonalisation_recovers_them_too(init, iterations):
    _, V, cmap = planted(16, d=128)
    options = {"num_factors": 64, "input_scale": 3.0, "iterations": iterations, "init": init}
    soft, qr = (
        recovery(V, fit_exponential(cmap, **options, orthogonalise=kind).V).mean_max_cosine for kind in ("soft", "qr")
    )
    assert soft > 0.98
    assert soft > qr - 0.01


def test_exponential_reconstructs_the_planted_map():
    _, V, cmap = planted(4)
    dct = fit_exponential(cmap, num_factors=D, input_scale=1.0, iterations=100, projections=D)
    theta = torch.cat([V, 0.5 * V, -V, unit_rows(8, D, seed=5)])  # at R = 1 planted and fitted σ are one
    assert (dct(theta) - cmap(theta)).norm() < 0.1 * cmap(theta).norm()


def test_exponential_matches_the_map_at_its_scale_along_its_factors():
    _, V, cmap = planted(4)
    dct = fit_exponential(cmap, num_factors=4, input_scale=2.0, iterations=60, projections=4)
    theta, truth = torch.cat([V, 0.5 * V, -V, unit_rows(8, D, seed=5)]), cmap(2.0 * V)
    assert (dct(V) - truth).norm() < 0.3 * truth.norm()  # σ has R = 1 inside: only the scale R·v is matched
    assert (dct(theta) - cmap(2.0 * theta)).norm() < 0.8 * cmap(2.0 * theta).norm()


def test_factors_are_unit_and_the_record_is_complete():
    _, _, cmap = planted(6)
    dct = fit_exponential(cmap, num_factors=12, input_scale=2.0, iterations=7)
    for rows in (dct.U, dct.V):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(12, dtype=torch.float64))
    assert dct.objective.shape == dct.change.shape == (7,)
    assert dct.objective[-1] > dct.objective[0]
    assert dct.importance is not None
    assert dct.importance.shape == (7, 12)
    torch.testing.assert_close(dct.importance.sum(1).float(), dct.objective)
    assert dct.input_scale == 2.0
    assert dct.seconds > 0


def test_the_importance_recorded_last_is_that_of_each_factor():
    _, _, cmap = planted(6)
    shorter, longer = (
        fit_exponential(cmap, num_factors=5, input_scale=2.0, iterations=n, projections=5) for n in (3, 4)
    )
    V = orthonormal_rows(shorter.V)  # the fourth iteration starts here
    assert longer.importance is not None
    torch.testing.assert_close(longer.importance[3], (shorter.U * cmap(2.0 * V)).sum(1))
    assert fit_linear(cmap, num_factors=5).importance.shape == (0, 5)  # pyright: ignore[reportOptionalMemberAccess]


def test_a_start_on_axes_draws_different_axes_from_the_seed_and_their_images():
    _, _, cmap = planted(6)
    starts = []

    class Watched(FunctionMap):
        def value_and_vjp(self, theta, cotangent):
            starts.append((theta, cotangent))
            return super().value_and_vjp(theta, cotangent)

    watched = Watched(cmap._terms()[0], d_source=D, d_target=D, dtype=torch.float64)
    for seed in (1, 1, 2):
        fit_exponential(watched, num_factors=20, input_scale=2.0, iterations=1, init="axes", seed=seed)
    fit_exponential(watched, num_factors=8, input_scale=2.0, iterations=1, init="axes", seed=1)
    (V, U), (again, _), (other, _), (narrow, _) = starts
    assert ((V == 2.0).sum(1) == 1).all() and (V.count_nonzero(dim=1) == 1).all()
    assert len(V.argmax(dim=1).unique()) == 20
    assert torch.equal(V, again) and torch.equal(V[:8], narrow) and not torch.equal(V, other)
    image = cmap.jvp(torch.zeros_like(V), V)
    torch.testing.assert_close(U, image / image.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("orthogonalise", ["qr", "soft"])
def test_a_start_on_axes_recovers_planted_factors(orthogonalise):
    _, V, cmap = planted(16, d=128)
    options: dict[str, Any] = {"num_factors": 64, "input_scale": 3.0, "iterations": 60, "orthogonalise": orthogonalise}
    assert recovery(V, fit_exponential(cmap, **options, init="axes").V).mean_max_cosine > 0.95


def test_a_start_on_axes_goes_on_at_random_where_axes_end():
    _, V, cmap = planted(6)
    options: dict[str, Any] = {"num_factors": 2 * D, "input_scale": 2.0, "iterations": 30, "orthogonalise": "soft"}
    dct = fit_exponential(cmap, **options, init="axes")
    assert dct.V.shape == (2 * D, D)
    assert recovery(V, dct.V).mean_max_cosine > 0.95


def test_a_seed_fixes_every_bit_and_another_changes_them():
    _, _, cmap = planted(6)
    one, two, other = (
        fit_exponential(cmap, num_factors=8, input_scale=2.0, iterations=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one.V, two.V)
    assert torch.equal(one.alpha, two.alpha)
    assert not torch.equal(one.V, other.V)


def test_the_global_generator_is_left_alone():
    _, _, cmap = planted(6)
    before = torch.random.get_rng_state()
    fit_exponential(cmap, num_factors=8, input_scale=2.0, iterations=2)
    fit_linear(cmap, num_factors=8, projections=8)
    assert torch.equal(before, torch.random.get_rng_state())


def planted_quadratic(count, d=D, seed=0):
    """Quadratic factors beside a linear term of the same size."""
    made = synthetic_map(count, d, activation="quadratic", linear=1.0, seed=seed, dtype=torch.float64)
    return made.U, made.V, made.alpha, made.cmap


def test_quadratic_recovers_planted_factors_beside_a_linear_term():
    _, V, _, cmap = planted_quadratic(12, d=128)
    dct = fit_quadratic(cmap, num_factors=32, iterations=40)
    found = recovery(V, dct.V)
    assert found.mean_max_cosine > 0.99
    assert recovery(V, fit_linear(cmap, num_factors=32).V).mean_max_cosine < 0.7


def test_quadratic_is_the_quadratic_part_of_the_map():
    _, V, a, cmap = planted_quadratic(4)
    dct = fit_quadratic(cmap, num_factors=4, iterations=60, projections=4)
    theta = torch.cat([V, unit_rows(8, D, seed=5)])
    even = (cmap(theta) + cmap(-theta)) / 2
    assert (dct(theta) - even).norm() < 0.1 * even.norm()
    torch.testing.assert_close(dct.alpha.sort().values, a.sort().values, rtol=0.1, atol=0.05)
    torch.testing.assert_close(dct.with_negations()(theta), dct(theta))


def test_quadratic_on_a_transformer_uses_true_second_derivatives(tokenizer, texts):
    cmap = CausalMap.from_model(tiny_model("GPT2"), tokenizer, texts, source=1, target=3)
    dct = fit_quadratic(cmap, num_factors=8, iterations=15)
    h = 1e-3
    along = (cmap(h * dct.V) + cmap(-h * dct.V)) / h**2  # finite differences of the values
    assert ((dct.U * along).sum(1) > 0.9 * along.norm(dim=1)).all()
    assert dct.objective[-1] > dct.objective[0]


def test_more_factors_than_coordinates_need_soft_orthogonalisation():
    _, V, cmap = planted(6)
    options = {"num_factors": 2 * D, "input_scale": 2.0, "iterations": 30}
    with pytest.raises(ValueError, match="orthogonalise='soft' allows more"):
        fit_exponential(cmap, **options)
    dct = fit_exponential(cmap, **options, orthogonalise="soft")
    assert dct.V.shape == (2 * D, D)
    assert recovery(V, dct.V).mean_max_cosine > 0.95


def test_it_stops_once_factors_stay():
    *_, cmap = linear()
    dct = fit_exponential(cmap, num_factors=3, input_scale=1.0, iterations=500, projections=3, tolerance=1e-2)
    assert 1 < len(dct.objective) < 500
    assert dct.change[-1] < 1e-2 <= dct.change[:-1].min()
    options: Any
    for options in ({}, {"tolerance": 0}):
        assert len(fit_exponential(cmap, num_factors=3, input_scale=1.0, iterations=20, **options).change) == 20


def test_chunks_agree():
    U, V, _ = planted(12)
    fits = []
    for chunk in (3, 64):
        cmap = FunctionMap(
            lambda t: torch.expm1(t @ V.T) @ U, d_source=D, d_target=D, dtype=torch.float64, chunk_size=chunk
        )
        fits.append(fit_exponential(cmap, num_factors=10, input_scale=2.0, iterations=4, projections=10))
    torch.testing.assert_close(fits[0].V, fits[1].V)


def test_a_remembered_fit_is_made_once_for_each_map_and_setting(tmp_path, tokenizer, texts):
    model, calls = tiny_model("Llama"), []

    def fit(cmap, *, num_factors):
        calls.append(num_factors)
        return fit_linear(cmap, num_factors=num_factors, progress=False)

    maps = [CausalMap.from_model(model, tokenizer, texts[:n], source=1, target=3) for n in (1, 2, 2)]
    first, other, again = (cached_fit(tmp_path, fit, cmap, num_factors=4) for cmap in maps)
    assert calls == [4, 4]
    assert torch.equal(other.V, again.V)
    assert not torch.equal(first.V, other.V)
    cached_fit(tmp_path, fit, maps[0], num_factors=5)
    assert calls == [4, 4, 5]


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda cmap: fit_linear(cmap, num_factors=0), "num_factors=0"),
        (lambda cmap: fit_linear(cmap, num_factors=D + 1), "1 to 48"),
        (lambda cmap: fit_linear(cmap, num_factors=4, projections=0), "projections=0"),
        (lambda cmap: fit_exponential(cmap, num_factors=D + 1, input_scale=1.0), "1 to 48"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=0.0), "input_scale=0.0"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=float("nan")), "input_scale=nan"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=1.0, init=cast("Any", "zero")), "init='zero'"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=1e6), "not finite"),
        (lambda cmap: fit_exponential(cmap, num_factors=4, input_scale=1.0, iterations=0), "iterations=0"),
        (lambda cmap: fit_quadratic(cmap, num_factors=4, iterations=0), "iterations=0"),
        (lambda cmap: fit_quadratic(cmap, num_factors=D + 1), "1 to 48"),
        (lambda cmap: fit_quadratic(cmap, num_factors=4, tolerance=-1.0), "tolerance=-1.0"),
        (lambda cmap: fit_quadratic(cmap, num_factors=4, orthogonalise=cast("Any", "svd")), "'qr', 'soft'"),
    ],
)
def test_bad_options_are_named(fit, message):
    with pytest.raises(ValueError, match=message):
        fit(planted(6)[2])
