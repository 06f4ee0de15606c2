"""The parts by name; each is a function of the settings that returns rows.

Settings are the `size`, the `data` whose texts are used, JAX's platform `device`, and the host
`threads`.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from vixml_jax.benchmarks import encode as encode_lib
from vixml_jax.benchmarks import vision
from vixml_jax.benchmarks.accelerator import doctor, parity, resuming, searching
from vixml_jax.benchmarks.accelerator.results import Row
from vixml_jax.benchmarks.support import platforms, workers
from vixml_jax.parallel import accelerators

Settings = dict[str, Any]
Reports = dict[str, list[dict[str, Any]]]
SIZES = ("full", "tiny")
ROUNDS = {"full": 5, "tiny": 1}
_TINY_TOWER = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
_TINY_STEP = {"batch": 16, "steps": 1, "chunk": 0, "sizes": _TINY_TOWER}
_ALL_OF_32 = ("ours, all of 32", "torch, all of 32")
_TITLES = ("ours", "torch, padded to 32", "torch, padded to longest")
_GIB = 2**30


def train_minilm(settings: Settings) -> list[Row]:
    """Training of MiniLM on titles."""
    full = {"tower": "all-minilm-l6", "batch": 2048, "steps": 4, "chunk": 0, "images": 0, "rank": 0}
    goals = {("ours", "torch, padded to longest"): "goal: 2"}
    return _train(settings, full, (*_TITLES, *_ALL_OF_32), goals)


def train_decoder(settings: Settings) -> list[Row]:
    """Training of Qwen2.5-0.5B with adapters on texts and images."""
    full = {"tower": "qwen2.5-0.5b", "batch": 2048, "steps": 1, "chunk": 0, "images": 3, "rank": 64}
    return _train(settings, full, _ALL_OF_32, {_ALL_OF_32: "goal: 1.5"})


def train_large(settings: Settings) -> list[Row]:
    """Training of Qwen2.5-3B with adapters, ours alone: its use of the device."""
    full = {"tower": "qwen2.5-3b", "batch": 2048, "steps": 1, "chunk": 128, "images": 3, "rank": 64}
    return _train(settings, full, _ALL_OF_32[:1], {}, utilisation="goal: 40")


def _train(
    settings: Settings,
    full: Settings,
    programs: Sequence[str],
    goals: dict[tuple[str, str], str],
    *,
    utilisation: str = "",
) -> list[Row]:
    asked = {**settings, **full, **(_TINY_STEP if settings["size"] == "tiny" else {})}
    modules = ("torch", "transformers", *(("peft",) if full["rank"] else ()))
    reports, rows = _compare("train_step", programs, asked, "texts", goals, modules)
    ours = {name: found for name, found in reports.items() if name.startswith("ours")}
    for name, found in ours.items():
        known = accelerators.find(found[0]["device"])
        if known:
            done = found[0]["flops"] / _seconds(found)
            what = f"{name}: model FLOPs utilisation, %"
            rows.append(Row(what, 100 * done / known.peak_flops, utilisation))
        rows.append(Row(f"{name}: seconds of the first round", found[0]["first_s"]))
    for whose in ("ours", "torch"):
        found = [row for name in reports if name.startswith(whose) for row in reports[name]]
        peak = max((row["bytes"] for row in found), default=0)
        if peak:
            planned = max(row.get("planned", 0) for row in found) / _GIB
            wanted = f"{planned:.2f} planned" if planned else ""
            rows.append(Row(f"{whose}: peak memory of the device, GiB", peak / _GIB, wanted))
    return rows


def encode(settings: Settings) -> list[Row]:
    """Encoding of titles by MiniLM."""
    asked = {**settings, "tower": encode_lib.TOWER, "images": 0, "batch": 2048, "texts": 65536}
    if settings["size"] == "tiny":
        asked |= {"batch": 32, "texts": 64, "sizes": _TINY_TOWER}
    return _compare("encode", encode_lib.PROGRAMS, asked, "texts")[1]


def siglip(settings: Settings) -> list[Row]:
    """Embedding of images by SigLIP 2 so400m."""
    full = settings["size"] == "full"
    asked = {**settings, "batch": 128 if full else 2, "tower": "so400m" if full else "tiny"}
    reports, rows = _compare("vision", vision.PROGRAMS, asked, "images")
    for name, found in reports.items():
        goal = "goal: 1.5" if name == "ours" and full else ""
        rows.append(Row(f"{name}: ms an image", 1000 * _seconds(found) / asked["batch"], goal))
    return rows


def head(settings: Settings) -> list[Row]:
    """Steps of the label head."""
    full = settings["size"] == "full"
    asked = {
        **settings, "labels": 1_000_000 if full else 500, "width": 384 if full else 16,
        "batch": 512 if full else 16, "positives": 3, "block": 8192, "moments": "float32",
        "loss": "softmax", "steps": 5 if full else 2,
    }  # fmt: skip
    reports, rows = _compare("head", ("ours", "torch"), asked, "queries", modules=("torch",))
    for name, found in reports.items():
        rows.append(Row(f"{name}: ms a step", 1000 * _seconds(found) / asked["steps"]))
        rows.append(Row(f"{name}: loss", found[0]["loss"]))
    return rows


def _compare(
    benchmark: str,
    programs: Sequence[str],
    settings: Settings,
    unit: str,
    goals: dict[tuple[str, str], str] | None = None,
    modules: Sequence[str] = ("torch", "transformers"),
) -> tuple[Reports, list[Row]]:
    """Speeds of programs that take turns, and their ratios to PyTorch's.

    Args:
      benchmark: Module of `vixml_jax.benchmarks`.
      programs: Names; those of PyTorch begin with "torch".
      settings: Of the benchmark, and the size.
      unit: What is counted, as programs name it in their descriptions.
      goals: Of ratios, by pair of programs.
      modules: Python modules that PyTorch's programs import.
    """
    rows = []
    if any(name.startswith("torch") for name in programs):
        if reason := platforms.why_no_torch(settings["device"], modules):
            rows.append(Row("PyTorch is not measured", reason))
            programs = [name for name in programs if not name.startswith("torch")]
    pairs = [
        (ours, theirs)
        for ours in programs
        for theirs in programs
        if ours.startswith("ours")
        and theirs.startswith("torch")
        and ("all of" in ours) == ("all of" in theirs)
    ]
    reports = workers.compare(
        f"vixml_jax.benchmarks.{benchmark}",
        programs,
        pairs,
        settings,
        rounds=ROUNDS[settings["size"]],
        texts=lambda about: about[unit],
        unit=unit,
    )
    for name, found in reports.items():
        rows.append(Row(f"{name}: {unit}/s", found[0][unit] / _seconds(found)))
    for pair in pairs:
        ours, theirs = (reports[name] for name in pair)
        ratio = statistics.median(
            b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)
        )
        rows.append(Row(f"speed, {pair[0]} : {pair[1]}", ratio, (goals or {}).get(pair, "")))
    return reports, rows


def _seconds(rounds: Sequence[dict[str, Any]]) -> float:
    return statistics.median(one["seconds"] for one in rounds)


PARTS: dict[str, Callable[[Settings], list[Row]]] = {
    "doctor": doctor.examine,
    "parity": parity.compare,
    "search": searching.check,
    "quickstart": resuming.resume,
    "train_minilm": train_minilm,
    "train_decoder": train_decoder,
    "encode": encode,
    "siglip": siglip,
    "head": head,
    "train_large": train_large,
}
