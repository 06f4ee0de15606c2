"""What is written while a run trains, against tensorboardX's own writer; a disk that is full."""

import errno
import json
import os
import struct
import time

import pytest

from vixml_jax.training import metric_logger


def records(directory):
    """The records of the event files of a directory: length, checksum, event, checksum."""
    found = []
    for name in sorted(os.listdir(directory)):
        data = (directory / name).read_bytes()
        while data:
            size = 16 + struct.unpack("<Q", data[:8])[0]
            found.append(data[:size])
            data = data[size:]
    return found


def test_curves_are_those_of_a_summary_writer(tmp_path, monkeypatch):
    import tensorboardX

    monkeypatch.setattr(time, "time", lambda: 12345.5)
    values = [("loss", 0.25, 3), ("a/b", -1e9, 4), ("loss", float("nan"), 2**20)]
    theirs = tensorboardX.SummaryWriter(str(tmp_path / "theirs"), purge_step=3)
    ours = metric_logger._Board(str(tmp_path / "ours"), purge_step=3)
    for board in (theirs, ours):
        for name, value, step in values:
            board.add_scalar(name, value, step)
        board.close()
    expected = records(tmp_path / "theirs")
    # They say the version once more at the step from which older files count no more.
    assert len(records(tmp_path / "ours")) == 5 == len(expected) - 1
    assert [record for record in expected if b"brain" not in record or record == expected[0]] == (
        records(tmp_path / "ours")
    )


def test_what_a_full_disk_takes_is_written_and_then_it_is_raised(tmp_path):
    class Disk:
        room, taken = 10, b""

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = data[: self.room]
            self.taken, self.room = self.taken + part, self.room - len(part)
            return len(part)

    disk = Disk()
    metric_logger._append(disk, b"0123456")
    with pytest.raises(OSError, match="No space left"):
        metric_logger._append(disk, b"789abc")
    assert disk.taken == b"0123456789"


def test_a_line_that_was_cut_is_dropped_and_what_follows_stands(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 7, "lo')
    kept = metric_logger.Telemetry(str(tmp_path), step=4, total_steps=9)
    kept.write(5, {"loss": 2.0}, epoch=1)
    kept.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in written] == [2, 4, 5] and written[-1]["loss"] == 2.0
