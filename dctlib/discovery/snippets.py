"""What a reader copies to use one vector of a discovery: Python that steers with it, and the command to export it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PYTHON = """from dctlib import format_chat, generate_completions, load_model, steer
from dctlib.exchange.hub import load_folder

model, tokenizer = load_model({model})
shared = load_folder({folder})
requests = format_chat(tokenizer, ["Write your request here."]{chat})
with steer(model, layer={layer}, vector=shared.vectors[{number}]):  # at its own length, {length:.3g}
    print(generate_completions(model, tokenizer, requests, max_new_tokens=64)[0])"""


@dataclass(frozen=True)
class SharedPlace:
    """Where the vectors of a discovery lie, and what they need to be used.

    Attributes
    ----------
    folder : str
        What :func:`dctlib.exchange.hub.save_folder` wrote.
    model : str
        What :func:`dctlib.load_model` takes.
    layer : int
        Where the vectors are added.
    chat : mapping
        Options of :func:`dctlib.format_chat`.
    """

    folder: str
    model: str
    layer: int
    chat: Mapping[str, Any] = field(default_factory=dict)

    def python(self, number: int, length: float) -> str:
        """Return a program that steers with the vector at place `number` of the folder, whose length is `length`."""
        chat = f", **{dict(self.chat)!r}" if self.chat else ""
        model, folder = (json.dumps(text, ensure_ascii=False) for text in (self.model, self.folder))
        values = {"model": model, "folder": folder, "layer": self.layer, "chat": chat}
        return _PYTHON.format(**values, number=number, length=length)

    def export(self, number: int) -> str:
        """Return the command that writes this vector as a control vector for llama.cpp."""
        return f"python -m dctlib export {shlex.quote(self.folder)} {number} --to gguf --output vector-{number}.gguf"
