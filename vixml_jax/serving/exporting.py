"""Exports a run to other programs: tower as Hugging Face directory, StableHLO, label vectors."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vixml_jax.data import store
from vixml_jax.data.packing import Layout
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.models import hf_export, sentence_modules
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.layers import prefix, stacked, unit
from vixml_jax.models.tower import EncoderConfig, TowerConfig
from vixml_jax.parallel import sharding
from vixml_jax.runtime import progress
from vixml_jax.search import fusion as fusion_lib
from vixml_jax.search import int8
from vixml_jax.search.fusion import Fusion
from vixml_jax.search.int8 import Int8Vectors
from vixml_jax.search.prefix import Prefix
from vixml_jax.serving import label_view
from vixml_jax.serving.label_view import LabelView
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import atomic
from vixml_jax.structs import PackedItems

TOWER, PROGRAM, ABOUT, HEAD = "tower", "tower.stablehlo", "export.json", "head.npz"
INT8 = "labels_int8.npz"
_ROWS = 1 << 14  # Labels written at a time.
_MAX_PROGRAM_BYTES = 1_900_000_000  # The serialised format is limited to 2 GB.
_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")  # Used as padding if the tokenizer has them.
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def host_tower(model: Model, params: Any) -> Any:
    """Returns the tower's parameters as numpy arrays in float32, without padding.

    In float32, adapters can be merged into a bfloat16 base without rounding it again.
    """
    tower = sharding.unpad(stacked(params["tower"]), model.abstract_params["tower"])
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tower)


def host_head(predictor: Predictor) -> Any:
    """Returns how the label head reads queries, as numpy arrays in float32; None without a head.

    That is its network and its table of words; {} if it reads the vectors of queries as they are.
    """
    if predictor.fusion is None:
        return None
    return jax.tree.map(lambda x: np.asarray(x, np.float32), predictor.params["head"])


def write_tower(
    directory: str, model: Model, tower: Any, *, like: str | None, tokenizer: str, max_tokens: int
) -> None:
    """Writes a directory for `AutoModel` and `PreTrainedTokenizerFast` of transformers; text only.

    Encoders with reserved image positions get their position embeddings rotated: those of texts
    come first, as other programs count them, and those of images last. The factor by which a
    decoder trained from scratch multiplies its token embeddings is multiplied into them.

    Args:
      directory: To be written.
      model: Model of the run.
      tower: Parameters from `host_tower`.
      like: Hugging Face directory or name that the tower was loaded from; None: trained from
        scratch.
      tokenizer: Path of the run's tokenizer.json.
      max_tokens: Tokens after which texts are cut.

    Raises:
      InputError: If `transformers` has no such tower.
    """
    config, layout = model.tower.config, model.layout
    if isinstance(config, BertConfig):
        if layout.reserve_images and layout.num_images:
            encoder, first = dict(tower["encoder"]), config.first_position
            table = encoder["position_embeddings"]
            rolled = np.roll(table[first:], -layout.num_images, axis=0)
            encoder["position_embeddings"] = np.concatenate([table[:first], rolled])
            tower = {**tower, "encoder": encoder}
    elif isinstance(config, DecoderConfig) and not config.causal:
        raise InputError(
            "--model.causal=false: transformers has no decoder with bidirectional attention; "
            "leave the tower out by --notower"
        )
    if like is None and config.embedding_scale != 1.0:
        scaled = tower["word_embeddings"] * np.float32(config.embedding_scale)
        tower = {**tower, "word_embeddings": scaled}
    hf_export.save_hf_tower(directory, tower, config=config, like=like)
    shutil.copyfile(tokenizer, os.path.join(directory, store.TOKENIZER))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens}
    with open(tokenizer, encoding="utf-8") as file:
        tokens = {token["content"] for token in json.load(file)["added_tokens"]}
    pad = next((token for token in _PAD_TOKENS if token in tokens), None)
    _write_json(directory, "tokenizer_config.json", about | ({"pad_token": pad} if pad else {}))
    if isinstance(config, EncoderConfig):
        _write_modules(directory, config, max_tokens)


def _write_modules(directory: str, config: EncoderConfig, max_tokens: int) -> None:
    """Writes the files that `sentence_transformers.SentenceTransformer` reads."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(_MODULES)
    ]
    for path, _ in _MODULES:
        os.makedirs(os.path.join(directory, path), exist_ok=True)
    _write_json(directory, "modules.json", modules)
    _write_json(directory, "sentence_bert_config.json", {"max_seq_length": max_tokens})
    _write_json(
        os.path.join(directory, "1_Pooling"),
        "config.json",
        {"word_embedding_dimension": config.width} | sentence_modules.modes(config.pooling),
    )


def _write_json(directory: str, name: str, value: Any) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)


def program(
    model: Model,
    tower: Any,
    head: Any = None,
    fusion: Fusion | None = None,
    used: int | None = None,
) -> jax.export.Exported:
    """Returns a program from token ids [b, t] and mask [b, t], int32, to query vectors [b, w].

    They are unit vectors; with a label head, fused with the vectors of the head. b and t are
    symbolic. A row holds the complete sequence of one text: special tokens and, for a decoder, the
    prompt.

    Args:
      model: Model of the run.
      tower: Parameters from `host_tower`.
      head: Parameters from `host_head`.
      fusion: Weights of prototypes, head and frequency; None: without a head.
      used: Columns of the vectors that are searched; None: all.

    Raises:
      InputError: If the tower is too large for one program.
    """
    size = sum(x.nbytes for x in jax.tree.leaves((tower, head)))
    if size > _MAX_PROGRAM_BYTES:
        raise InputError(
            f"the tower has {size / 1e9:.1f} GB, but a StableHLO program holds at most "
            f"{_MAX_PROGRAM_BYTES / 1e9:.1f} GB; leave it out by --noprogram"
        )
    layout, config = model.layout, model.tower.config
    first = layout.num_images if layout.reserve_images else 0
    before, after = (len(part) for part in prompt_of(layout))

    def text_tokens(ids: Int[Array, "b t"], mask: Int[Array, "b t"]) -> Int[Array, "b w"]:
        """The tokens between the parts of the prompt, as many as the head reads."""
        at = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1)
        count = jnp.sum(mask, axis=1, keepdims=True) - before - after
        count = jnp.minimum(count, model.word_tokens)
        shifted = jnp.roll(ids, -before, axis=1)
        return jnp.where(at < count, shifted, -1)

    def encode(ids: Int[Array, "b t"], mask: Int[Array, "b t"]) -> Float[Array, "b w"]:
        rows = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0)
        packed = PackedItems(
            tokens=ids,
            segments=jnp.where(mask > 0, rows, -1),
            positions=jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + first,
            image_at=jnp.full_like(ids, -1),
            images=jnp.zeros((0, max(1, config.image_width)), jnp.float16),
        )
        with model.precision():
            vectors = model.tower.apply({"params": tower}, packed, ids.shape[0], deterministic=True)
        vectors = unit(vectors)
        width = used or vectors.shape[1]
        if fusion is None:
            return prefix(vectors, width)
        with model.precision():
            g = model.head.queries(head, vectors, text_tokens(ids, mask))
        parts = [
            fusion.prototypes * prefix(vectors, width),
            fusion.head * prefix(g, width),
            jnp.full_like(vectors[:, :1], fusion.head),
            jnp.full_like(vectors[:, :1], fusion.frequency),
        ]
        missing = fusion_lib.width(width) - 2 * width - fusion_lib.NUM_TERMS
        return jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, missing)))

    shape = jax.export.symbolic_shape("b, t")
    argument = jax.ShapeDtypeStruct(shape, jnp.int32)
    exported = jax.export.export(jax.jit(encode), platforms=("cpu", "cuda", "tpu"))
    return exported(argument, argument)


def rows_of(predictor: Predictor, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids and mask [b, t], int32: the complete sequences of texts."""
    layout, items = predictor.model.layout, predictor.items(texts)
    values, offsets = items.tokens
    rows = []
    for a, b in itertools.pairwise(offsets):
        text = values[a + layout.trim[0] : b - layout.trim[1]]
        pieces = [text if part == "text" else np.array(part) for part in layout.unseen]
        rows.append(np.concatenate(pieces))
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return ids, mask


def tolerance_of(platform: str, precision: str, dtype: str) -> float:
    """Largest difference of an entry of a unit vector that other rows of the same text may make.

    Args:
      platform: `jax.Device.platform` of the devices that compute the vectors.
      precision: As `--model.matmul_precision`.
      dtype: As `--model.dtype`.
    """
    if dtype == "bfloat16" or (platform == "tpu" and precision == "default"):
        return 1e-2  # Products of 8 significant bits.
    if platform == "cpu" or precision == "highest":
        return 1e-4
    return 1e-3  # TF32, or three passes of bfloat16.


def write_program(path: str, predictor: Predictor, tower: Any, texts: list[str]) -> float:
    """Writes the query side as StableHLO, after checking that it computes the vectors of the run.

    Args:
      path: Of the file.
      predictor: Of the run.
      tower: Parameters from `host_tower`.
      texts: Texts to check it on.

    Returns:
      The largest difference of an entry of a vector.

    Raises:
      InputError: If the difference is above the tolerance, or the tower is too large.
    """
    fusion, searched = predictor.fusion, predictor.prefix
    made = program(predictor.model, tower, host_head(predictor), fusion, searched.used)
    serialized = made.serialize()
    deserialized = jax.export.deserialize(serialized)
    vectors = np.asarray(deserialized.call(*rows_of(predictor, texts)))
    expected = searched.queries(predictor.query_vectors(predictor.queries(texts)))
    difference = float(np.abs(vectors - expected).max())
    model = predictor.model
    tolerance = tolerance_of(
        model.mesh.devices.flat[0].platform, model.matmul_precision, model.tower.config.dtype
    ) * max((1.0, *(fusion or ())))
    if not difference <= tolerance:
        raise InputError(
            f"{path}: vectors of the program differ from those of the run by {difference:.1e}, "
            f"expected at most {tolerance:.0e}; leave the program out by --noprogram"
        )
    atomic.write_bytes(path, serialized)
    return difference


def label_blocks(
    view: LabelView,
) -> Iterator[tuple[list[str], list[str], Float[np.ndarray, "n w"]]]:
    """Yields ids, texts and vectors of all labels, label updates applied, in blocks.

    The vectors are those that are searched: prototypes, fused with the label head if there is one.
    """
    artifacts, updates = view.artifacts, view.updates
    start = 0

    def select(
        ids: list[str], texts: list[str]
    ) -> tuple[list[str], list[str], Float[np.ndarray, "n w"]]:
        rows = np.arange(start, start + len(ids))
        kept = np.flatnonzero(~np.isin(rows, updates.removed))
        vectors = view.label_vectors(rows[kept])
        return [ids[i] for i in kept], [texts[i] for i in kept], vectors

    chunks = zip(artifacts.ids.chunks(_ROWS), artifacts.texts.chunks(_ROWS), strict=True)
    for ids, texts in chunks:
        yield select(ids, texts)
        start += len(ids)
    if updates.ids:
        yield select(updates.ids, updates.texts)


def write_labels(
    directory: str, view: LabelView, searched: Prefix, *, with_int8: bool = False
) -> None:
    """Writes labels.npy, float32 [l, w], and labels.parquet with id, text and vector.

    Args:
      directory: Directory of the files.
      view: The labels.
      searched: Columns of their vectors that are written.
      with_int8: Whether to write labels_int8.npz as well: the arrays of `int8.Int8Vectors`.

    All have the same order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = view.num_labels
    width = searched.width(label_view.label_width(view.artifacts, view.head_rows))
    blocks = []
    fields = [("id", pa.string()), ("text", pa.string()), ("vector", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields)
    array = np.lib.format.open_memmap(
        os.path.join(directory, "labels.npy"), mode="w+", dtype=np.float32, shape=(count, width)
    )
    written = 0
    with (
        pq.ParquetWriter(os.path.join(directory, "labels.parquet"), schema) as file,
        progress.track("labels", count, unit="label") as advance,
    ):
        for ids, texts, vectors in label_blocks(view):
            if with_int8:
                blocks.append(int8.quantised(vectors, searched))
            vectors = searched.labels(vectors)
            array[written : written + len(ids)] = vectors
            flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
            vector_column = pa.FixedSizeListArray.from_arrays(flat, width)
            columns = [pa.array(ids, pa.string()), pa.array(texts, pa.string()), vector_column]
            file.write_table(pa.table(columns, schema=schema))
            written += len(ids)
            advance(len(ids))
    array.flush()
    if with_int8:
        arrays = map(np.concatenate, zip(*blocks, strict=True))
        with atomic.file(os.path.join(directory, INT8)) as path, open(path, "wb") as file:
            np.savez(file, **dict(zip(Int8Vectors._fields, arrays, strict=True)))


def prompt_of(layout: Layout) -> tuple[list[int], list[int]]:
    """Returns the tokens before and after the text of a query without images."""
    at = layout.unseen.index("text")
    before, after = (
        [token for part in parts for token in part]
        for parts in (layout.unseen[:at], layout.unseen[at + 1 :])
    )
    return before, after


def describe(predictor: Predictor, config: TowerConfig) -> dict[str, Any]:
    """Returns export.json: how other programs compute the run's vectors and scores."""
    layout = predictor.model.layout
    before, after = prompt_of(layout)
    return {
        "pooling": config.pooling,
        "unit_length": True,
        "max_tokens": predictor.artifacts.about.max_tokens,
        "trimmed": list(layout.trim),
        "before": before,
        "after": after,
        "width": config.width,
        "labels": predictor.num_labels,
        "searched_width": predictor.prefix.used,
        "label_width": predictor.prefix.width(predictor.label_width),
        "fusion": None if predictor.fusion is None else predictor.fusion._asdict(),
        "images": layout.num_images if predictor.image_width else 0,
    }


def write_head(path: str, predictor: Predictor) -> None:
    """Writes head.npz: how the label head reads queries, and the weights of `Fusion`.

    Without a hidden layer (`--head.mlp_width=0`) and words it holds the weights alone.
    """
    arrays = {name: np.float32(weight) for name, weight in predictor.fusion._asdict().items()}
    head = host_head(predictor)
    for layer, parameters in head.get("mlp", {}).items():
        arrays |= {f"{layer}_{name}": value for name, value in parameters.items()}
    if "words" in head:
        arrays |= {"words": head["words"], "word_tokens": np.int32(predictor.model.word_tokens)}
    with atomic.file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def write_projection(path: str, tower: Any) -> None:
    """Writes the projection of image embeddings to tower inputs: kernel [v, d], bias [d]."""
    with atomic.file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **tower["image_projection"])
