"""What devices exchange for the label head: counted in the compiled programs, and by formula."""

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from vixml_jax.benchmarks import communication
from vixml_jax.labels.head import LabelHead
from vixml_jax.parallel import collectives, sharding

SIZE, POSITIVES = 64, 192


def found(mesh_sizes, kind, labels, **changes):
    devices = jax.devices()[: mesh_sizes[0] * mesh_sizes[1] * mesh_sizes[2]]
    mesh = sharding.create_mesh(*mesh_sizes, devices=devices)
    head = LabelHead(mesh, labels, 32, 48, kind, label_block=100, **changes)
    programs = communication.head_programs(head, SIZE, POSITIVES)
    paper = communication.head_on_paper(head, SIZE, POSITIVES)
    return [collectives.collectives(program) for program in programs.values()], paper


@pytest.mark.parametrize("mesh_sizes", [(2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["softmax", "decoupled_softmax", "bce"])
def test_the_head_sends_what_its_formula_says(kind, mesh_sizes):
    programs, paper = found(mesh_sizes, kind, 1000)
    assert len(programs) == 2  # Gradient, and step.
    for program in programs:
        sent = sum(one.sent for one in program if one.devices > 1)
        assert 0 <= sent - sum(paper.values()) <= SIZE + 100  # Masks of one byte, and scalars.
        of_vectors = [one.sent for one in program if (SIZE, 32) in one.shapes]
        assert paper["vectors of queries, gathered"] in of_vectors
        kinds = {one.kind for one in program if one.devices > 1}
        assert kinds == {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize("num_sampled", [0, 40])
def test_nothing_that_devices_exchange_grows_with_the_labels(num_sampled):
    few, _ = found((2, 4, 1), "softmax", 1000, num_sampled=num_sampled)
    many, _ = found((2, 4, 1), "softmax", 5000, num_sampled=num_sampled)
    for before, after in zip(few, many, strict=True):
        as_sent = lambda program: sorted((one.kind, one.size) for one in program)  # noqa: E731
        assert as_sent(before) == as_sent(after)
        largest = max(one.size for one in after)
        assert largest <= 4 * (2 * 32 * 48 + 32 + 48) + 8  # The gradient of the network.
        assert largest < 5000 * 32 / 8  # Far from the rows of one device.


def test_both_counts_are_printed(capsys):
    communication.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(what="head", batch=64, labels=500, loss="bce", list=True):
        communication.main([])
    printed = capsys.readouterr().out
    assert "500 labels x 384, bce, a batch of 64 with 320 positives" in printed
    assert "all-gather" in printed and "total, by formula" in printed
    ratios = [float(line.split()[-1]) for line in printed.splitlines() if ", found" in line]
    assert len(ratios) == 2 and all(1 <= ratio < 1.01 for ratio in ratios)
