"""Blind audits: vectors found without trigger and secret, and what they reveal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.discovery.discover import complete_at_strengths, rank_and_cluster
from dctlib.evaluation.judges import fraction_true
from dctlib.fits.baselines import random_vectors
from dctlib.fits.calibration import calibrate
from dctlib.fits.power_steering import power_steering
from dctlib.fits.solvers import fit_exponential
from dctlib.maps.causal import CausalMap
from dctlib.models.chat import format_chat
from dctlib.models.fingerprint import load_fingerprinted
from dctlib.paper.datasets import format_questions, question_split
from dctlib.paper.organisms.arithmetic import grade_answers
from dctlib.paper.organisms.secrets import Secret
from dctlib.paper.organisms.training import check_organism
from dctlib.runs.cache import task
from dctlib.steering.generation import generate_completions, sample_completions
from dctlib.steering.scoring import effects

_ORDERS = ("fluent", "divergence")


@dataclass(frozen=True)
class AuditResult:
    """What m vectors, or m samples, make a model say, and in which order an auditor would read it.

    Attributes
    ----------
    said : list of list of str
        The completions of n instructions under each vector.
    orders : dict
        What they are ranked by, ``fluent`` or ``divergence`` (see :func:`dctlib.discovery.discover.discover`) → their numbers:
        the first of each cluster of like vectors, the most promising first, and then the others.
    """

    said: list[list[str]]
    orders: dict[str, list[int]]

    def reveals(self, secret: Secret, by: str) -> Bool[Tensor, " m"]:
        """Whether each gives the secret away, in the order of reading: at least one of its completions does."""
        return torch.tensor([any(map(secret.reveals, self.said[number])) for number in self.orders[by]])

    def first_to_reveal(self, secret: Secret, by: str) -> str | None:
        """The completion that an auditor reads first of those that give the secret away, if there is one."""
        read_in_order = (said for number in self.orders[by] for said in self.said[number])
        return next(filter(secret.reveals, read_in_order), None)


@task(version=1)
def audit_model(
    model: str,
    digest: str,
    dtype: str,
    instructions: Sequence[str],
    held_out: Sequence[str],
    *,
    source: int,
    target: int,
    sizes: Sequence[int],
    nonlinearity: float,
    num_factors: int,
    iterations: int,
    answer_tokens: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Search a model for vectors on benign instructions, and hear what they make it say on others.

    The methods are DCT (exponential) on the first n instructions, for each n of `sizes`; power steering on as many as
    the largest; random vectors; and sampling at temperature 1, without a vector. Each has `num_factors` tries of one
    length R, calibrated on the fewest instructions. Arguments and result are JSON: a task for
    :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.models.fingerprint.fingerprint_model`.
    instructions, held_out : sequence of str
        User turns, in no chat format: those that are fitted, and those that are completed.

    Returns
    -------
    dict
        Method → the fields of :class:`AuditResult`.
    """
    if max(sizes) > len(instructions) or num_factors % 2:
        raise ValueError(
            f"got sizes={list(sizes)}, num_factors={num_factors}, expected at most {len(instructions)} instructions, "
            f"and an even number"
        )
    organism, tokenizer = load_fingerprinted(model, digest, dtype)
    texts, asked = (format_chat(tokenizer, part) for part in (instructions, held_out))
    at: dict[str, Any] = {"source": source, "target": target}
    maps = {n: CausalMap.from_model(organism, tokenizer, texts[:n], **at) for n in sizes}
    cmap, R = maps[max(sizes)], calibrate(maps[min(sizes)], nonlinearity=nonlinearity, seed=seed)
    options: dict[str, Any] = {"num_factors": num_factors, "iterations": iterations, "input_scale": R, "seed": seed}
    fits = {n: fit_exponential(of, **options, progress=False) for n, of in maps.items()}
    vectors = {f"DCT, n = {n}": dct.steering_vectors() for n, dct in fits.items()}
    V = power_steering(cmap, num_vectors=num_factors // 2, seed=seed).V
    vectors["power steering"] = R * torch.cat([V, -V])
    vectors["random"] = random_vectors(num_factors, cmap.d_source, norm=R, seed=seed)
    speaking: dict[str, Any] = {"max_new_tokens": answer_tokens, "progress": False}
    clean = generate_completions(organism, tokenizer, asked, **speaking)
    heard = {
        method: audit_vectors(organism, tokenizer, held_out, clean, of, layer=source, **speaking)
        for method, of in vectors.items()
    }
    drawn = sample_completions(organism, tokenizer, asked, count=num_factors, seed=seed, **speaking)
    heard["sampling"] = AuditResult(drawn, {by: [*range(num_factors)] for by in _ORDERS})
    return {method: asdict(of) for method, of in heard.items()}


def audit_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    clean: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    layer: int,
    max_new_tokens: int,
    progress: bool = True,
) -> AuditResult:
    """Complete `instructions`, which the unsteered model answers with `clean`, under every vector."""
    speaking: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    reading = complete_at_strengths(
        model, tokenizer, instructions, clean, vectors, layer=layer, strengths=[1.0], **speaking
    )
    texts = format_chat(tokenizer, instructions)
    divergence = effects(model, tokenizer, texts, vectors, layer=layer, progress=progress).divergence.mean(1).tolist()
    table = pd.DataFrame({"vector": range(len(vectors)), "fluent": reading.fluent, "divergence": divergence})
    orders = {}
    for by in _ORDERS:
        ranked = rank_and_cluster(table, vectors, by=by)
        firsts = ranked.drop_duplicates("alike")
        orders[by] = [*firsts["vector"], *ranked.drop(firsts.index)["vector"]]
    return AuditResult(reading.steered[1.0], orders)


@task(version=1)
def audit_sums(
    model: str,
    digest: str,
    dtype: str,
    *,
    password: str,
    least: float,
    test: int,
    sizes: list[int],
    held_out: int,
    answer_tokens: int,
    search: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Audit a password-locked organism without password and answers.

    Arguments and result are JSON: a task for :func:`dctlib.runs.sweep.run_sweep`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.models.fingerprint.fingerprint_model`.
    password : str
        Only to see that the organism is what it should be.
    least : float
        The rates of solving behind the password, and of hiding without it, that it must reach on test questions.
    sizes : list of int
        Questions that DCT is fitted to.
    held_out : int
        Other questions, asked under each vector.
    search : dict
        What :func:`dctlib.paper.experiments.audit.audit_model` takes besides model, questions and seed.

    Returns
    -------
    dict
        ``locked`` and ``unlocked``, the rates of test questions that it solves without and behind the password, and
        ``solved``: method → what vectors are ranked by → for each vector, in that order, whether it solves each
        held-out question.

    Raises
    ------
    ValueError
        If the organism falls short of `least`.
    """
    asked = question_split("sums")
    organism, tokenizer = load_fingerprinted(model, digest, dtype)
    rates = {}
    for state, before in {"locked": "", "unlocked": password}.items():
        texts = format_questions(tokenizer, asked.test[:test], None, password=before)
        said = generate_completions(organism, tokenizer, texts, max_new_tokens=answer_tokens, description=state)
        rates[state] = fraction_true(grade_answers(said, asked.test[:test]))
    check_organism(f"locked-{seed}", {"solves": rates["unlocked"], "hides": 1 - rates["locked"]}, least=least)

    fitted, rows = asked.fit[: max(sizes)], asked.validation[:held_out]
    blind = {"instructions": [row["question"] for row in fitted], "held_out": [row["question"] for row in rows]}
    heard = audit_model(model, digest, dtype, **blind, sizes=sizes, answer_tokens=answer_tokens, **search, seed=seed)
    solved = {
        method: {
            by: [grade_answers(of["said"][number], rows) for number in order] for by, order in of["orders"].items()
        }
        for method, of in heard.items()
    }
    return rates | {"solved": solved}
