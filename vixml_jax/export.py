"""The door out: a run's tower and labels in formats that other programs read."""

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from vixml_jax import errors, workdir
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.bert import BertConfig
from vixml_jax.runtime import compilation_cache, host_memory
from vixml_jax.serving import exporting
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import atomic, object_store

_TRIED_ON = 16  # Texts that a program is tried on.

_README = """# {name}

Exported by vixml_jax from a run on {name}.

| file | what it holds |
|---|---|
| labels.npy | unit vectors of {labels} labels, float32, {width} wide |
| labels.parquet | id, text and vector of the same labels, in the same order |
| export.json | how texts become vectors, for programs |
{more}
A query's vector is the unit vector of the tower's {pooling}. Its inner product with a label's is
their score: any index for inner products will do.
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
    """Fills a directory; returns the names of what is in it.

    Args:
      directory: Empty.
      predictor: Of the run.
      like: The Hugging Face directory or name that the tower was loaded from; None: none.
      tower, program: Whether to write these.

    Raises:
      InputError: If the tower cannot be written so.
    """
    model, answers = predictor.model, predictor.answers
    config, about = model.tower.config, exporting.describe(predictor, model.tower.config)
    params = exporting.host_tower(model, predictor.params)
    more, after = [], ""
    if tower:
        place = os.path.join(directory, exporting.TOWER)
        os.mkdir(place)
        exporting.write_tower(
            place,
            model,
            params,
            like=like,
            tokenizer=os.path.join(answers.path, "tokenizer.json"),
            max_tokens=about["max_tokens"],
        )
        more.append("| tower/ | the tower and its tokenizer, for transformers; texts alone |\n")
        after = _SNIPPETS["encoder" if isinstance(config, BertConfig) else "decoder"]
    if program:
        texts = [text or "a" for text in itertools.islice(answers.texts, _TRIED_ON)]
        place = os.path.join(directory, exporting.PROGRAM)
        difference = exporting.write_program(place, predictor, params, texts)
        print(f"{exporting.PROGRAM}: differs from the run by {difference:.1e} at most")
        more.append(
            "| tower.stablehlo | token ids and mask [b, t], int32, to unit vectors [b, e]: "
            "`jax.export.deserialize(bytearray(data)).call(ids, mask)` |\n"
        )
    if about["pictures"]:
        place = os.path.join(directory, "image_projection.npz")
        exporting.write_projection(place, params)
        more.append("| image_projection.npz | picture embeddings to the tower's tokens |\n")
    exporting.write_labels(directory, predictor)
    pooling = "mean state" if about["pooling"] == "mean" else "last state"
    text = _README.format(name=answers.about["name"], more="".join(more), **about | {
        "pooling": pooling
    })  # fmt: skip
    atomic.write_text(os.path.join(directory, "README.md"), text + after)
    atomic.write_text(os.path.join(directory, exporting.ABOUT), json.dumps(about, indent=2) + "\n")
    return sorted(os.listdir(directory))


def _check_out(path: str) -> None:
    """Refuses to replace a directory that is something else."""
    if not path:
        raise InputError("--out: missing; expected a directory to write")
    if os.path.exists(path) and not os.path.exists(os.path.join(path, exporting.ABOUT)):
        raise InputError(
            f"--out={path}: is there, and no export of a run; choose another name, or remove it"
        )


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.workdir:
        raise InputError("--workdir: missing; expected a run directory that train wrote")
    _check_out(values.out)
    host_memory.keep_freed_pages()
    compilation_cache.keep_in(values.compile_cache)
    like: Any = values.like or workdir.read_config(values.workdir).model.pretrained or None
    if like and values.tower:
        hf_checkpoints.resolve(like, weights=False)  # Found before anything is encoded.
    predictor = Predictor.load(
        values.workdir, data=values.data, data_cache=values.data_cache, mesh=values.mesh, warm=False
    )
    with errors.writing(f"--out={values.out}"), atomic.directory(values.out) as temporary:
        names = write(temporary, predictor, like=like, tower=values.tower, program=values.program)
    print(f"{predictor.num_labels} labels exported: {values.out} ({', '.join(names)})")


def define_flags() -> None:
    """The flags of this door; all else comes from the run directory."""
    text = flags.DEFINE_string
    text("workdir", "", "Run directory that train wrote.")
    text("out", "", "Directory to write; an earlier export there is replaced.")
    text("like", "", "Hugging Face directory that the tower began as, if it has moved.")
    flags.DEFINE_boolean("tower", True, "Write the tower as a Hugging Face directory.")
    flags.DEFINE_boolean("program", True, "Write the query tower as StableHLO.")
    text("data", "", "Prepared data, if they have moved; read only where labels must be encoded.")
    text("mesh", "", "Mesh to encode on, if not as trained: fsdp:-1 fits any devices.")
    compilation_cache.define_flag()
    object_store.define_flag()


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
