"""The command `serve`: it starts, tells its address, ends gracefully, and loses no label."""

import json
import signal
import socket
import subprocess
import sys
import threading

from tests.service.conftest import TOKEN, Client


class Serve:
    """A service in a process of its own, which ends with the context."""

    def __init__(self, workdir, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vixml_jax", "serve", f"--workdir={workdir}", "--port=0",
             *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in self.process.stdout:
            if " labels at " in line:
                self.line = line
                self.client = Client(line.split(" labels at ")[1].split(",")[0])
                return
        raise AssertionError(self.process.communicate()[1])

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.process.kill()
        self.process.wait()

    def end(self, number):
        """Ends the service by a signal; returns its status, and what it printed then."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def test_service_from_its_start_to_its_end(workdir, tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    with Serve(workdir, f"--token_file={path}") as first:
        assert "labels can be changed" in first.line
        assert first.client("/readyz")[0] == 200
        body = {"labels": [{"id": f"new {i}", "text": f"a{i} b4"} for i in range(3)]}
        assert first.client("/labels", body, token=TOKEN)[0] == 200
        assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    # Nothing that was acknowledged is lost, and a request that has begun is answered.
    with Serve(workdir, "--timeout_s=60") as second:
        assert "labels cannot be changed" in second.line
        found = second.client.ask({"text": "a1 b4"}, k=30)[0]
        assert {"new 0", "new 1", "new 2"} <= {x[0] for x in found}
        answer, status, out, err = end_in_a_request(second)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    assert (status, err) == (0, "")
    assert out.rstrip().endswith("stopped by SIGTERM; requests that had begun were answered")


def end_in_a_request(service):
    """Sends SIGTERM in the middle of a request; returns its answer, and what `Serve.end` does."""
    address = service.client.address.removeprefix("http://")
    body = json.dumps({"queries": [{"text": "a3 b4"}] * 50}).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:-1])
        ended = []
        thread = threading.Thread(target=lambda: ended.extend(service.end(signal.SIGTERM)))
        thread.start()
        thread.join(1.0)
        connection.sendall(body[-1:])
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        thread.join(60)
    return answer, *ended


def test_faults_are_told_before_the_run_is_opened(workdir, tmp_path):
    short, absent = tmp_path / "short", tmp_path / "absent"
    short.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in (
            ([], "--workdir: missing"),
            ([f"--workdir={workdir}", f"--port={taken.getsockname()[1]}"], "in use"),
            ([f"--workdir={workdir}", "--host=no.such.host.invalid"], "choose another"),
            ([f"--workdir={workdir}", f"--token_file={short}"], "openssl rand -hex 32"),
            ([f"--workdir={workdir}", f"--token_file={absent}"], "absent"),
        ):
            result = subprocess.run(
                [sys.executable, "-m", "vixml_jax", "serve", *arguments],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert result.returncode == 2, result
            assert message in result.stderr and result.stderr.startswith("error: ")
            assert result.stderr.count("\n") == 1


def test_a_run_that_cannot_be_opened_ends_the_service(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "vixml_jax", "serve", f"--workdir={tmp_path}", "--port=0"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and str(tmp_path) in result.stderr
