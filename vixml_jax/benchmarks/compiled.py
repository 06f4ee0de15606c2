"""Programs compiled for accelerators that need not exist: memory, traffic, work and least time.

    python -m vixml_jax.benchmarks.compiled [--devices=h100:1,h100:8,v5e:2x4] [--meshes=fsdp,tensor]
        [--programs=minilm,qwen] [--out=FILE]

Training steps, the step of the label head, encoding, exact search and image embedding, from shapes
alone. Each row of the table is of one device: GiB of arguments, temporaries and outputs, seconds of
compiling on this machine, bytes of device memory read and written, bytes sent, operations of matrix
products, and the least time of a run by each of the three at the published speeds.
"""

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from vixml_jax import command_line
from vixml_jax.benchmarks.train_step import IMAGE_WIDTH, layout_of
from vixml_jax.config import BatchConfig, Config, LoraConfig, ModelConfig
from vixml_jax.flag_groups import HeadConfig
from vixml_jax.models import published_towers as towers
from vixml_jax.models.siglip import SiglipConfig, VisionTower
from vixml_jax.parallel import absent_devices, accelerators, sharding
from vixml_jax.training import build
from vixml_jax.training.memory_planner import DataSizes, beside_arguments
from vixml_jax.training.planning import programs
from vixml_jax.training.planning.programs import Lengths, Program

# Sizes of LF-AmazonTitles-131K, and of LF-AmazonTitles-1.3M for exact search.
SIZES = DataSizes(queries=294_805, labels=131_073, labels_per_query=2.3)
MANY = DataSizes(queries=2_248_619, labels=1_305_265, labels_per_query=22.2)
SO400M = SiglipConfig(
    image_size=384, patch_size=14, num_layers=27, width=1152, num_heads=16, mlp_width=4304,
    dtype="bfloat16",
)  # fmt: skip
IMAGES = 256  # Embedded at a time.
_NO_HEAD = HeadConfig()


class Run(NamedTuple):
    """A run whose programs are compiled.

    Attributes:
      tower: Beginning of the name of a published tower.
      config: Flags of the run.
      sizes: Sizes of its data.
      lengths: What its items are like.
    """

    tower: str
    config: Config
    sizes: DataSizes
    lengths: Lengths

    def parts(self, mesh: Mesh, **changes: Any) -> build.Parts:
        """Its model and steps on a mesh; `changes` are other sizes of the tower."""
        options = self.config.model
        tower = towers.config_of(self.tower)
        changes |= {"dtype": options.dtype, "scan": options.scan, "remat": options.remat}
        if options.num_images:
            changes["image_width"] = self.lengths.image_width
        if self.config.lora.rank:
            changes |= {"lora_rank": self.config.lora.rank}
        layout = layout_of(self.tower, options.num_images)
        tower = dataclasses.replace(tower, **changes)
        return build.assemble(self.config, tower, layout, self.sizes, mesh)


def _minilm(dtype: str, head: HeadConfig = _NO_HEAD, sizes: DataSizes = SIZES) -> Run:
    config = Config(
        model=ModelConfig(pretrained="all-minilm-l6", num_images=0, dtype=dtype),
        batch=BatchConfig(size=4096, row_width=64),
        head=head,
    )
    return Run("all-minilm-l6", config, sizes, Lengths(14.0, 14.0))


def _qwen(microbatch_rows: int = 0, num_images: int = 0) -> Run:
    config = Config(
        model=ModelConfig(
            pretrained="qwen2.5-0.5b", num_images=num_images, dtype="bfloat16", scan=True,
            remat=True,
        ),
        lora=LoraConfig(rank=64),
        batch=BatchConfig(size=2048, row_width=128, microbatch_rows=microbatch_rows),
    )  # fmt: skip
    lengths = Lengths(32.0, 32.0, num_images > 0, num_images > 0, IMAGE_WIDTH)
    return Run("qwen2.5-0.5b", config, SIZES, lengths)


_HEAD = HeadConfig(only=True, loss="softmax", batch_size=2048)
# Name -> run, and the program of it that is compiled.
RUNS: dict[str, tuple[Run, str]] = {
    "minilm-float32": (_minilm("float32"), programs.STEP),
    "minilm": (_minilm("bfloat16"), programs.STEP),
    "minilm-encoding": (_minilm("bfloat16"), programs.ENCODING),
    "qwen": (_qwen(), programs.STEP),
    "qwen-microbatches-images": (_qwen(microbatch_rows=16, num_images=3), programs.STEP),
    "qwen-encoding": (_qwen(), programs.ENCODING),
    "head": (_minilm("bfloat16", _HEAD, MANY), programs.HEAD),
    "search": (_minilm("bfloat16", sizes=MANY), programs.SEARCH),
}
IMAGE_PROGRAM = "siglip2-so400m"
NAMES = (*RUNS, IMAGE_PROGRAM)


def program(run: Run, kind: str, parts: build.Parts) -> Program:
    """Compiles a program of a run."""
    found, items = traced(run, kind, parts)
    return programs.compiled(kind, found, parts.model.mesh.size, items)


def traced(run: Run, kind: str, parts: build.Parts) -> tuple[jax.stages.Traced, int]:
    """Traces a program of a run; with it, the queries or items that it takes."""
    config = run.config
    return {
        programs.STEP: lambda: (
            programs.step(config, parts, run.lengths, run.sizes),
            config.batch.size,
        ),
        programs.HEAD: lambda: (
            programs.head_step(config, parts, run.sizes),
            config.head.batch_size,
        ),
        programs.ENCODING: lambda: (
            programs.encoding(parts, run.lengths, config.eval.block),
            config.eval.block,
        ),
        programs.SEARCH: lambda: (
            programs.search(config, parts.model, run.sizes),
            programs.QUERY_BLOCK,
        ),
    }[kind]()


def image_program(config: SiglipConfig, images: int, mesh: Mesh) -> Program:
    """Compiles the embedding of images on one device, as `prepare` embeds them."""
    tower, on_device = VisionTower.on(mesh.devices.flat[0], config), sharding.replicated(mesh)
    pixels = jax.ShapeDtypeStruct(
        (images, config.image_size, config.image_size, 3), jnp.float32, sharding=on_device
    )
    params = jax.eval_shape(lambda: tower.init(jax.random.key(0), jnp.zeros(pixels.shape)))[
        "params"
    ]
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype), sharding=on_device),
        sharding.unboxed(params),
    )
    embed = jax.jit(lambda params, x: tower.apply({"params": params}, x))
    return programs.compiled("image embedding", embed.trace(params, pixels), mesh.size, images)


def meshes(devices: Sequence[jax.Device], kinds: Sequence[str]) -> Iterator[tuple[str, Mesh]]:
    """A mesh of each kind: all devices along fsdp or replica, or half of fsdp along tensor."""
    count = len(devices)
    if count == 1:
        yield "1", sharding.create_mesh(1, 1, 1, devices=devices)
        return
    sizes = {"fsdp": (1, count, 1), "tensor": (1, count // 2, 2), "replica": (count, 1, 1)}
    for kind in kinds:
        of_kind = zip(("replica", "fsdp", "tensor"), sizes[kind], strict=True)
        name = ",".join(f"{axis}:{size}" for axis, size in of_kind if size > 1)
        yield name, sharding.create_mesh(*sizes[kind], devices=devices)


COLUMNS = (
    "devices", "mesh", "program", "GiB", "compiled, s", "traffic, GB", "sent, MB", "TFLOP",
    "compute, ms", "memory, ms", "links, ms", "bound",
)  # fmt: skip


def row(devices: str, mesh: str, name: str, found: Program) -> str:
    """The row of a program in the table."""
    kind = accelerators.find(_kind(devices))
    times, analysis = found.work.times(kind), found.compiled.memory_analysis()
    size = analysis.argument_size_in_bytes + beside_arguments(found.compiled)
    cells = (
        devices, mesh, f"{name}, {found.items:,}", f"{size / 2**30:.2f}", f"{found.seconds:.0f}",
        f"{found.work.moved / 1e9:.2f}", f"{sum(found.work.sent.values()) / 1e6:.1f}",
        f"{found.work.flops / 1e12:.3f}", *(f"{1e3 * seconds:.2f}" for seconds in times),
        times.bound,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _kind(devices: str) -> str:
    name = devices.partition(":")[0]
    return accelerators.GPUS[name].kind if name in accelerators.GPUS else accelerators.TPUS[name][0]


def compile_all(
    devices: Sequence[str], mesh_kinds: Sequence[str], names: Sequence[str]
) -> Iterator[str]:
    """Compiles programs one after the other; yields a row of the table for each."""
    for group in devices:
        for mesh_name, mesh in meshes(absent_devices.find(group), mesh_kinds):
            for name in names:
                if name == IMAGE_PROGRAM:
                    if mesh.size > 1:  # Images are embedded on one device.
                        continue
                    found = image_program(SO400M, IMAGES, mesh)
                else:
                    run, kind = RUNS[name]
                    found = program(run, kind, run.parts(mesh))
                yield row(group, mesh_name, name, found)
                del found
                jax.clear_caches()
                gc.collect()


def main(argv: Sequence[str]) -> None:
    """Prints the table, row by row, and writes it to `--out`."""
    del argv
    values = flags.FLAGS
    head = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    print("\n".join(head), flush=True)
    rows = []
    for line in compile_all(values.devices, values.meshes, values.programs):
        print(line, flush=True)
        rows.append(line)
        if values.out:
            with open(values.out, "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in (*head, *rows))


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_list("devices", ["h100:1", "h100:8"], "Devices, as --plan_devices in train.")
    flags.DEFINE_multi_enum(
        "meshes", ["fsdp"], ["fsdp", "tensor", "replica"], "Kinds of meshes of several devices."
    )
    flags.DEFINE_list("programs", list(NAMES), f"Programs: {', '.join(NAMES)}.")
    flags.DEFINE_string("out", "", "File that the table is written to, as markdown.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
