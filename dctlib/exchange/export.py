"""One vector of a shared folder as the file of another tool: what ``python -m dctlib export`` writes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dctlib._io import atomic_path
from dctlib.exchange.gguf import write_control_vector
from dctlib.exchange.hub import SharedVectors, load_folder, write_shared
from dctlib.exchange.packages import to_repeng
from dctlib.exchange.steered_model import steered_copy
from dctlib.models.assets import MODELS
from dctlib.models.loading import load_model


def export_vector(folder: str | Path, number: int, to: str, output: str | Path, *, model: str | None = None) -> str:
    """Write one vector of a shared folder for another tool, and return one line that says how to use it.

    Parameters
    ----------
    folder : path
        What :func:`dctlib.exchange.hub.save_folder` wrote.
    number : int
        The vector's place there, from 0 on.
    to : str
        ``gguf``: a control vector for llama.cpp. ``repeng``: the same kind of file, as repeng reads and writes it.
        ``npz``: NumPy arrays ``vector`` and ``layer``. ``folder``: a shared folder of this vector alone. ``model``: a
        folder of a model that is steered by its weights.
    output : path
        The file or folder to write, which must not exist.
    model : str, optional
        What :func:`dctlib.load_model` takes. Left out, the model that the folder names.

    Raises
    ------
    ValueError
        If the folder is no shared folder, has no such vector, `output` exists, the format cannot hold the vector, or
        the model was a local folder and `model` is left out.
    """
    folder, output = Path(folder), Path(output)
    shared = load_folder(folder)
    if not len(shared.vectors):
        raise ValueError(f"{folder} holds no vector: the search found nothing")
    if not 0 <= number < len(shared.vectors):
        raise ValueError(f"got vector {number}, expected 0 to {len(shared.vectors) - 1}, the vectors in {folder}")
    if to not in _WRITERS:
        raise ValueError(f"got the format {to!r}, expected one of {', '.join(_WRITERS)}")
    if output.exists():
        raise ValueError(f"{output} exists; choose another name, or remove it")
    reference = shared.facts.reference
    if to == "model" and model is None and "/" not in reference and reference not in MODELS:
        raise ValueError(f"the vectors are of a folder {reference!r}, whose place is not known; pass model= (--model)")
    return _WRITERS[to](shared, number, output, model or reference)


def _gguf(shared: SharedVectors, number: int, output: Path, _model: str) -> str:
    write_control_vector(output, _by_layer(shared, number), architecture=shared.facts.architecture)
    return f"llama-cli --model MODEL.gguf --control-vector {output}"


def _repeng(shared: SharedVectors, number: int, output: Path, _model: str) -> str:
    control_vector = to_repeng(_by_layer(shared, number), architecture=shared.facts.architecture)
    with atomic_path(output) as partial:
        control_vector.export_gguf(partial)
    return f"repeng.ControlVector.import_gguf({str(output)!r})"


def _npz(shared: SharedVectors, number: int, output: Path, _model: str) -> str:
    with atomic_path(output) as partial, partial.open("wb") as file:
        np.savez(file, vector=shared.vectors[number].float().numpy(), layer=shared.facts.layer)
    return f"np.load({str(output)!r})['vector'], to add to hidden_states[{shared.facts.layer}]"


def _folder(shared: SharedVectors, number: int, output: Path, _model: str) -> str:
    facts = shared.facts.model_copy(update={"vectors": [shared.facts.vectors[number]]})
    write_shared(output, SharedVectors(shared.vectors[[number]], facts))
    return f"dctlib.exchange.hub.load_folder({str(output)!r}).vectors[0]"


def _steered(shared: SharedVectors, number: int, output: Path, model: str) -> str:
    loaded, tokenizer = load_model(model)
    copied = steered_copy(loaded, layer=shared.facts.layer, vector=shared.vectors[number])
    with atomic_path(output) as partial:
        copied.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return f"AutoModelForCausalLM.from_pretrained({str(output)!r})"


_WRITERS: dict[str, Callable[[SharedVectors, int, Path, str], str]] = {
    "gguf": _gguf,
    "repeng": _repeng,
    "npz": _npz,
    "folder": _folder,
    "model": _steered,
}


def _by_layer(shared: SharedVectors, number: int) -> dict[int, Float[Tensor, " d"]]:
    return {shared.facts.layer: shared.vectors[number]}
