"""Files that a user names or a stranger altered: regular ones alone, and no longer than is sane.

To read a pipe never ends, to read `/dev/zero` fills the memory, and so does a file of gigabytes
under the name of a small one. All packages read such files by this module, which imports none.
"""

import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MOST_VALUES = 3_000_000
"""Values in a JSON text: three bytes of one can become a hundred of memory."""


def open_plain(path: Path, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading, without waiting for whoever writes into a pipe.

    Args:
        most: Bytes that it may have; None for any number.

    Raises:
        ValueError: If it is a pipe or a device, or is longer.
        OSError: If it cannot be opened, or is a folder.
    """
    file: BinaryIO = io.BufferedReader(io.FileIO(path, opener=_without_waiting))
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise ValueError(f"file {str(path)!r} is a pipe or a device: give a regular file")
    if most is not None and status.st_size > most:
        file.close()
        raise _too_long(path, most)
    return file


def check_plain(folder: Path, pattern: str = "*", most: int | None = None) -> None:
    """Check that what a folder holds is regular files and folders.

    Args:
        pattern: Of the names that are looked at, as of `Path.glob`.
        most: Bytes that a file may have; None for any number.

    Raises:
        ValueError: If one of them is a pipe or a device, or is longer.
        OSError: If one cannot be opened.
    """
    for path in sorted(folder.glob(pattern)):
        if not path.is_dir():
            open_plain(path, most).close()


def read_bytes(path: Path, most: int) -> bytes:
    """Return a regular file's bytes; raises as `open_plain`."""
    with open_plain(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grew, or its size is not told, as below /proc
        raise _too_long(path, most)
    return content


def read_text(path: Path, most: int) -> str:
    """Return a regular file's text; raises as `open_plain`, and ValueError if it is no UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"file {str(path)!r} must be UTF-8 text: {error}") from error


def read_lines(path: Path, most: int, longest: int) -> Iterator[bytes]:
    """Yield a regular file's lines with their ends; the last one may have none.

    Args:
        most: Bytes that the file may have.
        longest: Bytes that a line may have.

    Raises:
        ValueError: As `open_plain`, or a line is longer.
        OSError: If it cannot be read.
    """
    with open_plain(path, most) as file:
        while line := file.readline(longest + 1):
            if len(line) > longest:
                raise ValueError(f"file {str(path)!r} has a line of more than {longest} bytes")
            yield line


def read_object(path: Path, most: int) -> dict[str, Any]:
    """Return the JSON object in a regular file; raises as `read_text` and `parse_object`."""
    return parse_object(read_text(path, most), f"file {str(path)!r}")


def check_values(text: str | bytes, what: str) -> None:
    """Check that a JSON text has no more than `MOST_VALUES`, without parsing it.

    Args:
        what: What an error calls the text.

    Raises:
        ValueError: If it may have more.
    """
    content = text.encode() if isinstance(text, str) else text
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"{what} has more than {MOST_VALUES} values: not read")


def parse_object(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object that a text is.

    Args:
        what: What an error calls the text.

    Raises:
        ValueError: If it is no JSON, has too many values, is nested too deeply, or is something
            else than an object.
    """
    check_values(text, what)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold a JSON object, got a list or a value")
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such pipes


def _too_long(path: Path, most: int) -> ValueError:
    return ValueError(f"file {str(path)!r} is longer than {most} bytes: not read")
