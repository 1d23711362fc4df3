"""Each line once and whole, whatever happens to the process and to the disk."""

import resource

from rwkv_jax.log_file import LogFile


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
