"""The decoders against `transformers` (torch): embeddings, layers, final norm, vectors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from safetensors import torch as safetensors

from tests import random_models
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints, hf_export
from vixml_jax.models.tower import Tower
from vixml_jax.runtime import tree_utils
from vixml_jax.structs import PackedItems


@pytest.fixture(scope="module", params=random_models.DECODERS)
def pair(request, tmp_path_factory):
    """Family, torch model, config and parameters loaded from its checkpoint, and the path."""
    path = tmp_path_factory.mktemp(request.param)
    model = random_models.text_model(request.param)
    model.save_pretrained(path)
    return request.param, model, *hf_checkpoints.load_hf_tower(str(path)), str(path)


def apply(config, params, packed, num_items):
    run = jax.jit(
        lambda params, packed: Tower(config).apply(
            {"params": params}, packed, num_items, deterministic=True
        )
    )
    return np.asarray(run(params, packed))


def states_of(model, tokens):
    """Embeddings and states after each layer of a text, and states after the final norm."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor(tokens)[None], output_hidden_states=True)
    return [x[0].numpy() for x in output.hidden_states], output.last_hidden_state[0].numpy()


def first_layers(config, params, num_layers):
    """Config and parameters of a tower that has only the first layers."""
    blocks = jax.tree.map(lambda x: x[:num_layers], params["encoder"]["blocks"])
    encoder = {**params["encoder"], "blocks": blocks}
    return dataclasses.replace(config, num_layers=num_layers), {**params, "encoder": encoder}


def test_every_layer_of_a_text_of_500_tokens(pair, pack):
    from vixml_jax.models.decoder import Decoder

    _, model, config, params, _ = pair
    tokens = np.random.default_rng(0).integers(1, 60, 500)
    expected, final = states_of(model, tokens)
    packed = pack([(tokens, [])], [[0]], width=512)
    x = jnp.asarray(params["word_embeddings"])[packed.tokens] * config.embedding_scale
    np.testing.assert_allclose(x[0, :500], expected[0], atol=1e-5)
    # With unit weights the final norm only divides by the root mean square of the torch states.
    scale = np.zeros(32) if config.unit_offset else np.ones(32)
    for layer in range(1, config.num_layers):
        short, weights = first_layers(config, params, layer)
        weights["encoder"]["final_norm"] = {"scale": scale.astype(np.float32)}
        found = jax.jit(
            lambda w, x, short=short: Decoder(short).apply(
                {"params": w}, x, packed.positions, packed.segments, deterministic=True
            )
        )(weights["encoder"], x)[0, :500]
        rms = np.sqrt(np.mean(expected[layer] ** 2, axis=-1, keepdims=True) + config.norm_eps)
        normed = expected[layer] / rms
        np.testing.assert_allclose(found, normed, atol=1e-4, err_msg=f"layer {layer}")
    found = Decoder(config).apply(
        {"params": params["encoder"]}, x, packed.positions, packed.segments, deterministic=True
    )
    np.testing.assert_allclose(found[0, :500], final, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_vectors_of_texts_that_share_rows(pair, pack, draw_items, pooling):
    _, model, config, params, _ = pair
    config = dataclasses.replace(config, pooling=pooling)
    items = draw_items(np.random.default_rng(1), 6, vocab_size=60, longest=30)
    packed = pack(items, [[3, 0], [5, 1, 2], [4]], width=90)
    longest = max(len(tokens) for tokens, _ in items)
    padded = np.zeros((6, longest), np.int64)
    mask = np.zeros((6, longest), np.int64)
    for i, (tokens, _) in enumerate(items):
        padded[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask)
        ).last_hidden_state.numpy()
    expected = [
        states[i, : mask[i].sum()].mean(0) if pooling == "mean" else states[i, mask[i].sum() - 1]
        for i in range(6)
    ]
    np.testing.assert_allclose(apply(config, params, packed, 6), expected, atol=1e-4)


def test_scan_and_remat_do_not_change_gradients(pair, pack):
    _, _, config, params, _ = pair
    packed = pack([([3, 4, 5, 6, 7, 8, 9, 10, 11], []), ([7], [])], [[0, 1]], width=12)

    def gradients(**settings):
        changed = dataclasses.replace(config, **settings)
        return jax.jit(
            jax.grad(
                lambda p: jnp.sum(
                    jnp.sin(Tower(changed).apply({"params": p}, packed, 2, deterministic=True))
                )
            )
        )(params)

    expected = gradients(scan=True, remat=False)
    for settings in ({"scan": True, "remat": True}, {"scan": False, "remat": False}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5),
            expected,
            gradients(**settings),
        )


def test_first_position_attends_to_the_last_only_without_causal_mask(pair, pack):
    _, _, config, params, _ = pair
    packed_a, packed_b = (pack([([3, 4, last], [])], [[0]], width=4) for last in (5, 6))

    def first_state(config, packed):
        from vixml_jax.models.decoder import Decoder

        x = jnp.asarray(params["word_embeddings"])[packed.tokens]
        return Decoder(config).apply(
            {"params": params["encoder"]}, x, packed.positions, packed.segments, deterministic=True
        )[0, 0]

    np.testing.assert_array_equal(first_state(config, packed_a), first_state(config, packed_b))
    bidirectional = dataclasses.replace(config, causal=False)
    states = [first_state(bidirectional, packed) for packed in (packed_a, packed_b)]
    assert np.abs(states[0] - states[1]).max() > 1e-3


def test_parameters_have_the_structure_of_init(pair, pack):
    _, _, config, params, _ = pair
    packed = pack([([1], [])], [[0]], width=2)
    fresh = jax.eval_shape(
        lambda: nn.unbox(Tower(config).init(jax.random.key(0), packed, 1, deterministic=True))
    )["params"]
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)


def with_adapters(config, params, *, random):
    """The tower with an adapter on every map except "up", either fresh or random."""
    maps = ("query", "key", "value", "out", "gate", "down")
    config = dataclasses.replace(config, lora_rank=3, lora_alpha=6.0, lora_maps=maps)
    packed = PackedItems(*[np.zeros((1, 2), np.int32)] * 4, np.zeros((0, 1), np.float16))
    initial = nn.unbox(Tower(config).init(jax.random.key(1), packed, 1, deterministic=True))
    rng = np.random.default_rng(4)
    adapters, _ = tree_utils.partition(
        initial["params"], lambda path: path[-1] in ("lora_a", "lora_b")
    )
    if random:
        adapters = jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, adapters
        )
    assert {path[-2] for path in tree_utils.paths(adapters)} == set(maps)
    return config, tree_utils.merge(params, adapters)


def test_a_fresh_adapter_does_not_change_vectors(pair, pack):
    _, _, config, params, _ = pair
    packed = pack([([3, 4, 5, 6], []), ([7], [])], [[0, 1]], width=6)
    adapted = with_adapters(config, params, random=False)
    np.testing.assert_array_equal(apply(*adapted, packed, 2), apply(config, params, packed, 2))


def test_adapters_merged_in_transformers_and_separate_in_peft(pair, pack, tmp_path):
    _, _, config, params, path = pair
    config, params = with_adapters(config, params, random=True)
    tokens = np.random.default_rng(2).integers(1, 60, 40)
    expected = apply(config, params, pack([(tokens, [])], [[0]], width=40), 1)[0]
    hf_export.save_hf_tower(str(tmp_path / "merged"), params, config=config, like=path)
    hf_export.save_hf_adapters(str(tmp_path / "adapters"), params, config=config, base=path)
    merged = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = merged(input_ids=torch.tensor(tokens)[None]).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    import peft

    base = transformers.AutoModel.from_pretrained(path).eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        found = adapted(input_ids=torch.tensor(tokens)[None]).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_microbatches_do_not_change_vectors_or_gradients(pair, pack, draw_items):
    _, _, config, params, _ = pair
    config = dataclasses.replace(config, image_width=5, scan=True, remat=False)
    rng = np.random.default_rng(3)
    params = {**params, "image_projection": {"kernel": rng.normal(size=(5, 32)).astype(np.float32),
                                             "bias": np.ones(32, np.float32)}}  # fmt: skip
    items = draw_items(rng, 9, vocab_size=60, longest=8, num_images=2, image_width=5)
    packed = pack(items, [[0], [1, 2], [3], [4, 5], [6, 7], [8]], width=24, num_images=2,
                  image_width=5)  # fmt: skip
    weights = rng.normal(size=(9, 32)).astype(np.float32)

    def gradients(num_microbatches):
        def objective(params):
            found = Tower(config).apply(
                {"params": params},
                packed,
                9,
                deterministic=True,
                num_microbatches=num_microbatches,
            )
            return jnp.sum(found * weights), found

        return jax.jit(jax.grad(objective, has_aux=True))(params)

    (expected, expected_vectors), *others = map(gradients, (0, 3, 2, 1))
    for found, vectors in others:
        np.testing.assert_allclose(vectors, expected_vectors, atol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
        )


def test_transformers_loads_a_saved_tower(pair, tmp_path):
    _, model, config, params, path = pair
    hf_export.save_hf_tower(str(tmp_path), params, config=config, like=path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(loaded) is type(model)
    tokens = torch.randint(1, 60, (1, 40))
    with torch.no_grad():
        np.testing.assert_array_equal(
            loaded(input_ids=tokens).last_hidden_state, model(input_ids=tokens).last_hidden_state
        )


def test_bfloat16_parameters_are_rounded_float32_parameters(pair):
    _, _, _, params, path = pair
    _, half = hf_checkpoints.load_hf_tower(path, dtype="bfloat16")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(y.dtype), y), params, half)
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {"bfloat16"}


def test_a_language_model_head_is_ignored(tmp_path):
    model = random_models.text_model("qwen2")
    causal_lm = transformers.Qwen2ForCausalLM(model.config)
    causal_lm.model.load_state_dict(model.state_dict())
    causal_lm.save_pretrained(tmp_path / "causal_lm")
    model.save_pretrained(tmp_path / "plain")
    with_head, plain = (
        hf_checkpoints.load_hf_tower(str(tmp_path / name))[1] for name in ("causal_lm", "plain")
    )
    jax.tree.map(np.testing.assert_array_equal, with_head, plain)


def test_the_text_half_of_a_multimodal_gemma(tmp_path):
    import json

    model = random_models.text_model("gemma3_text")
    model.save_pretrained(tmp_path)
    _, plain = hf_checkpoints.load_hf_tower(str(tmp_path))
    text_config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text_config, "vision_config": {}})
    )
    state = {"language_model.model." + name: x for name, x in model.state_dict().items()}
    state["vision_tower.vision_model.head.weight"] = torch.zeros(3)
    state["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(3)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    _, found = hf_checkpoints.load_hf_tower(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, plain, found)


@pytest.mark.parametrize("family,changes,message", [
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, expected False"),
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ("qwen3", {"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ("qwen3", {"hidden_size": None}, "hidden_size is missing"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 4}, "layer_types is"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
])  # fmt: skip
def test_unsupported_features_are_refused(family, changes, message, tmp_path):
    import json

    random_models.text_model(family).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(InputError) as error:
        hf_checkpoints.load_hf_tower(str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)
