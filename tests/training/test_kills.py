"""Killed three times, a run ends as if nothing had happened. `kills.py` does it thirty times."""

import pytest

from tests.support import kills


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["KILL"])
def test_three_kills(signal, capsys):
    kills.main(["--kills", "3", "--signal", signal, "--seed", "5", "--steps_a_kill", "12"])
    assert "every .pth byte-identical" in capsys.readouterr().out
