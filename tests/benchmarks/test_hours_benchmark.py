"""The estimate of training hours, against formulas written out for BERT and for adapters."""

import dataclasses

import pytest
from absl import flags

from vixml_jax import command_line
from vixml_jax import config as config_lib
from vixml_jax.benchmarks import hours
from vixml_jax.errors import InputError
from vixml_jax.training import flops


def configuration(*arguments):
    values = flags.FlagValues()
    config_lib.define_flags(values)
    values(["hours", *command_line.expand(arguments)])
    return config_lib.from_flags(values)


@pytest.mark.parametrize("num_images", [0, 3])
def test_operations_of_an_encoder(num_images):
    """MiniLM-L6: six layers of width 384 with 12 d^2 weights, forward once and backward twice."""
    given = ["--preset=minilm", "--batch.size=256", "--loop.epochs=10", "--head.weight=0"]
    config = configuration(*given, "--nohead.refit", f"--model.num_images={num_images}")
    found = flops.estimate(config, 10_001, 32)
    d, b, s = 384, 256, 32 + num_images
    tower = 3 * 2 * b * (2 * 6 * 12 * d * d * s + 4 * 6 * d * s * s)
    projection = 2 * 2 * (2 * b * num_images) * 1152 * d  # Images need no gradient.
    combiner = 3 * b * (2 * 3 * (4 * d * d + 2 * d * 1024) + 4 * 9 * d)
    similarities = 3 * 2 * 2 * b * b * d
    assert found.step == pytest.approx(tower + projection + combiner + similarities, rel=1e-12)
    assert found.steps == 10 * 40  # The last batch of an epoch is partial.
    assert found.hours(found.step) == pytest.approx(400 / 3600)


def test_frozen_weights_need_no_gradient():
    """With adapters a frozen weight costs two passes in place of three."""
    path = "experiments/lf_amazontitles_131k_qwen2.5_0.5b.flags"
    config = configuration(f"--flagfile={path}")
    small, large = (
        dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank))
        for rank in (1, 2)
    )
    one, two = (flops.estimate(c, 1000, 32).step for c in (small, large))
    d, q, kv, m = 896, 896, 128, 4864
    sums = (d + q) + 2 * (d + kv) + (q + d) + 3 * (d + m)
    positions = 2 * config.batch.size * (32 + flops.PROMPT + 3)
    assert two - one == pytest.approx(3 * 2 * positions * 24 * sums, rel=1e-9)
    weights = 24 * (d * q + 2 * d * kv + q * d + 3 * d * m)
    assert one > 2 * 2 * positions * weights


def test_prints_one_line_and_refuses_a_tower_from_scratch(capsys):
    hours.define_flags()
    flags.FLAGS(
        ["hours", "--model.pretrained=all-MiniLM-L6-v2", "--queries=2048", "--loop.epochs=1"]
    )
    hours.main([])
    printed = capsys.readouterr().out
    assert (
        printed.startswith("all-MiniLM-L6-v2: 2 steps of ") and " h on 1 x NVIDIA H100" in printed
    )
    flags.FLAGS(["hours", "--model.pretrained="])
    with pytest.raises(InputError, match=r"--model\.pretrained: missing"):
        hours.main([])
