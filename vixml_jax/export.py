"""Exports a run's tower and label vectors to formats that other programs read.

python -m vixml_jax.export --workdir=runs/shop --out=exported
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from vixml_jax import command_line, errors, workdir
from vixml_jax.data import store
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.bert import BertConfig
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
| labels.npy | unit vectors of {labels} labels, float32, width {width} |
| labels.parquet | id, text and vector of the same labels, in the same order |
| export.json | how texts are turned into vectors, for programs |
{more}
The vector of a query is the tower's {pooling}, scaled to unit length. The score of a label is the
inner product of both vectors, so any index for maximum inner product search can be used.
"""

_SNIPPETS = {
    "encoder": """
    import numpy as np, torch, transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("tower")
    tower = transformers.AutoModel.from_pretrained("tower").eval()
    texts = tokenizer(["a query"], padding=True, truncation=True, return_tensors="pt",
                      return_token_type_ids=False)
    with torch.no_grad():
        states = tower(**texts).last_hidden_state
    mask = texts["attention_mask"][..., None]
    query = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    scores = query.numpy() @ np.load("labels.npy").T

or `sentence_transformers.SentenceTransformer("tower").encode(["a query"])`.
""",
    "decoder": """
    import json, numpy as np, torch, transformers

    about = json.load(open("export.json"))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("tower")
    tower = transformers.AutoModel.from_pretrained("tower").eval()
    text = tokenizer("a query", truncation=True)["input_ids"]
    first, last = about["trimmed"]
    ids = about["before"] + text[first : len(text) - last] + about["after"]
    with torch.no_grad():
        states = tower(torch.tensor([ids])).last_hidden_state[0]
    pooled = states.mean(0) if about["pooling"] == "mean" else states[-1]
    scores = torch.nn.functional.normalize(pooled, dim=-1).numpy() @ np.load("labels.npy").T
""",
}


def write(
    directory: str, predictor: Predictor, *, like: str | None, tower: bool, program: bool
) -> list[str]:
    """Writes an export into an empty directory; returns the names of its files.

    Args:
      directory: Empty.
      predictor: Of the run.
      like: Hugging Face directory or name that the tower was loaded from; None: trained from
        scratch.
      tower: Whether to write the tower as a Hugging Face directory.
      program: Whether to write the tower as StableHLO.

    Raises:
      InputError: If the tower cannot be written in one of these formats.
    """
    model, artifacts = predictor.model, predictor.artifacts
    config, about = model.tower.config, exporting.describe(predictor, model.tower.config)
    params = exporting.host_tower(model, predictor.params)
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
        snippet = _SNIPPETS["encoder" if isinstance(config, BertConfig) else "decoder"]
    if program:
        texts = [text or "a" for text in itertools.islice(artifacts.texts, _NUM_CHECKED)]
        path = os.path.join(directory, exporting.PROGRAM)
        difference = exporting.write_program(path, predictor, params, texts)
        console.status(f"{exporting.PROGRAM}: differs from the run by at most {difference:.1e}")
        rows.append(
            "| tower.stablehlo | token ids and mask [b, t], int32, to unit vectors [b, e]: "
            "`jax.export.deserialize(bytearray(data)).call(ids, mask)` |\n"
        )
    if about["images"]:
        exporting.write_projection(os.path.join(directory, "image_projection.npz"), params)
        rows.append("| image_projection.npz | image embeddings to inputs of the tower |\n")
    exporting.write_labels(directory, predictor)
    readme = _README.format(
        name=artifacts.about.name,
        labels=about["labels"],
        width=about["width"],
        more="".join(rows),
        pooling="mean state" if about["pooling"] == "mean" else "last state",
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
    host_memory.keep_freed_pages()
    compilation_cache.enable(values.compile_cache)
    like: Any = values.like or workdir.read_config(values.workdir).model.pretrained or None
    if like and values.tower:
        hf_checkpoints.resolve(like, weights=False)  # Fails before anything is encoded.
    predictor = Predictor.load(
        values.workdir, data=values.data, data_cache=values.data_cache, mesh=values.mesh, warm=False
    )
    with errors.writing(f"--out={values.out}"), atomic.directory(values.out) as temporary:
        names = write(temporary, predictor, like=like, tower=values.tower, program=values.program)
    print(f"{predictor.num_labels} labels exported: {values.out} ({', '.join(names)})")


def define_flags() -> None:
    """Defines the flags of the command; everything else comes from the run directory."""
    text = flags.DEFINE_string
    text("workdir", "", "Run directory that train wrote.")
    text("out", "", "Directory to write. An earlier export there is replaced.")
    text("like", "", "Hugging Face directory of the original tower, if moved.")
    flags.DEFINE_boolean("tower", True, "Write the tower as a Hugging Face directory.")
    flags.DEFINE_boolean("program", True, "Write the tower as a StableHLO program.")
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
