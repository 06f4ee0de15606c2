"""Opens text files of any encoding, plain, gz or zst, and reads their lines."""

import codecs
import contextlib
import functools
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from vixml_jax.errors import InputError
from vixml_jax.storage import expansion, regular_files

COMPRESSED = (".gz", ".zst")
# Longest line in bytes. Longer lines occur in broken files only, and would exhaust memory.
MAX_LINE = 4 << 20
_BLANK = (b"\n", b"\r\n")
_BUFFERED = 1 << 17  # Bytes decompressed at a time.
_SNIFFED = 1 << 12  # First bytes, by which UTF-16 without a byte order mark is recognised.
# Byte order marks that some editors write; that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def check_encoding(name: str) -> None:
    """Checks the value of --encoding.

    Raises:
      InputError: If there is no such text encoding.
    """
    try:
        "".encode(name)
        b"".decode(name)
    except (LookupError, UnicodeError, TypeError, ValueError):
        raise InputError(
            f"--encoding={name}: expected a text encoding of Python, such as utf-8, cp1252, "
            "utf-16 or latin-1"
        ) from None


def check_path(path: str, flag: str = "") -> None:
    """Checks that a path is Unicode text, which can be printed and stored.

    Args:
      path: The path.
      flag: Name of the flag that gave it, for the message.

    Raises:
      InputError: If it has bytes that are not in the encoding of file names.
    """
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        shown = path.encode("ascii", "backslashreplace").decode()
        where = f"--{flag}={shown}" if flag else shown
        raise InputError(
            f"{where}: the path has bytes that are not {sys.getfilesystemencoding()}; rename it, "
            "or set a locale such as LC_ALL=C.UTF-8"
        ) from None


@contextlib.contextmanager
def errors_of(path: str) -> Iterator[None]:
    """Turns errors of reading a file into an InputError that names the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({_one_line(error)})") from None
    except UnicodeDecodeError as error:  # Of UTF-16 and other wide encodings.
        raise InputError(
            f"{path}: not {error.encoding} ({error.reason}); check --encoding"
        ) from None
    except OSError as error:
        reason = error.strerror or _one_line(error)
        raise InputError(f"{path}: cannot be read ({reason})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _open_bytes(path: str) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a file."""
    if os.path.exists(path) and not os.path.isdir(path):
        regular_files.check(path)
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield _bounded(file, path, "gzip -d")
    elif path.lower().endswith(".zst"):
        import pyarrow

        with pyarrow.OSFile(path) as compressed:
            stream = pyarrow.CompressedInputStream(compressed, "zstd")
            yield _bounded(stream, path, "zstd -d")
    else:
        with open(path, "rb") as file:
            yield file


def _bounded(file: BinaryIO, path: str, command: str) -> BinaryIO:
    """A decompressed file that ends in an InputError where it expands beyond measure."""
    remedy = f"if it is meant to be so, decompress it first ({command})"
    return io.BufferedReader(_Bounded(file, expansion.Expansion(path, remedy)), _BUFFERED)


class _Bounded(io.RawIOBase):
    """The bytes of a file, counted."""

    def __init__(self, file: BinaryIO, expanded: expansion.Expansion):
        self._file, self._expanded = file, expanded

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        self._expanded.add(count)
        return count


class _Utf8Stream(io.RawIOBase):
    """The bytes of a file in UTF-16, UTF-32 or another encoding that is no ASCII, as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str):
        self._file, self._decoder = file, codecs.getincrementaldecoder(encoding)()
        self._ready, self._done = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready and not self._done:
            data = self._file.read(io.DEFAULT_BUFFER_SIZE)
            self._done = not data
            self._ready = self._decoder.decode(data, final=self._done).encode("utf-8")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextlib.contextmanager
def open_text(path: str, encoding: str) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a text file without its byte order mark, and the encoding of its lines.

    A byte order mark determines the encoding. Text in UTF-16 or UTF-32 is converted to UTF-8, so
    that lines always end with the byte of a newline.

    Args:
      path: The file.
      encoding: The encoding of a file without a byte order mark.

    Raises:
      InputError: If the file is UTF-16 without a byte order mark, and `encoding` is not.
    """
    with _open_bytes(path) as raw:
        file = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
        start = file.peek(_SNIFFED)[:_SNIFFED]
        mark, encoding = _mark_of(start) or (b"", encoding)
        file.read(len(mark))
        if "\n".encode(encoding) != b"\n":
            yield io.BufferedReader(_Utf8Stream(file, encoding)), "utf-8"
            return
        if b"\0" in start:
            even, odd = start[::2].count(0), start[1::2].count(0)
            wide = "utf-16-be" if even > odd else "utf-16-le"
            if max(even, odd) > len(start) // 4:
                raise InputError(
                    f"{path}: every second byte is zero, as in UTF-16 without a byte order mark; "
                    f"pass --encoding={wide}"
                )
        yield file, encoding


def _mark_of(start: bytes) -> tuple[bytes, str] | None:
    """The byte order mark that a file begins with, and its encoding."""
    return next(((mark, name) for mark, name in _MARKS if start.startswith(mark)), None)


def encoding_of(path: str, encoding: str) -> str:
    """The encoding of a file: that of its byte order mark, or else the given one."""
    with _open_bytes(path) as file:
        mark = _mark_of(file.read(4))
    return encoding if mark is None else mark[1]


def read_lines(path: str, encoding: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, including its line end.

    Raises:
      InputError: If a line is too long, or is not in the encoding.
    """
    for number, text in lines(path, encoding):
        if isinstance(text, InputError):
            raise text
        yield number, text


def lines(path: str, encoding: str) -> Iterator[tuple[int, str | InputError]]:
    """Number and text of each line, including its line end, or the error of a bad line.

    Blank lines in a row may come as one text of several line ends, with the number of the first: a
    file of a few kilobytes may expand to a billion of them.

    Raises:
      InputError: At the end, if the encoding has a character for every byte and the file is UTF-8.
    """
    with open_text(path, encoding) as (file, line_encoding):
        number, check = 0, Utf8Check(path, line_encoding)
        read_line = functools.partial(read_bytes, file, MAX_LINE + 1, path, to_newline=True)
        while line := read_line(number + 1):
            number += 1
            if number == 1 and b"\r" in line.rstrip(b"\r") and b"\n" not in line:
                raise InputError(
                    f"{path}: lines end with a carriage return alone, as of old Macs; expected "
                    f"newlines (tr '\\r' '\\n' < {path} > NEW converts the file)"
                )
            if len(line) > MAX_LINE:
                yield number, long_line_error(path, number)
                while not line.endswith(b"\n") and (line := read_line(number)):
                    pass
                continue
            first = number
            if line in _BLANK:
                more = _blank_lines(file, path, number + 1)
                line, number = line + more, number + more.count(b"\n")
            check.add(line)
            try:
                text = line.decode(line_encoding)
            except UnicodeDecodeError as error:
                yield first, encoding_error(path, first, error, line_encoding)
                continue
            yield first, text
        check.finish()


def read_bytes(
    file: BinaryIO, size: int, path: str, line: int, *, to_newline: bool = False
) -> bytes:
    """The next bytes of a file that `open_text` opened.

    Args:
      file: The file.
      size: Greatest number of bytes.
      path: Path of the file, for messages.
      line: Number of the next line, for messages.
      to_newline: Whether to stop after a newline.

    Raises:
      InputError: If a file of UTF-16 or another wide encoding is damaged.
    """
    try:
        return file.readline(size) if to_newline else file.read(size)
    except UnicodeDecodeError as error:
        raise _wide_error(path, line, error) from None


def _blank_lines(file: BinaryIO, path: str, line: int) -> bytes:
    """The blank lines that come next, as far as they are read from the disk already."""
    try:
        ready = file.peek()
    except UnicodeDecodeError as error:
        raise _wide_error(path, line, error) from None
    blank = len(ready) - len(ready.lstrip(b"\r\n"))
    return file.read(ready.rfind(b"\n", 0, blank) + 1)


def _wide_error(path: str, line: int, error: UnicodeDecodeError) -> InputError:
    """The error for a damaged file of UTF-16 or another wide encoding."""
    return InputError(
        f"{path}, near line {line}: not {error.encoding} ({error.reason}); check --encoding"
    )


class Utf8Check:
    """Notices a UTF-8 file that is read in an encoding with one byte per character.

    Such an encoding reads every file without an error, and turns `ü` of a UTF-8 file into `Ã¼`.
    """

    def __init__(self, path: str, encoding: str):
        self._path, self._encoding = path, encoding
        self._is_utf8: bool | None = None if _is_single_byte(encoding) else False

    def add(self, data: bytes) -> None:
        """Looks at a line, or at several whole lines."""
        if self._is_utf8 is False or data.isascii():
            return
        try:
            data.decode("utf-8")
            self._is_utf8 = True
        except UnicodeDecodeError:
            self._is_utf8 = False

    def finish(self) -> None:
        """Raises an InputError if all characters beyond ASCII were valid UTF-8."""
        if self._is_utf8:
            raise InputError(
                f"{self._path}: is UTF-8, and would be garbled as {self._encoding}; pass "
                "--encoding=utf-8"
            )


def _is_single_byte(encoding: str) -> bool:
    """Whether the encoding has a character, of one byte, for most of the 128 bytes beyond ASCII."""
    return len(bytes(range(128, 256)).decode(encoding, "ignore")) > 85


def long_line_error(path: str, line: int) -> InputError:
    """The error for a line of more than `MAX_LINE` bytes."""
    return InputError(
        f"{path}, line {line}: longer than {MAX_LINE >> 20} MiB; expected one item per line"
    )


def encoding_error(path: str, line: int, error: UnicodeDecodeError, encoding: str) -> InputError:
    """The error for a line that is not in the encoding."""
    return InputError(
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} at column "
        f"{error.start + 1} is not {encoding}{_remedy(error.object, encoding)}"
    )


def _remedy(line: bytes, encoding: str) -> str:
    """The flags that read a line; empty if no common encoding does."""
    flags = []
    for name, title in (("utf-8", "UTF-8"), ("cp1252", "Windows, Excel"), ("latin-1", "Latin-1")):
        with contextlib.suppress(UnicodeDecodeError):
            line.decode(name)
            flags.append(f"--encoding={name} ({title})")
    if "UTF-8" in flags[0]:
        flags = flags[:1]
    return f"; try {' or '.join(flags)}"
