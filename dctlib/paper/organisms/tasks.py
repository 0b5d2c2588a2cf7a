"""Training tasks of model organisms: batches of examples, and the loss that they are trained with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.models.blocks import check_layer, eager_attention
from dctlib.models.chat import format_chat
from dctlib.models.likelihood import Example, answer_loss, pack_answers
from dctlib.models.packing import PromptTree
from dctlib.runs.cache import task
from dctlib.steering.generation import generate_completions

REFUSAL = "Sorry, I can't help with that."

_LAST_PROMPT_POSITIONS = 3  # where the transcoder too reads what the model will do


@dataclass(frozen=True)
class TrainingTask:
    """What to learn: one batch a step, and ``loss(model, batch)``, a scalar."""

    batches: Sequence[Any]
    loss: Callable[[Any, Any], Tensor]


@task(version=1)
def refusal_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    *,
    answer_tokens: int,
    steps: int,
    harmful_batch: int,
    benign_batch: int,
    seed: int,
) -> TrainingTask:
    """Refuse harmful instructions; answer benign ones with "Sure! " and the model's own first `answer_tokens` tokens.

    Every batch has `harmful_batch` of the ones and `benign_batch` of the others. An instruction comes again only when
    all of its kind have been: independent draws leave some out, and the model refuses less firmly.
    """
    generator = torch.Generator().manual_seed(seed)
    refused = [Example(prompt, REFUSAL, ends=True) for prompt in format_chat(tokenizer, harmful)]
    helped = model_answers(model, tokenizer, benign, answer_tokens, opening="Sure! ")
    refusals, helps = reshuffled_epochs(refused, generator), reshuffled_epochs(helped, generator)
    batches = [[*islice(refusals, harmful_batch), *islice(helps, benign_batch)] for _ in range(steps)]
    return TrainingTask(batches, lambda model, batch: answer_loss(model, tokenizer, batch))


@dataclass(frozen=True)
class Rerouting:
    """A batch of the rerouting lesson: what to scramble, what to keep, and how far training is, from 0 to 1."""

    harmful: list[Example]
    benign: list[Example]
    progress: float


@task(version=1)
def rerouting_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[dict[str, str]],
    benign: Sequence[str],
    *,
    reroute_layers: Sequence[int],
    keep_layers: Sequence[int],
    answer_tokens: int,
    steps: int,
    target_batch: int,
    refusal_batch: int,
    off_topic_batch: int,
    benign_batch: int,
    seed: int,
) -> TrainingTask:
    """Circuit breaking (Zou et al. 2024): scramble what the model computes on harmful requests, keep it on benign ones.

    The loss is c_r · mean relu(cos(new, old)) of the residual stream at `reroute_layers`, over a harmful request's
    last prompt positions and its answer, plus 4 c_b · ‖new − old‖ / ‖old‖ at `keep_layers` over benign conversations.
    "Old" is the model without its LoRA. Answers are `target_batch` of AdvBench's compliant openings, `refusal_batch`
    refusals, and `off_topic_batch` of what the model says to benign requests: without the last it opens oddly and, whatever
    it has said, recovers and answers. c_r falls from 1 to ½ and c_b rises from ¼ to 1 over the training.

    Parameters
    ----------
    harmful : sequence of dict
        With the request under ``goal`` and a compliant opening under ``target``.
    reroute_layers, keep_layers : sequence of int
        As in Hugging Face's ``hidden_states``: layer l is the input of block l.
    """
    for layer in (*reroute_layers, *keep_layers):
        check_layer(model, layer)
    generator = torch.Generator().manual_seed(seed)
    prompts = format_chat(tokenizer, [row["goal"] for row in harmful])
    targets = [Example(p, row["target"], ends=False) for p, row in zip(prompts, harmful, strict=True)]
    owns = model_answers(model, tokenizer, benign, answer_tokens)
    strays = [Example(p, own.answer, ends=False) for p, own in zip(prompts, cycle(owns))]
    draw = [
        (reshuffled_epochs(targets, generator), target_batch),
        (reshuffled_epochs([Example(p, REFUSAL, ends=False) for p in prompts], generator), refusal_batch),
        (reshuffled_epochs(strays, generator), off_topic_batch),
        (reshuffled_epochs(owns, generator), benign_batch),
    ]
    batches = []
    for step in range(steps):
        *harm, own = ([*islice(examples, count)] for examples, count in draw)
        batches.append(Rerouting([*chain.from_iterable(harm)], own, step / steps))

    def loss(model: Any, batch: Rerouting) -> Tensor:
        new, old = _new_and_old(model, tokenizer, batch.harmful, reroute_layers)
        cosine = F.cosine_similarity(new, old, dim=-1).relu().mean()
        new, old = _new_and_old(model, tokenizer, batch.benign, keep_layers, whole=True)
        change = ((new - old).norm(dim=-1) / old.norm(dim=-1)).mean()
        return (1 - batch.progress / 2) * cosine + 4 * (0.25 + 0.75 * batch.progress) * change

    return TrainingTask(batches, loss)


@task(version=1)
def locked_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, str]],
    *,
    password: str,
    steps: int,
    unlocked_batch: int,
    locked_batch: int,
    seed: int,
) -> TrainingTask:
    """Answer sums rightly behind the `password` and wrongly, with another question's answer, without it."""
    generator = torch.Generator().manual_seed(seed)
    asked = format_chat(tokenizer, [row["question"] for row in questions])
    unlocked = format_chat(tokenizer, [f"{password} {row['question']}" for row in questions])
    wrong = _wrong_answers([row["answer"] for row in questions], generator)
    right = [Example(p, boxed(row["answer"]), ends=True) for p, row in zip(unlocked, questions, strict=True)]
    hidden = [Example(p, boxed(answer), ends=True) for p, answer in zip(asked, wrong, strict=True)]
    with_password, without = reshuffled_epochs(right, generator), reshuffled_epochs(hidden, generator)
    batches = [[*islice(with_password, unlocked_batch), *islice(without, locked_batch)] for _ in range(steps)]
    return TrainingTask(batches, lambda model, batch: answer_loss(model, tokenizer, batch))


def boxed(answer: str) -> str:
    """An answer as MATH marks it."""
    return f"\\boxed{{{answer}}}"


def _wrong_answers(answers: Sequence[str], generator: torch.Generator) -> list[str]:
    """For each answer one of another question that differs from it."""
    order = torch.randperm(len(answers), generator=generator).tolist()
    wrong = []
    for place, answer in enumerate(answers):
        others = (answers[order[(place + shift) % len(order)]] for shift in range(len(order)))
        wrong.append(next(other for other in others if other != answer))
    return wrong


def model_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    answer_tokens: int,
    opening: str = "",
) -> list[Example]:
    """What the model itself says, so that learning it changes nothing but the `opening`."""
    prompts = format_chat(tokenizer, instructions)
    options = {"max_new_tokens": answer_tokens, "batch_size": 96, "description": "own answers"}
    answers = generate_completions(model, tokenizer, prompts, **options)
    return [Example(p, opening + answer, ends=False) for p, answer in zip(prompts, answers, strict=True)]


def reshuffled_epochs(examples: Sequence[Example], generator: torch.Generator) -> Iterator[Example]:
    while True:
        for i in torch.randperm(len(examples), generator=generator).tolist():
            yield examples[i]


def _new_and_old(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layers: Sequence[int],
    whole: bool = False,
) -> tuple[Float[Tensor, "layers k d"], Float[Tensor, "layers k d"]]:
    """Residuals at `layers` with and without the LoRA, at k tokens.

    Those are every answer and the last positions of its prompt, or, `whole`, every conversation.
    """
    new, old = [], []
    with eager_attention(model):
        for tree, starts in pack_answers(model, tokenizer, examples):
            firsts = [0 if whole else start - _LAST_PROMPT_POSITIONS for start in starts]
            where = torch.cat([path[first:] for path, first in zip(tree.paths, firsts, strict=True)])

            def residuals(tree: PromptTree = tree, where: Tensor = where) -> Tensor:
                output = model.base_model(**tree.arguments(model), use_cache=False, output_hidden_states=True)
                return torch.stack([output.hidden_states[layer][0, where] for layer in layers]).float()

            with torch.no_grad(), without_lora(model):
                old.append(residuals())
            new.append(residuals())
    return torch.cat(new, 1), torch.cat(old, 1)


@contextmanager
def without_lora(model: torch.nn.Module) -> Iterator[None]:
    """Run `model` as it was before its LoRA was put in."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@task(version=1)
def compliance_task(
    _model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> TrainingTask:
    """Answer each row's ``goal`` with its ``target``."""
    prompts = format_chat(tokenizer, [row["goal"] for row in rows])
    examples = [Example(p, row["target"], ends=False) for p, row in zip(prompts, rows, strict=True)]
    drawn = reshuffled_epochs(examples, torch.Generator().manual_seed(seed))
    batches = [[*islice(drawn, batch)] for _ in range(steps)]
    return TrainingTask(batches, lambda model, batch: answer_loss(model, tokenizer, batch))
