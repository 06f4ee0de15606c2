"""Which GPUs each task of a node takes: as Slurm, Open MPI and TPU pods set its variables."""

import os
import subprocess
import sys

import jax
import pytest
from jax._src import clusters

from vixml_jax.errors import InputError
from vixml_jax.parallel import distributed
from vixml_jax.parallel.visible_devices import local_device_ids, num_visible

EIGHT = "0,1,2,3,4,5,6,7"


def slurm(rank, tasks, **more):
    """The variables of a task of Slurm on a node with `tasks` tasks."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": str(tasks), **more,
    }  # fmt: skip


def mpi(rank, tasks, **more):
    return {
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": str(tasks), **more
    }  # fmt: skip


def of_all_tasks(make, tasks, **more):
    return [local_device_ids(make(rank, tasks, **more)) for rank in range(tasks)]


@pytest.mark.parametrize("make", [slurm, mpi])
@pytest.mark.parametrize(
    "one", ["0", "GPU-0a1b2c3d-aaaa-bbbb-cccc-0123456789ab", "MIG-0a1b2c3d/1/0"]
)
def test_a_task_that_sees_one_gpu_takes_it(make, one):
    """As with --gpus-per-task=1: index 0 in every task, whatever its rank."""
    assert of_all_tasks(make, 8, CUDA_VISIBLE_DEVICES=one) == [[]] * 8
    assert of_all_tasks(make, 8, ROCR_VISIBLE_DEVICES=one) == [[]] * 8


@pytest.mark.parametrize("make", [slurm, mpi])
@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_tasks_that_see_all_gpus_share_them(make, name):
    assert of_all_tasks(make, 8, **{name: EIGHT}) == [[i] for i in range(8)]
    assert of_all_tasks(make, 4, **{name: EIGHT}) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Indices count the visible devices, not those of the machine.
    assert of_all_tasks(make, 2, **{name: "4,5,6,7"}) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("make", [slurm, mpi])
@pytest.mark.parametrize("variables", [{"CUDA_VISIBLE_DEVICES": EIGHT}, {}])
def test_the_only_task_of_a_node_takes_all_gpus(make, variables):
    """JAX by itself would take one of the eight."""
    assert of_all_tasks(make, 1, **variables) == [[]]


def test_two_gpus_per_task_are_told_from_a_node_with_two():
    own = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert of_all_tasks(slurm, 2, **own) == [[0], [1]]
    assert of_all_tasks(slurm, 2, **own, SLURM_GPUS_ON_NODE="2") == [[0], [1]]
    assert of_all_tasks(slurm, 2, **own, SLURM_GPUS_ON_NODE="4") == [[], []]
    assert of_all_tasks(slurm, 2, **own, SLURM_GPUS_PER_TASK="a100:2") == [[], []]
    # With --gpu-bind=none every task sees all four.
    four = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "2"}
    assert of_all_tasks(slurm, 2, **four, SLURM_GPUS_ON_NODE="4") == [[0, 1], [2, 3]]
    # More tasks than visible GPUs: the launcher has given each its own.
    assert of_all_tasks(mpi, 4, **own) == [[]] * 4


def test_unrestricted_gpus_are_counted_by_slurm_or_taken_one_per_task():
    assert of_all_tasks(slurm, 4, SLURM_GPUS_ON_NODE="8") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert of_all_tasks(slurm, 4) == [[0], [1], [2], [3]]
    assert of_all_tasks(mpi, 4) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("node", "listed", "expected"),
    [("0", "4(x2),2", [2, 3]), ("1", "4(x2),2", [2, 3]), ("2", "4(x2),2", [4, 5, 6, 7])],
)
def test_tasks_are_those_of_this_node_and_of_the_step(node, listed, expected):
    found = slurm(
        1, 8, SLURM_NODEID=node, SLURM_STEP_TASKS_PER_NODE=listed, SLURM_NTASKS_PER_NODE="8",
        CUDA_VISIBLE_DEVICES=EIGHT,
    )  # fmt: skip
    assert local_device_ids(found) == expected
    del found["SLURM_STEP_TASKS_PER_NODE"]
    assert local_device_ids(found) == [1]


def test_mpirun_in_a_job_of_slurm_counts_by_mpi():
    """All its processes inherit SLURM_LOCALID=0 and a single task from the batch script."""
    around = {**slurm(0, 1), "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert of_all_tasks(mpi, 4, **around) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("platforms", ["cpu", "tpu,cpu"])
def test_without_gpus_jax_decides(platforms):
    """Three tasks could not share eight GPUs, but they do not use them."""
    for make in (slurm, mpi):
        found = of_all_tasks(make, 3, CUDA_VISIBLE_DEVICES=EIGHT, JAX_PLATFORMS=platforms)
        assert found == [None] * 3


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_none(hidden):
    assert of_all_tasks(slurm, 3, CUDA_VISIBLE_DEVICES=hidden, SLURM_GPUS_ON_NODE="8") == [[]] * 3


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"CUDA_VISIBLE_DEVICES": EIGHT},
        {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d", "JOB_COMPLETION_INDEX": "3"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "CUDA_VISIBLE_DEVICES": "0,1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # A batch script, outside of srun.
        slurm(3, 8, CUDA_VISIBLE_DEVICES=EIGHT, JAX_LOCAL_DEVICE_IDS="5"),
        slurm("x", 8, CUDA_VISIBLE_DEVICES=EIGHT),
    ],
    ids=["alone", "one machine", "TPU pod", "Kubernetes", "batch", "decided", "damaged"],
)
def test_other_launchers_are_left_to_jax(variables):
    assert local_device_ids(variables) is None


@pytest.mark.parametrize(
    ("tasks", "more", "expected"),
    [
        (3, {"CUDA_VISIBLE_DEVICES": EIGHT}, "8 GPUs .* 3 tasks .*expected 1, 2, 4 or 8 tasks"),
        (4, {"SLURM_GPUS_ON_NODE": "2"}, "2 GPUs .* 4 tasks .*expected 1 or 2 tasks a node"),
    ],
)
def test_uneven_shares_are_refused(tasks, more, expected):
    with pytest.raises(InputError, match=f"{expected}.*JAX_LOCAL_DEVICE_IDS"):
        local_device_ids(slurm(0, tasks, **more))


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "2, 3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"HIP_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0,1,2"}, 1),
    ],
)
def test_visible_devices_are_counted(variables, count):
    assert num_visible(variables) == count


@pytest.mark.parametrize("ids", [None, [], [2, 3]])
def test_jax_replaces_only_a_missing_list(ids, monkeypatch):
    """What this rests on in JAX, for the task of rank 3."""
    for name, value in slurm(3, 8).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", False)
    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    found = find(None, None, None, ids, None, None)
    assert found[1:] == (8, 3, [3] if ids is None else ids)


@pytest.mark.parametrize(("coordinator", "numbers"), [("auto", ()), ("localhost:1", (8, 3))])
def test_start_passes_the_devices_on(coordinator, numbers, monkeypatch):
    for name, value in slurm(3, 8, CUDA_VISIBLE_DEVICES="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    given = []

    def initialize(*arguments, **named):
        given.append((arguments, named["local_device_ids"]))
        raise RuntimeError("far enough")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="far enough"):
        distributed.start(coordinator, *(numbers or (None, None)))
    assert given == [((coordinator, *numbers) if numbers else (), [])]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"CUDA_VISIBLE_DEVICES": "0"}, "all"), ({"CUDA_VISIBLE_DEVICES": EIGHT}, "3")],
    ids=["one visible", "all visible"],
)
def test_jax_opens_the_devices_that_were_chosen(variables, expected):
    """In a process of its own, up to the devices that JAX would ask CUDA for."""
    program = (
        "import socket\n"
        "with socket.socket() as free:\n"
        "    free.bind(('localhost', 0))\n"
        "    port = free.getsockname()[1]\n"
        "import jax\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "from vixml_jax.parallel import distributed\n"
        "distributed.start(f'localhost:{port}', 1, 0)\n"
        "from jax._src import xla_bridge\n"
        "print('asks for', xla_bridge.CUDA_VISIBLE_DEVICES.value)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env={**env, **slurm(3, 8), **variables},
    )  # fmt: skip
    assert f"asks for {expected}\n" in done.stdout, done.stderr
