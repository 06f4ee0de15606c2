"""The configuration of a run: one flag per dataclass field, checked together, saved as JSON."""

import dataclasses
import json
import re
from typing import Any

import msgspec
from absl import flags
from etils import epath

from vixml_jax.errors import InputError
from vixml_jax.runtime import flag_fields
from vixml_jax.runtime.flag_fields import flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The tower: the encoder or decoder that embeds text and images."""

    pretrained: str = flag(
        "",
        "Hugging Face directory or model name to start from. Empty: a tower from scratch with the "
        "sizes below.",
    )
    family: str = flag(
        "encoder",
        "Kind of a tower from scratch. An encoder is like BERT, a decoder like Qwen3.",
        choices=("encoder", "decoder"),
    )
    num_layers: int = flag(4, "Layers of a tower from scratch.", lower_bound=1)
    width: int = flag(256, "Width of a tower from scratch.", lower_bound=1)
    num_heads: int = flag(4, "Attention heads of a tower from scratch.", lower_bound=1)
    mlp_width: int = flag(1024, "Feed-forward width of a tower from scratch.", lower_bound=1)
    dropout: float = flag(
        -1.0,
        "Dropout rate of an encoder in training. -1: that of the checkpoint, or 0.1 from scratch.",
        lower_bound=-1.0,
        upper_bound=0.9,
    )
    num_images: int = flag(3, "Images read per item at most; 0: text only.", lower_bound=0)
    image_init: str = flag(
        "regression",
        "Initial image projection. regression: fitted to the mean token embedding of the labels of "
        "training items; random: as published.",
        choices=("regression", "random"),
    )
    pooling: str = flag(
        "mean",
        "How token states become one vector. mean: their mean; last: the last state, with decoders "
        "only.",
        choices=("mean", "last"),
    )
    causal: bool = flag(
        True,
        "Causal attention in a decoder, as in pretraining. Off: positions attend in both "
        "directions.",
    )
    dtype: str = flag(
        "float32", "Data type that the tower computes in.", choices=("float32", "bfloat16")
    )
    scan: bool = flag(
        False,
        "Compile one layer and loop over it. Compilation is faster, but steps of small towers are "
        "slower.",
    )
    remat: bool = flag(False, "Recompute activations in the backward pass to save memory.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The prompt around the text and images of an item, for decoders."""

    text: str = flag("Text: ", "Prompt before the text.")
    images: str = flag(" Images: ", "Prompt before the images; left out of items without images.")
    order: str = flag(
        "text_image", "Order of text and images.", choices=("text_image", "image_text")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of a frozen decoder, rank-stabilised (rsLoRA)."""

    rank: int = flag(
        0, "Rank of LoRA adapters (decoders only); 0: train all weights.", lower_bound=0
    )
    alpha: float = flag(256.0, "Adapters are scaled by alpha / sqrt(rank).", lower_bound=0.0)
    maps: list[str] = flag(
        ["query", "key", "value", "out", "gate", "up", "down"],
        "Linear maps that have adapters.",
    )
    base_dtype: str = flag(
        "bfloat16", "Data type of the frozen weights.", choices=("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Label prototypes: free vectors, centroids and the network that combines them."""

    prototypes: bool = flag(
        True,
        "Represent labels by prototypes. Off: by the tower's vector of the label text alone.",
    )
    num_free: int = flag(
        65536,
        "Number of free vectors, which labels share. At most one per label is used.",
        lower_bound=1,
    )
    free_init: str = flag(
        "uniform",
        "Initial free vectors. uniform: small random values; embedding: the mean embedding of the "
        "labels that share one.",
        choices=("uniform", "embedding"),
    )
    free_update: str = flag(
        "dense",
        "Free vectors that a step updates. dense: all, by their momentum, as published; sparse: "
        "those of the labels in the batch, which is faster with many labels.",
        choices=("dense", "sparse"),
    )
    centroids: str = flag(
        "stale",
        "How label centroids follow training. stale: from the embeddings last seen in training; "
        "exact: all training queries are encoded again each epoch; moving: a moving average.",
        choices=("stale", "exact", "moving"),
    )
    num_heads: int = flag(8, "Attention heads of the combiner.", lower_bound=1)
    mlp_width: int = flag(1024, "Feed-forward width of the combiner.", lower_bound=1)
    dropout: float = flag(0.1, "Dropout rate of the combiner.", lower_bound=0.0, upper_bound=0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss."""

    num_negatives: int = flag(10, "Hardest negatives per row.", lower_bound=1)
    margin_min: float = flag(0.1, "Smallest margin.", lower_bound=0.0, upper_bound=2.0)
    margin_max: float = flag(0.3, "Largest margin.", lower_bound=0.0, upper_bound=2.0)
    temperature: float = flag(
        0.1, "Temperature of the softmax that weights the negatives.", lower_bound=1e-4
    )
    regulariser: float = flag(0.1, "Weight of the prototype margin loss.", lower_bound=0.0)
    tie_gradient: bool = flag(
        True, "Gradient 0.5 where a hinge is exactly zero, as published. Off: gradient 0."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sampling and packing of batches."""

    size: int = flag(1024, "Queries per batch, over all devices.", lower_bound=2)
    row_width: int = flag(64, "Positions per packed row.", lower_bound=8)
    positives: str = flag(
        "inverse_propensity",
        "How the positive label of a query is sampled.",
        choices=("inverse_propensity", "uniform"),
    )
    image_dropout: float = flag(
        0.0,
        "Fraction of items whose images are dropped in training. Drawn anew in each batch; keeps "
        "the model accurate for items without images.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    cluster_start: int = flag(
        10,
        "Epoch (from 0) after which queries are first clustered. -1: batches stay random.",
        lower_bound=-1,
    )
    cluster_every: int = flag(5, "Epochs between clusterings.", lower_bound=1)
    cluster_size: int = flag(16, "Queries per cluster at first.", lower_bound=1)
    curriculum: list[int] = flag([], "Epochs (from 0) after which the cluster size doubles.")
    threads: int = flag(1, "Threads that prepare batches.", lower_bound=1)
    microbatch_rows: int = flag(
        0,
        "Packed rows per device that the tower reads at once; 0: all. Rows are recomputed in the "
        "backward pass, so memory grows with this number instead of the batch size.",
        lower_bound=0,
    )
    prefetch: int = flag(4, "Batches prepared ahead.", lower_bound=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with parameter groups and a schedule."""

    learning_rate: float = flag(1e-4, "Peak learning rate of the tower.", lower_bound=0.0)
    label_learning_rate: float = flag(
        1e-3, "Peak learning rate of the combiner and free vectors.", lower_bound=0.0
    )
    image_learning_rate: float = flag(
        1e-3, "Peak learning rate of the image projection.", lower_bound=0.0
    )
    weight_decay: float = flag(
        0.01, "Weight decay, except of biases, norms and free vectors.", lower_bound=0.0
    )
    warmup_steps: int = flag(
        100, "Steps of linear warm-up from 0 to the peak learning rates.", lower_bound=0
    )
    clip_norm: float = flag(0.0, "Largest global gradient norm; 0: no clipping.", lower_bound=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of training, evaluations, checkpoints and logging."""

    epochs: int = flag(10, "Passes over the training queries.", lower_bound=0)
    eval_every: int = flag(
        0,
        "Epochs between evaluations in training; 0: only at the end. They use the validation split "
        "if the data have one, else the test split.",
        lower_bound=0,
    )
    monitor: str = flag(
        "",
        "Validation metric that selects the best epoch, such as P@1. Empty: the last epoch is the "
        "model, as published. Needs --loop.eval_every; each evaluation then also reads the "
        "training queries.",
    )
    patience: int = flag(
        0,
        "Evaluations without improvement before stopping; 0: never. Needs --loop.monitor.",
        lower_bound=0,
    )
    save_every: int = flag(
        500,
        "Steps between checkpoints. They are written in the background; each epoch ends with one "
        "as well.",
        lower_bound=1,
    )
    save_minutes: float = flag(
        0.0, "Minutes between checkpoints, in addition; 0: no such limit.", lower_bound=0.0
    )
    max_to_keep: int = flag(
        2,
        "Newest checkpoints to keep. There is one more while it is written.",
        lower_bound=1,
    )
    log_every: int = flag(10, "Steps between lines of metrics.jsonl.", lower_bound=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of a run."""

    block: int = flag(1024, "Items encoded at a time.", lower_bound=8)
    k: int = flag(100, "Labels retrieved per query.", lower_bound=1)
    knn_baseline: bool = flag(False, "Also evaluate the training-free kNN baseline.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Retrieval-augmented inference: labels of the nearest training queries are mixed in."""

    weight: float = flag(
        0.0,
        "Weight of labels of the nearest training queries; 0: off. They are mixed with the labels "
        "found by search; the paper uses 0.1.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    k: int = flag(100, "Training queries retrieved per query.", lower_bound=1)
    temperature: float = flag(
        0.05,
        "Softmax temperature of label and training query scores.",
        lower_bound=1e-4,
    )
    joint: bool = flag(
        False,
        "Search labels and training queries as one set. The best of both are kept. Off: each set "
        "is searched by itself.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How labels are searched. Not part of a run: it may differ each time."""

    recall: float = flag(
        0.99,
        "Recall of exact search that --search=scann must reach. The index is tuned to it.",
        lower_bound=0.01,
        upper_bound=1.0,
    )
    sample: int = flag(1000, "Queries that the index is tuned on at most.", lower_bound=1)
    query_block: int = flag(1024, "Queries searched exactly at a time.", lower_bound=1)
    label_block: int = flag(
        65536,
        "Labels scored exactly at a time on each device. The scores of a block take 4 * "
        "query_block * label_block bytes.",
        lower_bound=1,
    )
    memory_gb: float = flag(
        0.0, "Host memory in GB that search may use; 0: what is available.", lower_bound=0.0
    )


SEARCH = SearchConfig()

# Flags of version 0.1 and their new names. Commands refuse an old name with an error that gives the
# new one; saved configurations with old names are still read.
RENAMED = {
    "batch.encode_chunk": "batch.microbatch_rows",
    "eval.memory_weight": "knn.weight",
    "eval.memory_k": "knn.k",
    "eval.memory_temperature": "knn.temperature",
    "eval.memory_joint": "knn.joint",
    "eval.vote": "eval.knn_baseline",
    "loop.choose_by": "loop.monitor",
    "loop.keep": "loop.max_to_keep",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    data: str = flag("glyphs", "Directory written by prepare; glyphs: the built-in data.")
    workdir: str = flag("runs/default", "Run directory; an unfinished run in it is resumed.")
    seed: int = flag(
        0, "Seed of all random draws. Equal flags and seed give equal results.", lower_bound=0
    )
    mesh: str = flag(
        "replica:1,fsdp:-1,tensor:1",
        "Devices along each mesh axis; -1: all that remain. replica holds copies of the weights "
        "(for the slowest links), fsdp shards weights and batches, tensor shards attention heads "
        "and wide layers.",
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
    knn: KnnConfig = dataclasses.field(default_factory=KnnConfig)

    def __post_init__(self) -> None:
        flag_fields.check_bounds(self)
        if self.loss.margin_min > self.loss.margin_max:
            raise InputError(
                f"--loss.margin_min={self.loss.margin_min} is above "
                f"--loss.margin_max={self.loss.margin_max}"
            )
        if self.loss.num_negatives >= self.batch.size:
            raise InputError(
                f"--loss.num_negatives={self.loss.num_negatives}: a batch of "
                f"--batch.size={self.batch.size} has at most {self.batch.size - 1} negatives per "
                "row"
            )
        if self.model.num_images >= self.batch.row_width:
            raise InputError(
                f"--model.num_images={self.model.num_images} leaves no positions for text in rows "
                f"of --batch.row_width={self.batch.row_width}"
            )
        if self.loop.patience and not self.loop.monitor:
            raise InputError(
                f"--loop.patience={self.loop.patience} needs a metric to wait for: set "
                "--loop.monitor, for example to P@1"
            )
        if self.loop.monitor and not self.loop.eval_every:
            raise InputError(
                f"--loop.monitor={self.loop.monitor} needs evaluations in training: set "
                "--loop.eval_every, for example to 1"
            )
        if self.lora.rank and not self.model.pretrained:
            raise InputError(
                f"--lora.rank={self.lora.rank}: adapters need pretrained weights: set "
                "--model.pretrained"
            )
        if not self.model.pretrained and self.model.width % self.model.num_heads:
            raise InputError(
                f"--model.width={self.model.width} is not a multiple of "
                f"--model.num_heads={self.model.num_heads}"
            )
        mesh_sizes(self.mesh)

    def to_json(self) -> str:
        """Returns the flags as JSON with sorted keys, so equal configurations give equal text."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


def mesh_sizes(mesh: str) -> dict[str, int]:
    """Returns the number of devices along each axis of `--mesh`; at most one is -1 (the rest).

    Raises:
      InputError: If the flag is malformed.
    """
    sizes = {"replica": 1, "fsdp": -1, "tensor": 1}
    expected = (
        f"--mesh={mesh}: expected sizes such as --mesh=replica:1,fsdp:-1,tensor:1 (these are the "
        "defaults of each axis; -1 takes the remaining devices)"
    )
    given = set()
    for part in str(mesh).split(",") if mesh else ():
        name, _, size = part.partition(":")
        if name not in sizes:
            raise InputError(f"{expected}; {name!r} is none of {', '.join(sizes)}")
        if name in given:
            raise InputError(f"{expected}; {name} is given twice")
        if not re.fullmatch("-1|[1-9][0-9]{0,8}", size):
            raise InputError(f"{expected}; {size!r} is not a number of devices for {name}")
        given.add(name)
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        rest = [name for name, size in sizes.items() if size == -1]
        raise InputError(f"{expected}; {' and '.join(rest)} cannot both take the rest")
    return sizes


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag per field, `--group.field`; to be called once, in an entry point."""
    flag_fields.define(Config(), values)


def define_group(name: str, group: type, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags `--name.field` of a group that is not part of a run's configuration."""
    flag_fields.define(group(), values, f"{name}.")


def from_flags(values: flags.FlagValues) -> Config:
    """Returns the configuration of the parsed flags.

    Raises:
      InputError: If a value is out of bounds, or flags contradict each other.
    """
    return from_dict(flag_fields.parsed(Config(), values))


def group_from_flags(name: str, group: type, values: flags.FlagValues) -> Any:
    """Returns the group of the parsed flags, of the given type.

    Raises:
      InputError: If a value is out of bounds.
    """
    config = group(**flag_fields.parsed(group(), values, f"{name}.")[name])
    flag_fields.check_bounds(config, f"{name}.")
    return config


def from_dict(tree: dict[str, Any]) -> Config:
    """Returns the configuration of `dataclasses.asdict`; missing fields take their defaults.

    Raises:
      InputError: If a field is unknown or of another type, or a value is out of bounds.
    """
    known = {name for name, _, _ in flag_fields.leaves(Config())}
    unknown = sorted(flag_fields.names(tree) - known)
    if unknown:
        raise InputError(f"unknown settings {', '.join(unknown)}")
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        # "Expected `str`, got `array` - at `$.mesh`" -> "--mesh: expected str, got array".
        problem, _, path = str(error).replace("`", "").partition(" - at $.")
        problem = f"--{path}: {problem[0].lower()}{problem[1:]}" if path else problem
        raise InputError(problem) from None


def load(path: str) -> Config:
    """Reads a configuration that `to_json` wrote, in this version or version 0.1.

    Raises:
      InputError: If there is no such file, or it is not a configuration.
    """
    if not epath.Path(path).exists():
        raise InputError(f"{path}: not found; expected a run directory written by train")
    try:
        tree = json.loads(epath.Path(path).read_bytes())  # Not by msgspec, which refuses Infinity.
        return from_dict(_with_new_names(msgspec.convert(tree, dict[str, Any])))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a valid configuration: {error}") from None


def _with_new_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a nested dict in which settings of version 0.1 have their new names."""
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for old, new in RENAMED.items():
        (group, name), (new_group, new_name) = old.split("."), new.split(".")
        source, target = tree.get(group), tree.setdefault(new_group, {})
        groups = isinstance(source, dict) and isinstance(target, dict)
        if groups and name in source and new_name not in target:  # Both: `from_dict` refuses old.
            target[new_name] = source.pop(name)
    return tree


def differences(old: Config, new: Config) -> list[str]:
    """Returns the flags in which two configurations differ, with both values."""
    pairs = zip(flag_fields.leaves(old), flag_fields.leaves(new), strict=True)
    return [
        f"--{name}: was {old_value}, now {new_value}"
        for (name, _, old_value), (_, _, new_value) in pairs
        if old_value != new_value
    ]
