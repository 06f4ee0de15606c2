"""Two commands that write to one place at once: one is refused, or both have their effect."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from vixml_jax.benchmarks import fault_injection
from vixml_jax.benchmarks.support import killed_commands

pytestmark = pytest.mark.slow
# Processes of which each is number 1 where it runs, as in two containers.
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]


def has_namespaces():
    done = shutil.which(NAMESPACE[0]) and subprocess.run([*NAMESPACE, "true"], capture_output=True)
    return bool(done) and not done.returncode


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("writers") / "template"
    fault_injection.make_jobs(str(path))
    return path


@pytest.fixture(params=["one namespace", "own namespaces"])
def prefix(request):
    if request.param == "one namespace":
        return []
    if not has_namespaces():
        pytest.skip("only root can make namespaces of processes")
    return NAMESPACE


@pytest.fixture
def place(template, tmp_path):
    return str(shutil.copytree(template, tmp_path / "place"))


def start(prefix, *command):
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def together(prefix, *commands):
    """Starts commands at once; returns the status and standard error of each."""
    processes = [start(prefix, *command) for command in commands]
    ends = []
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode in (0, 2), errors
        assert "Traceback" not in errors, errors
        ends.append((process.returncode, errors))
    return ends


def refusals(ends):
    """Last lines of the commands that were refused; each names who writes already."""
    lines = [errors.strip().split("\n")[-1] for status, errors in ends if status]
    assert all(re.search(r"^error: .* in use by (process \d+|another process)", x) for x in lines)
    return lines


def temporaries(place):
    names = killed_commands.listing(place)
    return [name for name in names if re.search(r"\.(tmp|old)-|\.lock$|\.undone$", name)]


def test_two_prepare_into_one_directory(place, prefix, tmp_path):
    commands = [
        ("vixml_jax.prepare", f"--source={place}/raw", f"--max_tokens={n}", "--overwrite")
        for n in (3, 7)  # The texts have 4 tokens.
    ]
    alone = []
    for number, command in enumerate(commands):
        out = f"alone{number}"
        assert together([], (*command, f"--out={tmp_path}/{out}"))[0][0] == 0
        alone.append(arrays(tmp_path / out))
    assert alone[0] != alone[1]
    ends = together(prefix, *((*command, f"--out={place}/prepared") for command in commands))
    assert len(refusals(ends)) < 2
    assert arrays(f"{place}/prepared") in alone
    assert temporaries(place) == []


def arrays(directory):
    """Checksums of the arrays of a data set."""
    found = killed_commands.contents(str(directory), ".")
    return {name: values for name, values in found.items() if name.endswith(".npy")}


def test_a_second_train_is_refused_and_the_first_unharmed(place, prefix):
    runs = [fault_injection.Run(f"{place}/data", f"{place}/{name}") for name in ("alone", "both")]
    assert runs[0].finish()[0] == 0
    module = runs[1].command[2:]
    ends = together(prefix, module, module)
    assert sorted(status for status, _ in ends) == [0, 2], ends
    refusals(ends)
    assert fault_injection.same(runs[1].state(), runs[0].state())
    assert steps(runs[1]) == steps(runs[0])
    assert temporaries(runs[1].workdir) == []


def steps(run):
    """Steps of the lines of metrics.jsonl, each of which is whole."""
    with open(os.path.join(run.workdir, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line)["step"] for line in file]


def add(place, label):
    path = os.path.join(place, f"{label}.csv")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"id,text\n{label},label a1 b2\n")
    return "vixml_jax.predict", f"--workdir={place}/run", f"--add_labels={path}"


def updates(place):
    """Ids of each label update of a run."""
    top = os.path.join(place, "run", "label_updates")
    found = []
    for name in sorted(os.listdir(top)):
        with open(os.path.join(top, name, "change.json"), encoding="utf-8") as file:
            found.append(json.load(file)["ids"])
    return found


def test_two_additions_of_labels_are_both_there(place, prefix):
    ends = together(prefix, add(place, "x"), add(place, "y"))
    assert [status for status, _ in ends] == [0, 0], ends
    assert sorted(updates(place)) == [["x"], ["y"]]
    assert temporaries(place) == []


def test_one_label_is_added_once(place, prefix):
    ends = together(prefix, add(place, "x"), add(place, "x"))
    assert sorted(status for status, _ in ends) == [0, 2], ends
    assert updates(place) == [["x"]]


def test_an_undo_beside_an_addition(place, prefix):
    assert together([], add(place, "x"))[0][0] == 0
    undo = "vixml_jax.predict", f"--workdir={place}/run", "--undo"
    ends = together(prefix, add(place, "y"), undo)
    assert [status for status, _ in ends] == [0, 0], ends
    assert updates(place) in ([["x"]], [["y"]])
    assert temporaries(place) == []


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_reader_beside_training(place, prefix, command):
    """Training with one checkpoint kept ends with the bits of an undisturbed one."""
    changes = {"loop.epochs": 24, "loop.max_to_keep": 1}
    runs = [
        fault_injection.Run(f"{place}/data", f"{place}/{name}", **changes)
        for name in ("alone", "both")
    ]
    assert runs[0].finish()[0] == 0
    process = start(prefix, *runs[1].command[2:])
    assert fault_injection.wait_for(process, lambda: len(runs[1].saved()) > 0)
    trials = 0
    while process.poll() is None:
        arguments = (f"--out={place}/out",) if command == "export" else ("--report",)
        ends = together(prefix, (f"vixml_jax.{command}", f"--workdir={place}/both", *arguments))
        assert ends[0][0] == 0, ends
        trials += 1
    _, errors = process.communicate()
    assert process.returncode == 0 and trials, errors
    assert fault_injection.same(runs[1].state(), runs[0].state())
    assert temporaries(place) == []
