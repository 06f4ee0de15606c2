"""Messages between processes: they arrive as they were sent, and nothing else is taken for one."""

import io
import pickle

import numpy as np
import pytest

from vixml_jax.runtime import frames


def test_messages_arrive_as_they_were_sent():
    array = np.arange(5, dtype="<i4")
    sent = [["", "ünïcode 漢字 \0\n", "x" * 300_000], [], "text", (array.tobytes(), b"", b"\0")]
    kinds = [list[str], list[str], str | list[str], tuple[bytes, bytes, bytes] | str]
    file = io.BytesIO()
    for message in sent:
        frames.write(file, message)
    file.seek(0)
    received = [frames.read(file, kind) for kind in kinds]
    assert received == sent
    np.testing.assert_array_equal(np.frombuffer(received[3][0], "<i4"), array)
    with pytest.raises(EOFError):
        frames.read(file, str)


def test_a_message_that_is_cut_anywhere_is_the_end():
    file = io.BytesIO()
    frames.write(file, ["some", "texts"])
    for size in range(len(file.getvalue())):
        with pytest.raises(EOFError):
            frames.read(io.BytesIO(file.getvalue()[:size]), list[str])


@pytest.mark.parametrize(
    "content",
    [
        b"a line that a library has printed\n",
        pickle.dumps(["a"]),
        (1 << 40).to_bytes(8, "little") + b"a",
        (3).to_bytes(8, "little") + b"\xc1\xc1\xc1",
        (1).to_bytes(8, "little") + b"\x01",  # A number.
    ],
)
def test_what_is_no_message_is_the_end(content):
    with pytest.raises(EOFError):
        frames.read(io.BytesIO(content + bytes(100)), list[str])
