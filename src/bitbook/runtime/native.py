"""The loops of native.c, compiled once for this processor and kept in the cache of the user.

Nothing is compiled or loaded at import.  Where there is no C compiler, `library` is None and others serve; a warning
says so once, because it costs speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import warnings
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_long, c_void_p
from pathlib import Path
from typing import Any

from bitbook.download import cache_folder

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC")
_TRIED = (("-march=native", "-fopenmp"), ("-fopenmp",), ())
"""The first flags that the compiler takes: without the second, one thread; without the first, slow vectors."""

FLOAT32, BFLOAT16 = range(2)
GIVEN, MINMAX, ABSMAX = range(3)


class Levels(Structure):
    """`levels_t`."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "levels", "scales", "offsets")),
        *((name, c_long) for name in ("rows", "cols", "block_rows", "block_cols")),
        *((name, c_int) for name in ("bits", "first", "scale_type", "offset_type")),
    )


class Integers(Structure):
    """`integers_t`."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scales", "zeros", "sums")),
        *((name, c_long) for name in ("rows", "cols")),
        *((name, c_int) for name in ("bits", "factor", "symmetric", "most", "rule")),
        *((name, c_float) for name in ("in_scale", "in_zero")),
    )


class Vectors(Structure):
    """`vectors_t`."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "table", "codewords")),
        *((name, c_long) for name in ("rows", "cols", "dims", "stride")),
        ("bits", c_int),
    )


class Rows(Structure):
    """`rows_t`."""

    _fields_ = (
        *((name, c_void_p) for name in ("panels", "labels")),
        *((name, c_long) for name in ("rows", "cols", "centroids")),
    )


pack_call = struct.Struct("PPlPl").pack
"""`call_t` as bytes: addresses of bias (0: none) and input, batch, address of the product, threads.

ctypes takes these in half the time of five arguments, which is a tenth of what a small product takes.
"""

_PRODUCT = c_void_p, c_char_p  # the tensor's structure, and a call: bare addresses convert fastest
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "levels_linear": _PRODUCT,
    "integers_linear": _PRODUCT,
    "vectors_look_up": _PRODUCT,
    "vectors_rows": (POINTER(Vectors), c_long, c_long, c_void_p, c_int),
    "rows_linear": _PRODUCT,
    "gather_linear": _PRODUCT,
    "pack": (c_void_p, c_int, c_int32, c_long, c_long, c_int, c_void_p, c_int),
    "unpack": (c_void_p, c_long, c_long, c_long, c_int, c_int32, c_void_p, c_int, c_int),
}


@functools.cache
def compiled() -> Any:
    """The compiled loops, or None where there is no compiler."""
    path = _file()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    for name, types in _ARGUMENTS.items():
        getattr(loaded, name).argtypes = types
    return loaded


def _file() -> Path | None:
    """The library's file, made where it is missing; another process may be making it, too."""
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, repr((_FLAGS, _TRIED)).encode(), _processor().encode()])).hexdigest()
    path = cache_folder("native") / f"{key[:24]}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)
    if compiler is None:
        warnings.warn("there is no C compiler, so products with packed weights are slower; install gcc", stacklevel=2)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, said = Path(folder, "made.so"), ""
        for flags in _TRIED:
            command = [compiler, *_FLAGS, *flags, str(_SOURCE), "-o", str(made), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                made.replace(path)
                return path
            said = said or result.stderr.strip().partition("\n")[0]
    warnings.warn(f"{compiler} does not compile native.c, so packed weights are slower: {said}", stacklevel=2)
    return None


def _processor() -> str:
    """What the instructions that -march=native chooses depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.system(), platform.machine(), *sorted(set(told))])
