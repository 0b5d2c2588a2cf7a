"""What works on a model: every capability, verified against the model itself."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dctlib.maps.causal import CausalMap
from dctlib.models.blocks import get_blocks, residual_width
from dctlib.models.chat import format_chat
from dctlib.models.logits import compute_logits
from dctlib.models.trace import probe_tokens, trace_model
from dctlib.models.writers import residual_writers
from dctlib.steering.hooks import ablate, editable_writers, steer


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Return which capabilities work on `model`, with the error message of each that does not.

    Returns
    -------
    DataFrame
        A row for each capability: ``capability``, ``works``, and ``detail``, the error message or what was found.
    """
    checks: dict[str, Callable[[PreTrainedModel, PreTrainedTokenizerBase], str]] = {
        "blocks": lambda model, _: f"{len(get_blocks(model))} blocks, d = {residual_width(model)}",
        "chat template": _check_template,
        "steer": _check_steer,
        "replay": _check_replay,
        "derivatives": _check_derivatives,
        "logits": _check_logits,
        "ablate": _check_ablate,
        "export of an ablated copy": _check_export,
    }
    rows = []
    for capability, check in checks.items():
        try:
            rows.append((capability, True, check(model, tokenizer)))
        except ValueError as refusal:
            rows.append((capability, False, str(refusal)))
    return pd.DataFrame(rows, columns=["capability", "works", "detail"])


def _check_template(_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(format_chat(tokenizer, ["Hello"])[0])


def _map(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CausalMap:
    blocks = len(get_blocks(model))
    text = str(tokenizer.decode(probe_tokens(model)[0].tolist())) or "Hello there"
    source = blocks // 3
    return CausalMap.from_model(
        model, tokenizer, [text], source=source, target=max(source + 1, 2 * blocks // 3), positions=1
    )


def _check_replay(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    cmap = _map(model, tokenizer)
    return f"layers {cmap.source} → {cmap.target}"


def _check_derivatives(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    cmap = _map(model, tokenizer)
    rows = torch.randn(2, cmap.d_source, generator=torch.Generator().manual_seed(0), dtype=cmap.dtype)
    for product in (cmap.vjp, cmap.jvp, cmap.second_derivative, cmap.second_derivative_vjp):
        product(rows, rows)
    return "first and second, forward mode equal to reverse mode"


def _check_steer(model: PreTrainedModel, _tokenizer: PreTrainedTokenizerBase) -> str:
    layer, (clean, *_) = len(get_blocks(model)) // 3, _residuals(model)
    vector = clean[0].norm(dim=-1).median() * torch.nn.functional.normalize(torch.ones_like(clean[0, 0]), dim=0)
    before = _residuals(model)[layer]
    with steer(model, layer=layer, vector=vector):
        moved = _residuals(model)[layer]
    if not (moved - before - vector).norm() <= 0.05 * (before + vector).norm():
        raise ValueError("steer() does not change the residual stream by its vector")
    if not torch.equal(_residuals(model)[layer], before):
        raise ValueError("steer() leaves something of its vector in the model after the with block")
    return f"a vector is added at layer {layer}"


def _check_logits(model: PreTrainedModel, _tokenizer: PreTrainedTokenizerBase) -> str:
    compute_logits(model, _residuals(model)[-1].to(model.device), torch.arange(2, device=model.device))
    return "computed from the last block's output, equal to the model's own"


def _check_ablate(model: PreTrainedModel, _tokenizer: PreTrainedTokenizerBase) -> str:
    hidden = _residuals(model)
    direction = torch.nn.functional.normalize(hidden[1][0, -1].float(), dim=0)
    with ablate(model, direction):
        left = max(((each.float() @ direction).norm() / each.float().norm()).item() for each in _residuals(model))
    if not left < 0.01:
        raise ValueError(f"ablate() leaves {left:.1%} of a direction in the residual stream")
    return f"{len(residual_writers(model).modules)} modules write to the residual stream, and none writes the direction"


def _check_export(model: PreTrainedModel, _tokenizer: PreTrainedTokenizerBase) -> str:
    writers = editable_writers(model)
    return f"{len(writers.projections or [])} matrices and {len(writers.embeddings or [])} tables are edited"


def _residuals(model: PreTrainedModel) -> list[Tensor]:
    """Return h_0 … h_blocks, (1, tokens, d) each, for a few tokens, on the CPU; they include what steering adds."""
    return [each.cpu() for each in trace_model(model).residuals]
