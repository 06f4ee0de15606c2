"""Model directories for tests: tiny valid ones, what is read of them, and random damage to them."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import socket
import struct
import tempfile

import jax
import numpy as np
from PIL import Image

from tests.security import mutations, test_tokenizers
from vixml_jax.data.images import image_files
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.image_encoding import encoder
from vixml_jax.models import hf_checkpoints

TEXTS = ["green wool scarf", "a", "", "Ünï 漢字 \U0001f600 12, x!", "scarf " * 40]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Settings in config.json that the shapes of the weights do not fix, so that another valid value is
# another valid model.
FREE = {
    "dropout", "attention_dropout", "attention_scale", "layer_norm_eps", "norm_eps",
    "initializer_range", "rope", "local_rope", "num_heads", "max_positions", "window",
    "global_every", "causal", "pooling", "patch_size", "first_position", "num_kv_heads",
    "head_width", "image_size", "qk_norm",
}  # fmt: skip
# What valid settings in a file decide on; nothing else of a model may change with it.
MAY_CHANGE = {
    "config.json": FREE | {"end", "notes"},
    "config_sentence_transformers.json": {"notes"},
    "sentence_bert_config.json": {"notes"},
    "modules.json": {"pooling", "notes"},
    "tokenizer.json": {"tokens", "lengths"},
    "vocab.txt": {"tokens", "lengths"},
    "tokenizer_config.json": {"tokens", "lengths"},
    "preprocessor_config.json": {"pixels"},
}
NUMBERS = ("0", "-1", "1e9", "1000000000", "1e18", "NaN", "-Infinity", "1e999", "0.5", "9" * 5000)
VALUES = (*NUMBERS, '"x"', "null", "[]", "[1]", "{}", "true")


def make(root):
    """Writes a directory of each kind below `root`; needs torch."""
    import sentence_transformers
    import transformers
    from sentence_transformers.base import modules as base
    from sentence_transformers.sentence_transformer import modules

    from tests import random_models, tiny

    root = pathlib.Path(root)
    learned = tokenizer_lib.train(lambda: iter([TEXTS[:2]]), vocab_size=48, max_tokens=32)
    learned.no_truncation()
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=learned, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    for family in ("bert", "modernbert"):
        random_models.text_model(family, num_hidden_layers=2).save_pretrained(root / family)
    for family, model in (("qwen2", "Qwen2"), ("llama", "Llama")):  # With tied and untied heads.
        sizes = random_models.DECODERS[family][2] | {"num_hidden_layers": 2, "eos_token_id": 2}
        config = getattr(transformers, f"{model}Config")(
            **sizes, tie_word_embeddings=family == "qwen2"
        )
        random_models.draw(
            getattr(transformers, f"{model}ForCausalLM"), config, 0.1
        ).save_pretrained(root / family)
    for family in ("bert", "modernbert", "qwen2", "llama"):
        saved.save_pretrained(root / family)
    small = random_models.text_model("bert", num_hidden_layers=1)
    small.save_pretrained(root / "shards", max_shard_size="8KB")
    saved.save_pretrained(root / "shards")
    small.save_pretrained(root / "early")  # A BERT of the first years has a list of tokens.
    tokens = sorted(saved.get_vocab().items(), key=lambda item: item[1])
    (root / "early" / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in tokens))
    parts = [base.Transformer(str(root / "bert")), modules.Pooling(24, pooling_mode="cls")]
    model = sentence_transformers.SentenceTransformer(
        modules=[*parts, base.Normalize()], device="cpu", prompts={"query": "q: "}
    )
    model.save(str(root / "sentences"), create_model_card=False)
    (root / "siglip").mkdir()
    tiny.make_siglip(root / "siglip", side=16, patch=8, width=24)


def read(directory):
    """All that commands read of a model directory.

    Returns:
      "config": sizes; "params": arrays by path; "other": tokens, end token, pixels of an image.
    """
    directory = str(directory)
    if os.path.basename(directory) == "siglip":
        processor = encoder.check_model(directory)
        config, params = hf_checkpoints.load_hf_vision(directory)
        other = {
            "pixels": image_files.normalize(image_files.load_pixels(_image(), processor), processor)
        }
    else:
        tokenizer = tokenizer_lib.load(directory, 16)
        tokens = batch_tokenizer.encode(tokenizer, TEXTS)
        notes = [
            note.replace(directory, "") for note in hf_checkpoints.read_pooling(directory).notes
        ]
        end = hf_checkpoints.end_token(directory)
        config, params = hf_checkpoints.load_hf_tower(directory)
        size = tokenizer_lib.vocab_size(tokenizer)
        assert 0 <= tokens.values.min() and tokens.values.max() < size, "a token out of range"
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        assert len(set(ids)) == len(ids), "two tokens with one id"
        other = {"tokens": tokens.values, "lengths": tokens.lengths, "end": end, "notes": notes}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    params = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {"config": dataclasses.asdict(config), "params": params, "other": other}


def _image():
    content = io.BytesIO()
    pixels = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def difference(found, expected):
    """What of two results of `read` differs though no valid setting explains it; None: nothing."""
    for name, value in expected["config"].items():
        if found["config"][name] != value and name not in FREE:
            return f"config.{name}: {found['config'][name]} instead of {value}"
    if found["params"].keys() != expected["params"].keys():
        return "params: other names"
    for name, value in expected["params"].items():
        # Another number of heads is another shape of the same values.
        if not np.array_equal(found["params"][name].ravel(), value.ravel()):
            return f"params{name}: other values"
    return None


def others(found, expected):
    """What of two results of `read` differs by valid settings."""
    names = {
        name for name in expected["config"] if found["config"][name] != expected["config"][name]
    }
    return names | {
        name
        for name in expected["other"]
        if not np.array_equal(found["other"][name], expected["other"][name])
    }


class Target:
    """Valid directories of all kinds, which are damaged one at a time."""

    def __init__(self, root):
        self._root = root
        self._kinds = sorted(path.name for path in root.iterdir())
        self._expected = {kind: read(root / kind) for kind in self._kinds}
        for kind, expected in self._expected.items():
            again = read(root / kind)
            assert difference(again, expected) is None and not others(again, expected)

    def attack(self, rng):
        """Damages a file of a directory and reads it; see `worker`."""
        kind = self._kinds[rng.integers(len(self._kinds))]
        with tempfile.TemporaryDirectory() as above:
            directory = pathlib.Path(shutil.copytree(self._root / kind, f"{above}/{kind}"))
            name, what = mutate(rng, directory)
            print(f"{kind}/{name}: {what}", end=" ", flush=True)
            try:
                found = read(directory)
            except InputError as error:
                line = str(error)
                assert (
                    "\n" not in line
                    and len(line) - line.count(str(directory)) * len(str(directory)) < 1000
                ), line
                # Some files name others, and a tokenizer may fail on texts only.
                names_others = name in (INDEX, "modules.json")
                files = {name}
                if names_others:
                    files |= {path.name for path in directory.rglob("*")}
                if name in ("tokenizer.json", "vocab.txt"):
                    files |= {"tokenizer.json", "the tokenizer"}
                assert any(file in line for file in files), line
                return name, "refused"
        wrong = difference(found, self._expected[kind])
        assert wrong is None, wrong
        changed = others(found, self._expected[kind])
        assert changed <= MAY_CHANGE.get(name, set()), changed
        return name, "other" if changed else "same"


# --- Damage. Each function takes a generator and a path, and returns what it did. ---


def damage_json(rng, path):
    path.write_bytes(mutations.damaged(rng, path.read_bytes()))
    return "random damage"


def replace_value(rng, path):
    """One value replaced, also by what Python's json cannot write; or its key removed or twice."""
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        return damage_json(rng, path)
    places = mutations.places(tree)[1:]
    if not places:
        return damage_json(rng, path)
    *parents, last = places[rng.integers(len(places))]
    node = tree
    for key in parents:
        node = node[key]
    value, action = VALUES[rng.integers(len(VALUES))], rng.integers(10)
    if action == 0:
        del node[last]
        value = "nothing"
    elif action == 1 and isinstance(node, dict):
        node[f"{last}#"] = "@"
    else:
        node[last] = "@"
    text = json.dumps(tree).replace('"@"', value).replace(f'"{last}#"', f'"{last}"')
    path.write_text(text)
    return f"{'.'.join(map(str, (*parents, last)))} -> {value[:20]}"


def change_ids(rng, path):
    """Ids of a tokenizer: two the same, two swapped, negative, huge, none, or a hole."""
    tree = json.loads(path.read_text())
    kind = ("same", "swapped", "negative", "huge", "text", "hole", "added")[rng.integers(7)]
    vocabulary = tree["model"]["vocab"]
    one, two = rng.choice(sorted(vocabulary), 2, replace=False)
    if kind == "same":
        vocabulary[one] = vocabulary[two]
    elif kind == "swapped":
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    elif kind == "hole":
        vocabulary[one] = len(vocabulary) + int(rng.integers(1, 2000))
    elif kind == "added":
        added = tree["added_tokens"][rng.integers(len(tree["added_tokens"]))]
        added["id"] = int(rng.choice([vocabulary[one], len(vocabulary) + 5, 0, 1]))
    else:
        vocabulary[one] = {"negative": -1, "huge": 2**32 - 1, "text": "x"}[kind]
    path.write_text(json.dumps(tree))
    return f"ids {kind}: {one}, {two}"


def put_hostile(rng, path):
    """A small file that ends the process of the `tokenizers` library, or worse."""
    name = sorted(test_tokenizers.HOSTILE)[rng.integers(len(test_tokenizers.HOSTILE))]
    path.write_text(json.dumps(test_tokenizers.HOSTILE[name]))
    return name


def change_lines(rng, path):
    """Tokens of a vocab.txt: one missing, twice, empty, not UTF-8."""
    lines = path.read_bytes().split(b"\n")
    at = rng.integers(len(lines))
    value = (b"", b"\xff", lines[rng.integers(len(lines))], b"x" * 10**6, b"\0", b"[UNK]\r")
    lines[at] = value[rng.integers(len(value))]
    path.write_bytes(b"\n".join(lines[: at if rng.integers(2) else None]))
    return f"line {at}"


def nest(rng, path):
    depth, kind = 100_000, rng.integers(3)
    if kind == 0:
        path.write_text("[" * depth + "]" * depth)
    elif kind == 1:
        path.write_text('{"a":' * depth + "1" + "}" * depth)
    else:
        tree = json.loads(path.read_text())
        where = "normalizer" if "normalizer" in tree else "x"
        inner = '{"type":"Sequence","normalizers":['
        tree[where] = "@"
        text = json.dumps(tree)
        path.write_text(text.replace('"@"', inner * depth + "]}" * depth))
    return f"nested {depth} levels deep ({kind})"


def change_header(rng, path):
    """The header of a safetensors file: its length, offsets, types, shapes, names."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    one, two = (header[name] for name in rng.choice(names, 2, replace=False))
    kind = int(rng.integers(12))
    declared = None
    if kind == 0:
        declared = int(rng.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63 - 1]))
    elif kind == 1:
        one["data_offsets"] = two["data_offsets"]
    elif kind == 2:
        one["data_offsets"][rng.integers(2)] = int(rng.choice([-1, 0, len(data) + 1, 2**62]))
    elif kind == 3:
        one["dtype"] = str(rng.choice(["F64", "F16", "BF16", "I32", "I8", "BOOL", "F8_E4M3", "x"]))
    elif kind == 4:
        one["shape"] = [[], [0], [-1, 2], [2**32, 2**32], [1, *one["shape"]], one["shape"] * 2,
                        [one["shape"][0] + 1, *one["shape"][1:]], one["shape"][::-1], "x", [1.5],
                       ][rng.integers(10)]  # fmt: skip
    elif kind == 5:
        header.pop(str(rng.choice(names)))
    elif kind == 6:
        header[f"more.{rng.integers(9)}"] = dict(one)
    elif kind == 7:
        header["__metadata__"] = [{"x": 1}, 3, {"format": "pt"}, {"x": "y" * 10**6}][
            rng.integers(4)
        ]
    elif kind == 8:  # A tensor of more type and shape than data: F64 with half of the shape.
        one["dtype"], one["shape"] = "F16", [*one["shape"][:-1], 2 * one["shape"][-1]]
    elif kind == 9:
        data = data[: rng.integers(len(data))]
    elif kind == 10:
        data += bytes(int(rng.integers(1, 100)))
    else:
        values = np.frombuffer(data, np.float32).copy()
        values[rng.integers(len(values))] = rng.choice([np.nan, np.inf, -np.inf])
        data = values.tobytes()
    text = json.dumps(header).encode()
    if kind == 5 and rng.integers(2):  # A name twice.
        first = names[0]
        text = text[:-1] + b"," + json.dumps({first: one}).encode()[1:]
    path.write_bytes(struct.pack("<Q", len(text) if declared is None else declared) + text + data)
    return f"header ({kind})"


def damage_bytes(rng, path):
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if rng.integers(2):
        path.write_bytes(content[: rng.integers(len(content))])
        return "truncated"
    at = rng.integers(header)  # Beyond the header any value is a valid weight.
    content[at] ^= int(rng.integers(1, 256))
    path.write_bytes(bytes(content))
    return f"byte {at} of the header"


def change_index(rng, path):
    """Files that an index of shards names: elsewhere, missing, or special ones."""
    tree = json.loads(path.read_text())
    names = sorted(tree["weight_map"])
    files = sorted(set(tree["weight_map"].values()))
    chosen = files[rng.integers(len(files))]
    outside = path.parent.parent / "outside.safetensors"
    shutil.copyfile(path.parent / chosen, outside)
    kind = int(rng.integers(8))
    if kind == 0:
        target = (
            *("../outside.safetensors", str(outside), "a/../../outside.safetensors", "..", ""),
            *("x\0y.safetensors", "/dev/zero", "/proc/self/mem"),
        )[rng.integers(8)]
        tree["weight_map"] |= {name: target for name in names if tree["weight_map"][name] == chosen}
    elif kind == 1:
        (path.parent / chosen).unlink()
    elif kind == 2:
        return f"{chosen}: {put_special(rng, path.parent / chosen)}"
    elif kind == 3:
        tree["weight_map"] = {name: "missing.safetensors" for name in names}
    elif kind == 4:
        tree["weight_map"] = [{}, [], None, 3, {"x": 3}, {"x": None}][rng.integers(6)]
    elif kind == 5:
        shutil.copyfile(path.parent / chosen, path.parent / "again.safetensors")
        tree["weight_map"]["again"] = "again.safetensors"
    elif kind == 6:
        del tree["weight_map"][names[rng.integers(len(names))]]
    else:
        return replace_value(rng, path)
    path.write_text(json.dumps(tree))
    return f"index ({kind})"


def put_special(rng, path):
    """A FIFO, device, directory, socket or link in the place of a file."""
    path.unlink()
    kind = ("fifo", "directory", "socket", "loop", "dangling", "link", "empty", "missing")[
        rng.integers(8)
    ]
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unbound:
            here = os.getcwd()
            os.chdir(path.parent)  # Paths of sockets are short.
            unbound.bind(path.name)
            os.chdir(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "link":
        kind = ("/dev/zero", "/dev/random", "/proc/kmsg", "/proc/self/mem", "/proc/self/pagemap",
                "/dev/stdin", "/dev/tty", "/proc/kcore", "/")[rng.integers(9)]  # fmt: skip
        path.symlink_to(kind)
    elif kind == "empty":
        path.write_bytes(b"")
    return kind


def mutate(rng, directory):
    """Damages one file of a model directory; returns (name of the file, what was done)."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix in (".json", ".safetensors", ".txt")]
    path = files[rng.integers(len(files))]
    ways = [put_special]
    if path.suffix == ".safetensors":
        ways += [change_header] * 3 + [damage_bytes]
    elif path.suffix == ".txt":
        ways += [change_lines] * 3
    else:
        ways += [replace_value] * 4 + [damage_json] * 2
        if path.name == "tokenizer.json":
            ways += [change_ids] * 3 + [nest, put_hostile, put_hostile]
        elif path.name == INDEX:
            ways += [change_index] * 6
        elif path.name == "config.json":
            ways += [replace_value] * 3 + [nest]
    way = ways[rng.integers(len(ways))]
    return path.name, f"{way.__name__}: {way(rng, path)}"
