"""Things of the user's that are named as text: "package.module:callable"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from bitbook.errors import BitbookError


def import_callable(name: str, error: type[BitbookError]) -> Callable[..., Any]:
    """The callable that "package.module:callable" names; raises `error` if there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as cause:
        raise error(f"{name!r} cannot be imported: {cause}; it should read 'package.module:callable'") from cause
    if not callable(found):
        raise error(f"{name!r} is a {type(found).__name__}, not a callable")
    return found
