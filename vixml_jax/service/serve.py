"""Serves a run over HTTP: predictions, changes of labels, health and metrics, and a page to try."""

import contextlib
import os
import sys
from collections.abc import Sequence

from absl import flags

from vixml_jax import command_line
from vixml_jax import workdir as workdir_lib
from vixml_jax.errors import InputError
from vixml_jax.image_encoding import encoder
from vixml_jax.runtime import compilation_cache, console, host_memory, signals
from vixml_jax.serving import predictor_flags
from vixml_jax.storage import text_files

COMMON_FLAGS = (
    "workdir", "host", "port", "token_file", "search", "timeout_s", "max_queries", "max_pending",
)  # fmt: skip
_MIN_TOKEN = 16  # Characters.
TOKEN_VARIABLE = "VIXML_JAX_TOKEN"


def read_token(path: str) -> str:
    """Returns the token of a file, or of the environment if there is no file; empty: none.

    Raises:
      InputError: If the file cannot be read, or the token can be guessed.
    """
    source, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE, "")
    if path:
        source = f"--token_file={path}"
        with text_files.errors_of(path):
            token = "".join(line for _, line in text_files.read_lines(path, "utf-8"))
    elif not token:
        return ""
    token = token.strip()
    if len(token) < _MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"{source}: expected a token of at least {_MIN_TOKEN} printable ASCII characters "
            f"without spaces, found {len(token)}; make one by: openssl rand -hex 32"
        )
    return token


def check_libraries() -> None:
    """Checks that the libraries of the service are there.

    Raises:
      InputError: If one is missing.
    """
    try:
        import multipart  # noqa: F401  # Of python-multipart.
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serve needs {error.name}: pip install 'vixml_jax[serve]'") from None


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.workdir:
        raise InputError("--workdir: missing; expected a run directory that train wrote")
    check_libraries()
    from vixml_jax.service import app, backend, server
    from vixml_jax.serving import explaining

    token = read_token(values.token_file)
    bound = server.bind(values.host, values.port)
    host_memory.bound_freed_pages()
    compilation_cache.enable(values.compile_cache)

    def open_run() -> backend.Opened:
        predictor = predictor_flags.load(values, warm=True)
        explaining.explain(predictor, "a")  # Compiles its programs.
        images = encoder.encoder_of(predictor.artifacts.about.images, values.image_dtype)
        texts = None
        with contextlib.suppress(InputError):  # The data may be elsewhere by now.
            config = workdir_lib.read_config(values.workdir, data=values.data)
            texts = workdir_lib.open_run_dataset(config, values.data_cache).train.texts
        return backend.Opened(predictor, images if predictor.image_width else None, texts)

    console.status(f"{values.workdir}: opening the run")
    settings = backend.Settings(
        values.max_queries, values.max_pending, values.timeout_s, values.refresh_s
    )
    service = backend.Backend(settings, open_run)
    application = app.make(
        service,
        token=token,
        origins=tuple(values.origins),
        max_body=values.max_body_mib << 20,
    )

    def announce() -> None:
        address, count = server.address_of(bound), service.opened.predictor.num_labels
        print(
            f"{values.workdir}: {count:,} labels at {address}, API at {address}/docs; labels "
            f"can{'' if token else 'not'} be changed",
            flush=True,
        )

    ended_by = server.run(application, service, bound, values.timeout_s, announce)
    service.close()
    if service.failure is not None:
        raise service.failure
    line = f"{values.workdir}: stopped by {ended_by}; requests that had begun were answered"
    if service.is_loading:  # In a thread that compiles, say; nothing of it is kept.
        signals.leave(line, 0)
    print(line)
    sys.stdout.flush()


def define_flags() -> None:
    """Defines the flags of the command; everything else comes from the run directory."""
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", "", "Run directory that train wrote.")
    text("host", "127.0.0.1", "Address to listen on. 0.0.0.0: all of this machine.")
    integer("port", 8000, "Port to listen on; 0: any that is free.", 0, 65535)
    text(
        "token_file",
        "",
        "File with the token that requests need to list and change labels, in the header "
        f"'Authorization: Bearer TOKEN'. Without it, that of the variable {TOKEN_VARIABLE}. "
        "Without either, labels cannot be changed.",
    )
    flags.DEFINE_list(
        "origins", [], "Web pages that may use the service from a browser, such as "
        "https://shop.example; none but its own page by default.",
    )  # fmt: skip
    integer("max_queries", 256, "Queries of a request at most.", 1, 100_000)
    integer(
        "max_pending",
        1024,
        "Queries of all requests that are answered or wait. With more, a request gets status 429 "
        "and is to be repeated later.",
        1,
        10_000_000,
    )
    integer("max_body_mib", 32, "Size of a request at most, in MiB.", 1, 4096)
    flags.DEFINE_float(
        "timeout_s",
        10.0,
        "Seconds after which a request ends without an answer. When the service is stopped, those "
        "that have begun have as long.",
        0.1,
        3600.0,
    )
    flags.DEFINE_float(
        "refresh_s",
        2.0,
        "Seconds between looks for label updates that other processes make, by predict say.",
        0.05,
        3600.0,
    )
    predictor_flags.define()


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
