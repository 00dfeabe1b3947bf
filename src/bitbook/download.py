"""Files from public places, and the cache that keeps them; whoever asks for one checks what came."""

from __future__ import annotations

import os
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path

TIMEOUT = 30.0  # seconds that a server may stay silent

FAILURES = (OSError, HTTPException)
"""What `fetch` raises where there is no network, no such file, or the connection breaks."""


def cache_folder(name: str) -> Path:
    """The folder of the cache called `name`: `bitbook/name` in `$XDG_CACHE_HOME` or `~/.cache`; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bitbook", name)


def fetch(url: str, most: int) -> bytes:
    """What is at `url`, of which at most `most` bytes are taken, so that a wrong file cannot fill memory."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return response.read(most)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch, "whole")
        whole.write_bytes(data)
        whole.replace(path)
