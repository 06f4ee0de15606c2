"""Exports a run's tower and label vectors to formats that other programs read.

python -m vixml_jax.export --workdir=runs/shop --out=exported
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from vixml_jax import command_line, errors, workdir
from vixml_jax.config import SearchConfig
from vixml_jax.data import store
from vixml_jax.errors import InputError
from vixml_jax.models import hf_files
from vixml_jax.models.tower import EncoderConfig, TowerConfig
from vixml_jax.runtime import compilation_cache, console, host_memory
from vixml_jax.serving import exporting
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import atomic, json_files, object_store

COMMON_FLAGS = (
    "workdir", "out", "like", "tower", "program", "data", "mesh",
)  # fmt: skip
_NUM_CHECKED = 16  # Label texts on which the program is checked.

_README = """# {name}

Exported by vixml_jax from a run on {name}.

| file | content |
|---|---|
| labels.npy | {vectors} of {labels} labels, float32, width {width} |
| labels.parquet | id, text and vector of the same labels, in the same order |
| export.json | how texts are turned into vectors, for programs |
{more}
The vector q of a query is the tower's {pooling}, scaled to unit length.{cut} {scored} any index for
maximum inner product search can be used.{probability}
"""
_FIRST = """ Of all
vectors, only the first {width} numbers are used; those of queries are scaled to unit length."""
_COSINE = "The score of a label is the\ninner product of both vectors, so"
_FUSED = """A label has its
prototype, its vector and its bias in the label head, and log(1 + n) of the number n of its
training queries, one after the other; a query is searched by [a q; c g; c; t], where g is its
vector in the head, and a, c and t are the weights of prototypes, head and frequency. The score of
a label is the inner product of both, so"""
_PROBABILITY = """

exp(score), divided by its sum over all labels, is the probability that a label drawn from those of
the query is this one. It is what `predict --knn.weight=0` prints as the score of a label."""

# Kind of pooling -> what a vector is, and the weights of its states in code.
_POOLINGS = {
    "mean": ("mean state", "mask"),
    "cls": ("state of the first token", "mask * (mask.cumsum(1) == 1)"),
    "last": ("last state", "mask * (mask.flip(1).cumsum(1).flip(1) == 1)"),
    "weighted_mean": ("mean state, the n-th with weight n", "mask * mask.cumsum(1)"),
}

# Code that computes the vectors q of queries, then scores; for the README.
_QUERIES = {
    "encoder": """
    import numpy as np, torch, transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("tower")
    tower = transformers.AutoModel.from_pretrained("tower").eval()
    texts = tokenizer(["a query"], padding=True, truncation=True, return_tensors="pt",
                      return_token_type_ids=False)
    with torch.no_grad():
        states = tower(**texts).last_hidden_state
    mask = texts["attention_mask"]
    read = texts["input_ids"][0][mask[0] > 0].tolist()
    weights = ({weights})[..., None]
    query = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
""",
    "decoder": """
    import json, numpy as np, torch, transformers

    about = json.load(open("export.json"))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("tower")
    tower = transformers.AutoModel.from_pretrained("tower").eval()
    text = tokenizer("a query", truncation=True)["input_ids"]
    first, last = about["trimmed"]
    read = text[first : len(text) - last]
    ids = about["before"] + read + about["after"]
    with torch.no_grad():
        states = tower(torch.tensor([ids])).last_hidden_state
    mask = torch.ones(1, len(ids))
    weights = ({weights})[..., None]
    query = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
""",
}
_CUT = """    {name} = torch.nn.functional.normalize({name}[:, :{width}], dim=-1)
"""
_SCORES = """    scores = query.numpy() @ np.load("labels.npy").T
"""
_MLP = """    hidden = torch.nn.functional.gelu(query @ head["up_kernel"] + head["up_bias"])
    g = query + hidden @ head["down_kernel"] + head["down_bias"]
"""
_WORDS = """    words = [token % len(head["words"]) for token in read[: int(head["word_tokens"])]]
    g = g + head["words"][words].sum(0) / max(1, len(words)) ** 0.5
"""
_HEAD_SCORES = """    head = np.load("head.npz")
    head = {{name: torch.from_numpy(values) for name, values in head.items()}}
{reading}    g, a, c = torch.nn.functional.normalize(g, dim=-1), head["prototypes"], head["head"]
    terms = torch.stack([c, head["frequency"]]).expand(len(query), 2)
    fused = torch.cat([a * query, c * g, terms], dim=1)
    labels = np.load("labels.npy")[:, : fused.shape[1]]  # The rest is padding.
    scores = fused.numpy() @ labels.T
    probabilities = torch.from_numpy(scores).softmax(dim=1)
"""
_INT8 = """
The vectors of labels_int8.npz, in float32:

    int8 = np.load("labels_int8.npz")
    labels = int8["values"] * int8["scales"][:, :, None]
    labels = np.concatenate([labels.reshape(len(labels), -1), int8["terms"]], axis=1)

They are used in place of those of labels.npy. No entry differs by more than half its scale.
"""
_SENTENCE_TRANSFORMERS = """
q is also `sentence_transformers.SentenceTransformer("tower").encode(["a query"])`.
"""


def _snippet(config: TowerConfig, head: Any, used: int) -> str:
    """Returns code for the README.

    Args:
      config: Of the tower.
      head: From `exporting.host_head`; None without a head.
      used: Columns of the vectors that are searched.
    """
    is_cut = used < config.width
    is_encoder = isinstance(config, EncoderConfig)
    code = _QUERIES["encoder" if is_encoder else "decoder"]
    code = code.format(weights=_POOLINGS[config.pooling][1])
    cut = [_CUT.format(name=name, width=used) if is_cut else "" for name in ("query", "g")]
    if head is None:
        code += cut[0] + _SCORES
    else:
        reading = _MLP if "mlp" in head else "    g = query\n"
        reading += _WORDS if "words" in head else ""
        code += _HEAD_SCORES.format(reading=reading + "".join(cut))
    return code + (_SENTENCE_TRANSFORMERS if is_encoder else "")


def write(
    directory: str,
    predictor: Predictor,
    *,
    like: str | None,
    tower: bool,
    program: bool,
    with_int8: bool = False,
) -> list[str]:
    """Writes an export into an empty directory; returns the names of its files.

    Args:
      directory: Empty.
      predictor: Of the run.
      like: Hugging Face directory or name that the tower was loaded from; None: trained from
        scratch.
      tower: Whether to write the tower as a Hugging Face directory.
      program: Whether to write tower and label head as StableHLO.
      with_int8: Whether to write the vectors of labels as integers of 8 bits, too.

    Raises:
      InputError: If the tower cannot be written in one of these formats.
    """
    model, artifacts = predictor.model, predictor.artifacts
    config, about = model.tower.config, exporting.describe(predictor, model.tower.config)
    params, head = exporting.host_tower(model, predictor.params), exporting.host_head(predictor)
    rows, snippet = [], ""
    if tower:
        path = os.path.join(directory, exporting.TOWER)
        os.mkdir(path)
        exporting.write_tower(
            path,
            model,
            params,
            like=like,
            tokenizer=os.path.join(artifacts.path, store.TOKENIZER),
            max_tokens=about["max_tokens"],
        )
        rows.append("| tower/ | the tower and its tokenizer, for transformers; texts only |\n")
        snippet = _snippet(config, head, predictor.prefix.used)
    if program:
        texts = [text or "a" for text in itertools.islice(artifacts.texts, _NUM_CHECKED)]
        path = os.path.join(directory, exporting.PROGRAM)
        difference = exporting.write_program(path, predictor, params, texts)
        console.status(f"{exporting.PROGRAM}: differs from the run by at most {difference:.1e}")
        rows.append(
            f"| tower.stablehlo | token ids and mask [b, t], int32, to the vectors "
            f"[b, {about['label_width']}] that are searched with: "
            "`jax.export.deserialize(bytearray(data)).call(ids, mask)` |\n"
        )
    if head is not None:
        exporting.write_head(os.path.join(directory, exporting.HEAD), predictor)
        rows.append("| head.npz | how the label head reads queries, and the weights a, c and t |\n")
    if about["images"]:
        exporting.write_projection(os.path.join(directory, "image_projection.npz"), params)
        rows.append("| image_projection.npz | image embeddings to inputs of the tower |\n")
    exporting.write_labels(directory, predictor.view, predictor.prefix, with_int8=with_int8)
    if with_int8:
        rows.append(f"| {exporting.INT8} | the vectors of labels.npy as integers of 8 bits |\n")
        snippet += _INT8
    readme = _README.format(
        name=artifacts.about.name,
        labels=about["labels"],
        width=about["label_width"],
        vectors="unit vectors" if head is None else "vectors",
        scored=_COSINE if head is None else _FUSED,
        probability="" if head is None else _PROBABILITY,
        more="".join(rows),
        pooling=_POOLINGS[about["pooling"]][0],
        cut=_FIRST.format(width=predictor.prefix.used) if not predictor.prefix.is_all else "",
    )
    atomic.write_text(os.path.join(directory, "README.md"), readme + snippet)
    json_files.write(os.path.join(directory, exporting.ABOUT), about)
    return sorted(os.listdir(directory))


def _check_out(path: str) -> None:
    """Checks that `--out` is free, or an earlier export that may be replaced."""
    if not path:
        raise InputError("--out: missing; expected a directory to write")
    if os.path.exists(path) and not os.path.exists(os.path.join(path, exporting.ABOUT)):
        raise InputError(
            f"--out={path}: exists and is not an export of a run; choose another directory, or "
            "remove it"
        )


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.workdir:
        raise InputError("--workdir: missing; expected a run directory that train wrote")
    _check_out(values.out)
    host_memory.bound_freed_pages()
    compilation_cache.enable(values.compile_cache)
    like: Any = values.like or workdir.read_config(values.workdir).model.pretrained or None
    if like and values.tower:
        hf_files.resolve(like, weights=False)  # Fails before anything is encoded.
    predictor = Predictor.load(
        values.workdir,
        data=values.data,
        data_cache=values.data_cache,
        mesh=values.mesh,
        search_config=SearchConfig(
            width=values["search.width"].value, dtype=values["search.dtype"].value
        ),
        with_neighbours=False,  # They cannot be exported; the weights of scores are those without.
        warm=False,
    )
    with errors.writing(f"--out={values.out}"), atomic.directory(values.out) as temporary:
        names = write(
            temporary,
            predictor,
            like=like,
            tower=values.tower,
            program=values.program,
            with_int8=values["search.dtype"].value == "int8",
        )
    print(f"{predictor.num_labels} labels exported: {values.out} ({', '.join(names)})")


def define_flags() -> None:
    """Defines the flags of the command; everything else comes from the run directory."""
    text = flags.DEFINE_string
    text("workdir", "", "Run directory that train wrote.")
    text("out", "", "Directory to write. An earlier export there is replaced.")
    text("like", "", "Hugging Face directory of the original tower, if moved.")
    flags.DEFINE_boolean("tower", True, "Write the tower as a Hugging Face directory.")
    flags.DEFINE_boolean("program", True, "Write tower and label head as a StableHLO program.")
    flags.DEFINE_integer("search.width", 0, "First numbers of vectors to export; 0: all.")
    flags.DEFINE_enum(
        "search.dtype",
        "float32",
        ["float32", "int8"],
        "int8: also write the vectors of labels as integers. A quarter of the size of float32.",
    )
    text(
        "data",
        "",
        "Prepared data, if they have moved. Read only if the serving artifacts must be written.",
    )
    text("mesh", "", "Mesh, if not as in training. 'fsdp:-1' fits any number of devices.")
    compilation_cache.define_flag()
    object_store.define_flag()


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
