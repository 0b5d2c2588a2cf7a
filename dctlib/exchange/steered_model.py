"""A copy of a model with a steering vector in its weights, which any program runs with no hook."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from dctlib.models.blocks import eager_attention, get_blocks, unwrap
from dctlib.models.trace import trace_model
from dctlib.steering.hooks import steer

# Without a sliding window these compute what a Llama model does. Its config allows biases that theirs do not.
_LLAMAS = ("Qwen2ForCausalLM", "MistralForCausalLM")


def steered_copy(model: PreTrainedModel, *, layer: int, vector: Float[Tensor, " d"]) -> PreTrainedModel:
    """Return a copy of `model` whose weights add `vector` to h_layer at every position, for export.

    It computes what the model does under :func:`dctlib.steer`, which is verified by residuals and logits on a few
    tokens. The vector goes into a bias of the module that writes last before block `layer`: usually the MLP's output
    projection in the block before, or the embedding for layer 0. If the model has no such bias, an option of its config
    may add one; other biases that come with it are zero. Tied embeddings are untied if the vector goes into them.

    Parameters
    ----------
    model : PreTrainedModel
        A model as transformers loads it, with no adapter and no quantised weights. It is not changed.
    layer : int
        As for :func:`dctlib.steer`, from 0 to the number of blocks.
    vector : Tensor or numpy array, (d,)
        What is added. Its length is the strength.

    Returns
    -------
    PreTrainedModel
        For ``save_pretrained``. It has the class of `model`, except that a Qwen2 or Mistral model becomes the Llama
        model that computes the same for a layer above 0, because their configs allow no such bias.

    Raises
    ------
    ValueError
        If no bias of this family is equal to the vector; for adapters, quantised or offloaded weights; and as
        :func:`dctlib.steer`.
    """
    model = unwrap(model)
    vector = torch.as_tensor(vector)
    if vector.ndim != 1:
        raise ValueError(f"got a vector of shape {tuple(vector.shape)}, expected (d,): weights hold one for all rows")
    with steer(model, layer=layer, vector=vector):
        pass  # it refuses a wrong layer, width or number before a copy is made
    _check_plain(model)
    if layer == 0 and model.config.get_text_config() is not model.config:
        raise ValueError("images do not pass the embedding, so no weight adds a vector at layer 0; use steer()")
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    copied: Any = copy.deepcopy(model)
    copied.to(torch.promote_types(model.dtype, torch.float32))  # because rounding would hide a misfit
    with eager_attention(copied):
        clean, _ = _run(copied, layer)
        with steer(copied, layer=layer, vector=vector):
            expected = _run(copied, layer)
    for candidate in (copied, _as_llama(copied)):
        if candidate is None:
            continue
        with eager_attention(candidate):
            if not _write(candidate, layer, vector.to(clean), clean):
                continue
            _check_equal(_run(candidate, layer), expected, vector.to(clean))
        _check_plain(candidate)
        for name, tensor in _tensors(candidate):
            tensor.data = tensor.data.to(dtypes.get(name, model.dtype))
        return candidate
    raise ValueError(
        f"no bias of {type(model).__name__} adds a vector to the input of block {layer}, and no option of its config "
        f"makes one; use steer(), or write_control_vector for llama.cpp"
    )


def _check_plain(model: PreTrainedModel) -> None:
    """Refuse a model that differs from what its config describes, because a saved copy would not load as it is."""
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the weights are quantised and take no vector exactly; load the model in full precision")
    if any(has_offloaded_params(module) for module in model.modules()):
        raise ValueError("weights are offloaded, which no edit reaches; load the model whole, with device='cpu'")
    if extra := model.state_dict().keys() ^ _weights(type(model), model.config).keys():
        raise ValueError(
            f"{type(model).__name__} holds other weights than its config describes, as {min(extra)}; merge an adapter "
            f"first (merge_and_unload), and compile blocks afterwards"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of `model` and its floating buffers."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())


def _as_llama(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a Llama model with the weights of `model` if that computes the same, else None."""
    config: Any = model.config
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if type(model).__name__ not in _LLAMAS or windows or getattr(config, "sliding_window", None):
        return None
    shared = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "attention_bias"}
    settings = {name: value for name, value in config.to_dict().items() if name in shared}
    with_bias = any(name.endswith("q_proj.bias") for name in model.state_dict())
    llama: Any = LlamaForCausalLM(LlamaConfig(**settings, attention_bias=with_bias))
    llama.to(model.device, model.dtype)
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith("o_proj.bias") for name in missing):
        return None
    for name in missing:
        nn.init.zeros_(llama.get_parameter(name))
    for name, buffer in model.named_buffers():  # of the rotary embedding, which a cast of the model rounds
        llama.get_buffer(name).copy_(buffer)
    llama.generation_config = copy.deepcopy(model.generation_config)
    return llama.train(model.training).requires_grad_(False)


def _run(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """Return h_layer and the logits of a few tokens."""
    trace = trace_model(model)
    return trace.residuals[layer], trace.logits


@torch.no_grad()
def _write(model: Any, layer: int, vector: Tensor, clean: Tensor) -> bool:
    """Put `vector` into the last weight that adds it to h_layer and to nothing before it. Return whether one exists."""
    probe = torch.randn(vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(clean)
    probe *= clean.norm(dim=-1).mean() / probe.norm()
    options = _bias_options(model)
    for name, module in reversed(_writers(model, layer, width=len(vector))):
        making = [option for option in options if f"{name}.bias" in option.biases]
        if _constant(module) is None and not making:
            continue
        with _added(module, probe):
            moved, _ = _run(model, layer)
        scale = _multiple(moved - clean, probe, clean)
        if scale is None:
            continue
        if _constant(module) is None:
            min(making, key=lambda option: len(option.biases)).enable(model)
        head = model.get_output_embeddings()
        if head is not None and head.weight is _constant(module):
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        _constant(module).add_(vector.to(torch.float64).div(scale).to(clean))
        return True
    return False


@dataclass(frozen=True)
class _BiasOption:
    """An option of a config that gives a model more biases.

    Attributes
    ----------
    name : str
        Its name, such as ``mlp_bias``.
    value : bool
        The value with which the biases exist.
    biases : dict
        Name of each new bias → a tensor of its shape.
    """

    name: str
    value: bool
    biases: dict[str, Tensor]

    def enable(self, model: PreTrainedModel) -> None:
        """Give `model` the biases, all zero, and its config the option."""
        setattr(model.config.get_text_config(), self.name, self.value)
        for name, shaped in self.biases.items():
            module: Any = model.get_submodule(name.rpartition(".")[0])
            module.bias = nn.Parameter(torch.zeros_like(shaped, device=module.weight.device, dtype=module.weight.dtype))
            module.bias.requires_grad_(False)


def _bias_options(model: PreTrainedModel) -> list[_BiasOption]:
    """Return each option of the model's config that adds biases and changes no other weight."""
    found = []
    present = _weights(type(model), model.config)
    for name, value in vars(model.config.get_text_config()).items():
        if "bias" not in name or not isinstance(value, bool):
            continue
        changed = copy.deepcopy(model.config)
        setattr(changed.get_text_config(), name, not value)
        weights = _weights(type(model), changed)
        biases = {key: tensor for key, tensor in weights.items() if key not in present}
        if biases and present.keys() <= weights.keys() and all(key.endswith(".bias") for key in biases):
            found.append(_BiasOption(name, not value, biases))
    return found


def _weights(kind: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, Tensor]:
    """Return the names and shapes of the weights that a model of this config has."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config)).state_dict()


def _writers(model: PreTrainedModel, layer: int, *, width: int) -> list[tuple[str, Any]]:
    """Return the modules before block `layer` that can hold a constant of this width, in the order of their calls."""
    inside = {module for block in get_blocks(model) for module in block.modules()}
    scope = set(get_blocks(model)[layer - 1].modules()) if layer else {*model.modules()} - inside
    called: list[nn.Module] = []

    def note(module: nn.Module, _args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1] == width:
            called.append(module)

    with ExitStack() as hooks:
        for module in scope:
            if isinstance(module, nn.Embedding) or "bias" in module._parameters:
                hooks.enter_context(module.register_forward_hook(note))
        _run(model, layer)
    names = {module: name for name, module in model.named_modules()}
    return [(names[module], module) for module in called if called.count(module) == 1]


def _constant(module: Any) -> Any:
    """Return the weight that `module` adds at every position: a bias, or an embedding's rows."""
    return module.weight if isinstance(module, nn.Embedding) else module.bias


@contextmanager
def _added(module: nn.Module, vector: Tensor) -> Iterator[None]:
    """Add `vector` to the weight of :func:`_constant`, or to the output where there is none, inside the context."""
    weight = _constant(module)
    if weight is None:

        def add(_module: nn.Module, _args: tuple, output: Any) -> Tensor:
            return output + vector

        with module.register_forward_hook(add):
            yield
    else:
        kept = weight.clone()
        weight.add_(vector)
        yield
        weight.copy_(kept)


def _multiple(change: Tensor, vector: Tensor, hidden: Tensor) -> float | None:
    """Return c where `change` is c times `vector` at every position up to rounding, else None."""
    wide = vector.double()
    scale = ((change.double() @ wide).mean() / (wide @ wide)).item()
    if abs(scale - 1) < 64 * torch.finfo(hidden.dtype).eps:
        scale = 1.0
    return scale if scale and _is_rounding(change - scale * vector, hidden, vector) else None


def _is_rounding(error: Tensor, hidden: Tensor, vector: Tensor) -> bool:
    """Return whether `error` is no more than the rounding of a few additions to `hidden`, at every position."""
    size = hidden.norm(dim=-1) + vector.norm()
    return bool((error.norm(dim=-1) <= 64 * torch.finfo(error.dtype).eps * size).all())


def _check_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], vector: Tensor) -> None:
    """Raise ValueError unless residuals and logits agree up to rounding."""
    error = (found[1] - expected[1]).abs().max() / expected[1].abs().max()
    if error > 1e-5 or not _is_rounding(found[0] - expected[0], expected[0], vector):
        raise ValueError(
            f"the copy's logits differ by {error:.1e} of the largest from those under steer(), so a weight of this "
            f"family does more than add; use steer()"
        )
