"""Reads JSON files, up to one limit of size and of depth, and writes files whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any

JsonObject = dict[str, Any]

# Longest text or JSON file that is read: a checkpoint of about ten thousand metrics.
MOST_BYTES = 20_000_000


def read_text(path: Path) -> str:
    """Return a file's text; raises ValueError if it is not regular, too long, or no UTF-8."""
    about = path.stat()
    if not S_ISREG(about.st_mode):  # a device or a pipe may never end
        raise ValueError(f"{str(path)!r} is no regular file: not read")
    if about.st_size > MOST_BYTES:
        raise ValueError(f"file {str(path)!r} is longer than {MOST_BYTES} bytes: not read")
    return path.read_text("utf-8")


def read_object(path: Path) -> JsonObject:
    """Return the JSON object in a file; raises as `read_text` and `parse_object`."""
    return parse_object(read_text(path), f"file {str(path)!r}")


def parse_object(text: str, what: str) -> JsonObject:
    """Return the JSON object that a text is; raises ValueError, which calls the text `what`."""
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{what} is no JSON, or nested too deeply: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold a JSON object, got a list or a value")
    return content


@contextmanager
def whole_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path; what is written there gets its name at the end.

    A kill leaves the old file or the new one; so does a power cut, if synced.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        yield draft
        if sync:
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def finite(content: JsonObject) -> JsonObject:
    """Return JSON content, None in place of numbers that are not finite: JSON has none of these."""
    read: JsonObject = json.loads(json.dumps(content), parse_constant=lambda constant: None)
    return read


def write_json(path: Path, content: JsonObject) -> None:
    """Write an object, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
