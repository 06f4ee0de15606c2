"""Every flag of a run: frozen dataclasses, a group a room, checked together, saved with it."""

import dataclasses
import json
import re
from typing import Any

from absl import flags
from etils import epath

from vixml_jax.errors import InputError


def _flag(default: Any, help: str, **checks: Any) -> Any:
    """A field that becomes a flag; `checks` are lower_bound, upper_bound or choices."""
    made = (
        {"default_factory": lambda: default} if isinstance(default, list) else {"default": default}
    )
    return dataclasses.field(**made, metadata={"help": help, **checks})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The tower that reads text and pictures."""

    pretrained: str = _flag(
        "", "Hugging Face directory or hub name to start from; empty: from scratch, by the sizes."
    )
    family: str = _flag(
        "encoder",
        "Kind of a tower from scratch: an 'encoder' as BERT, or a 'decoder' as Qwen3.",
        choices=("encoder", "decoder"),
    )
    num_layers: int = _flag(4, "Layers of a tower from scratch.", lower_bound=1)
    width: int = _flag(256, "Width of a tower from scratch.", lower_bound=1)
    num_heads: int = _flag(4, "Attention heads of a tower from scratch.", lower_bound=1)
    mlp_width: int = _flag(1024, "Feed-forward width of a tower from scratch.", lower_bound=1)
    dropout: float = _flag(
        -1.0,
        "Dropout of the tower in training; -1: as the checkpoint says, 0.1 from scratch.",
        lower_bound=-1.0,
        upper_bound=0.9,
    )
    num_images: int = _flag(3, "Pictures read of each item at most; 0: text only.", lower_bound=0)
    image_init: str = _flag(
        "regression",
        "Start of the image projection: 'regression' onto the mean word embedding of the "
        "item's labels in training, or 'random' as published.",
        choices=("regression", "random"),
    )
    pooling: str = _flag(
        "mean",
        "An item's vector: the 'mean' of its states, or the 'last' (decoders alone).",
        choices=("mean", "last"),
    )
    causal: bool = _flag(
        True, "Whether a decoder's positions see only those before them, as pretrained."
    )
    dtype: str = _flag("float32", "What the tower computes in.", choices=("float32", "bfloat16"))
    scan: bool = _flag(
        False, "Compile one layer and loop over it: faster to compile, slower on small towers."
    )
    remat: bool = _flag(False, "Recompute activations in the backward pass: less memory.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What stands around the text and the pictures of an item before a decoder."""

    text: str = _flag("Text: ", "Before the text.")
    images: str = _flag(" Images: ", "Before the pictures, where there are some.")
    order: str = _flag("text_image", "Which comes first.", choices=("text_image", "image_text"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, beside a decoder that is itself frozen."""

    rank: int = _flag(0, "Rank of the adapters; 0: the whole tower is trained.", lower_bound=0)
    alpha: float = _flag(
        256.0, "Adapters are multiplied by alpha / sqrt(rank) (rsLoRA).", lower_bound=0.0
    )
    maps: list[str] = _flag(
        ["query", "key", "value", "out", "gate", "up", "down"], "Which linear maps have one."
    )
    base_dtype: str = _flag(
        "bfloat16", "What the frozen weights are kept in.", choices=("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Label prototypes: free vectors, centroids and the network that combines them."""

    prototypes: bool = _flag(True, "Enrich labels by the combiner; off: the tower's vector alone.")
    num_free: int = _flag(
        65536, "Free vectors shared by all labels, at most one a label.", lower_bound=1
    )
    free_init: str = _flag(
        "uniform",
        "Start of the free vectors: small and 'uniform', or the mean 'embedding' of their labels.",
        choices=("uniform", "embedding"),
    )
    free_update: str = _flag(
        "dense",
        "Which free vectors a step moves: all by their momentum, 'dense' as published, or those of "
        "the batch's labels alone, 'sparse', so that the others cost nothing.",
        choices=("dense", "sparse"),
    )
    centroids: str = _flag(
        "stale",
        "How centroids follow training: 'stale' from embeddings as last seen in "
        "training, 'exact' by encoding anew each epoch, 'moving' average.",
        choices=("stale", "exact", "moving"),
    )
    num_heads: int = _flag(8, "Attention heads of the combiner.", lower_bound=1)
    mlp_width: int = _flag(1024, "Feed-forward width of the combiner.", lower_bound=1)
    dropout: float = _flag(0.1, "Dropout of the combiner.", lower_bound=0.0, upper_bound=0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss."""

    num_negatives: int = _flag(10, "Hardest negatives of each row.", lower_bound=1)
    margin_min: float = _flag(0.1, "Smallest margin.", lower_bound=0.0, upper_bound=2.0)
    margin_max: float = _flag(0.3, "Largest margin.", lower_bound=0.0, upper_bound=2.0)
    temperature: float = _flag(
        0.1, "Softmax temperature that weighs the negatives.", lower_bound=1e-4
    )
    regulariser: float = _flag(0.1, "Weight of the prototype margin term.", lower_bound=0.0)
    tie_gradient: bool = _flag(
        True, "Half a gradient where a hinge is exactly zero, as published; off: none."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Which queries meet which labels, and how they are packed."""

    size: int = _flag(1024, "Queries of a batch, over all devices.", lower_bound=2)
    row_width: int = _flag(64, "Positions of a packed row.", lower_bound=8)
    positives: str = _flag(
        "inverse_propensity",
        "How the positive of a query is drawn.",
        choices=("inverse_propensity", "uniform"),
    )
    image_dropout: float = _flag(
        0.0,
        "Share of queries and labels, drawn anew each time, whose pictures training hides, so "
        "that the model stays good without them.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    cluster_start: int = _flag(
        10,
        "Epoch (from 0) at whose end queries are first clustered; -1: batches stay random.",
        lower_bound=-1,
    )
    cluster_every: int = _flag(5, "Epochs between clusterings.", lower_bound=1)
    cluster_size: int = _flag(16, "Queries of a cluster at first.", lower_bound=1)
    curriculum: list[int] = _flag([], "Epochs at whose end the cluster size doubles.")
    threads: int = _flag(1, "Threads that prepare batches.", lower_bound=1)
    encode_chunk: int = _flag(
        0,
        "Packed rows a device that the tower reads at a time, computed again in the backward "
        "pass: memory grows with it, not with the batch; 0: all at once.",
        lower_bound=0,
    )
    prefetch: int = _flag(4, "Batches prepared ahead.", lower_bound=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its groups and its schedule."""

    learning_rate: float = _flag(1e-4, "Peak rate of the tower.", lower_bound=0.0)
    label_learning_rate: float = _flag(
        1e-3, "Peak rate of the combiner and the free vectors.", lower_bound=0.0
    )
    image_learning_rate: float = _flag(1e-3, "Peak rate of the image projection.", lower_bound=0.0)
    weight_decay: float = _flag(
        0.01, "Decay of all but biases, norms and free vectors.", lower_bound=0.0
    )
    warmup_steps: int = _flag(100, "Steps from rate zero to the peak.", lower_bound=0)
    clip_norm: float = _flag(0.0, "Largest norm of a gradient; 0: not clipped.", lower_bound=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, and what is written on the way."""

    epochs: int = _flag(10, "Passes over the training queries.", lower_bound=0)
    eval_every: int = _flag(
        0,
        "Epochs between evaluations, on the validation split where the data have one; 0: at the "
        "end alone.",
        lower_bound=0,
    )
    choose_by: str = _flag(
        "",
        "Metric of the validation split, P@1 say, by which the best of the epochs evaluated "
        "becomes the run's model (each evaluation then reads the training queries once more); "
        "empty: the last epoch, as published.",
    )
    patience: int = _flag(
        0,
        "Evaluations in a row without a better --loop.choose_by after which training stops; "
        "0: never.",
        lower_bound=0,
    )
    save_every: int = _flag(
        500,
        "Steps between checkpoints, written in the background; each epoch ends in one, too.",
        lower_bound=1,
    )
    save_minutes: float = _flag(
        0.0, "Minutes after which one is due whatever the step; 0: never.", lower_bound=0.0
    )
    keep: int = _flag(
        2, "Newest checkpoints kept; while one is written there is one more.", lower_bound=1
    )
    log_every: int = _flag(10, "Steps between lines of metrics.jsonl.", lower_bound=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a run is judged."""

    block: int = _flag(1024, "Items encoded at a time.", lower_bound=8)
    k: int = _flag(100, "Labels retrieved for each query.", lower_bound=1)
    memory_weight: float = _flag(
        0.0,
        "What the labels of near training queries count beside those found by their own vectors "
        "(retrieval-augmented inference; 0.1 as published); 0: nothing.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    memory_k: int = _flag(100, "Training queries that each query remembers.", lower_bound=1)
    memory_temperature: float = _flag(
        0.05, "What scores are divided by before labels and memory share.", lower_bound=1e-4
    )
    memory_joint: bool = _flag(
        False,
        "Labels and training queries are searched as one set, of which the best count, as many as "
        "there would be labels; off: each by itself.",
    )
    vote: bool = _flag(False, "Set the learning-free nearest-neighbour vote beside the result.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How labels are searched. No part of a run: it may differ each time."""

    recall: float = _flag(
        0.99,
        "Share of the exact best labels that --search=scann is tuned to find.",
        lower_bound=0.01,
        upper_bound=1.0,
    )
    sample: int = _flag(1000, "Queries that it is tuned on at most.", lower_bound=1)
    query_block: int = _flag(1024, "Queries searched exactly at a time.", lower_bound=1)
    label_block: int = _flag(
        65536,
        "Labels scored exactly at a time on each device: the scores of a block take "
        "4 * query_block * label_block bytes.",
        lower_bound=1,
    )
    memory_gb: float = _flag(
        0.0, "Memory of the host that search may take; 0: what is left.", lower_bound=0.0
    )


SEARCH = SearchConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    data: str = _flag("glyphs", "Directory written by prepare, or 'glyphs', the built-in data.")
    workdir: str = _flag("runs/default", "Run directory; an unfinished run in it is resumed.")
    seed: int = _flag(0, "One seed, one run.", lower_bound=0)
    mesh: str = _flag(
        "replica:1,fsdp:-1,tensor:1",
        "Devices along each axis of the mesh: copies of the weights (replica, the slowest links), "
        "their rows and those of batches (fsdp), heads and wide layers (tensor); -1: the rest.",
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    labels: LabelsConfig = dataclasses.field(default_factory=LabelsConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for group, field, value in _leaves(self):
            _check_bounds(group + field.name, value, field.metadata)
        if self.loss.margin_min > self.loss.margin_max:
            raise InputError(
                f"--loss.margin_min={self.loss.margin_min} is above "
                f"--loss.margin_max={self.loss.margin_max}"
            )
        if self.loss.num_negatives >= self.batch.size:
            raise InputError(
                f"--loss.num_negatives={self.loss.num_negatives}: a batch of "
                f"--batch.size={self.batch.size} has at most {self.batch.size - 1} negatives"
            )
        if self.model.num_images >= self.batch.row_width:
            raise InputError(
                f"--model.num_images={self.model.num_images} leaves no place for text in rows of "
                f"--batch.row_width={self.batch.row_width}"
            )
        if self.loop.patience and not self.loop.choose_by:
            raise InputError(
                f"--loop.patience={self.loop.patience}: nothing to wait for; set "
                "--loop.choose_by=P@1, say"
            )
        if self.loop.choose_by and not self.loop.eval_every:
            raise InputError(
                f"--loop.choose_by={self.loop.choose_by}: no epoch is evaluated; set "
                "--loop.eval_every=1, say"
            )
        if self.lora.rank and not self.model.pretrained:
            raise InputError(
                f"--lora.rank={self.lora.rank}: adapters stand beside pretrained weights; set "
                "--model.pretrained"
            )
        if not self.model.pretrained and self.model.width % self.model.num_heads:
            raise InputError(
                f"--model.width={self.model.width} is not a multiple of "
                f"--model.num_heads={self.model.num_heads}"
            )
        mesh_sizes(self.mesh)

    def to_json(self) -> str:
        """The flags as JSON text, sorted, so that equal runs have equal text."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


def mesh_sizes(mesh: str) -> dict[str, int]:
    """Devices along each axis that `--mesh` names, by the axis; at most one is -1, the rest.

    Raises:
      InputError: If it is not a mesh.
    """
    sizes = {"replica": 1, "fsdp": -1, "tensor": 1}
    expected = (
        f"--mesh={mesh}: expected sizes as in --mesh=replica:1,fsdp:-1,tensor:1 (an axis left out "
        "is as there; -1 takes the devices that are left)"
    )
    named = set()
    for part in str(mesh).split(",") if mesh else ():
        name, _, size = part.partition(":")
        if name not in sizes:
            raise InputError(f"{expected}; {name!r} is none of {', '.join(sizes)}")
        if name in named:
            raise InputError(f"{expected}; {name} is named twice")
        if not re.fullmatch("-1|[1-9][0-9]{0,8}", size):
            raise InputError(f"{expected}; {size!r} is no number of devices for {name}")
        named.add(name)
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        rest = [name for name, size in sizes.items() if size == -1]
        raise InputError(f"{expected}; {' and '.join(rest)} cannot both be the rest")
    return sizes


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, dataclasses.Field, Any]]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += _leaves(value, f"{prefix}{field.name}.")
        else:
            found.append((prefix, field, value))
    return found


def _check_bounds(name: str, value: Any, checks: Any) -> None:
    low, high, choices = (checks.get(key) for key in ("lower_bound", "upper_bound", "choices"))
    if choices and value not in choices:
        raise InputError(f"--{name}={value}: expected one of {', '.join(choices)}")
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"--{name}={value}: expected {wanted}")


_DEFINE = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag a field: `--group.field`. Call it once, in a door.

    Bounds and choices are checked when the `Config` is made, so that flags and saved files are
    held to the same.
    """
    _define(_leaves(Config()), values)


def define_group(name: str, group: type, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of a group that is no part of a run's configuration: `--name.field`."""
    _define(_leaves(group(), f"{name}."), values)


def _define(leaves: list[tuple[str, dataclasses.Field, Any]], values: flags.FlagValues) -> None:
    for prefix, field, value in leaves:
        text = field.metadata["help"]
        if field.metadata.get("choices"):
            text += f" One of: {', '.join(field.metadata['choices'])}."
        if isinstance(value, list):
            default = [str(item) for item in value]
            flags.DEFINE_list(prefix + field.name, default, text, flag_values=values)
        else:
            _DEFINE[type(value)](prefix + field.name, value, text, flag_values=values)


def from_flags(values: flags.FlagValues) -> Config:
    """The configuration that the parsed flags say.

    Raises:
      InputError: If a value is out of its bounds or flags contradict each other.
    """
    return from_dict(_parsed(_leaves(Config()), values))


def group_from_flags(name: str, group: type, values: flags.FlagValues) -> Any:
    """The group, of that type, that the parsed flags say.

    Raises:
      InputError: If a value is out of its bounds.
    """
    made = group(**_parsed(_leaves(group(), f"{name}."), values)[name])
    for prefix, field, value in _leaves(made, f"{name}."):
        _check_bounds(prefix + field.name, value, field.metadata)
    return made


def _parsed(
    leaves: list[tuple[str, dataclasses.Field, Any]], values: flags.FlagValues
) -> dict[str, Any]:
    """What the flags say, a dict for each group."""
    tree: dict[str, Any] = {}
    for prefix, field, default in leaves:
        value = values[prefix + field.name].value
        if isinstance(default, list):
            kind = type(default[0]) if default else int
            try:
                value = [kind(item) for item in value]
            except ValueError:
                raise InputError(
                    f"--{prefix}{field.name}={','.join(value)}: expected integers separated by "
                    "commas"
                ) from None
        group = tree.setdefault(prefix[:-1], {}) if prefix else tree
        group[field.name] = value
    return tree


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`; missing fields take their defaults."""
    made = dict(tree)
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default_factory) and field.name in made:
            made[field.name] = field.default_factory(**made[field.name])
    return Config(**made)


def load(path: str) -> Config:
    """Reads a configuration that `to_json` wrote.

    Raises:
      InputError: If there is no such file or it is not a configuration of this version.
    """
    if not epath.Path(path).exists():
        raise InputError(f"{path}: not found; expected a run directory that train wrote")
    try:
        return from_dict(json.loads(epath.Path(path).read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{path}: not a configuration of this version: {error}") from None


def differences(old: Config, new: Config) -> list[str]:
    """The flags in which two configurations differ, as `--flag=old (was), new`."""
    return [
        f"--{prefix}{field.name}: {was} there, {now} here"
        for (prefix, field, was), (_, _, now) in zip(_leaves(old), _leaves(new), strict=True)
        if was != now
    ]
