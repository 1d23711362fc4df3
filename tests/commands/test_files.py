"""That a file cannot be written is said before the work for it begins."""

import os
import sys

import pytest

from rwkv_jax import evaluate, plot
from rwkv_jax.errors import UserError
from rwkv_jax.files import check_writable, written_whole


def test_a_path_is_checked_and_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "new"):
        check_writable(tmp_path / name)
    for name, reason in [
        ("none/x", "No such file or directory"),
        ("file/x", "Not a directory"),
        ("folder", "it is not a regular file"),
        ("pipe", "it is not a regular file"),
        ("x" * 250, "File name too long"),  # not it, but the one beside it
    ]:
        with pytest.raises(UserError, match=f"{name}: cannot write: {reason}"):
            check_writable(tmp_path / name)
        with pytest.raises(OSError, match=reason), written_whole(tmp_path / name) as temporary:
            temporary.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert (tmp_path / "file").read_text() == "x"


def test_commands_check_their_output_first(tmp_path, monkeypatch):
    """Before the model or the runs, which are not there either."""
    with pytest.raises(UserError, match="none/x: cannot write: "):
        evaluate.main(
            ["--load_model", "no.pth", "--data_file", "no.txt", "--output", f"{tmp_path}/none/x"]
        )
    for output, complaint in [
        (f"{tmp_path}/none/x", "none/x.html: cannot write: "),
        (".", "--output .: is a folder"),
    ]:
        monkeypatch.setattr(sys, "argv", ["plot", "no-run", "--output", output])
        with pytest.raises(UserError, match=complaint):
            plot.main()
