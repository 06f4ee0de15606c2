"""Speed of a frozen SigLIP 2 vision tower, compared with `transformers` in PyTorch.

    python -m vixml_jax.benchmarks.vision --baseline=torch [--size=so400m]

Random weights and pixels; programs take turns in one run on the same cores: float32 on a CPU,
bfloat16 (torch with SDPA) on an accelerator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.support import platforms, workers

PROGRAMS = ("ours", "torch")
SIZES = {
    "tiny": {
        "image_size": 32, "patch_size": 8, "num_layers": 2, "width": 32, "num_heads": 4,
        "mlp_width": 64,
    },
    "base": {},
    "so400m": {
        "image_size": 384, "patch_size": 14, "num_layers": 27, "width": 1152, "num_heads": 16,
        "mlp_width": 4304,
    },
}  # fmt: skip


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """Builds the programs and runs each once."""
    prepared: dict[str, workers.Prepared] = {}
    for program in programs:
        run = (_ours if program == "ours" else _torch)(settings)
        run()
        prepared[program] = {"images": settings["batch"]}, run
    return prepared


def pixels_of(settings: dict[str, Any], side: int) -> np.ndarray:
    """Random images, float32 [batch, side, side, 3]."""
    shape = (settings["batch"], side, side, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _ours(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    import jax
    from flax import linen as nn

    from vixml_jax.models.siglip import SiglipConfig, VisionTower

    dtype = "float32" if settings["device"] == "cpu" else "bfloat16"
    config = SiglipConfig(**SIZES[settings["tower"]], dtype=dtype)
    tower = VisionTower.on(jax.devices()[0], config)
    pixels = pixels_of(settings, config.image_size)

    def fresh(key: jax.Array) -> Any:
        made = nn.unbox(tower.init(key, pixels[:1]))["params"]
        return jax.tree.map(lambda x: x.astype(dtype), made)

    params = jax.jit(fresh)(jax.random.key(0))
    encode = jax.jit(lambda params, pixels: tower.apply({"params": params}, pixels))

    def run() -> dict[str, Any]:
        return {"sum": float(np.asarray(encode(params, pixels), np.float32).sum())}

    return run


def _torch(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    import torch
    import transformers

    from vixml_jax.models.siglip import SiglipConfig

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    gpu = settings["device"] == "gpu"
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    c = SiglipConfig(**SIZES[settings["tower"]])
    config = transformers.SiglipVisionConfig(
        image_size=c.image_size,
        patch_size=c.patch_size,
        num_hidden_layers=c.num_layers,
        hidden_size=c.width,
        num_attention_heads=c.num_heads,
        intermediate_size=c.mlp_width,
    )
    model = transformers.SiglipVisionModel._from_config(config, attn_implementation="sdpa")
    model = model.to(device, dtype).eval()
    pixels = torch.from_numpy(pixels_of(settings, c.image_size)).permute(0, 3, 1, 2).contiguous()

    def run() -> dict[str, Any]:
        with torch.no_grad():
            found = model(pixels.to(device, dtype)).pooler_output
        return {"sum": float(found.float().sum())}

    return run


def main(argv: Sequence[str]) -> None:
    """Prints images per second, the ratio, and milliseconds per image."""
    del argv
    values = flags.FLAGS
    device = platforms.describe().name
    settings = {
        "tower": values.size,
        "batch": values.batch or (2 if device == "cpu" else 128),
        "threads": values.threads,
        "device": device,
    }
    reports = workers.compare(
        "vixml_jax.benchmarks.vision",
        platforms.measurable(PROGRAMS, device, values.baseline),
        [("ours", "torch")],
        settings,
        rounds=values.rounds,
        texts=lambda about: about["images"],
        unit="images",
    )
    for name, rounds in reports.items():
        seconds = float(np.median([one["seconds"] for one in rounds]))
        print(f"{name}: {1000 * seconds / settings['batch']:.2f} ms per image")
    if device == "cpu":
        print("no accelerator here: measured on the CPU in float32; not measured: bfloat16")


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("baseline", "torch", ["torch", "none"], "Baseline to compare with.")
    flags.DEFINE_enum(
        "size", "so400m", list(SIZES), "so400m patch14 384, base patch16 224, or tiny, for tests."
    )
    flags.DEFINE_integer("batch", 0, "Images per batch; 0: by device.", lower_bound=0)
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_integer("threads", 1, "Cores of each program.", lower_bound=1)


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
