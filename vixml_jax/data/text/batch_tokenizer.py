"""Tokenizes many texts: caches the tokens of frequent pieces of text, and uses all processors."""

import collections
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.data.store import ranges
from vixml_jax.data.text import pretokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.runtime import frames, processors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WHERE = "the tokenizer of the texts"
_MODULE = "vixml_jax.data.text.batch_tokenizer"
_MAX_PIECES = 1 << 20  # Cached pieces, of up to four tokens on average: about 200 MB.
_MANY_TEXTS = 1 << 16  # Fewer are not worth starting processes, which takes half a second.
_TOGETHER = 64  # New pieces tokenized as one text.
_INT32_MAX = np.iinfo(np.int32).max
_DTYPES = ("<i4", "<i8", "<i4")  # Of the arrays that processes send, in the order of `Encoded`.
_REPLY = tuple[bytes, bytes, bytes] | str  # The arrays, or what is wrong with the texts.


class Encoded(NamedTuple):
    """Tokens of texts.

    Attributes:
      values: Tokens of all texts, one text after the other, int32.
      lengths: Number of tokens of each text after truncation, int64.
      full_lengths: Number of tokens of each text before truncation, int32.
    """

    values: Int[np.ndarray, " total"]
    lengths: Int[np.ndarray, " n"]
    full_lengths: Int[np.ndarray, " n"]


def encode(tokenizer: "Tokenizer", texts: list[str]) -> Encoded:
    """Tokens of a few texts; see `Encoder.encode`."""
    return Encoder(tokenizer).encode(texts)


class Encoder:
    """Tokenizes texts in one process, with a cache of the tokens of pieces of text.

    Most tokenizers treat the words between spaces separately, and words repeat, so that looking
    them up takes a tenth of the time. New pieces go to the tokenizer, which uses all processors.
    """

    def __init__(self, tokenizer: "Tokenizer", max_pieces: int = _MAX_PIECES):
        """Creates an encoder with an empty cache.

        Args:
          tokenizer: Truncates texts as set by `tokenizer.load`.
          max_pieces: Pieces that are cached at most, each about 200 bytes.

        Raises:
          InputError: If its post-processor does more than adding tokens before and after a text.
        """
        with tokenizer_lib.library_errors(_WHERE):
            self._prepare(tokenizer)
        self._max_pieces = max_pieces
        self._numbers = _Numbers()
        self._tokens = np.zeros(0, np.int32)  # Of all cached pieces, one after the other.
        self._ends = np.zeros(1, np.int64)  # Piece i has the tokens from ends[i] to ends[i + 1].

    def _prepare(self, tokenizer: "Tokenizer") -> None:
        """Finds how texts are split into pieces, and what is added before and after them."""
        from tokenizers import Tokenizer

        self._before, self._after = tokenizer_lib.special_tokens(tokenizer)
        frame = len(self._before) + len(self._after)
        truncation = tokenizer.truncation
        self._max_tokens = truncation["max_length"] - frame if truncation else _INT32_MAX
        written = tokenizer.to_str()
        self._split, self._end = pretokenizer.rule_of(json.loads(written))
        self._end_token = None if self._end is None else tokenizer.token_to_id(self._end.strip())
        self._uncut = Tokenizer.from_str(written)
        self._uncut.no_truncation()
        self._uncut.no_padding()
        for text in ("", "b a"):
            bare = self._uncut.encode(text, add_special_tokens=False).ids
            if self._uncut.encode(text).ids != [*self._before, *bare, *self._after]:
                raise InputError(tokenizer_lib.NO_FRAME)

    def encode(self, texts: list[str]) -> Encoded:
        """Tokens of texts, truncated and with special tokens, as the tokenizer gives them."""
        split = [self._split(text) for text in texts]
        counts = np.fromiter(map(len, split), np.int64, len(split))
        numbers = map(self._numbers.__getitem__, itertools.chain.from_iterable(split))
        pieces = np.fromiter(numbers, np.int64, int(counts.sum()))
        del split
        self._tokenize_new_pieces()
        at = self._ends[pieces]
        sizes = self._ends[pieces + 1] - at
        ends = np.concatenate([[0], np.cumsum(sizes)])  # Before truncation.
        last = np.cumsum(counts)
        begins = ends[last - counts]
        full = ends[last] - begins
        # Tokens that each piece may have at most, as its text is truncated.
        left = self._max_tokens - (ends[:-1] - np.repeat(begins, counts))
        kept = self._tokens[ranges(at, np.clip(left, 0, sizes))]
        self._shrink_cache()
        frame = len(self._before) + len(self._after)
        lengths = np.minimum(full, self._max_tokens) + frame
        return Encoded(self._frame(kept, lengths), lengths, (full + frame).astype(np.int32))

    def _tokenize_new_pieces(self) -> None:
        """Tokenizes the pieces that are not in the cache, and adds them."""
        new, self._numbers.new = self._numbers.new, []
        if new:
            try:
                tokens, lengths = self._tokenize(new)
            except BaseException:  # Else later pieces would get the tokens of these.
                for piece in new:
                    del self._numbers[piece]
                raise
            self._tokens = np.concatenate([self._tokens, tokens])
            self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(lengths)])

    def _tokenize(self, new: list[str]) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"]]:
        """Tokens of all pieces, one after the other, and the number of tokens of each piece."""
        if self._end is not None:  # One call for many pieces costs less.
            parts = (new[start : start + _TOGETHER] for start in range(0, len(new), _TOGETHER))
            tokens, _ = self._run([self._end.join([*part, ""]) for part in parts])
            ends = tokens == self._end_token
            at = np.flatnonzero(ends)
            if len(at) == len(new):  # Else a piece contains the end token itself.
                return tokens[~ends], np.diff(at, prepend=-1) - 1
        return self._run(new)

    def _run(self, texts: list[str]) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"]]:
        """Tokens of all texts from the tokenizer, and the number of tokens of each text."""
        with tokenizer_lib.library_errors(_WHERE):
            encodings = self._uncut.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def _shrink_cache(self) -> None:
        """Keeps the pieces that were seen first; the frequent ones are among them."""
        kept = int(np.searchsorted(self._ends, 4 * self._max_pieces, side="right")) - 1
        kept = min(kept, self._max_pieces)
        while len(self._numbers) > kept:
            self._numbers.popitem()  # Removes the newest piece.
        self._ends = self._ends[: kept + 1]
        self._tokens = self._tokens[: self._ends[-1]]

    def _frame(
        self, kept: Int[np.ndarray, " k"], lengths: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " total"]:
        """Adds the special tokens before and after each text."""
        tokens = np.empty(int(lengths.sum()), np.int32)
        is_text = np.ones(len(tokens), bool)
        ends = np.cumsum(lengths)
        for begins, special in (
            (ends - lengths, self._before),
            (ends - len(self._after), self._after),
        ):
            for i, token in enumerate(special):
                tokens[begins + i] = token
                is_text[begins + i] = False
        tokens[is_text] = kept
        return tokens


class _Numbers(dict):
    """Numbers pieces of text in the order in which they are first looked up.

    Attributes:
      new: Pieces that are not tokenized yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, piece: str) -> int:
        self[piece] = number = len(self)
        self.new.append(piece)
        return number


class Encoders:
    """Encoders in several processes, since Python looks up pieces in one thread at a time.

    The processes are started as programs, not forked and not with `multiprocessing`, so that they
    depend neither on threads of this process nor on its main module. They end with the context.
    """

    def __init__(self, tokenizer: "Tokenizer", processes: int):
        """Checks the tokenizer; the processes start with the context.

        Args:
          tokenizer: See `Encoder`.
          processes: Number of processes, see `processes_for`; 0: this process encodes all texts.

        Raises:
          InputError: See `Encoder`.
        """
        self._encoder = Encoder(tokenizer)
        self._written = tokenizer.to_str()
        self._processes = processes

    def __enter__(self) -> "Encoders":
        if not self._processes:
            return self
        command = [sys.executable, "-m", _MODULE]
        single_threaded = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        with contextlib.ExitStack() as stack:
            self._local = threading.local()
            self._idle = [
                stack.enter_context(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=single_threaded
                    )
                )
                for _ in range(self._processes)
            ]
            self._threads = stack.enter_context(futures.ThreadPoolExecutor(self._processes))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._processes:
            self._stack.__exit__(*error)

    def encode(self, chunks: Iterable[list[str]]) -> Iterator[tuple[list[str], Encoded]]:
        """Yields chunks of texts and their tokens in order; reads a few chunks ahead."""
        if not self._processes:
            yield from ((chunk, self._encoder.encode(chunk)) for chunk in chunks)
            return
        pending: collections.deque[tuple[list[str], futures.Future]] = collections.deque()
        for chunk in chunks:
            pending.append((chunk, self._threads.submit(self._encode_in_process, chunk)))
            if len(pending) > 2 * self._processes:
                chunk, future = pending.popleft()
                yield chunk, future.result()
        for chunk, future in pending:
            yield chunk, future.result()

    def _encode_in_process(self, texts: list[str]) -> Encoded:
        """Tokens of texts from the process that belongs to this thread."""
        first = not hasattr(self._local, "process")
        if first:
            self._local.process = self._idle.pop()
        process = self._local.process
        try:
            if first:
                frames.write(process.stdin, self._written)
            frames.write(process.stdin, texts)
            reply = frames.read(process.stdout, _REPLY)
        except (EOFError, BrokenPipeError):
            process.communicate()  # Closes its input, so that it ends in any case.
            raise InputError(
                f"{_WHERE}: one of its processes ended with exit status {process.returncode}; "
                "free memory, or see what it printed above"
            ) from None
        if isinstance(reply, str):
            raise InputError(reply)
        return Encoded(*map(np.frombuffer, reply, _DTYPES))


def processes_for(num_texts: int) -> int:
    """Number of processes for `Encoders`: one per processor, at most 16; 0 for few texts."""
    count = processors.usable()
    return min(count, 16) if count > 1 and num_texts >= _MANY_TEXTS else 0


def _serve() -> None:
    """Encodes lists of texts from standard input until it ends."""
    from tokenizers import Tokenizer

    source, target = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        encoder = Encoder(Tokenizer.from_str(frames.read(source, str)))
        while True:
            texts = frames.read(source, list[str])
            try:
                arrays = zip(encoder.encode(texts), _DTYPES, strict=True)
                reply = tuple(array.astype(dtype).tobytes() for array, dtype in arrays)
            except InputError as error:
                reply = str(error)
            frames.write(target, reply)


if __name__ == "__main__":
    _serve()
