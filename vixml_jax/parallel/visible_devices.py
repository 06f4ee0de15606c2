"""Which of the visible GPUs a process of a run uses, from the variables of its launcher."""

import re
from collections.abc import Mapping

from vixml_jax.errors import InputError

# Each restricts the GPUs that a process sees; indices of JAX count what is left.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# The tasks of each node, "8(x2),4"; that of the job step counts, if there are both.
_TASKS_OF_NODES = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")


def local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """The argument of `jax.distributed.initialize`: indices among the GPUs that this process sees.

    By itself JAX takes, under Slurm and Open MPI, the one GPU whose index is that of the task on
    its node. This is right only where all tasks of a node see all its GPUs and there are as many.
    Otherwise it fails (one GPU visible to each task, always with index 0) or leaves GPUs unused.

    Args:
      environment: Variables of the process, such as `os.environ`.

    Returns:
      This task's share of the GPUs, or an empty list for all that are visible. None leaves the
      decision to JAX: without Slurm or Open MPI, without GPUs (`JAX_PLATFORMS`), and if the user
      has decided (`JAX_LOCAL_DEVICE_IDS`).

    Raises:
      InputError: If the tasks of this node cannot share its GPUs evenly.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if environment.get("JAX_LOCAL_DEVICE_IDS") or (
        platforms and not re.search("gpu|cuda|rocm", platforms)
    ):
        return None
    # In a job of Slurm that starts `mpirun`, the variables of Slurm are those of `mpirun` itself.
    slurm = "OMPI_COMM_WORLD_LOCAL_RANK" not in environment
    if slurm:
        rank, tasks = _number(environment, "SLURM_LOCALID"), _slurm_tasks(environment)
    else:
        rank = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
        tasks = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if rank is None:
        return None
    on_node = _number(environment, "SLURM_GPUS_ON_NODE") if slurm else None
    visible = num_visible(environment)
    if visible is None:
        visible = on_node
    if tasks == 1 or (visible is not None and visible <= 1):
        return []
    if visible is None or tasks is None:
        return [rank]
    if slurm:
        per_task = _number(environment, "SLURM_GPUS_PER_TASK")
        own_share = visible == per_task or (on_node is not None and visible < on_node)
    else:
        own_share = False
    if own_share or (on_node is None and visible < tasks):
        return []
    if visible % tasks:
        divisors = [n for n in range(1, visible + 1) if visible % n == 0]
        raise InputError(
            f"{visible} GPUs are visible to each of the {tasks} tasks of this node, which cannot "
            f"share them evenly: expected {_either(divisors)} tasks a node; start so many "
            "(--ntasks-per-node of Slurm, --npernode of mpirun), or set JAX_LOCAL_DEVICE_IDS to "
            "the indices of the GPUs of each task"
        )
    share = visible // tasks
    return list(range(rank * share, (rank + 1) * share))


def num_visible(environment: Mapping[str, str]) -> int | None:
    """The number of GPUs that a process sees; None if no variable restricts them.

    Args:
      environment: Variables of the process.
    """
    counts = [_listed(environment[name]) for name in _VISIBLE if name in environment]
    if not counts:
        return None
    # A list of AMD is empty on a machine of NVIDIA, and the reverse.
    return min((count for count in counts if count), default=0)


def _listed(devices: str) -> int:
    """The number of entries of a list of devices, which ends at the first invalid one."""
    count = 0
    for device in devices.split(","):
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", device.strip()):
            break
        count += 1
    return count


def _slurm_tasks(environment: Mapping[str, str]) -> int | None:
    """The number of tasks on this node."""
    for name in _TASKS_OF_NODES:
        nodes = []
        for part in environment.get(name, "").split(","):
            found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
            if not found:
                break
            nodes += [int(found[1])] * int(found[2] or 1)
        if nodes:
            node = _number(environment, "SLURM_NODEID") or 0
            return nodes[min(node, len(nodes) - 1)]
    return None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The number that a variable ends with, "a100:2" or "2"; None if there is none."""
    found = re.fullmatch(r"(?:.*:)?(\d+)", environment.get(name, ""))
    return int(found[1]) if found else None


def _either(numbers: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))
