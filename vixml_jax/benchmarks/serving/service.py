"""Throughput and latency of the service under load, compared with PyTorch behind the same server.

    python -m vixml_jax.benchmarks.serving.service [--labels=131072 --clients=1,16,128]

Clients on the same machine each send a query, wait for its ten labels, and send the next. Ours is
`vixml_jax serve`, with a deadline; the baseline answers each request in a thread with the model in
PyTorch, `matmul` and `topk`, by the same server (uvicorn and Starlette, which FastAPI is made of).
With --baseline=torch_batched it answers requests that arrive together as one batch, by the same
code as ours. Random weights and labels, float32. Programs take turns on the same cores.
"""

import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.serving import predict
from vixml_jax.benchmarks.support import inputs, workers

_QUERIES = 2048  # Different texts that clients draw from.
_MAX_PENDING = 4096
PROGRAMS = ("ours", "torch", "torch_batched")


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """In a child process: a server, and a round of load for each number of clients."""
    from vixml_jax.service import server

    name = programs[0].split(", ")[0]
    dataset = inputs.open_data(settings["data"])
    application = _application(name, dataset, settings)
    bound = server.bind("127.0.0.1", 0)
    running = server.make(application, settings["timeout_s"])
    serving = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    serving.start()
    texts = list(itertools.islice(dataset.train.texts, _QUERIES))

    def load(clients: int) -> dict[str, Any]:
        ask = {
            "address": server.address_of(bound),
            "clients": clients,
            "queries": settings["queries"],
            "texts": texts,
        }
        done = subprocess.run(
            [sys.executable, "-m", "vixml_jax.benchmarks.serving.service", "--load"],
            input=json.dumps(ask),
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    prepared: dict[str, workers.Prepared] = {}
    for program in programs:
        clients = int(program.split(", ")[1].split()[0])
        about = {"queries": settings["queries"]}
        prepared[program] = about, lambda clients=clients: load(clients)
    load(1)
    return prepared


def _application(name: str, dataset: Any, settings: dict[str, Any]) -> Any:
    """The application of a program."""
    labels = predict.random_labels(settings)
    if name == "ours":
        from vixml_jax.service import app, backend

        predictor = predict.our_predictor(dataset, labels, settings)
        limits = backend.Settings(256, _MAX_PENDING, settings["timeout_s"], 3600.0)
        service = backend.Backend(limits, lambda: backend.Opened(predictor, None))
        service.wait_until_loaded()
        return app.make(service, token="", origins=(), max_body=1 << 24)
    import anyio
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from vixml_jax.serving.coalescing import Coalescer

    answer_all = predict.torch_answers(dataset, labels, settings)
    together = Coalescer(answer_all, 256)  # Of texts that arrive together.

    def answer(texts: list[str]) -> list[Any]:
        if name == "torch_batched":
            return [together(text, size=1) for text in texts]
        return answer_all(texts)

    async def endpoint(request: Any) -> JSONResponse:
        texts = [query["text"] for query in (await request.json())["queries"]]
        found = await anyio.to_thread.run_sync(answer, texts)
        rows = [[{"id": label, "score": score} for label, score in row] for row in found]
        return JSONResponse({"results": [{"labels": row} for row in rows]})

    return Starlette(routes=[Route("/predict", endpoint, methods=["POST"])])


def generate_load(ask: dict[str, Any]) -> dict[str, Any]:
    """Sends queries from a number of clients; returns what they saw.

    Args:
      ask: Address, number of clients, of queries, and texts.

    Returns:
      `seconds` of all queries together, `each`, the seconds of every one that was answered, and
      `refused`, the number of answers with another status than 200.
    """
    host, lock = urlsplit(ask["address"]).netloc, threading.Lock()
    texts, left, each, refused = ask["texts"], ask["queries"], [], 0

    def client() -> None:
        nonlocal left, refused
        connection = http.client.HTTPConnection(host, timeout=600)
        while True:
            with lock:
                left -= 1
                if left < 0:
                    return
                text = texts[left * 7919 % len(texts)]
            body = json.dumps({"queries": [{"text": text}], "k": predict.K})
            before = time.perf_counter()
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            seconds = time.perf_counter() - before
            with lock:
                if response.status != 200:
                    refused += 1
                    continue
                each.append(seconds)
            if len(json.loads(answer)["results"][0]["labels"]) != predict.K:
                raise ValueError(f"not {predict.K} labels: {answer[:200]!r}")

    clients = [threading.Thread(target=client) for _ in range(ask["clients"])]
    started = time.perf_counter()
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    return {"seconds": time.perf_counter() - started, "each": each, "refused": refused}


def main(argv: Sequence[str]) -> None:
    """Prints a table: queries a second, p50 and p99 of each program by the number of clients."""
    del argv
    values = flags.FLAGS
    names = ("data", "labels", "search", "threads", "tower", "queries", "timeout_s")
    settings = {"batch": 256} | {name: values[name].value for name in names}
    loads = [f"{count} client{'s'[: int(count) > 1]}" for count in values.clients]
    compared = ["ours"] + ([values.baseline] if values.baseline != "none" else [])
    programs = [f"{name}, {load}" for name in compared for load in loads]
    reports = workers.compare(
        "vixml_jax.benchmarks.serving.service",
        programs,
        [(f"ours, {load}", f"{name}, {load}") for name in compared[1:] for load in loads],
        settings,
        rounds=values.rounds,
        texts=lambda about: about["queries"],
        unit="queries",
    )
    print("| program | queries/s | p50, ms | p99, ms | refused |\n|---|---|---|---|---|")
    for program, rounds in reports.items():
        each = 1000 * np.array([second for one in rounds for second in one["each"]])
        rate = np.median([len(one["each"]) / one["seconds"] for one in rounds])
        p50, p99 = np.percentile(each, [50, 99])
        refused = sum(one["refused"] for one in rounds)
        print(f"| {program} | {rate:.1f} | {p50:.1f} | {p99:.1f} | {refused} |")


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("tower", "all-minilm-l6", "Tower of the queries.")
    flags.DEFINE_enum("baseline", "torch", [*PROGRAMS[1:], "none"], "Baseline to compare with.")
    flags.DEFINE_string("data", "glyphs", "Prepared data whose texts are the queries, or 'glyphs'.")
    flags.DEFINE_integer("labels", 131072, "Number of labels.", lower_bound=predict.K)
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "How ours searches.")
    flags.DEFINE_list("clients", ["1", "16", "128"], "Numbers of clients.")
    flags.DEFINE_integer("queries", 256, "Queries of a round.", lower_bound=1)
    flags.DEFINE_float("timeout_s", 10.0, "Deadline of a request to our service.", 0.1)
    flags.DEFINE_integer("rounds", 3, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "Cores of each program.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--load"]:
        print(json.dumps(generate_load(json.load(sys.stdin))))
    elif not workers.serve(prepare):
        command_line.launch(main, define_flags)
