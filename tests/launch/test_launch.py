"""The launch scripts against fakes of gcloud, kubectl and Slurm that record their calls."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
ODD = '--model.pretrained=a dir/it\'s "$HOME" *'

# A fake program: records its arguments, then prints and exits as the test prescribes.
FAKE = """#!{python}
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
root = pathlib.Path({root!r})
stdin = "" if sys.stdin.isatty() or name != "kubectl" else sys.stdin.read()
with open(root / "calls", "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if stdin:
    (root / "stdin").write_text(stdin)
for key, answers in json.loads((root / "part").read_text()).items():
    if key in " ".join([name, *sys.argv[1:]]):
        count = root / ("count " + "".join(c for c in key if c.isalnum()))
        at = int(count.read_text()) if count.exists() else 0
        count.write_text(str(at + 1))
        say, status = answers[min(at, len(answers) - 1)]
        print(say)
        sys.exit(status)
"""


class Stage:
    """A directory of fake programs, first on the path."""

    def __init__(self, root, part):
        self.root = root
        (root / "part").write_text(json.dumps(part))
        for name in ("gcloud", "kubectl", "srun", "scontrol"):
            (root / name).write_text(FAKE.format(python=sys.executable, root=str(root)))
            (root / name).chmod(0o755)

    def run(self, script, *arguments, **variables):
        env = {**os.environ, "PATH": f"{self.root}:{os.environ['PATH']}", "POLL": "0", **variables}
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            capture_output=True, text=True, env=env, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def calls(self):
        path = self.root / "calls"
        return [json.loads(line) for line in open(path)] if path.exists() else []

    def called(self, *words):
        return [call for call in self.calls if all(word in " ".join(call) for word in words)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_passes(script):
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "shellcheck"), "-x", str(script)],
        capture_output=True, text=True, cwd=LAUNCH.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh", "gke.sh", "slurm.sbatch"])
def test_dry_runs_call_nothing_and_unknown_arguments_are_refused(script, tmp_path):
    stage = Stage(tmp_path, {})
    done = stage.run(script, "--dry_run", "--", ODD, HERE=str(LAUNCH), VENV=str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr
    assert "vixml_jax.train" in done.stdout + done.stderr
    assert stage.calls == []
    refused = stage.run(script, "--dri_run", HERE=str(LAUNCH))
    assert refused.returncode == 2 and "unknown argument --dri_run" in refused.stderr
    assert "--dry_run" in stage.run(script, "--help", HERE=str(LAUNCH)).stdout
    assert stage.calls == []


READY = {"describe": [["READY", 0]]}


def test_a_missing_slice_is_created_and_an_existing_one_is_used(tmp_path):
    stage = Stage(tmp_path, {"describe": [["", 1], ["CREATING", 0], ["READY", 0]]})
    assert stage.run("tpu_pod.sh", "--", "--seed=1", NAME="mine").returncode == 0
    (made,) = stage.called("create")
    assert made[1:6] == ["compute", "tpus", "tpu-vm", "create", "mine"] and "--spot" in made
    assert len(stage.called("scp", "--worker=all")) == 1
    assert not stage.called("delete")
    there = Stage(tmp_path / "there" if not (tmp_path / "there").mkdir() else None, READY)
    assert there.run("tpu_pod.sh", "--", "--seed=1").returncode == 0
    assert not there.called("create") and not there.called("delete")


def test_flags_reach_train_through_every_shell(tmp_path):
    """The command for a host, run here with a `python` that prints its arguments."""
    stage = Stage(tmp_path, READY)
    assert stage.run("tpu_pod.sh", "--", ODD, "--seed=3").returncode == 0
    (begun,) = stage.called("vixml_jax.train", "--worker=all")
    command = next(word for word in begun if word.startswith("--command="))
    home = tmp_path / "home"
    (home / "vixml_jax/.venv/bin").mkdir(parents=True)
    python = home / "vixml_jax/.venv/bin/python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(5)\n"
    )
    python.chmod(0o755)
    subprocess.run(["bash", "-c", command.removeprefix("--command=")], cwd=home, check=True)
    deadline = time.monotonic() + 20
    while not (home / "vixml_jax/status").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (home / "vixml_jax/status").read_text() == "5\n"
    said = json.loads((home / "vixml_jax/log").read_text())
    assert said == ["-m", "vixml_jax.train", "--coordinator=auto", ODD, "--seed=3"]
    # And how its log is followed, and its status comes back.
    (followed,) = stage.called("tail", "--worker=0")
    command = next(word for word in followed if word.startswith("--command="))
    done = subprocess.run(
        ["bash", "-c", command.removeprefix("--command=")], cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 5 and json.loads(done.stdout) == said


@pytest.mark.parametrize(
    ("statuses", "begun", "left"),
    [([75, 143, 0], 3, 0), ([2], 1, 2), ([1], 1, 1), ([255, 0], 1, 0)],
)
def test_a_pod_restarts_only_runs_that_can_be_resumed(tmp_path, statuses, begun, left):
    stage = Stage(tmp_path, {**READY, "tail --pid": [["", status] for status in statuses]})
    assert stage.run("tpu_pod.sh", "--", "--seed=1").returncode == left
    assert len(stage.called("vixml_jax.train", "--worker=all")) == begun
    assert len(stage.called("tail --pid")) == len(statuses)
    assert not stage.called("delete")


def test_a_preempted_slice_is_created_again(tmp_path):
    states = [["READY", 0], ["PREEMPTED", 0], ["", 1], ["READY", 0]]
    stage = Stage(tmp_path, {"describe": states, "tail --pid": [["", 255], ["", 0]]})
    done = stage.run("tpu_pod.sh", "--", "--seed=1")
    assert done.returncode == 0 and "is PREEMPTED" in done.stderr
    kinds = [call[4] for call in stage.calls if call[4] != "describe"]
    assert kinds == ["scp", "ssh", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh", "ssh"]


def test_a_slice_is_deleted_when_asked(tmp_path):
    stage = Stage(tmp_path, READY)
    assert stage.run("tpu_pod.sh", "--delete", NAME="mine", PROJECT="p").returncode == 0
    assert stage.calls == [
        ["gcloud", "compute", "tpus", "tpu-vm", "delete", "mine", "--zone=us-west4-a",
         "--project=p", "--quiet"]
    ]  # fmt: skip


def test_a_jobset_is_filled_in_and_applied(tmp_path):
    yaml = pytest.importorskip("yaml")
    stage = Stage(tmp_path, {})
    done = stage.run(
        "gke.sh", "--", ODD, NAME="mine", IMAGE="here/vixml", TOPOLOGY="16x16", HOSTS="64"
    )
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "stdin").read_text())
    assert "@" not in (tmp_path / "stdin").read_text().split("apiVersion", 1)[1]
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (64, 64, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["command"][-2:] == ["--coordinator=auto", ODD]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    user = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}
    assert pod["securityContext"] == user
    assert pod["containers"][0]["securityContext"] == {"allowPrivilegeEscalation": False}
    on = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (on["operator"], on["values"]) == ("NotIn", [75, 143])
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 100
    assert [call[1] for call in stage.calls] == ["apply", "wait", "logs"]
    assert stage.run("gke.sh", "--delete", NAME="mine").returncode == 0
    assert stage.calls[-1] == ["kubectl", "delete", "jobset", "mine"]
    assert stage.run("gke.sh", USER_ID="0").returncode == 0
    found = yaml.safe_load((tmp_path / "stdin").read_text())
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["securityContext"] == {**dict.fromkeys(user, 0), "runAsNonRoot": False}


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (143, True), (0, False), (2, False)])
def test_slurm_requeues_a_preempted_run(tmp_path, status, requeued):
    stage = Stage(tmp_path, {"srun": [["", status]]})
    done = stage.run("slurm.sbatch", "--", ODD, HERE=str(LAUNCH), SLURM_JOB_ID="7")
    assert done.returncode == status
    assert stage.calls[0][-3:] == ["vixml_jax.train", "--coordinator=auto", ODD]
    assert stage.called("scontrol") == ([["scontrol", "requeue", "7"]] if requeued else [])


@pytest.mark.parametrize("cores", ["12", None])
def test_slurm_tasks_get_the_cores_of_the_job(cores, tmp_path):
    """srun takes them from the job up to Slurm 21.08 only."""
    stage = Stage(tmp_path, {})
    given = {"SLURM_CPUS_PER_TASK": cores} if cores else {}
    assert stage.run("slurm.sbatch", HERE=str(LAUNCH), SLURM_JOB_ID="7", **given).returncode == 0
    ((_, *arguments),) = stage.called("srun")
    assert arguments[:-4] == ["--kill-on-bad-exit=0", *(["--cpus-per-task=12"] if cores else [])]


def local(tmp_path, program, *arguments, **variables):
    """local.sh with a python that is a few lines of shell."""
    (tmp_path / "venv/bin").mkdir(parents=True, exist_ok=True)
    python = tmp_path / "venv/bin/python"
    python.write_text(f"#!/usr/bin/env bash\n{program}\n")
    python.chmod(0o755)
    return subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
            "VENV": str(tmp_path / "venv"), "RESTART_DELAY": "0", **variables,
        },
    )  # fmt: skip


def test_local_runs_restart_and_exit_with_the_status_of_train(tmp_path):
    program = 'echo "$*" >> calls; [[ $(wc -l < calls) -lt 3 ]] && exit 75; exit 2'
    done = local(tmp_path, program, "--", ODD)
    done.communicate(timeout=30)
    assert done.returncode == 2
    assert (tmp_path / "calls").read_text() == f"-m vixml_jax.train {ODD}\n" * 3


def test_local_processes_connect_and_stop_together(tmp_path):
    program = 'echo "$*" >> calls; trap "exit 75" TERM; while true; do sleep 0.05; done'
    child = local(tmp_path, program, "--processes=2", "--", "--seed=1")
    deadline = time.monotonic() + 20
    calls = tmp_path / "calls"
    while time.monotonic() < deadline:
        if calls.exists() and calls.read_text().count("\n") == 2:
            break
        time.sleep(0.02)
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 75
    together = "-m vixml_jax.train --coordinator=localhost:8476 --num_processes=2 --process_index="
    assert sorted(calls.read_text().splitlines()) == [f"{together}{i} --seed=1" for i in range(2)]


SAY_GPUS = 'echo "${@: -1} ${CUDA_VISIBLE_DEVICES-unset}" >> calls'


def gpus_of(tmp_path, *arguments, **variables):
    """Return status, errors, and the GPUs that each process of local.sh sees, by its index."""
    child = local(tmp_path, SAY_GPUS, *arguments, **{"JAX_PLATFORMS": "", **variables})
    errors = child.communicate(timeout=30)[1]
    calls = tmp_path / "calls"
    lines = sorted(calls.read_text().splitlines()) if calls.exists() else []
    return child.returncode, errors, [line.rpartition(" ")[2] for line in lines]


@pytest.mark.parametrize(
    ("processes", "listed", "shares"),
    [
        (2, "0,1,2,3", ["0,1", "2,3"]),
        (4, "4,5,6,7", ["4", "5", "6", "7"]),
        (2, "GPU-aa, GPU-bb", ["GPU-aa", "GPU-bb"]),
        (1, "0,1,2", ["0,1,2"]),
        (3, "", ["", "", ""]),
        (3, "-1", ["-1", "-1", "-1"]),
    ],
)
def test_local_processes_share_the_listed_gpus(processes, listed, shares, tmp_path):
    status, errors, found = gpus_of(
        tmp_path, f"--processes={processes}", CUDA_VISIBLE_DEVICES=listed
    )
    assert (status, found) == (0, shares), errors


def with_nvidia_smi(tmp_path, program):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(f"#!/usr/bin/env bash\n{program}\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_local_processes_share_the_gpus_that_nvidia_smi_finds(tmp_path):
    path = with_nvidia_smi(tmp_path, 'echo "$*" > asked; printf "%s\\n" 0 1 2 3')
    status, errors, found = gpus_of(tmp_path, "--processes=2", PATH=path)
    assert (status, found) == (0, ["0,1", "2,3"]), errors
    assert (tmp_path / "asked").read_text() == "--query-gpu=index --format=csv,noheader\n"
    (tmp_path / "calls").unlink()
    # One process takes all GPUs by itself, and a run on a CPU takes none.
    assert gpus_of(tmp_path, "--processes=1", PATH=path)[2] == ["unset"]
    (tmp_path / "calls").unlink()
    found = gpus_of(tmp_path, "--processes=3", PATH=path, JAX_PLATFORMS="cpu")[2]
    assert found == ["unset"] * 3


def test_a_machine_whose_driver_does_not_answer_has_no_gpus(tmp_path):
    path = with_nvidia_smi(tmp_path, 'echo "NVIDIA-SMI has failed"; exit 9')
    assert gpus_of(tmp_path, "--processes=2", PATH=path)[2] == ["unset"] * 2


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_local_processes_refuse_gpus_that_they_cannot_share(dry, tmp_path):
    for processes, listed in ((3, "0,1,2,3"), (4, "0,1")):
        status, errors, found = gpus_of(
            tmp_path, *dry, f"--processes={processes}", CUDA_VISIBLE_DEVICES=listed
        )
        assert (status, found) == (2, [])
        assert errors == (
            f"error: --processes={processes}: expected a number that divides the "
            f"{len(listed.split(','))} GPUs ({listed.replace(',', ' ')}); list fewer GPUs in "
            "CUDA_VISIBLE_DEVICES, or set JAX_PLATFORMS=cpu to use none\n"
        )


@pytest.mark.parametrize("processes", ["0", "two", "-1", ""])
def test_local_processes_are_a_number(processes, tmp_path):
    status, errors, found = gpus_of(tmp_path, f"--processes={processes}")
    assert (status, found) == (2, [])
    assert errors == f"error: --processes={processes}: expected a number from 1\n"
