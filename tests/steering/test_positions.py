"""Which tokens are steered, and with which row's vector; the reference runs the whole sequence again for each token."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import family_model
from tiny import tiny_model, tiny_tokenizer, unit_rows

from dctlib import steer
from dctlib.models.blocks import get_blocks, split_residual

D, LAYER, NEW = 32, 1, 4
PROMPTS = torch.tensor([[6, 7, 8, 9, 10], [20, 31, 12, 43, 14]])
VECTORS = 8 * unit_rows(2, D)
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def reference_logits(model, tokens, vector, steered):
    """The logits of one row, (tokens, v), with `vector` added where `steered`, (tokens,), is true."""

    def add(_block, args, kwargs):
        hidden, args, kwargs = split_residual(args, kwargs)
        return (hidden + steered[:, None] * vector, *args), kwargs

    with get_blocks(model)[LAYER].register_forward_pre_hook(add, with_kwargs=True):
        return model(tokens[None], use_cache=False).logits[0]


def reference(model, prompt, vector, positions):
    """NEW greedy tokens behind one prompt."""
    tokens = prompt
    for _ in range(NEW):
        generated = torch.arange(len(tokens)) >= len(prompt)
        if isinstance(positions, str):
            steered = {"all": generated | ~generated, "prompt": ~generated, "generated": generated}[positions]
        else:
            steered = torch.nn.functional.pad(positions, (0, len(tokens) - len(prompt)))
        logits = reference_logits(model, tokens, vector, steered)[-1].clone()
        logits[2] = -torch.inf  # the end token
        tokens = torch.cat([tokens, logits.argmax()[None]])
    return tokens[len(prompt) :]


def references(model, vectors, positions, prompts=None):
    prompts = PROMPTS if prompts is None else prompts
    rows = vectors.expand(2, -1)
    return torch.stack([reference(model, p, v, positions) for p, v in zip(prompts, rows, strict=True)])


MASK = torch.tensor([False, True, True, False, True])
POSITIONS = ["all", "prompt", "generated", MASK]
NAMES = ["all", "prompt", "generated", "mask"]
each_position = pytest.mark.parametrize("positions", POSITIONS, ids=NAMES)
WAYS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 2},
    "two answers": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def sliding():
    return tiny_model("Mistral")


def test_the_references_differ(model):
    texts = {tuple(reference(model, PROMPTS[0], VECTORS[0], p).tolist()) for p in [*POSITIONS, 0 * MASK == 1]}
    assert len(texts) == 5


@each_position
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vectors", [VECTORS, VECTORS[0]], ids=["a vector a row", "one vector"])
def test_generate_steers_the_tokens_meant(model, positions, way, vectors):
    for prompts in (PROMPTS, PROMPTS.flip(0)):
        expected = references(model, vectors, positions, prompts).repeat_interleave(2 if way == "two answers" else 1, 0)
        with steer(model, layer=LAYER, vector=vectors, positions=positions):
            model.generate(prompts.flip(0), **GREEDY | WAYS[way])  # the next one begins anew
            assert torch.equal(model.generate(prompts, **GREEDY | WAYS[way])[:, 5:], expected)


@each_position
@pytest.mark.parametrize("family", ["Mistral", "Gemma3", "GPT2", "GPTNeoX"])
def test_other_caches_and_families(family, positions):
    model = tiny_model(family)
    expected = references(model, VECTORS, positions)
    with steer(model, layer=LAYER, vector=VECTORS, positions=positions):
        for way in ("cache", "chunked prefill", "no cache"):
            assert torch.equal(model.generate(PROMPTS, **GREEDY | WAYS[way])[:, 5:], expected)


@each_position
@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "jamba", "recurrent_gemma"])
def test_recurrent_states(family, positions):
    changes: dict[str, Any] = {"attn_layer_period": 2, "attn_layer_offset": 1} if family == "jamba" else {}
    model = family_model(family, **changes)
    with steer(model, layer=LAYER, vector=VECTORS, positions=positions):
        found = model.generate(PROMPTS, **GREEDY)[:, 5:]
    assert torch.equal(found, references(model, VECTORS, positions))


@each_position
@pytest.mark.parametrize("way", ["a draft model", "prompt lookup", "early exit", "the model itself"])
def test_assisted_decoding(model, sliding, positions, way):
    target = sliding if way == "prompt lookup" else model
    options = {
        "a draft model": {"assistant_model": tiny_model("Llama")},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "early exit": {"assistant_early_exit": 2},
        "the model itself": {"assistant_model": model},
    }[way]
    prompt = torch.tensor([6, 7, 8, 6, 7])
    with steer(target, layer=LAYER, vector=VECTORS[0], positions=positions):
        found = target.generate(prompt[None], **GREEDY, **options)[0, 5:]
    assert torch.equal(found, reference(target, prompt, VECTORS[0], positions))


@each_position
def test_beams_are_those_of_one_row_at_a_time(model, positions):
    options = GREEDY | {
        "num_beams": 3,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with steer(model, layer=LAYER, vector=VECTORS, positions=positions):
        together = model.generate(PROMPTS, **options)
    for row in range(2):
        with steer(model, layer=LAYER, vector=VECTORS[row], positions=positions):
            alone = model.generate(PROMPTS[row : row + 1], **options)
        assert torch.equal(alone.sequences, together.sequences[2 * row : 2 * row + 2])
        torch.testing.assert_close(alone.sequences_scores, together.sequences_scores[2 * row : 2 * row + 2])
        best = alone.sequences[0]
        if isinstance(positions, str):
            index = torch.arange(len(best) - 1)
            steered = {"all": index >= 0, "prompt": index < 5, "generated": index >= 5}[positions]
        else:
            steered = torch.nn.functional.pad(positions, (0, len(best) - 6))
        logits = reference_logits(model, best[:-1], VECTORS[row], steered)[4:].float().log_softmax(-1)
        logits[:, 2] = -torch.inf
        total = logits.gather(1, best[5:, None]).sum() / NEW
        torch.testing.assert_close(alone.sequences_scores[0], total, rtol=1e-4, atol=1e-4)


def test_a_mask_a_row_with_padding_on_the_left(model):
    short = PROMPTS[1, 2:]
    tokens = torch.stack([PROMPTS[0], torch.nn.functional.pad(short, (2, 0))])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    masks = torch.tensor([[True, False, False, True, True], [True, True, False, True, False]])
    one = reference(model, PROMPTS[0], VECTORS[0], masks[0])
    other = reference(model, short, VECTORS[1], masks[1, 2:])
    for way in WAYS.values():
        with steer(model, layer=LAYER, vector=VECTORS, positions=masks.tolist()):
            found = model.generate(tokens, attention_mask=attention, **GREEDY | way)[:, 5:]
        assert torch.equal(found[0], one)
        assert torch.equal(found[-1], other)


@each_position
def test_embeddings_as_a_prompt(model, positions):
    embeddings = model.get_input_embeddings()(PROMPTS)
    with steer(model, layer=LAYER, vector=VECTORS, positions=positions):
        found = model.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(found, references(model, VECTORS, positions))


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_a_prompt_begun_in_a_cache(model, positions):
    """What lies in the cache was steered when it was made, or not."""
    clean = model(PROMPTS[:, :3])
    with steer(model, layer=LAYER, vector=VECTORS, positions=positions):
        found = model.generate(PROMPTS, past_key_values=clean.past_key_values, **GREEDY)[:, 5:]
    behind = torch.tensor([False] * 3 + [True] * 2)
    for row in range(2):
        expected = reference(model, PROMPTS[row], VECTORS[row], behind if positions == "prompt" else positions)
        assert torch.equal(found[row], expected)


@each_position
def test_passes_outside_generate(model, positions):
    with steer(model, layer=LAYER, vector=VECTORS, positions=positions):
        first = model(PROMPTS)
        second = model(first.logits[:, -1:].argmax(-1), past_key_values=first.past_key_values)
        inner = model.model(PROMPTS).last_hidden_state
    steered = {"all": torch.ones(6) == 1, "prompt": torch.arange(6) < 5, "generated": torch.arange(6) == 5}
    chosen = steered[positions] if isinstance(positions, str) else torch.nn.functional.pad(positions, (0, 1))
    for row in range(2):
        tokens = torch.cat([PROMPTS[row], first.logits[row, -1:].argmax(-1)])
        expected = reference_logits(model, tokens, VECTORS[row], chosen)
        torch.testing.assert_close(first.logits[row], expected[:5], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second.logits[row, 0], expected[5], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.lm_head(inner)[row], expected[:5], rtol=1e-5, atol=1e-5)


def test_a_model_without_a_head(model):
    from transformers import LlamaModel

    bare = LlamaModel(model.config).double().eval()
    bare.load_state_dict(model.model.state_dict())
    expected = [reference_logits(model, PROMPTS[row], VECTORS[row], MASK) for row in range(2)]
    with steer(bare, layer=LAYER, vector=VECTORS, positions=MASK):
        found = model.lm_head(bare(PROMPTS).last_hidden_state)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def refused(message):
    return pytest.raises(ValueError, match=message)


def test_what_cannot_be_told_is_refused(model):
    with steer(model, layer=LAYER, vector=VECTORS[0], positions="prompt"):
        past = model(PROMPTS).past_key_values
        with refused("3 tokens behind a past"):
            model(PROMPTS[:, :3], past_key_values=past)
        with refused("did not prepare"):
            model.generate(PROMPTS, guidance_scale=2.0, **GREEDY)
        with refused("5 tokens behind a past"):  # continuous batching packs requests behind a cache of its own
            model(PROMPTS, cache=SimpleNamespace(update=None))
        with refused("token_healing rewrites"):
            model.generate(PROMPTS, token_healing=True, tokenizer=tiny_tokenizer(), **GREEDY)
        with refused("kept its prompts to itself"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "_expand_inputs_for_generation", lambda **given: (given["input_ids"], {}))
            model.generate(PROMPTS, custom_generate=lambda model, input_ids, **_: input_ids)
        with refused("outside its model"):
            get_blocks(model)[LAYER](torch.zeros(1, 2, D, dtype=torch.float64))
        model(PROMPTS)  # and nothing is left of it
    with (
        steer(model, layer=LAYER, vector=VECTORS[0], positions=MASK),
        refused("a mask of 5 positions for a prompt of 4"),
    ):
        model.generate(PROMPTS[:, :4], **GREEDY)
    with (
        steer(model, layer=LAYER, vector=VECTORS[0], positions=MASK),
        refused("a mask of 5 positions for a prompt of 4"),
    ):
        model(PROMPTS[:, :4])
    with (
        steer(model, layer=LAYER, vector=VECTORS[0], positions=MASK.expand(3, -1)),
        refused("3 masks for a batch of 2"),
    ):
        model(PROMPTS)
    assert "generate" not in vars(model)


def test_guidance_steers_every_pass_at_all_positions(model):
    with steer(model, layer=LAYER, vector=VECTORS):
        together = model.generate(PROMPTS, guidance_scale=2.0, **GREEDY)
    for row in range(2):
        with steer(model, layer=LAYER, vector=VECTORS[row]):
            assert torch.equal(model.generate(PROMPTS[row : row + 1], guidance_scale=2.0, **GREEDY)[0], together[row])


@pytest.mark.parametrize("count", [3, 4, 6])
def test_only_rows_that_generate_repeats_are_repeated(model, count):
    """A batch that is a multiple of the rows by chance, or rows that fit the repeated batch by chance."""
    with steer(model, layer=LAYER, vector=unit_rows(count, D)):
        with refused(f"{count} vectors"):
            model.generate(PROMPTS, **GREEDY | {"num_beams": 2})
        with refused(f"{count} vectors"):
            model.generate(PROMPTS, **GREEDY | {"num_return_sequences": 3, "do_sample": True})
    with steer(model, layer=LAYER, vector=VECTORS):
        for rows in (3, 4):
            with refused(f"2 vectors for a batch of {rows}"):
                model(PROMPTS[:1].expand(rows, -1))
            with refused(f"2 vectors for a batch of {rows}"):
                model.generate(PROMPTS[:1].expand(rows, -1), **GREEDY)
        with refused("2 vectors for a batch of 1 rows, which generate repeated 2 times"):
            model.generate(PROMPTS[:1], **GREEDY | {"num_beams": 2})


@pytest.mark.parametrize(
    "positions", ["prompts", "", None, 3, MASK.int(), [0, 1], torch.ones(2, 2, 2) == 1, {"a": 1}], ids=str
)
def test_positions_are_words_or_a_mask(model, positions):
    context = steer(model, layer=LAYER, vector=VECTORS[0], positions=positions)
    with refused("expected 'all', 'prompt', 'generated' or a boolean mask"), context:
        pass


def test_contexts_with_positions_nest_and_leave_the_model_as_it_was(model):
    before = dict(vars(model))
    with (
        steer(model, layer=LAYER, vector=VECTORS[0], positions="prompt"),
        steer(model, layer=LAYER, vector=VECTORS[0], positions="generated"),
    ):
        found = model.generate(PROMPTS, **GREEDY)[:, 5:]
        with refused("boom"), steer(model, layer=LAYER, vector=VECTORS[0], positions=MASK):
            raise ValueError("boom")
    assert torch.equal(found[1], reference(model, PROMPTS[1], VECTORS[0], "all"))
    assert vars(model).keys() == before.keys()
    assert all(not part._forward_pre_hooks and not part._forward_hooks for part in model.modules())


def test_contexts_may_end_in_any_order(llama):
    rows, tokens = unit_rows(2, 32), torch.tensor([[7, 8, 9]])
    before = set(vars(llama))
    expected = llama.generate(tokens, max_new_tokens=3, do_sample=False)
    first, second = (steer(llama, layer=layer, vector=rows) for layer in (1, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert set(vars(llama)) == before
    assert torch.equal(llama.generate(tokens, max_new_tokens=3, do_sample=False), expected)


def test_several_streams_take_one_vector_at_all_positions():
    model = family_model("gemma3n_text")
    seen = []
    handle = get_blocks(model)[LAYER].register_forward_pre_hook(
        lambda _b, args, kwargs: seen.append(split_residual(args, kwargs)[0]), with_kwargs=True
    )
    model(PROMPTS, use_cache=False)
    handle.remove()
    with steer(model, layer=LAYER, vector=VECTORS[0]):
        handle = get_blocks(model)[LAYER].register_forward_pre_hook(
            lambda _b, args, kwargs: seen.append(split_residual(args, kwargs)[0]), with_kwargs=True
        )
        model(PROMPTS, use_cache=False)
        handle.remove()
    assert seen[0].shape == (4, 2, 5, D)
    torch.testing.assert_close(seen[1], seen[0] + VECTORS[0])
    for options in ({"vector": VECTORS}, {"vector": VECTORS[0], "positions": "prompt"}):
        with (
            steer(model, layer=LAYER, **options),
            refused(r"has shape \(4, 2, 5, 32\), expected \(batch, tokens, 32\)"),
        ):
            model(PROMPTS, use_cache=False)
