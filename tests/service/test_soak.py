"""Half an hour of queries beside changes of labels: no wrong answer, and memory stays."""

import os
import pathlib
import signal
import threading
import time
from concurrent import futures

import pytest

from tests.service.conftest import TOKEN
from tests.service.test_serve import Serve

SECONDS = float(os.environ.get("VIXML_JAX_SOAK_S", "1800"))
_WARM = 0.2  # Of the time, after which memory is compared.
_GROWTH = 1.05


def memory(process):
    """Resident memory in bytes, without mapped files."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    line = next(line for line in status.split("\n") if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@pytest.mark.slow
def test_memory_and_answers_while_labels_change(workdir, tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    with Serve(workdir, f"--token_file={path}", "--timeout_s=60") as service:
        soak(service)
        assert service.end(signal.SIGTERM)[0] == 0


def soak(service):
    """Asks and changes labels for `SECONDS`."""
    client, stop = service.client, threading.Event()
    texts = [f"a{i} b{(3 * i + 1) % 10}" for i in range(10)]
    # With the label and without it. It says whether it was found, and no other label may differ.
    before = {text: client.ask({"text": text}, k=8)[0] for text in texts}
    add = {"labels": [{"id": "new", "text": "a1 b4"}]}
    assert client("/labels", add, token=TOKEN)[0] == 200
    after = {text: client.ask({"text": text}, k=8)[0] for text in texts}
    assert client("/labels/undo", {}, token=TOKEN)[0] == 200

    def same(found, expected):
        return [x[0] for x in found] == [x[0] for x in expected] and all(
            abs(x[2] - y[2]) < 1e-5 for x, y in zip(found, expected, strict=True)
        )

    def ask(seed):
        count = 0
        while not stop.is_set():
            text = texts[(seed + count) % len(texts)]
            found = client.ask({"text": text}, k=8)[0]
            assert same(found, before[text]) or same(found, after[text]), (text, found)
            count += 1
        return count

    sizes, started = [], time.monotonic()
    with futures.ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, seed) for seed in range(8)]
        try:
            while (elapsed := time.monotonic() - started) < SECONDS:
                assert client("/labels", add, token=TOKEN)[0] == 200
                assert client("/labels/undo", {}, token=TOKEN)[0] == 200
                if elapsed > _WARM * SECONDS:
                    sizes.append(memory(service.process))
                assert not any(one.done() for one in asking)
                time.sleep(0.05)
        finally:
            stop.set()
        counts = [one.result() for one in asking]
    quarter = max(1, len(sizes) // 4)
    first, last = max(sizes[:quarter]), max(sizes[-quarter:])
    print(f"{sum(counts)} queries, {first >> 20} MiB at first, {last >> 20} MiB at the end")
    assert last < _GROWTH * first
