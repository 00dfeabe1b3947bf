"""Attacks on the Python reader, once more, on the decoder in C beside it: it must refuse whatever Python refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.artifact import test_hostile, test_hostile_one
from tests.artifact.test_hostile import (
    test_bombs_are_not_set_off,  # noqa: F401
    test_data_behind_the_last_entry,  # noqa: F401
    test_data_that_cannot_be,  # noqa: F401
    test_dense_data_is_the_users_own,  # noqa: F401
    test_header_beyond_the_file,  # noqa: F401
    test_header_has_one_form,  # noqa: F401
    test_header_that_is_none,  # noqa: F401
    test_indices_that_lie,  # noqa: F401
    test_many_small_claims_add_up,  # noqa: F401
    test_metadata_is_exact,  # noqa: F401
    test_padding_is_exact,  # noqa: F401
    test_plan_that_is_none,  # noqa: F401
    test_plans_that_lie,  # noqa: F401
    test_the_limit_is_the_callers_to_lift,  # noqa: F401
    test_versions,  # noqa: F401
)
from tests.artifact.test_hostile_one import (
    test_an_entry_too_short,  # noqa: F401
    test_around_the_plan,  # noqa: F401
)
from tests.artifact.test_hostile_one import test_bombs_are_not_set_off as test_bombs_in_one  # noqa: F401
from tests.artifact.test_hostile_one import test_data_that_cannot_be as test_data_in_one  # noqa: F401
from tests.artifact.test_hostile_one import test_plans_that_lie as test_plans_in_one  # noqa: F401
from tests.c.decoder import Fed, Refused, compiler, read

from bitbook.artifact import Artifact, from_bytes
from bitbook.errors import CorruptArtifact

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler named cc")


@pytest.fixture(scope="module")
def fed() -> Iterator[Fed]:
    with Fed() as program:
        yield program


@pytest.fixture(autouse=True)
def _both(monkeypatch: pytest.MonkeyPatch, fed: Fed) -> None:
    """What these modules know as `from_bytes` gives each file to the decoder, too, and fails where the two differ."""

    def both(data: bytes | memoryview, *, max_elements: int | None = None) -> Artifact:
        data = bytes(data)
        fed.read(data)  # for the sanitizers
        try:
            artifact = from_bytes(data, max_elements=max_elements)
            artifact.state_dict()
        except CorruptArtifact:
            with pytest.raises(Refused):
                read(data, max_elements or 0)
            raise
        read(data, max_elements or 0)
        return artifact

    monkeypatch.setattr(test_hostile, "from_bytes", both)
    monkeypatch.setattr(test_hostile_one, "from_bytes", both)
