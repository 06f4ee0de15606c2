"""Hostile model directories: each is read as the valid one, or refused in a line.

No file of them ends the process, takes long or takes much memory.
"""

import json
import os
import shutil
import time

import pytest

from tests.security import model_directories, mutations, worker
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.image_encoding import encoder
from vixml_jax.models import hf_checkpoints, hf_configs, hf_files, hf_names

MODULE = "tests.security.model_directories"
KINDS = ("bert", "qwen2", "llama", "modernbert", "siglip")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    model_directories.make(root)
    return root


@pytest.fixture
def copy(valid, tmp_path):
    """A function that copies the valid directory of a kind."""
    return lambda kind: shutil.copytree(valid / kind, tmp_path / kind)


def test_damaged_directories_are_read_or_refused(valid):
    counts = worker.run(MODULE, valid, 0, 300)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert counts[name]["refused"] > 10, counts
    assert counts["config.json"]["same"] > 10, counts


def sizes(kind, path):
    families = hf_names.VISION if kind == "siglip" else hf_names.TOWERS
    return hf_configs.read_config(str(path), hf_files.read_json(str(path)), families)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_a_config_is_checked(kind, copy):
    """Each value replaced by each other one, each key removed."""
    path = copy(kind) / "config.json"
    expected = sizes(kind, path)
    tree = json.loads(path.read_text())
    refused, start = 0, time.monotonic()
    for place in mutations.places(tree)[1:]:
        *parents, last = place
        for value in (None, *model_directories.VALUES):
            changed = json.loads(json.dumps(tree))
            node = changed
            for key in parents:
                node = node[key]
            if value is None:
                del node[last]
            else:
                node[last] = "@"
            path.write_text(json.dumps(changed).replace('"@"', value or ""))
            try:
                found = sizes(kind, path)
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                assert len(str(error)) < 400 + len(str(path))
                refused += 1
                continue
            assert type(found) is type(expected)
            for name, size in vars(expected).items():
                # Without the key, a size may be the default of `transformers`, and no token types
                # are possible; the shapes of the weights decide then.
                if value in (None, "null") or (name, value) == ("type_vocab_size", "0"):
                    continue
                if name not in model_directories.FREE:
                    assert getattr(found, name) == size, (place, value)
    assert refused > 60 and time.monotonic() - start < 10


@pytest.mark.parametrize("text,found", [
    ('"model_type": "gpt99"', "'gpt99'"), ('"model_type": 7', "7: expected `str`"),
    ('"model_type": ["bert"]', "expected `str`"), ('"model_type": null', "None"),
    ('"model_type": "bert", "model_type": "own"', "'own'"),  # The last one counts, as in Python.
])  # fmt: skip
def test_unknown_families_are_refused(text, found, copy):
    path = copy("bert") / "config.json"
    path.write_text(path.read_text().replace('"model_type": "bert"', text))
    with pytest.raises(InputError) as error:
        hf_checkpoints.load_hf_tower(str(path.parent))
    assert f"{path}: model_type is " in str(error.value) and found in str(error.value)


def change_vocabulary(directory, change):
    path = directory / "tokenizer.json"
    tree = json.loads(path.read_text())
    change(tree, tree["model"]["vocab"])
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("change,fault", [
    (lambda tree, ids: ids.update(wool=ids["green"]), "'wool' and 'green' have the same id, "),
    (lambda tree, ids: ids.update(wool=60_000), "the largest id is 60000, of 3"),
    (lambda tree, ids: ids.update(wool=-1), "Expected `int` >= 0"),
    (lambda tree, ids: ids.update(wool=1.5), "Expected `int`, got `float`"),
    (lambda tree, ids: tree["added_tokens"][1].update(id=ids["green"]),
     "the token '[UNK]' has the ids 1 and "),
    (lambda tree, ids: tree["added_tokens"].append(
        {**tree["added_tokens"][0], "content": "new", "id": ids["green"]}),
     "and 'new' have the same id, "),
    (lambda tree, ids: tree["added_tokens"].append(
        {**tree["added_tokens"][0], "content": "new", "id": len(ids) + 1}),
     "the added token 'new' has the id "),
])  # fmt: skip
def test_ids_of_tokens_are_checked(change, fault, copy):
    directory = copy("bert")
    change_vocabulary(directory, change)
    with pytest.raises(InputError) as error:
        tokenizer_lib.load(str(directory), 16)
    message = str(error.value)
    assert message.startswith(f"{directory}/tokenizer.json: ") and fault in message, message


def test_added_tokens_after_the_vocabulary_are_read(copy):
    directory = copy("bert")
    before = tokenizer_lib.vocab_size(tokenizer_lib.load(str(directory), 16))
    change_vocabulary(directory, lambda tree, ids: tree["added_tokens"].append(
        {**tree["added_tokens"][0], "content": "new", "id": before}))  # fmt: skip
    tokenizer = tokenizer_lib.load(str(directory), 16)
    assert tokenizer.token_to_id("new") == before
    assert tokenizer_lib.vocab_size(tokenizer) == before + 1


@pytest.mark.parametrize("changes,fault", [
    ({"image_std": [0, 0, 0]}, "`$.image_std[0]`"), ({"image_std": [0.5, 0.5, -1]}, "image_std[2]"),
    ({"image_mean": [1e9] * 3}, "image_mean[0]"), ({"image_mean": [0.5] * 4}, "image_mean"),
    ({"rescale_factor": 0}, "rescale_factor"), ({"resample": 99}, "resample"),
    ({"size": {"height": 0, "width": 16}}, "size.height"), ({"size": []}, "`$.size`"),
    ({"size": {"height": 16, "width": 10**9}}, "size.width"),
    ({"size": {"height": 32, "width": 32}}, "expects 16 x 16"),
])  # fmt: skip
def test_processors_of_images_are_checked(changes, fault, copy):
    path = copy("siglip") / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError) as error:
        encoder.check_model(str(path.parent))
    assert "preprocessor_config.json" in str(error.value) and fault in str(error.value)


@pytest.mark.parametrize("target", [
    "/dev/zero", "/proc/kmsg", "/proc/self/mem", "/proc/self/pagemap", "/proc/version", "nowhere",
])  # fmt: skip
def test_links_to_special_files_are_not_read(target, copy, valid):
    files = [
        path.relative_to(valid)
        for path in valid.rglob("*")
        if path.suffix in (".json", ".safetensors") and path.name != "generation_config.json"
    ]
    for name in files:
        kind, path = name.parts[0], None
        directory = copy(kind)
        path = directory / os.path.relpath(name, kind)
        path.unlink()
        path.symlink_to(target)
        try:
            model_directories.read(directory)
        except InputError as error:
            assert path.name in str(error) and "regular file" in str(error), name
        else:  # The config.json of the normalisation of vectors, which has no settings.
            assert path.parent.name == "2_Normalize", name
        shutil.rmtree(directory)


@pytest.mark.parametrize("name,content,fault", [
    ("1_Pooling/config.json", {"pooling_mode": 0.5}, "`$.pooling_mode`"),
    ("1_Pooling/config.json", {"pooling_mode": [1]}, "`$.pooling_mode"),
    ("1_Pooling/config.json", {"pooling_mode_cls_token": "x"}, "pooling_mode_cls_token"),
    ("1_Pooling/config.json", {"pooling_mode": ["x" * 10**5]}, "expected one of cls, mean"),
    ("config_sentence_transformers.json", {"default_prompt_name": []}, "default_prompt_name"),
    ("config_sentence_transformers.json", {"prompts": 0.5}, "`$.prompts`"),
    ("sentence_bert_config.json", {"modality_config": "x"}, "modality_config"),
    ("sentence_bert_config.json", {"transformer_task": "x\ny" * 999}, "feature-extraction"),
])  # fmt: skip
def test_settings_of_sentence_transformers_are_checked(name, content, fault, copy):
    directory = copy("sentences")
    (directory / name).write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        hf_checkpoints.load_hf_tower(str(directory))
    message = str(error.value)
    assert f"{directory}/{name}: " in message and fault in message, message
    assert "\n" not in message and len(message) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_directories_are_read_or_refused(seed, valid):
    worker.run(MODULE, valid, seed, 1000)
