"""A run for others to use: its tower as a Hugging Face directory and as StableHLO, its labels."""

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
from vixml_jax.errors import InputError
from vixml_jax.modeling import Model, unit
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import sharding
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import atomic
from vixml_jax.structs import PackedItems

TOWER, PROGRAM, ABOUT = "tower", "tower.stablehlo", "export.json"
TOLERANCE = 1e-4  # Of an entry of a unit vector.
_ROWS = 1 << 14  # Labels written at a time.
_MOST = 1_900_000_000  # Bytes of a program: what the format holds.
_KINDS = ("Transformer", "Pooling", "Normalize")


def host_tower(model: Model, params: Any) -> Any:
    """The tower's parameters as numpy arrays in float32, without padding; a base kept in bfloat16
    takes up its adapters without being rounded again."""
    tower = sharding.unpad(params["tower"], model.abstract_params["tower"])
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tower)


def write_tower(
    directory: str, model: Model, tower: Any, *, like: str | None, tokenizer: str, max_tokens: int
) -> None:
    """Writes what `AutoModel` and `PreTrainedTokenizerFast` of transformers load; text alone.

    Position embeddings of an encoder that leaves room for pictures are turned round, so that those
    of texts come first, as others count them; those of pictures come last. What a decoder trained
    from nothing multiplies its words by goes into them.

    Args:
      directory: Made.
      model: Of the run.
      tower: Its parameters, of `host_tower`.
      like: Where it was loaded from; None: it was trained from nothing.
      tokenizer: The run's tokenizer.json.
      max_tokens: Where texts are cut.

    Raises:
      InputError: If `transformers` has no such tower.
    """
    config, layout = model.tower.config, model.layout
    if isinstance(config, BertConfig):
        if layout.reserve_images and layout.num_images:
            encoder = dict(tower["encoder"])
            encoder["position_embeddings"] = np.roll(
                encoder["position_embeddings"], -layout.num_images, axis=0
            )
            tower = {**tower, "encoder": encoder}
    elif not config.causal:
        raise InputError(
            "--model.causal=false: transformers has no decoder that sees both ways; leave the "
            "tower out by --notower"
        )
    if like is None and config.word_scale != 1.0:
        scaled = tower["word_embeddings"] * np.float32(config.word_scale)
        tower = {**tower, "word_embeddings": scaled}
    hf_checkpoints.save_hf_tower(directory, tower, config=config, like=like)
    shutil.copyfile(tokenizer, os.path.join(directory, store.TOKENIZER))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens}
    with open(tokenizer, encoding="utf-8") as file:
        words = {token["content"] for token in json.load(file)["added_tokens"]}
    pad = next((word for word in ("[PAD]", "<pad>", "<|endoftext|>") if word in words), None)
    _write_json(directory, "tokenizer_config.json", about | ({"pad_token": pad} if pad else {}))
    if isinstance(config, BertConfig):
        _write_modules(directory, config.width, max_tokens)


def _write_modules(directory: str, width: int, max_tokens: int) -> None:
    """What `sentence_transformers.SentenceTransformer` wants to know."""
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, _KINDS, strict=True))
    ]
    for path in paths[1:]:
        os.makedirs(os.path.join(directory, path), exist_ok=True)
    _write_json(directory, "modules.json", modules)
    _write_json(directory, "sentence_bert_config.json", {"max_seq_length": max_tokens})
    _write_json(
        os.path.join(directory, paths[1]),
        "config.json",
        {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
    )


def _write_json(directory: str, name: str, value: Any) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)


def program(model: Model, tower: Any) -> jax.export.Exported:
    """Unit vectors [b, e] of token ids [b, t] and mask [b, t], int32, for any b and t.

    A row is all that the tower reads of one text: special tokens, a decoder's prompt too.

    Raises:
      InputError: If the tower is too large for one program.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(tower))
    if size > _MOST:
        raise InputError(
            f"the tower's {size / 1e9:.1f} GB are more than a program of StableHLO holds "
            f"({_MOST / 1e9:.1f} GB); leave it out by --noprogram"
        )
    layout, config = model.layout, model.tower.config
    first = layout.num_images if layout.reserve_images else 0

    def encode(ids: Int[Array, "b t"], mask: Int[Array, "b t"]) -> Float[Array, "b e"]:
        rows = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0)
        packed = PackedItems(
            tokens=ids,
            segments=jnp.where(mask > 0, rows, -1),
            positions=jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + first,
            image_at=jnp.full_like(ids, -1),
            images=jnp.zeros((0, max(1, config.image_width)), jnp.float16),
        )
        found = model.tower.apply({"params": tower}, packed, ids.shape[0], deterministic=True)
        return unit(found)

    shape = jax.export.symbolic_shape("b, t")
    argument = jax.ShapeDtypeStruct(shape, jnp.int32)
    exported = jax.export.export(jax.jit(encode), platforms=("cpu", "cuda", "tpu"))
    return exported(argument, argument)


def rows_of(predictor: Predictor, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [b, t], int32, as the tower reads these texts."""
    layout, items = predictor.model.layout, predictor.items(texts)
    values, offsets = items.tokens
    rows = []
    for a, b in itertools.pairwise(offsets):
        text = values[a + layout.trim[0] : b - layout.trim[1]]
        pieces = [text if part == "text" else np.array(part) for part in layout.unseen]
        rows.append(np.concatenate(pieces))
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros_like(ids)
    for row, found in enumerate(rows):
        ids[row, : len(found)], mask[row, : len(found)] = found, 1
    return ids, mask


def write_program(path: str, predictor: Predictor, tower: Any, texts: list[str]) -> float:
    """Writes the query tower as StableHLO, if read back it finds what the run finds.

    Args:
      path: Of the file.
      predictor: Of the run.
      tower: Its tower's parameters, of `host_tower`.
      texts: To try it on.

    Returns:
      The largest difference of an entry.

    Raises:
      InputError: If that is above TOLERANCE, or the tower too large.
    """
    written = program(predictor.model, tower).serialize()
    read = jax.export.deserialize(written)
    found = np.asarray(read.call(*rows_of(predictor, texts)))
    difference = float(np.abs(found - predictor.encode(texts)).max())
    if not difference <= TOLERANCE:
        raise InputError(
            f"{path}: the program differs from the run by {difference:.1e}, above {TOLERANCE}; "
            "leave it out by --noprogram"
        )
    atomic.write_bytes(path, written)
    return difference


def labels_of(
    predictor: Predictor,
) -> Iterator[tuple[list[str], list[str], Float[np.ndarray, "n e"]]]:
    """Ids, texts and unit vectors of all labels that are searched, so many at a time."""
    answers, changes = predictor.answers, predictor.changes
    start, gone = 0, changes.removed
    chunks = zip(answers.ids.chunks(_ROWS), answers.texts.chunks(_ROWS), strict=True)
    for ids, texts in chunks:
        stay = np.flatnonzero(~np.isin(np.arange(start, start + len(ids)), gone))
        vectors = np.asarray(answers.vectors[start : start + len(ids)])
        yield [ids[i] for i in stay], [texts[i] for i in stay], vectors[stay]
        start += len(ids)
    stay = np.flatnonzero(~np.isin(np.arange(start, start + len(changes.ids)), gone))
    if len(stay):
        yield (
            [changes.ids[i] for i in stay],
            [changes.texts[i] for i in stay],
            changes.vectors[stay],
        )


def write_labels(directory: str, predictor: Predictor) -> None:
    """Writes labels.npy, float32 [l, e], and labels.parquet with id, text and vector, both in the
    same order, a part at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tqdm

    count, width = predictor.num_labels, predictor.answers.vectors.shape[1]
    fields = [("id", pa.string()), ("text", pa.string()), ("vector", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields)
    into = np.lib.format.open_memmap(
        os.path.join(directory, "labels.npy"), mode="w+", dtype=np.float32, shape=(count, width)
    )
    done = 0
    with (
        pq.ParquetWriter(os.path.join(directory, "labels.parquet"), schema) as file,
        tqdm.tqdm(total=count, desc="labels", unit="label", unit_scale=True, disable=None) as bar,
    ):
        for ids, texts, vectors in labels_of(predictor):
            into[done : done + len(ids)] = vectors
            flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, width)
            file.write_table(pa.table([pa.array(ids), pa.array(texts), column], schema=schema))
            done += len(ids)
            bar.update(len(ids))
    into.flush()


def describe(predictor: Predictor, config: TowerConfig) -> dict[str, Any]:
    """How others get the run's vectors from the tower."""
    layout = predictor.model.layout
    at = layout.unseen.index("text")
    before, after = (
        [token for part in parts for token in part]
        for parts in (layout.unseen[:at], layout.unseen[at + 1 :])
    )
    return {
        "pooling": config.pooling,
        "unit_length": True,
        "max_tokens": predictor.answers.about["max_tokens"],
        "trimmed": list(layout.trim),
        "before": before,
        "after": after,
        "width": config.width,
        "labels": predictor.num_labels,
        "pictures": layout.num_images if predictor.image_width else 0,
    }


def write_projection(path: str, tower: Any) -> None:
    """Writes what turns embeddings of pictures into the tower's tokens: kernel [v, d], bias [d]."""
    with atomic.file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **tower["image_projection"])
