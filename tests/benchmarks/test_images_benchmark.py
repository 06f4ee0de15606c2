"""The benchmark of decoding: files of the given size, and a row for each program."""

import re

from absl import flags
from absl.testing import flagsaver
from PIL import Image

from vixml_jax.benchmarks.images import __main__ as images
from vixml_jax.benchmarks.images import decoding


def test_rows_of_threads_and_processes(tmp_path, capsys):
    paths = decoding.write_files(str(tmp_path), 3, 40)
    assert [Image.open(path).size for path in paths] == [(40, 40)] * 3
    used = decoding.decode(paths, 24)
    assert 0 < used < 60
    images.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(files=6, side=40, frame=24, workers=2, rounds=2):
        images.main([])
    printed = capsys.readouterr().out
    assert printed.startswith("6 JPEG files of 40 x 40 pixels")
    rows = re.findall(r"^(\d \w+) +([\d.]+) +([\d.]+) +([\d.]+) ", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["1 thread", "2 threads", "2 processes"]
    assert all(float(speed) > 0 for _, speed, *_ in rows) and rows[0][3] == "1.00"
