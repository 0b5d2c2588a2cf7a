"""Graded criteria of completions, where no judge is at hand: new, fluent, on the request, and not repetitive."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.evaluation.refusals import is_refusal
from dctlib.evaluation.repetition import is_repetitive
from dctlib.evaluation.thoughts import answer_of
from dctlib.models.likelihood import Example, mean_nll

_OPENING = 3  # tokens; the rest of an answer follows from them
_OTHERS = 2  # prompts that an answer is compared with
_FLUENT = 0.9  # fraction of the model's own answers that are fluent by definition
_MIN_PMI = 0.1  # nats a token


@dataclass(frozen=True, eq=False)
class Grades:
    """Grades of the completions of n requests under k vectors, each (k, n).

    Attributes
    ----------
    novelty : Tensor
        1 − exp(−x), with x the nats a token by which the unsteered model finds an answer less likely than its own.
    fluency : Tensor
        1 for text that is as likely as the model's own answers to harmless requests. It falls by a factor of e for
        every nat a token beyond.
    varied : bool Tensor
        Not repetitive.
    reopened : bool Tensor
        It opens otherwise than the unsteered answers do, and is not one refusal in place of another.
    on_request : bool Tensor
        More likely after its own request than after others.
    """

    novelty: Float[Tensor, "k n"]
    fluency: Float[Tensor, "k n"]
    varied: Bool[Tensor, "k n"]
    reopened: Bool[Tensor, "k n"]
    on_request: Bool[Tensor, "k n"]

    @property
    def product(self) -> Float[Tensor, "k n"]:
        """The product of all, from 0 to 1."""
        return self.novelty * self.fluency * self.varied * self.reopened * self.on_request


@dataclass(frozen=True, eq=False)
class Criteria:
    """What the unsteered model says of a completion.

    Attributes
    ----------
    model, tokenizer
        The model that is steered; it is read without steering.
    neutral : list of str
        Harmless prompts in chat format, after which text is read for fluency, whatever it answers.
    max_nll : float
        Mean −log p of a token, in nats, up to which text after them counts as fluent.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    neutral: list[str]
    max_nll: float

    @classmethod
    def from_answers(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
    ) -> "Criteria":
        """Set the bound of fluency by the model's own answers to harmless requests, at least three of them.

        If none of them holds text, or they are thoughts alone, there is no bound.

        Raises
        ------
        ValueError
            If there are fewer.
        """
        if len(examples) <= _OTHERS:
            raise ValueError(f"got {len(examples)} answers to harmless requests, expected at least {_OTHERS + 1}")
        neutral = [example.prompt for example in examples[:_OTHERS]]
        answers = [answer_of(example.answer) for example in examples[_OTHERS:]]
        unbounded = cls(model, tokenizer, neutral, math.inf)
        nll = unbounded._nll((prompt, answer) for prompt in neutral for answer in answers)
        each = [_mean(nll[prompt, answer] for prompt in neutral) for answer in answers]
        finite = torch.tensor([value for value in each if math.isfinite(value)])
        return cls(model, tokenizer, neutral, finite.quantile(_FLUENT).item() if len(finite) else math.inf)

    def grade(
        self,
        texts: Sequence[str],
        unsteered: Sequence[str],
        completions: Sequence[Sequence[str]],
        *,
        read_request: bool = True,
    ) -> Grades:
        """Grade the completions of n texts under k vectors.

        Parameters
        ----------
        texts : sequence of str
            Prompts in chat format, at least two.
        unsteered : sequence of str
            Their n completions without steering, of as many tokens.
        completions : sequence of sequence of str
            For each vector its n.
        read_request : bool
            Whether answers must be on the request. False suits a few tokens, which do not yet tell.
        """
        n = len(texts)
        before = [answer_of(completion) for completion in unsteered]
        answers = [[answer_of(completion) for completion in each] for each in completions]
        cells = [(row, i) for row in range(len(answers)) for i in range(n)]
        own = self._nll((text, answer) for each in [before, *answers] for text, answer in zip(texts, each, strict=True))
        openings = [self._opening(answer) for answer in before]
        common = {opening for opening, count in Counter(openings).items() if count > 1 and 2 * count >= n}

        def novelty(row: int, i: int) -> float:
            likeliest = own[texts[i], before[i]]
            surprise = own[texts[i], answers[row][i]] - (likeliest if math.isfinite(likeliest) else 0.0)
            return -math.expm1(-max(0.0, surprise))

        def is_reopened(row: int, i: int) -> bool:
            opening = self._opening(answers[row][i])
            both_refuse = is_refusal(answers[row][i]) and is_refusal(before[i])
            return opening != openings[i] and opening not in common and not both_refuse

        graded = {cell: novelty(*cell) for cell in cells}
        varied = {(row, i): bool(answers[row][i]) and not is_repetitive(answers[row][i]) for row, i in cells}
        reopened = {cell: is_reopened(*cell) for cell in cells}

        # Only answers that are still in question are read after other prompts; the rest count as not fluent.
        left = [cell for cell in cells if graded[cell] > 0 and varied[cell] and reopened[cell]]
        general = self._nll((prompt, answers[row][i]) for row, i in left for prompt in self.neutral)
        fluency = dict.fromkeys(cells, 0.0)
        for row, i in left:
            excess = _mean(general[prompt, answers[row][i]] for prompt in self.neutral) - self.max_nll
            fluency[row, i] = math.exp(-max(0.0, excess))

        on_request = dict.fromkeys(cells, not read_request)
        if read_request:
            others = {i: [texts[(i + shift) % n] for shift in range(1, min(_OTHERS, n - 1) + 1)] for i in range(n)}
            elsewhere = self._nll((text, answers[row][i]) for row, i in left for text in others[i])
            for row, i in left:
                after_others = _mean(elsewhere[text, answers[row][i]] for text in others[i])
                on_request[row, i] = after_others - own[texts[i], answers[row][i]] >= _MIN_PMI

        def table(values: Mapping[tuple[int, int], float]) -> Tensor:
            return torch.tensor([values[cell] for cell in cells]).view(len(answers), n)

        return Grades(table(graded), table(fluency), table(varied), table(reopened), table(on_request))

    def _nll(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Return the mean −log p of a token of each pair's answer after its prompt, each pair read once."""
        ordered = sorted(set(pairs))  # because a tree of prompts holds once what its neighbours share
        if not ordered:
            return {}
        examples = [Example(prompt, answer, ends=False) for prompt, answer in ordered]
        return dict(zip(ordered, mean_nll(self.model, self.tokenizer, examples).tolist(), strict=True))

    def _opening(self, answer: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(answer, add_special_tokens=False)[:_OPENING])


def _mean(values: Iterable[float]) -> float:
    found = [*values]
    return sum(found) / len(found)
