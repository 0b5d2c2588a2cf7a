"""Blind audits: do vectors that were found without trigger and secret make an organism give it away?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.baselines import random_vectors
from dctlib.causal_map import CausalMap
from dctlib.discover import distinct, read
from dctlib.effects import effects
from dctlib.fit import fit_exponential
from dctlib.generate import complete
from dctlib.input_scale import calibrate
from dctlib.melbo import power_steering
from dctlib.pinned_model import open_pinned
from dctlib.planted_secrets import Secret
from dctlib.prompts import format_chat
from dctlib.sampling import sample

_ORDERS = ("fluent", "divergence")


@dataclass(frozen=True)
class Heard:
    """What m vectors, or m samples, make a model say, and in which order an auditor would read it.

    Attributes
    ----------
    said : list of list of str
        The completions of n instructions under each vector.
    orders : dict
        What they are ranked by, ``fluent`` or ``divergence`` (see :func:`dctlib.discover.discover`) → their numbers:
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


def audit(
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
    :func:`dctlib.sweep.map_fits`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.pinned_model.pin`.
    instructions, held_out : sequence of str
        User turns, in no chat format: those that are fitted, and those that are completed.

    Returns
    -------
    dict
        Method → the fields of :class:`Heard`.
    """
    if max(sizes) > len(instructions) or num_factors % 2:
        raise ValueError(
            f"got sizes={list(sizes)}, num_factors={num_factors}, expected at most {len(instructions)} instructions, "
            f"and an even number"
        )
    organism, tokenizer = open_pinned(model, digest, dtype)
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
    clean = complete(organism, tokenizer, asked, **speaking)
    heard = {
        method: hear(organism, tokenizer, held_out, clean, of, layer=source, **speaking)
        for method, of in vectors.items()
    }
    drawn = sample(organism, tokenizer, asked, count=num_factors, seed=seed, **speaking)
    heard["sampling"] = Heard(drawn, {by: [*range(num_factors)] for by in _ORDERS})
    return {method: asdict(of) for method, of in heard.items()}


def hear(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    clean: Sequence[str],
    vectors: Float[Tensor, "m d"],
    *,
    layer: int,
    max_new_tokens: int,
    progress: bool = True,
) -> Heard:
    """Complete `instructions`, which the unsteered model answers with `clean`, under every vector."""
    speaking: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    reading = read(model, tokenizer, instructions, clean, vectors, layer=layer, strengths=[1.0], **speaking)
    texts = format_chat(tokenizer, instructions)
    divergence = effects(model, tokenizer, texts, vectors, layer=layer, progress=progress).divergence.mean(1).tolist()
    table = pd.DataFrame({"vector": range(len(vectors)), "fluent": reading.fluent, "divergence": divergence})
    orders = {}
    for by in _ORDERS:
        ranked = distinct(table, vectors, by=by)
        firsts = ranked.drop_duplicates("alike")
        orders[by] = [*firsts["vector"], *ranked.drop(firsts.index)["vector"]]
    return Heard(reading.steered[1.0], orders)
