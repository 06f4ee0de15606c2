"""Full and read-only disks: one line says what to do, and earlier versions stay as they were.

Commands run in a mount namespace of their own, on a small tmpfs that holds copies of their inputs.
"""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest

from vixml_jax import errors
from vixml_jax.benchmarks import fault_injection
from vixml_jax.benchmarks.support import killed_commands
from vixml_jax.storage import atomic, locks

MOUNT = "mount -t tmpfs -o size=256m tmpfs {disk} && cp -a {template}/. {disk}"
READ_ONLY = "mount -o remount,ro {disk}"
# The size of a tmpfs counts whole pages of 4 KiB.
FULL = "mount -o remount,size=$(($(df --output=used -k {disk} | tail -1) + {kib}))k {disk}"
SCRIPT = (
    "{mount} && {limit} || exit 99; {command}; status=$?; cp -a {disk}/. {result}; exit $status"
)
# What is said of the disk, and what to do.
FAULTS = {
    "full": "No space left on device|not enough disk space",
    "read-only": "Read-only file system",
}
REMEDIES = {"full": "free disk space", "read-only": "can be written to"}


def namespace():
    """The command that gives another one mounts of its own, or None."""
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if shutil.which(command[0]):
            mount = [*command, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
            if not subprocess.run(mount, capture_output=True).returncode:
                return command
    return None


@pytest.fixture(scope="module")
def prefix():
    command = namespace()
    if command is None:
        pytest.skip("needs namespaces of mounts: unshare --mount")
    return command


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A directory with a run, prepared data and exports; and the commands that write to them."""
    path = tmp_path_factory.mktemp("disk") / "template"
    jobs = {job.name: list(job.arguments) for job in fault_injection.make_jobs(str(path))}
    jobs["train anew"] = fault_injection.Run("{}/data", "{}/new", **{"loop.epochs": 1}).command[3:]
    return path, jobs


class Trial:
    """A command on a disk with a limit: its status and output, and what it left."""

    def __init__(self, prefix, template, name, directory, limit):
        path, jobs = template
        disk, result = directory / "disk", directory / "result"
        disk.mkdir()
        result.mkdir()
        places = {"disk": disk, "template": path, "result": result}
        command = [sys.executable, "-m", f"vixml_jax.{name.split()[0]}"]
        command += [argument.format(disk) for argument in jobs[name]]
        script = SCRIPT.format(
            mount=MOUNT.format(**places), limit=limit.format(**places), **places,
            command=" ".join(f"'{word}'" for word in command),
        )  # fmt: skip
        done = subprocess.run(
            [*prefix, "sh", "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode != 99, done.stderr
        self.status, self.output, self.errors = done.returncode, done.stdout, done.stderr
        self.before, self.after, self.disk = path, result, str(disk)

    def check_refusal(self, kind):
        """Checks that one line names the place, the fault and the remedy."""
        lines = self.errors.strip().split("\n")
        assert self.status == 2 and len(lines) == 1, self.errors
        assert lines[0].startswith("error: ") and self.disk in lines[0], lines
        assert re.search(FAULTS[kind], lines[0]) and REMEDIES[kind] in lines[0], lines

    def check_what_is_left(self, *, new=()):
        """Checks that earlier files are as they were, and that nothing half-written is there.

        Args:
          new: Patterns of paths that may be there in addition.
        """
        before, after = (killed_commands.listing(str(x)) for x in (self.before, self.after))
        assert before <= after, before - after
        more = [x for x in after - before if not any(re.fullmatch(each, x) for each in new)]
        assert not more, more
        for name in before:
            if (self.before / name).is_file():
                assert (self.before / name).read_bytes() == (self.after / name).read_bytes(), name


def limit(kind, kib=0):
    return READ_ONLY if kind == "read-only" else FULL.replace("{kib}", str(kib))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "evaluate", "predict", "export", "train anew"])
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_commands_on_a_disk_that_takes_nothing(kind, name, prefix, template, tmp_path):
    trial = Trial(prefix, template, name, tmp_path, limit(kind))
    trial.check_refusal(kind)
    trial.check_what_is_left(new=NEW.get(name, ()))


@pytest.mark.slow
@pytest.mark.parametrize("name,kib", [
    ("prepare", 8), ("prepare", 60), ("export", 40), ("train anew", 100), ("train anew", 400),
])  # fmt: skip
def test_commands_whose_disk_is_full_later(name, kib, prefix, template, tmp_path):
    trial = Trial(prefix, template, name, tmp_path, limit("full", kib))
    trial.check_refusal("full")
    trial.check_what_is_left(new=NEW.get(name, ()))


# What a command may have written completely before there is no more space.
NEW = {
    "predict": ("run/label_updates",),
    "evaluate": (r"run/evaluation/[\w.-]+\.(json|npz|html)", r"run/vectors(/[\w.]+)?"),
    "train anew": (r"new", r"new/(?!.*tmp).*"),
}


def in_child(function, *arguments):
    """What a function prints in a process that can write no byte to a file; -1 if it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            os.write(writer, function(*arguments).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


def write(path, kind):
    try:
        with getattr(atomic, kind)(path) as temporary:
            target = temporary if kind == "file" else os.path.join(temporary, "a")
            with open(target, "w") as file:
                file.write("more than nothing")
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return "written"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_write_without_space_names_the_file_and_leaves_the_earlier_version(kind, tmp_path):
    path = tmp_path / "data"
    if kind == "file":
        path.write_text("first")
    else:
        path.mkdir()
        (path / "a").write_text("first")
    assert in_child(write, str(path), kind) == f"{path}: File too large"
    assert os.listdir(tmp_path) == ["data"]
    assert (path if kind == "file" else path / "a").read_text() == "first"


def hold(directory):
    with locks.exclusive(directory, doing="training"):
        return "held"


def test_a_lock_needs_no_space(tmp_path):
    assert in_child(hold, str(tmp_path)) == "held"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number,remedy", [
    (errno.ENOSPC, "free disk space, or choose another path"),
    (errno.EROFS, "choose a path that can be written to"),
    (errno.EACCES, "choose a path that can be written to"),
])  # fmt: skip
def test_the_remedy_fits_the_fault(number, remedy):
    with pytest.raises(errors.InputError) as error:
        with errors.writing("--out=x"):
            raise OSError(number, os.strerror(number))
    assert str(error.value) == (
        f"--out=x: {os.strerror(number)} while writing; nothing was kept: {remedy}"
    )
