import time
import tracemalloc
from typing import Any

import pytest
import torch
from families import family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, assert_near, full_model_map, tiny_model, unit_rows
from torch import nn

from dctlib import CausalMap, score_vectors
from dctlib.models.packing import PromptTree, pack_prompts, supports_packing

D = 32
SHARING = ["w0 w1 w2 w3 w4 w5 w6", "w0 w1 w2 w9", "w0 w1 w2 w3 w7 w8 w6 w5 w4", "w0 w1 w2 w9"]
prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


def rows(*prompts):
    return [torch.tensor([prompt]) for prompt in prompts]


@given(prompts)
def test_a_path_spells_its_prompt_and_sees_it_alone(prompts):
    tree = PromptTree.from_prompts(prompts)
    assert tree.tokens.shape[1] == len({tuple(p[: end + 1]) for p in prompts for end in range(len(p))})
    for prompt, path in zip(prompts, tree.paths, strict=True):
        assert tree.tokens[0, path].tolist() == prompt
        assert tree.position_ids[0, path].tolist() == list(range(len(prompt)))
        for end, token in enumerate(path):
            assert tree.attention_mask[token].nonzero().flatten().tolist() == sorted(path[: end + 1].tolist())


LLAMA = tiny_model("Llama", attention="eager")


@settings(max_examples=30)
@given(prompts)
def test_trees_give_every_prompt_in_order_what_it_gives_alone(prompts):
    trees = pack_prompts(LLAMA, rows(*prompts))
    assert [tree.tokens[0, path].tolist() for tree in trees for path in tree.paths] == prompts
    together = [(LLAMA(**tree.arguments(LLAMA)).logits[0], tree.paths) for tree in trees]
    found = [logits[path] for logits, paths in together for path in paths]
    for logits, row in zip(found, rows(*prompts), strict=True):
        torch.testing.assert_close(logits, LLAMA(row).logits[0], rtol=1e-5, atol=1e-5)


def test_prompts_that_share_little_stay_alone():
    count = len(pack_prompts(tiny_model("Llama"), rows([1, 2, 3, 4], [1, 5, 6, 7], [1, 8, 9, 10, 11], [2, 3, 4, 5])))
    assert count == 3  # a quarter, a fifth, nothing


def test_trees_are_bounded():
    long = [[0] * 100 + [k] * 60 for k in range(1, 5)]
    assert [tree.tokens.shape[1] for tree in pack_prompts(tiny_model("Llama"), rows(*long))] == [220, 220]
    assert [tree.tokens.shape[1] for tree in pack_prompts(tiny_model("Llama"), rows(*long), most_tokens=300)] == [
        280,
        160,
    ]


@pytest.mark.parametrize(
    "setting",
    [
        {"sliding_window": 5},
        {"attention_chunk_size": 5},
        {"window_size": 5},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 5}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 5},
    ],
)
def test_a_tree_stays_within_every_reach_of_attention(setting):
    model = tiny_model("Llama")
    sharing = rows([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6])
    assert len(pack_prompts(model, sharing)) == 1
    for name, value in setting.items():
        setattr(model.config, name, value)
    assert [tree.tokens.shape[1] for tree in pack_prompts(model, sharing)] == [5, 4]


class Leaky(nn.Module):
    """An attention whose every token also sees the token before it in memory, whatever its prompt."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, **kwargs):
        output, weights = self.attention(hidden_states=hidden_states, **kwargs)
        return output + 0.05 * hidden_states.roll(1, dims=1), weights


class Blind(nn.Module):
    """An attention that takes the token's place in memory for its position."""

    def __init__(self, attention: Any, rotary: Any):
        super().__init__()
        self.attention, self.rotary = attention, rotary

    def forward(self, hidden_states, position_embeddings, **kwargs):
        places = torch.arange(hidden_states.shape[1])[None]
        return self.attention(hidden_states, position_embeddings=self.rotary(hidden_states, places), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_packing_is_verified_on_the_model_itself(dtype):
    model = tiny_model("Llama", dtype=dtype)
    assert supports_packing(model)
    model = tiny_model("Llama", dtype=dtype)
    model.model.layers[1].self_attn = Leaky(model.model.layers[1].self_attn)
    assert not supports_packing(model)
    model = tiny_model("Llama", dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn = Blind(layer.self_attn, model.model.rotary_emb)
    assert not supports_packing(model)
    assert len(pack_prompts(model, rows([1, 2, 3, 4], [1, 2, 3, 5]))) == 2


@pytest.mark.parametrize("family", ["bloom", "mpt", "lfm2_moe", "zamba2", "jamba", "rwkv", "mamba"])
def test_prompts_stay_alone_where_a_mask_does_not_part_them(family):
    assert not supports_packing(family_model(family, dtype=torch.float32))


@pytest.mark.parametrize("family", ["mixtral", "opt", "falcon", "glm4", "phi"])
def test_other_families_share_beginnings_too(family):
    assert supports_packing(family_model(family, dtype=torch.float32))


def test_the_verdict_is_found_once_():
    model = tiny_model("Llama")
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    sharing = rows([1, 2, 3, 4], [1, 2, 3, 5])
    pack_prompts(model, rows([1, 2, 3, 4], [5, 6, 7]))
    assert not calls  # nothing to share
    pack_prompts(model, sharing)
    assert len(calls) == 3
    assert supports_packing(nn.DataParallel(model))  # pyright: ignore[reportArgumentType]
    assert len(calls) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_long_prompts_cost_linear_time_and_memory(count):
    model = tiny_model("Llama")
    prompts = [torch.randint(64, (1, 16_000), generator=torch.Generator().manual_seed(7))] * count
    tracemalloc.start()
    start = time.perf_counter()
    trees = pack_prompts(model, prompts)
    assert [tree.arguments(model)["input_ids"].shape for tree in trees] == [(1, 16_000)] * count
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.fixture(params=FAMILIES)
def wide_model(request):
    """A model of each family whose window, if it has one, is longer than the prompts."""
    model = tiny_model(request.param)
    for module in [model.config, *(module for module in model.modules() if hasattr(module, "sliding_window"))]:
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 32
    return model


@pytest.mark.parametrize(("source", "target"), [(0, 2), (1, 4)])
def test_a_tree_equals_the_full_model_prompt_by_prompt(wide_model, tokenizer, source, target):
    cmap = CausalMap.from_model(wide_model, tokenizer, SHARING, source=source, target=target)
    assert cmap.tokens == [7, 4, 9, 4]
    assert len(cmap._captures) == 1
    assert cmap._captures[0].hidden.shape[1] == 13
    delta = full_model_map(wide_model, tokenizer, SHARING, source, target, 3)
    theta, u, v = 3 * unit_rows(2, D), unit_rows(2, D, seed=1), unit_rows(2, D, seed=2)
    assert_near(cmap(theta), torch.stack([delta(row) for row in theta]), 1e-6)
    alone = [CausalMap.from_model(wide_model, tokenizer, [t], source=source, target=target) for t in SHARING]
    for product in (
        lambda cmap: cmap.jvp(theta, v),
        lambda cmap: cmap.vjp(theta, u),
        lambda cmap: cmap.second_derivative(v, unit_rows(2, D, seed=3)),
        lambda cmap: cmap.second_derivative_vjp(u, v),
    ):
        assert_near(product(cmap), torch.stack([product(one) for one in alone]).mean(0), 1e-5)


def test_scores_of_a_tree_equal_those_of_its_prompts(wide_model, tokenizer):
    vectors = 2 * unit_rows(5, D)
    together = score_vectors(wide_model, tokenizer, SHARING, vectors, layer=1, progress=False)
    alone = [score_vectors(wide_model, tokenizer, [text], vectors, layer=1, progress=False) for text in SHARING]
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)


def test_the_digest_counts_repeated_prompts(tokenizer):
    def digest(texts):
        return CausalMap.from_model(tiny_model("Llama"), tokenizer, texts, source=1, target=3).digest

    assert len({digest(SHARING), digest(SHARING[:3]), digest([*SHARING[:3], SHARING[2]])}) == 3
