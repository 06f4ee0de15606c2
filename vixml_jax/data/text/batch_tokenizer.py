"""Texts to ragged int32 tokens: pieces seen before are looked up, and all processors work."""

import collections
import contextlib
import itertools
import json
import os
import pickle
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

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MODULE = "vixml_jax.data.text.batch_tokenizer"
_MOST_PIECES = 1 << 20  # Remembered, of four tokens on average: some 200 MB.
_MANY_TEXTS = 1 << 16  # To start processes for: they need half a second.
_TOGETHER = 64  # New pieces tokenised as one text.


class Encoded(NamedTuple):
    """Tokens of texts."""

    values: Int[np.ndarray, " total"]  # int32, those of all texts one after the other.
    lengths: Int[np.ndarray, " n"]  # int64, tokens of each text.
    whole: Int[np.ndarray, " n"]  # int32, tokens that it had if it were not cut.


def encode(tokenizer: "Tokenizer", texts: list[str]) -> Encoded:
    """Tokens of a few texts, as `Encoder.encode` gives them."""
    return Encoder(tokenizer).encode(texts)


class Encoder:
    """Texts to tokens, each piece of a text once: the tokens of pieces seen before are looked up.

    Most tokenizers treat what stands between spaces by itself, and words repeat: looking them up
    takes a tenth of the time. What is new goes to the tokenizer, on all processors.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        """Takes a tokenizer that cuts as `load` has it.

        Raises:
          InputError: If it does more than to put tokens before and after a text.
        """
        from tokenizers import Tokenizer

        self._before, self._after = tokenizer_lib.special_tokens(tokenizer)
        frame = len(self._before) + len(self._after)
        cut = tokenizer.truncation
        self._room = cut["max_length"] - frame if cut else np.iinfo(np.int32).max
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
        self._numbers = _Numbers()
        self._tokens = np.zeros(0, np.int32)  # Of all known pieces, one after the other.
        self._ends = np.zeros(1, np.int64)  # Where those of piece i end, at i + 1.

    def encode(self, texts: list[str]) -> Encoded:
        """Tokens of texts as the tokenizer cuts them."""
        split = [self._split(text) for text in texts]
        counts = np.fromiter(map(len, split), np.int64, len(split))
        numbers = map(self._numbers.__getitem__, itertools.chain.from_iterable(split))
        found = np.fromiter(numbers, np.int64, int(counts.sum()))
        del split
        self._learn()
        at = self._ends[found]
        sizes = self._ends[found + 1] - at
        ends = np.concatenate([[0], np.cumsum(sizes)])  # As if no text were cut.
        last = np.cumsum(counts)
        begins = ends[last - counts]
        whole = ends[last] - begins
        left = self._room - (ends[:-1] - np.repeat(begins, counts))  # Room for each piece.
        kept = self._tokens[ranges(at, np.clip(left, 0, sizes))]
        self._forget()
        frame = len(self._before) + len(self._after)
        lengths = np.minimum(whole, self._room) + frame
        return Encoded(self._frame(kept, lengths), lengths, (whole + frame).astype(np.int32))

    def _learn(self) -> None:
        """Has the new pieces tokenised."""
        new, self._numbers.new = self._numbers.new, []
        if new:
            try:
                tokens, lengths = self._tokenise(new)
            except BaseException:  # Else pieces that come later would get tokens of others.
                for piece in new:
                    del self._numbers[piece]
                raise
            self._tokens = np.concatenate([self._tokens, tokens])
            self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(lengths)])

    def _tokenise(self, new: list[str]) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"]]:
        """Tokens of pieces one after the other, and the number of each piece's."""
        if self._end is not None:  # A call's cost is shared by many pieces.
            parts = (new[start : start + _TOGETHER] for start in range(0, len(new), _TOGETHER))
            tokens, _ = self._run([self._end.join([*part, ""]) for part in parts])
            ends = tokens == self._end_token
            at = np.flatnonzero(ends)
            if len(at) == len(new):  # Else some piece says the end itself.
                return tokens[~ends], np.diff(at, prepend=-1) - 1
        return self._run(new)

    def _run(self, texts: list[str]) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"]]:
        """What the tokenizer makes of texts, and the number of tokens of each."""
        found = self._uncut.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array(encoding.ids, np.int32) for encoding in found]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def _forget(self) -> None:
        """Keeps of the pieces those first seen: the frequent ones are among them."""
        most = int(np.searchsorted(self._ends, 4 * _MOST_PIECES, side="right")) - 1
        most = min(most, _MOST_PIECES)
        while len(self._numbers) > most:
            self._numbers.popitem()  # The last one.
        self._ends = self._ends[: most + 1]
        self._tokens = self._tokens[: self._ends[-1]]

    def _frame(
        self, kept: Int[np.ndarray, " k"], lengths: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " total"]:
        """Puts the special tokens before and after each text."""
        tokens = np.empty(int(lengths.sum()), np.int32)
        text = np.ones(len(tokens), bool)
        ends = np.cumsum(lengths)
        for begins, special in (
            (ends - lengths, self._before),
            (ends - len(self._after), self._after),
        ):
            for i, token in enumerate(special):
                tokens[begins + i] = token
                text[begins + i] = False
        tokens[text] = kept
        return tokens


class _Numbers(dict):
    """Numbers pieces of text in the order in which they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, piece: str) -> int:
        self[piece] = number = len(self)
        self.new.append(piece)
        return number


class Encoders:
    """Encoders in processes of their own, one a processor: Python looks up in one thread alone.

    The processes are started as programs, not forked and not by `multiprocessing`, so that neither
    threads of this process nor its main module matter. They end with the context.
    """

    def __init__(self, tokenizer: "Tokenizer", processes: int):
        """Takes what an encoder takes, and `processes_for` the texts; 0: all is done in this one.

        Raises:
          InputError: As of an encoder.
        """
        self._encoder = Encoder(tokenizer)
        self._written = tokenizer.to_str()
        self._processes = processes

    def __enter__(self) -> "Encoders":
        if not self._processes:
            return self
        command = [sys.executable, "-m", _MODULE]
        alone = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        with contextlib.ExitStack() as stack:
            self._local = threading.local()
            self._idle = [
                stack.enter_context(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=alone
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
        """Yields chunks of texts and their tokens, in order, a few chunks behind the reading."""
        if not self._processes:
            yield from ((chunk, self._encoder.encode(chunk)) for chunk in chunks)
            return
        pending: collections.deque[tuple[list[str], futures.Future]] = collections.deque()
        for chunk in chunks:
            pending.append((chunk, self._threads.submit(self._ask, chunk)))
            if len(pending) > 2 * self._processes:
                chunk, future = pending.popleft()
                yield chunk, future.result()
        for chunk, future in pending:
            yield chunk, future.result()

    def _ask(self, texts: list[str]) -> Encoded:
        """Has a process of this thread's own encode texts."""
        first = not hasattr(self._local, "process")
        if first:
            self._local.process = self._idle.pop()
        process = self._local.process
        try:
            if first:
                pickle.dump(self._written, process.stdin)
            pickle.dump(texts, process.stdin)
            process.stdin.flush()
            return Encoded(*pickle.load(process.stdout))
        except (EOFError, BrokenPipeError):
            raise RuntimeError(
                f"a process that tokenises ended with status {process.wait()}"
            ) from None


def processes_for(num_texts: int) -> int:
    """One a processor where there is enough to do, at most 16; 0 where there is not."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return min(processors, 16) if processors > 1 and num_texts >= _MANY_TEXTS else 0


def _serve() -> None:
    """Encodes what comes in until no more comes."""
    from tokenizers import Tokenizer

    with contextlib.suppress(EOFError, KeyboardInterrupt):
        encoder = Encoder(Tokenizer.from_str(pickle.load(sys.stdin.buffer)))
        while True:
            found = encoder.encode(pickle.load(sys.stdin.buffer))
            pickle.dump(tuple(found), sys.stdout.buffer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
