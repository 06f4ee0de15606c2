"""The configuration of a run: one flag per dataclass field, checked together, saved as JSON."""

import dataclasses
import json
import re
from typing import Any

import msgspec
from absl import flags

from vixml_jax.errors import InputError
from vixml_jax.flag_groups import (
    BatchConfig,
    EvalConfig,
    FusionConfig,
    HeadConfig,
    KnnConfig,
    LabelsConfig,
    LoopConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    SearchConfig,
)
from vixml_jax.runtime import flag_fields
from vixml_jax.runtime.flag_fields import flag
from vixml_jax.storage import atomic, json_files, sealed

SEARCH = SearchConfig()
_RESTORE = (
    "put the file back from a copy of the run; if it was changed on purpose, remove the line of "
    f'"{sealed.FIELD}"'
)

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
REMOVED = ("batch.prefetch",)  # Without effect on results; earlier versions wrote them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    data: str = flag(
        "glyphs",
        "Directory written by prepare, or a source to prepare. A source such as shop.csv is "
        "prepared with the tokenizer of --model.pretrained, in --data_cache. glyphs: the built-in "
        "data.",
    )
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
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    fusion: FusionConfig = dataclasses.field(default_factory=FusionConfig)
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
        widths = self.loss.widths
        if min(widths, default=1) < 1 or len({*widths}) < len(widths):
            raise InputError(
                f"--loss.widths={','.join(map(str, widths))}: expected different numbers from 1 to "
                "the width of the tower"
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
        if self.head.only and (self.head.weight or self.head.refit):
            raise InputError(
                "--head.only trains the head alone, without --head.weight and --head.refit: leave "
                "out one or the other"
            )
        if self.head.enabled and self.knn.weight and self.knn.joint:
            raise InputError(
                "--knn.joint: labels and training queries cannot be searched as one set in a run "
                "with a label head; leave it out"
            )
        if self.head.only and self.loop.monitor:
            raise InputError(
                f"--loop.monitor={self.loop.monitor} selects an epoch of the tower, and "
                "--head.only trains none: leave out one or the other"
            )
        if self.head.only and self.lora.rank:
            raise InputError(
                f"--lora.rank={self.lora.rank}: --head.only trains no adapters: leave out one or "
                "the other"
            )
        if self.head.enabled and not self.fusion.prototypes and not self.fusion.head:
            raise InputError(
                "--fusion.prototypes=0 and --fusion.head=0: all scores would be equal; give one of "
                "them a weight"
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
        shown = [name if len(name) <= 80 else f"{name[:77]}..." for name in unknown[:8]]
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise InputError(f"unknown settings {', '.join(shown)}{more}")
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        # "Expected `str`, got `array` - at `$.mesh`" -> "--mesh: expected str, got array".
        problem, _, path = str(error).replace("`", "").partition(" - at $.")
        problem = f"--{path}: {problem[0].lower()}{problem[1:]}" if path else problem
        raise InputError(problem) from None


def save(path: str, config: Config) -> None:
    """Writes a configuration with a checksum of its values; `to_json` gives the same without."""
    tree = sealed.stamped(dataclasses.asdict(config))
    atomic.write_text(path, json.dumps(tree, indent=2, sort_keys=True) + "\n")


def load(path: str) -> Config:
    """Reads a configuration that `save` or `to_json` wrote, in this version or version 0.1.

    Raises:
      InputError: If there is no such file, or it is not a configuration.
    """
    if not json_files.is_there(path):
        raise InputError(f"{path}: not found; expected a run directory written by train")
    content = json_files.read_bytes(path, _RESTORE)
    try:
        tree = json.loads(content)  # Not by msgspec, which refuses Infinity.
        tree = msgspec.convert(tree, dict[str, Any])
        config = from_dict(_with_new_names({k: v for k, v in tree.items() if k != sealed.FIELD}))
        if not tree:  # Flags that are missing get their defaults, but no version leaves all out.
            raise ValueError("no settings; put the file back from a copy of the run")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a valid configuration: {error}") from None
    sealed.opened(tree, path, _RESTORE)
    return config


def _with_new_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a nested dict with the new names of settings of version 0.1, without removed ones."""
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for old, new in RENAMED.items():
        (group, name), (new_group, new_name) = old.split("."), new.split(".")
        source, target = tree.get(group), tree.setdefault(new_group, {})
        groups = isinstance(source, dict) and isinstance(target, dict)
        if groups and name in source and new_name not in target:  # Both: `from_dict` refuses old.
            target[new_name] = source.pop(name)
    for group, name in (removed.split(".") for removed in REMOVED):
        if isinstance(tree.get(group), dict):
            tree[group].pop(name, None)
    return tree


def differences(old: Config, new: Config) -> list[str]:
    """Returns the flags in which two configurations differ, with both values."""
    pairs = zip(flag_fields.leaves(old), flag_fields.leaves(new), strict=True)
    return [
        f"--{name}: was {old_value}, now {new_value}"
        for (name, _, old_value), (_, _, new_value) in pairs
        if old_value != new_value
    ]
