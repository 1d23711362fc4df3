"""Each line once and whole, whatever happens to the process and to the disk."""

import resource

import pytest

from rwkv_jax.tracking.log_file import LogFile


def test_lines_from_the_first_on_are_dropped_and_torn_ones(tmp_path):
    path = tmp_path / "log"
    path.write_text("step loss\n0 a\n1 b\n2 c\n3 ")
    LogFile(path, 2).append("2 d\n")
    assert path.read_text() == "step loss\n0 a\n1 b\n2 d\n"
    LogFile(path, 9).append("9 e\n")
    assert path.read_text() == "step loss\n0 a\n1 b\n2 d\n9 e\n"


def test_without_a_checkpoint_nothing_is_dropped(tmp_path):
    """The run that was there, cut short, then two that append, the second of them resumed."""
    path = tmp_path / "log"
    path.write_text("NEW RUN\n{}\n0 a\n1 b\n2 c\n3 ")
    LogFile(path, None, "header").append("0 d\n")
    before = "NEW RUN\n{}\n0 a\n1 b\n2 c\n3 \n0 d\n"
    assert path.read_text() == before
    LogFile(path, None).append("1 e\n2 f\n")
    LogFile(path, 2).append("2 g\n")
    assert path.read_text() == before + "1 e\n2 g\n"
    LogFile(path, 1).append("1 h\n")
    assert path.read_text() == before + "1 h\n"


# What a crash leaves after the lines 0 to 19 of a log.
TAILS = {
    "nothing": b"",
    "NUL bytes": b"\0" * 4096,
    "NUL bytes and a line": b"\0" * 100 + b"20 x\n",
    "lines, then NUL bytes": b"20 x\n21 x" + b"\0" * 100,
    "NUL bytes in a line": b"20 \0\0\0\0\n",
    "half a number": b"2",
    "half a line": b"20 x",
    "other bytes": bytes(range(256)) * 3,
    "other bytes, and a line": b"\xff\xfe\n\x07\n20 x\n",
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("first", [0, 1, 10, 19, 20])
def test_each_line_is_there_once_after_a_crash(tmp_path, tail, first):
    path, header = tmp_path / "log", b"step loss\n"
    before = [b"%d x\n" % number for number in range(20)]
    path.write_bytes(header + b"".join(before) + TAILS[tail])
    LogFile(path, first, header.decode()).append(f"{first} y\n")
    assert path.read_bytes() == header + b"".join(before[:first]) + b"%d y\n" % first


def test_what_a_crash_left_in_the_middle_cuts_nothing_off(tmp_path):
    path = tmp_path / "log"
    before = b"0 x\n1 x\n\0\0\0\n1\0 x\n2 x\n3 x\n"
    path.write_bytes(before + b"4 x\n5 x\n")
    LogFile(path, 4)
    assert path.read_bytes() == before


@pytest.mark.parametrize("there", [b"", b"\0" * 50, b"step l", b"step l\0\0"], ids=range(4))
@pytest.mark.parametrize("first", [None, 0])
def test_a_log_that_never_began(tmp_path, there, first):
    (tmp_path / "log").write_bytes(there)
    LogFile(tmp_path / "log", first, "step loss\n").append("0 x\n")
    assert (tmp_path / "log").read_text() == "step loss\n0 x\n"


@pytest.mark.parametrize("end", [b"5 x\n", b"5 x", b"5 x\n\0\0", b"5 \xe9\0\0"], ids=range(4))
def test_appending_drops_nothing_but_nul_bytes(tmp_path, end):
    path = tmp_path / "log"
    path.write_bytes(b"NEW RUN\n{'\xe9': 1}\n4 x\n" + end)
    LogFile(path, None, "header\n").append("0 y\n")
    kept = end.rstrip(b"\0\n")
    assert path.read_bytes() == b"NEW RUN\n{'\xe9': 1}\n4 x\n" + kept + b"\n0 y\n"


def test_the_header_is_written_once(tmp_path):
    LogFile(tmp_path / "log", 0, "step\n").append("0\n")
    LogFile(tmp_path / "log", 1, "step\n").append("1\n")
    LogFile(tmp_path / "log", 0, "step\n")
    assert (tmp_path / "log").read_text() == "step\n"


def test_lines_wait_for_a_full_disk(tmp_path):
    """The third does not fit: nothing of it is there for long, and it comes when there is space."""
    log, before = LogFile(tmp_path / "log", 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        told = [log.append(f"{n} {'x' * 40}\n") for n in range(4)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [bool(reason) for reason in told] == [False, False, True, True]
    assert log.append("4\n") == ""
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == list("01234") and len(lines[2]) == 42


def test_a_log_that_is_removed_or_cannot_be_written(tmp_path):
    log = LogFile(tmp_path / "log", 0)
    log.append("0\n")
    (tmp_path / "log").unlink()
    assert log.append("1\n") == ""
    assert (tmp_path / "log").read_text() == "1\n"
    (tmp_path / "folder").mkdir()
    assert LogFile(tmp_path / "nowhere" / "log", 0).append("0\n") == "No such file or directory"
