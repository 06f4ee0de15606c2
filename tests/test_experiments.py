"""Flag files of the paper's experiments: each parses and builds the published model."""

import json
import math
import pathlib
import re
import types

import jax
import pytest
import tokenizers
from absl import flags
from flax import linen as nn

from vixml_jax import command_line, frozen_weights, train, workdir
from vixml_jax import config as config_lib
from vixml_jax.data.sources import catalog
from vixml_jax.errors import InputError
from vixml_jax.models import hf_files
from vixml_jax.models import published_towers as towers
from vixml_jax.training import build, flops

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").glob("*.flags"))
SHORT_NAMES = {"lf_wiki": "lf_wikipedia_500k", "lf_wikiseealso": "lf_wikiseealso_320k"}
PAPER = [f for f in FILES if re.match(r"lf_|mm_", f.name) and f.stem not in SHORT_NAMES]
OTHERS = [f for f in FILES if f not in PAPER and f.stem not in ("base", *SHORT_NAMES)]
# Data sets of the XML repository (and MUFIN's), with the paper's: labels, length of a text.
DATA = {
    "lf_amazontitles_131k": (131_073, 32),
    "lf_amazon_131k": (131_073, 128),
    "mm_amazontitles_300k": (303_296, 32),
    "lf_amazontitles_1.3m": (1_305_265, 32),
    "lf_wikiseealso_320k": (312_330, 128),
    "lf_wikipedia_500k": (501_070, 256),
}
# Parameters of each tower as published, without the heads that a tower does not have.
PUBLISHED = {
    "minilm_l3": 17_241_984,
    "distilbert": 66_362_880,
    "e5_base": 108_891_648,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_070_619_136,
    "llama3.2_3b": 3_212_749_824,
    "gemma3_4b": 3_880_263_168,
    "qwen3_embedding_4b": 4_021_774_336,
}


def parse(path):
    values = flags.FlagValues()
    config_lib.define_flags(values)
    values(["train", *command_line.expand([f"--flagfile={path}"])])
    return config_lib.from_flags(values)


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A model hub that has only the published config.json of each tower."""

    def resolve(name, weights=True):
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(towers.about(name)))
        return str(path)

    monkeypatch.setattr(hf_files, "resolve", resolve)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words = {word: n for n, word in enumerate(["[UNK]", "This", "product", "text", "image"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))
    return str(path)


def dataset_of(length, tokenizer):
    return types.SimpleNamespace(
        image_width=1152, vocab_size=100, max_tokens=length, tokenizer=tokenizer
    )


def sizes_of(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(tree)))


def parts(path):
    name = next(name for name in sorted(DATA, key=len)[::-1] if path.name.startswith(name))
    return name, path.name.removesuffix(".flags").removeprefix(name).lstrip("_") or "distilbert"


def test_every_tower_and_data_set_has_a_flag_file():
    found = {parts(path) for path in PAPER}
    paper = {(data, tower) for data in DATA if "wiki" not in data for tower in PUBLISHED}
    assert found == paper | {(name, "distilbert") for name in SHORT_NAMES.values()}


def test_data_sets_have_the_names_of_the_catalogue():
    for path in PAPER:
        assert parts(path)[0] in catalog.CATALOG
        assert parse(path).workdir == f"runs/{path.stem}"
    for short, name in SHORT_NAMES.items():
        same = [parse(ROOT / "experiments" / f"{x}.flags") for x in (short, f"{name}_distilbert")]
        assert same[0] == same[1]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_without_data_it_says_how_to_get_them(path, tmp_path, monkeypatch):
    """The catalogue entry, the page, the `prepare` command and the time on known hardware."""
    monkeypatch.chdir(tmp_path)
    config, (data, _) = parse(path), parts(path)
    dataset, (_, length) = catalog.CATALOG[data], DATA[data]
    with pytest.raises(InputError) as caught:
        train.train(config, data_cache=str(tmp_path / "cache"))
    said = str(caught.value)
    assert said.startswith(f"--data={config.data}: not found; this is {dataset.name} ({data} in ")
    assert dataset.homepage in said and "\n" not in said
    assert (
        f"python -m vixml_jax.prepare --source=RAW/{dataset.name} --out={config.data} "
        f"--max_tokens={length} --tokenizer={config.model.pretrained}; "
    ) in said
    hours = flops.estimate(config, dataset.train, length).hours(0.4 * 989e12)
    assert f"about {hours:.1f} h on one NVIDIA H100" in said


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_it_builds_the_published_model(path, tokenizer):
    data, name = parts(path)
    config = parse(path)
    num_labels, length = DATA[data]
    tower, layout = build.make_tower(config, dataset_of(length, tokenizer))
    model = workdir.build_model(config, tower, layout, num_labels, workdir.make_mesh(config))
    trained, frozen = frozen_weights.split(model.abstract_params, tower)
    images = 1153 * tower.width if config.model.num_images else 0
    d = tower.width
    # Four d x d products and two of 1,024 with biases, two norms; one free vector a cluster.
    beside = 4 * d * d + 4 * d + 2 * 1024 * d + 1024 + d + 4 * d + 65_536 * d
    if name in ("minilm_l3", "distilbert", "e5_base"):
        assert not frozen and sizes_of(trained) == PUBLISHED[name] + images + beside
        assert (config.loop.epochs, config.optimizer.clip_norm) == (
            80 if "wiki" in data else 150, 0.0,
        )  # fmt: skip
    else:
        assert sizes_of(frozen) == PUBLISHED[name]
        q, kv = tower.num_heads * tower.head_width, tower.num_kv_heads * tower.head_width
        m = tower.mlp_width
        pairs = [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]
        adapters = tower.num_layers * 256 * sum(one + other for one, other in pairs)
        assert sizes_of(trained) == adapters + images + beside
        assert tower.lora_scale == 16.0 and config.optimizer.learning_rate == 5e-5
    assert config.batch.size == 2048 and config.data.startswith(f"data/{data}_")
    said = path.read_text()
    assert f"--max_tokens={length}\n" in said and f"--out={config.data} " in said
    if "wiki" in data:
        a, b = ("0.5", "0.4") if data == "lf_wikipedia_500k" else ("0.55", "1.5")
        assert f"--propensity_a={a} --propensity_b={b}" in said


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_other_flag_files_parse(path):
    assert parse(path).workdir == f"runs/{path.stem}"
