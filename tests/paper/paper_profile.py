"""The paper profile for tests: its models swapped for tiny random ones of the same architecture and kind of tokenizer,
its counts shrunk, everything else as params/paper.yaml says."""

import json
import shutil
from pathlib import Path

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dctlib._io import ROOT
from dctlib.evaluation.instructions import harmful_instructions
from dctlib.paper.datasets import question_split
from dctlib.paper.pipeline import run_notebook

# The paper's models: architecture, tokenizer kind, and whether they have a chat template.
PAPER_MODELS = {
    "Qwen/Qwen1.5-7B-Chat": ("Qwen2", "bytes", True),
    "Qwen/Qwen1.5-32B-Chat": ("Qwen2", "bytes", True),
    "GraySwanAI/Mistral-7B-Instruct-RR": ("Mistral", "sentencepiece", True),
    "mistralai/Mistral-7B-Instruct-v0.2": ("Mistral", "sentencepiece", True),
    "cais/HarmBench-Mistral-7b-val-cls": ("Mistral", "sentencepiece", False),
    "redwoodresearch/math_pwd_lock_deepseek_math7b_on_weak_pythia1b": ("Llama", "bytes", False),
    "deepseek-ai/deepseek-math-7b-instruct": ("Llama", "bytes", False),
}
NAMING_A_MODEL = ("model", "base", "deeper", "clean", "judge", "tokenizer_from")
SHRUNK = {
    "widths": [2, 4],
    "num_factors": 4,
    "iterations": 1,
    "fit_prompts": 2,
    "validation": 4,
    "test": 11,
    "answer_tokens": 3,
    "sizes": [1, 2],
    "pool": 8,
    "shuffles": 2,
    "d": 64,
    "planted": 4,
    "seeds": [0, 1],
    "behaviours": ["refusal", "sums"],
    "projected_iterations": [1, 2],
    "random_iterations": [1, 2],
    "multipliers": [1.0, 4.0],
    "judged": 4,
    "arms": {"exponential": {"1": 2, "2": 2}, "linear_projected": {"1": 2}, "linear": {"1": 2}, "quadratic": {"1": 2}},
    "random_vectors": 2,
    "shown": 2,
    "strengths": [1.0],
    "tries": 2,
    "melbo_vectors": 2,
    "melbo_steps": 2,
    "lora_steps": 1,
    "steps": 1,
    "benign_prompts": 4,
    "harmful_batch": 2,
    "benign_batch": 2,
    "ablated": 2,
    "triggered_batch": 2,
    "plain_batch": 2,
    "controls": [0],
    "least": 0.0,
    "held_out": 2,
    "trusted": 4,
    "probes": 8,
    "spoken_tokens": 3,
    "workers": 1,
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def tiny_tokenizer(kind: str, chat: bool) -> PreTrainedTokenizerFast:
    """A small BPE: over bytes as Qwen's and DeepSeek's, or over ▁-marked words as Mistral's."""
    whole_words = ["Sure Sorry [INST] [/INST] yes no", "Sure", "Sorry"] * 400
    corpus = [
        *harmful_instructions().train,
        *(row["question"] for row in question_split("math").train[:400]),
        *whole_words,
    ]
    core = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind != "bytes"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # pyright: ignore[reportAttributeAccessIssue]
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "<s>", "</s>", *(alphabet if kind != "bytes" else [])]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet if kind == "bytes" else []
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def tiny_model(architecture: str, vocabulary: int):
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=26,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def swapped(value, folder: Path, key: str = ""):
    """paper.yaml with counts shrunk and every model's name replaced by its stand-in's folder."""
    if isinstance(value, dict) and key not in SHRUNK:
        return {k: swapped(v, folder, k) for k, v in value.items()}
    if key == "models" and all(name.startswith("models/") for name in value):  # organisms, of the seeds above
        return [name for name in value if name.endswith("/1")]
    if key == "models":
        return [swapped(name, folder, "model") for name in value]
    if isinstance(value, str) and key in NAMING_A_MODEL and "/" in value:
        return str(folder / value.partition("@")[0].rsplit("/", 1)[1])
    shrunk = SHRUNK.get(key, value)
    return shrunk[:2] if isinstance(shrunk, list) else shrunk


def stages(pipeline: str) -> list[str]:
    """The stages of a dvc.yaml that are notebooks, in its order: later ones read what earlier ones left."""
    named = yaml.safe_load((ROOT / pipeline).read_text())["stages"]
    return [stem for stem in named if (ROOT / "notebooks" / f"{stem}.ipynb").is_file()]


def filled(root: Path) -> Path:
    """Fill a folder with all that the paper profile's notebooks read, and give it back."""
    for name, (architecture, kind, chat) in PAPER_MODELS.items():
        tokenizer = tiny_tokenizer(kind, chat)
        folder = root / "stand-ins" / name.rsplit("/", 1)[1]
        tiny_model(architecture, len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "writeup").mkdir()
    shutil.copy(ROOT / "writeup" / "published.yaml", root / "writeup")
    (root / "params").mkdir()
    paper = yaml.safe_load((ROOT / "params" / "paper.yaml").read_text())
    (root / "params" / "run.yaml").write_text("profile: paper\n")
    (root / "params" / "paper.yaml").write_text(yaml.safe_dump(swapped(paper, root / "stand-ins")))
    return root


def run_stage(root: Path, stem: str) -> None:
    """Run a notebook through papermill, and see that it left numbers and a page."""
    run_notebook(stem, "paper", root)
    results = json.loads((root / "figures" / "paper" / f"{stem}.json").read_text())
    assert results
    assert (root / "runs" / "paper" / f"{stem}.html").stat().st_size > 10_000
