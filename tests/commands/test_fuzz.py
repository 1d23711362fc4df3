"""Mutated files of four kinds: a result or a `UserError` each time. `fuzz.py` tries more."""

import pytest

from tests.support import fuzz


# Where one part of a load fails, orbax's other parts may, too, and nobody asks for their result.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "reader",
    [pytest.param(x, marks=pytest.mark.slow if x == "checkpoint" else ()) for x in fuzz.READERS],
)
def test_mutated_files_hold_no_surprise(reader, tmp_path):
    assert "2000 inputs" in fuzz.fuzz(reader, 2000, tmp_path)
