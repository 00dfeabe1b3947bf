"""The decoder in C, compiled with whatever `cc` is, as a library in this process or as a program that is fed files."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

SOURCE = Path(__file__).resolve().parents[2] / "c"
HERE = Path(__file__).resolve().parent
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2")
SANITIZED = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CODES = ("OK", "UNREADABLE", "NO_MEMORY", "CORRUPT", "NEWER", "TOO_MANY", "NO_SUCH")


class Refused(Exception):
    """A file that the decoder refuses: the name of the error, and its message."""


class Read(NamedTuple):
    """A tensor as the decoder gives it."""

    values: np.ndarray
    stored_as: str
    target: int


def compiler() -> str | None:
    return shutil.which("cc")


@functools.cache
def build(name: str, sources: tuple[Path, ...], *flags: str) -> Path:
    """A program, library or object in a folder that lives as long as this process."""
    out = Path(_folder().name) / name
    command = [compiler() or "cc", *STRICT, *flags, f"-I{SOURCE}", "-o", str(out), *map(str, sources)]
    done = subprocess.run([*command, *(() if "-c" in flags else ("-lm",))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def compiled() -> Path:
    """The decoder, to be linked."""
    return build("bitbook.o", (SOURCE / "bitbook.c",), "-c", "-fPIC")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bitbook-c-")


class _Error(ctypes.Structure):
    _fields_ = (("status", ctypes.c_int), ("message", ctypes.c_char * 256))


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("bitbook.so", (compiled(),), "-shared")))
    pointer, number, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
    error = ctypes.POINTER(_Error)
    for name, result, arguments in (
        ("open_memory", pointer, (pointer, size, number, error)),
        ("close", None, (pointer,)),
        ("count", size, (pointer,)),
        ("name", pointer, (pointer, size, ctypes.POINTER(size))),
        ("axes", size, (pointer, size)),
        ("shape", ctypes.POINTER(number), (pointer, size)),
        ("elements", number, (pointer, size)),
        ("stored_as", ctypes.c_char_p, (pointer, size)),
        ("target", size, (pointer, size)),
        ("decode", ctypes.c_int, (pointer, size, pointer, error)),
    ):
        function = getattr(library, f"bitbook_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def read(data: bytes, max_elements: int = 0) -> dict[str, Read]:
    """All tensors of a file by name, as float32; raises `Refused`."""
    library, error, size = _library(), _Error(), ctypes.c_size_t()
    book = library.bitbook_open_memory(data, len(data), max_elements, ctypes.byref(error))
    if not book:
        raise Refused(CODES[error.status], error.message.decode("utf-8", "replace"))
    try:
        tensors = {}
        for i in range(library.bitbook_count(book)):
            text = library.bitbook_name(book, i, ctypes.byref(size))
            name = ctypes.string_at(text, size.value).decode()
            shape = library.bitbook_shape(book, i)[: library.bitbook_axes(book, i)]
            values = np.empty(shape, np.float32)
            assert values.size == library.bitbook_elements(book, i)
            if library.bitbook_decode(book, i, values.ctypes.data, ctypes.byref(error)):
                raise Refused(CODES[error.status], error.message.decode("utf-8", "replace"))
            stored_as = library.bitbook_stored_as(book, i).decode()
            tensors[name] = Read(values, stored_as, library.bitbook_target(book, i))
        return tensors
    finally:
        library.bitbook_close(book)


class Fed:
    """The decoder under sanitizers, as a program that is fed files and answers each with a status and a checksum."""

    def __init__(self) -> None:
        program = build("driver", (HERE / "driver.c", SOURCE / "bitbook.c"), *SANITIZED)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([str(program)], stdin=pipe, stdout=pipe, stderr=pipe)

    def __enter__(self) -> Fed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._process.kill()
            self._process.communicate()

    def read(self, data: bytes) -> tuple[str, int]:
        """The name of the status, and the checksum of the content; fails where the program ended."""
        process = self._process
        assert process.stdin and process.stdout and process.stderr
        try:
            process.stdin.write(len(data).to_bytes(4, "little") + data)
            process.stdin.flush()
            status, checksum = process.stdout.readline().split()
        except (BrokenPipeError, ValueError):
            raise AssertionError(f"the decoder broke on {data!r}:\n{process.stderr.read().decode()}") from None
        return CODES[int(status)], int(checksum)

    def close(self) -> None:
        """End the program, which looks for leaks then."""
        _, said = self._process.communicate()
        assert self._process.returncode == 0, said.decode()


def checksum(tensors: Mapping[str, np.ndarray]) -> int:
    """What `Fed` answers for this content."""
    crc = 0
    for name, values in tensors.items():
        bits = np.where(np.isnan(values), np.float32(np.nan), values.astype(np.float32))
        shape = np.array(values.shape, "<u8")
        crc = zlib.crc32(name.encode() + b"\0" + shape.tobytes() + bits.astype("<f4").tobytes(), crc)
    return crc
