"""Metrics on disk, compared with tensorboardX's own writer; full disks; progress on the screen."""

import errno
import itertools
import json
import os
import struct
import time

import pytest

from vixml_jax.runtime import console
from vixml_jax.training import metric_logger


def records(directory):
    """Reads the records of event files: length, checksum, event, checksum."""
    records = []
    for name in sorted(os.listdir(directory)):
        data = (directory / name).read_bytes()
        while data:
            size = 16 + struct.unpack("<Q", data[:8])[0]
            records.append(data[:size])
            data = data[size:]
    return records


def test_events_equal_those_of_a_summary_writer(tmp_path, monkeypatch):
    import tensorboardX

    monkeypatch.setattr(time, "time", lambda: 12345.5)
    values = [("loss", 0.25, 3), ("a/b", -1e9, 4), ("loss", float("nan"), 2**20)]
    theirs = tensorboardX.SummaryWriter(str(tmp_path / "theirs"), purge_step=3)
    ours = metric_logger._Board(str(tmp_path / "ours"), purge_step=3)
    for board in (theirs, ours):
        for name, value, step in values:
            board.add_scalar(name, value, step)
        board.add_text("flags", "    --seed=0\n", 3)
        board.close()
    expected = records(tmp_path / "theirs")
    # tensorboardX writes the version a second time, at the purge step.
    assert len(records(tmp_path / "ours")) == 6 == len(expected) - 1
    assert [record for record in expected if b"brain" not in record or record == expected[0]] == (
        records(tmp_path / "ours")
    )


def test_full_disk_is_reported_after_a_partial_write(tmp_path):
    class Disk:
        free, written = 10, b""

        def write(self, data):
            if not self.free:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = data[: self.free]
            self.written, self.free = self.written + part, self.free - len(part)
            return len(part)

    disk = Disk()
    metric_logger._append(disk, b"0123456")
    with pytest.raises(OSError, match="No space left"):
        metric_logger._append(disk, b"789abc")
    assert disk.written == b"0123456789"


def test_incomplete_last_line_is_dropped_when_a_run_resumes(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 7, "lo')
    logger = metric_logger.MetricLogger(str(tmp_path), step=4, total_steps=9, num_epochs=3)
    logger.write(5, {"loss": 2.0}, epoch=1)
    logger.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in written] == [2, 4, 5] and written[-1]["loss"] == 2.0


def test_lines_have_the_wall_clock_time_of_all_starts(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metric_logger.time, "monotonic", lambda: clock.now)
    for step, started_at in ((2, None), (4, clock.now - 100.0)):
        logger = metric_logger.MetricLogger(
            str(tmp_path), step=step - 2, total_steps=9, num_epochs=3, started_at=started_at
        )
        clock.now += 7.0
        logger.write(step, {"loss": 2.0}, epoch=0)
        clock.now += 50.0  # After the last line of a start, so that it is lost.
        logger.write(step + 1, {"loss": 2.0}, epoch=0)
        logger.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    # The second start began 100 s before the clock's first reading, so 157 s before its own.
    assert [(line["step"], line["seconds"]) for line in lines] == [(2, 7.0), (4, 171.0), (5, 221.0)]


class Clock:
    """A clock that is set by hand."""

    now = 1000.0


def log_run(
    tmp_path, monkeypatch, seconds_per_step, log_every, num_epochs=2, num_steps=20, clock=None
):
    """Logs a run whose steps take a fixed time on a fake clock."""
    clock = clock or Clock()
    monkeypatch.setattr(metric_logger.time, "monotonic", lambda: clock.now)
    logger = metric_logger.MetricLogger(
        str(tmp_path), step=0, total_steps=num_steps, num_epochs=num_epochs
    )
    times = {"queries_per_s": 1596.0, "data_share": 0.01}
    monkeypatch.setattr(logger.timer, "report", lambda: times)
    for step in range(1, num_steps + 1):
        epoch = (step - 1) * num_epochs // num_steps
        clock.now += seconds_per_step
        logger.advance(epoch)
        if step % log_every == 0 or step % (num_steps // num_epochs) == 0:
            logger.scalars(step, {"loss": 1.0 / step, "violators": 0.63}, epoch=epoch)
    logger.status("status")
    logger.print("warning")
    logger.close()


def test_progress_in_a_log_is_plain_lines(tmp_path, monkeypatch, capfd):
    """Short epochs: one line each. Lines have no escape codes or carriage returns."""
    log_run(tmp_path, monkeypatch, seconds_per_step=1.0, log_every=1)
    output, errors = capfd.readouterr()
    assert errors == ""
    assert output.splitlines() == [
        "epoch 1/2, step 10 of 20: loss 0.1000, violators 0.63, 1,596 queries/s, about 10 s left",
        "epoch 2/2, step 20 of 20: loss 0.0500, violators 0.63, 1,596 queries/s",
        "status",
        "warning",
    ]
    assert "\r" not in output and "\x1b" not in output


@pytest.mark.parametrize("seconds_per_step,log_every", [(7.0, 1), (20.0, 2), (7.0, 100), (90.0, 5)])
def test_progress_in_a_log_is_shown_once_a_minute(
    seconds_per_step, log_every, tmp_path, monkeypatch
):
    """Unless a step takes longer, whether or not there are new scalars."""
    lines, clock = [], Clock()
    monkeypatch.setattr(console, "status", lambda text: lines.append((clock.now, text)))
    log_run(tmp_path, monkeypatch, seconds_per_step, log_every, 1, 100, clock)
    times = [1000.0, *(at for at, _ in lines)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps) < 60.0 + seconds_per_step
    assert min(gaps[:-1]) >= 30.0 and len(lines) >= 10
    assert lines[-1][0] == 1000.0 + 100 * seconds_per_step
    assert all(text.startswith("epoch 1/1, step ") for _, text in lines)
    assert " left" in lines[1][1] and " left" not in lines[-1][1]


def test_time_left_leaves_out_compiling(tmp_path, monkeypatch, capfd):
    clock = Clock()
    monkeypatch.setattr(metric_logger.time, "monotonic", lambda: clock.now)
    logger = metric_logger.MetricLogger(str(tmp_path), step=0, total_steps=20, num_epochs=2)
    monkeypatch.setattr(logger.timer, "report", lambda: {})
    for step in range(1, 11):
        slow = 100.0 if step in (1, 3) else 0.0  # Two shapes of batches are compiled.
        logger.timer._recent.seconds["compiling"] += slow
        clock.now += 1.0 + slow
        logger.advance(0)
    logger.scalars(10, {"loss": 1.0, "violators": 1.0}, epoch=0)
    logger.close()
    assert capfd.readouterr().out.splitlines()[-1].endswith(", about 10 s left")


def test_quiet_shows_no_progress_but_warnings(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(console, "_level", console.Level.QUIET)
    log_run(tmp_path, monkeypatch, seconds_per_step=100.0, log_every=1)
    assert capfd.readouterr() == ("warning\n", "")


def test_progress_on_a_terminal_is_a_bar(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(console, "shows_bars", lambda: True)
    log_run(tmp_path, monkeypatch, seconds_per_step=1.0, log_every=1)
    output, errors = capfd.readouterr()
    assert output == "status\nwarning\n"
    assert "epoch 2/2: 100%" in errors and "20/20" in errors


def test_wait_for_data_is_shown_if_it_matters(tmp_path, monkeypatch):
    shown = []
    logger = metric_logger.MetricLogger(str(tmp_path), step=0, total_steps=2, num_epochs=1)
    monkeypatch.setattr(logger._progress, "scalars", lambda step, epoch, text: shown.append(text))
    for share in (0.02, 0.021):
        times = {"queries_per_s": 600.0, "data_share": share}
        monkeypatch.setattr(logger.timer, "report", lambda times=times: times)
        logger.scalars(1, {"loss": 1.0, "violators": 2.0}, epoch=0)
    logger.close()
    assert shown == [
        "loss 1.0000, violators 2.00, 600 queries/s",
        "loss 1.0000, violators 2.00, 600 queries/s, 2 % waiting for data",
    ]


def test_durations_have_a_suitable_unit():
    durations = {1.2: "1 s", 89.0: "89 s", 240.0: "4 min", 5399.0: "90 min", 9000.0: "2.5 h"}
    assert {s: metric_logger._duration(s) for s in durations} == durations
