import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, assert_near, full_model_map, tiny_model, unit_rows

from dctlib import CausalMap, score_vectors
from dctlib.models.packing import PromptTree, pack_prompts

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


@given(prompts)
def test_planting_keeps_every_prompt_in_order(prompts):
    trees = pack_prompts(tiny_model("Llama"), rows(*prompts))
    assert [tree.tokens[0, path].tolist() for tree in trees for path in tree.paths] == prompts


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


def test_a_short_window_and_an_untried_family_keep_prompts_alone():
    sharing = rows([1, 2, 3, 4], [1, 2, 3, 5])
    assert len(pack_prompts(tiny_model("Mistral"), sharing)) == 1
    assert len(pack_prompts(tiny_model("Mistral"), rows([1, 2, 3, 4, 5], [1, 2, 3, 5, 6]))) == 2  # its window is 4
    untried = tiny_model("Llama")
    untried.config.model_type = "bloom"
    assert len(pack_prompts(untried, sharing)) == 2


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
