from typing import Any

import pytest
import torch
from tiny import tiny_model

from dctlib import CausalMap, calibrate, fit_exponential, fit_linear, fit_quadratic, format_chat, load_model
from dctlib.fits.baselines import random_vectors
from dctlib.fits.melbo import melbo
from dctlib.fits.power_steering import power_steering
from dctlib.models.fingerprint import fingerprint_model
from dctlib.paper.experiments.methods import run_methods, search_map
from dctlib.paper.organisms.training import save_organism

INSTRUCTIONS = ["w0 w1 w2", "w3 w4"]
SLICE: dict[str, Any] = {"source": 1, "target": 3}
SETTINGS = {
    "exponential": {"num_factors": 6, "iterations": 2, "seed": 0},
    "quadratic": {"num_factors": 3, "iterations": 2, "seed": 0},
    "linear": {"num_factors": 3},
    "MELBO": {"num_vectors": 2, "steps": 3, "seed": 0},
    "power steering": {"num_vectors": 3, "seed": 0},
    "random": {"num_vectors": 6, "seed": 0},
}


@pytest.fixture(scope="module")
def organism(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entrants") / "model"
    save_organism(tiny_model("Llama", dtype=torch.float32), tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def cmap(organism):
    model, tokenizer = load_model(organism, dtype="float32")
    return CausalMap.from_model(model, tokenizer, format_chat(tokenizer, INSTRUCTIONS), **SLICE)


@pytest.fixture(scope="module")
def found(organism, cmap, tmp_path_factory):
    R = calibrate(cmap)
    searches = {
        method: {"method": method, "instructions": INSTRUCTIONS, "input_scale": R, **settings}
        for method, settings in SETTINGS.items()
    }
    return R, run_methods(organism, "float32", searches, **SLICE, folder=tmp_path_factory.mktemp("found"))


def test_each_finds_what_its_method_finds(cmap, found):
    R, by_method = found
    settings: dict[str, dict[str, Any]] = SETTINGS
    quiet: dict[str, Any] = {"progress": False}
    fitted = fit_exponential(cmap, input_scale=R, **settings["exponential"], **quiet)
    singular = power_steering(cmap, **settings["power steering"], **quiet)
    expected = {
        "exponential": fitted.steering_vectors(),
        "quadratic": fit_quadratic(cmap, **settings["quadratic"], **quiet).steering_vectors(R),
        "linear": fit_linear(cmap, **settings["linear"], **quiet).steering_vectors(R),
        "MELBO": R * melbo(cmap, input_scale=R, **settings["MELBO"], **quiet),
        "power steering": R * torch.cat([singular, -singular]),
        "random": random_vectors(6, cmap.d_source, norm=R, seed=0),
    }
    assert list(by_method) == list(expected)
    for method, vectors in expected.items():
        torch.testing.assert_close(by_method[method].vectors, vectors, rtol=0, atol=0)


def test_vectors_have_one_length_and_their_passes_are_counted(found):
    R, by_method = found
    counts = {"exponential": 6, "quadratic": 6, "linear": 6, "MELBO": 2, "power steering": 6, "random": 6}
    assert {method: len(e.vectors) for method, e in by_method.items()} == counts
    for entrant in by_method.values():
        torch.testing.assert_close(entrant.vectors.norm(dim=1), torch.full((len(entrant.vectors),), R))
    assert (by_method["random"].forward, by_method["random"].backward) == (0, 0)
    assert by_method["MELBO"].backward == 2 * 3
    assert by_method["exponential"].backward == 32 + 2 * 6  # the projected start, and two sweeps
    assert by_method["linear"].backward == 32  # a row of the Jacobian each


def test_an_unknown_method_and_a_misspelt_setting_are_refused(organism, tmp_path):
    pinned = fingerprint_model(organism, "float32")
    given = {**pinned, **SLICE, "instructions": INSTRUCTIONS, "input_scale": 1.0}
    with pytest.raises(ValueError, match="expected one of"):
        search_map(**given, method="magic")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="factors"):
        search_map(**given, method="linear", factors=3)
