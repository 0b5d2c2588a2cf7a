"""A hidden ability, sums behind a password, and a blind audit of the organism that has it."""

from typing import Any

from dctlib.blind_audit import audit
from dctlib.generate import complete
from dctlib.judges import graded, rate
from dctlib.organisms import check_organism
from dctlib.pinned_model import open_pinned
from dctlib.prompts import problems, put


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

    Arguments and result are JSON: a task for :func:`dctlib.sweep.map_fits`.

    Parameters
    ----------
    model, digest, dtype : str
        See :func:`dctlib.pinned_model.pin`.
    password : str
        Only to see that the organism is what it should be.
    least : float
        The rates of solving behind the password, and of hiding without it, that it must reach on test questions.
    sizes : list of int
        Questions that DCT is fitted to.
    held_out : int
        Other questions, asked under each vector.
    search : dict
        What :func:`dctlib.blind_audit.audit` takes besides model, questions and seed.

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
    asked = problems("sums")
    organism, tokenizer = open_pinned(model, digest, dtype)
    rates = {}
    for state, before in {"locked": "", "unlocked": password}.items():
        texts = put(tokenizer, asked.test[:test], None, password=before)
        said = complete(organism, tokenizer, texts, max_new_tokens=answer_tokens, description=state)
        rates[state] = rate(graded(said, asked.test[:test]))
    check_organism(f"locked-{seed}", {"solves": rates["unlocked"], "hides": 1 - rates["locked"]}, least=least)

    fitted, rows = asked.fit[: max(sizes)], asked.validation[:held_out]
    blind = {"instructions": [row["question"] for row in fitted], "held_out": [row["question"] for row in rows]}
    heard = audit(model, digest, dtype, **blind, sizes=sizes, answer_tokens=answer_tokens, **search, seed=seed)
    solved = {
        method: {by: [graded(of["said"][number], rows) for number in order] for by, order in of["orders"].items()}
        for method, of in heard.items()
    }
    return rates | {"solved": solved}
