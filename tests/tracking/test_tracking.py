"""Where a run's numbers go: the step log and its reader, wandb's calls, TensorBoard's events."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.errors import UserError
from rwkv_jax.tracking.step_log import COLUMNS, STEP_LOG, StepLog, read_step_log
from rwkv_jax.tracking.trackers import WANDB_ID, Guarded, TensorBoard, Wandb

ROOT = Path(__file__).parents[2]
WD = 0.001


def values(step: int, loss: float) -> dict[str, float]:
    tokens = (step + 1) * 8192 / 1e9
    return {"loss": loss, "lr": 6e-4, "wd": WD, "Gtokens": tokens, "kt/s": 130.5, "grad_norm": 0.25}


def write(folder, losses: dict[int, float]) -> None:
    log = StepLog(folder, min(losses, default=0))
    for step, loss in losses.items():
        log.log(step, values(step, loss))
    log.close()


def test_step_log_is_read_as_written(tmp_path):
    write(tmp_path, {0: 11.09375, 1: 9.5, 2: float("nan")})
    log = read_step_log(tmp_path / STEP_LOG)
    assert tuple(log) == COLUMNS
    np.testing.assert_array_equal(log["step"], [0, 1, 2])
    np.testing.assert_array_equal(log["loss"], [11.09375, 9.5, np.nan])
    np.testing.assert_allclose(log["Gtokens"], [8.192e-6, 16.384e-6, 24.576e-6], rtol=1e-6)
    assert (tmp_path / STEP_LOG).read_text().count("step") == 1


def test_step_log_goes_on_where_a_run_went_on(tmp_path):
    """Died at step 4, went on from the checkpoint before step 2; then once more."""
    write(tmp_path, {step: 5.0 for step in range(5)})
    write(tmp_path, {step: 4.0 for step in range(2, 4)})
    with (tmp_path / STEP_LOG).open("a") as log:
        log.write("4\t0.1\t3.")  # the power went
        log.write("\n")
    write(tmp_path, {step: 3.0 for step in range(3, 6)})
    log = read_step_log(tmp_path / STEP_LOG)
    np.testing.assert_array_equal(log["step"], range(6))
    np.testing.assert_array_equal(log["loss"], [5, 5, 4, 3, 3, 3])


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 512, b"3\t0.1", b"3\t0.1\t3.2\t1e-4\t0.5\t12\0\0\n", b"\xff\xfe\x00garbage\n",
     b"3\t0.1\t3.2\t1e-4\t0.5\t1"],
    ids=range(5),
)  # fmt: skip
def test_step_log_is_read_with_what_a_crash_left_in_it(tmp_path, damage):
    write(tmp_path, {0: 5.0, 1: 4.0})
    path = tmp_path / STEP_LOG
    *header, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(header) + last + damage)
    np.testing.assert_array_equal(read_step_log(path)["loss"], [5, 4])
    path.write_bytes(b"".join(header) + damage.rstrip(b"\n") + b"\n" + last)
    assert read_step_log(path)["loss"][-1] == 4


def test_step_log_of_no_step(tmp_path):
    write(tmp_path, {})
    assert read_step_log(tmp_path / STEP_LOG)["loss"].shape == (0,)


@pytest.mark.parametrize("text", ["", "loss\n1\n", "\t".join(COLUMNS) + "\n0\ta\tb\tc\td\te\n"])
def test_what_is_no_step_log_is_refused(tmp_path, text):
    path = tmp_path / STEP_LOG
    with pytest.raises(UserError, match="No such file"):
        read_step_log(path)
    path.write_text(text)
    with pytest.raises(UserError, match=STEP_LOG):
        read_step_log(path)


def test_tensorboard_reads_what_is_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(tmp_path)
    for step in range(3):
        tracker.log(step, values(step, 5.0 - step))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "wd", "Gtokens", "kt/s", "grad_norm"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (0, 5),
        (1, 4),
        (2, 3),
    ]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        TensorBoard(tmp_path)


@pytest.fixture
def wandb_calls(monkeypatch) -> list:
    """What the package is called with."""
    calls = []

    def init(**given):
        calls.append(("init", given))
        return types.SimpleNamespace(
            id=given.get("id") or f"made{len(calls)}",
            log=lambda values, step: calls.append(("log", step, values)),
            finish=lambda: calls.append(("finish",)),
            offline=False,
            disabled=False,
            url="https://wandb.ai/me/goose/runs/made1",
        )

    fake = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def test_wandb_is_called_with_what_was_given(wandb_calls, tmp_path):
    """The first step is 1, as in the official trainer."""
    options = {"n_layer": 12, "lr_init": 6e-4}
    said = []
    wandb = Wandb("goose", tmp_path, "65536 ctx512", options, False, said.append)
    assert said == ["wandb: https://wandb.ai/me/goose/runs/made1"]
    wandb.log(0, {"loss": 4.5, "lr": 6e-4, "wd": 0.001, "Gtokens": 0.1})
    wandb.close()
    general = {"project": "goose", "dir": tmp_path, "config": options}
    general |= {"save_code": False, "allow_val_change": True, "settings": {"silent": True}}
    assert wandb_calls == [
        ("init", {**general, "name": "65536 ctx512"}),
        ("log", 1, {"loss": 4.5, "lr": 6e-4, "wd": 0.001, "Gtokens": 0.1}),
        ("finish",),
    ]


def test_wandb_continues_the_run_of_a_resumed_one_only(wandb_calls, tmp_path):
    for resumed in (True, True, False, True):
        Wandb("goose", tmp_path, "new", {}, resumed, print)
    told = [{key: given.get(key) for key in ("id", "resume", "name")} for _, given in wandb_calls]
    new = {"id": None, "resume": None, "name": "new"}
    again = {"id": "made1", "resume": "allow", "name": None}
    assert told == [new, again, new, {**again, "id": "made3"}]


def test_wandb_offline_keeps_its_id(tmp_path):
    """The package itself, without a network, prints nothing; we say where the run is. In a process
    of its own, as the package keeps what other tests have set.
    """
    program = (
        "import sys\nfrom pathlib import Path\nfrom rwkv_jax.tracking.trackers import Wandb\n"
        "for resumed in (False, True):\n"
        "    options = {'lr_init': float(resumed)}\n"
        "    wandb = Wandb('goose', Path(sys.argv[1]), '65536 ctx512', options, resumed, print)\n"
        "    wandb.log(int(resumed), {'loss': 4.5})\n"
        "    wandb.close()\n"
    )
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.startswith("wandb: offline; `wandb sync ") for line in said] == [True, True]
    assert all(Path(line.split()[4].rstrip("`")).is_dir() for line in said)
    # offline-run-TIME-ID, and a number behind it for a second one in the same second.
    (run_id,) = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert (tmp_path / WANDB_ID).read_text() == f"{run_id}\n"


@pytest.mark.parametrize("key", ["", "abc"])
def test_wandb_without_a_usable_key_is_an_error_of_the_options(tmp_path, key):
    """The package itself, where there is no terminal; in a process of its own, as it keeps keys."""
    program = (
        "from rwkv_jax.config import ModelConfig, TrainConfig\n"
        "from rwkv_jax.errors import run_command\n"
        "from rwkv_jax.tracking.trackers import open_trackers\n"
        "config = TrainConfig(wandb='goose')\n"
        f"arguments = (config, ModelConfig(1, 64), {{}}, Path({str(tmp_path)!r}), print, False)\n"
        "run_command(lambda: list(open_trackers(*arguments)))\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"WANDB_API_KEY": key} if key else {}
    for name in {"WANDB_MODE", "NETRC", *(() if key else ("WANDB_API_KEY",))}:
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", "from pathlib import Path\n" + program],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    [line] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: --wandb goose: ") and "WANDB_MODE=offline" in line
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / WANDB_ID).exists()


class Failing:
    def __init__(self, where: str):
        self.where, self.logged = where, []
        self._fail("open")

    def _fail(self, here: str) -> None:
        if here == self.where:
            raise OSError(f"network unreachable in {here}\nat length")

    def log(self, step, values):
        self._fail("log")

    def close(self):
        self._fail("close")


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_cannot_stop_a_run(where):
    said = []
    tracker = Guarded("tensorboard", lambda: Failing(where), said.append)
    for step in range(3):
        tracker.log(step, {})
    tracker.close()
    reason = f"network unreachable in {where}"
    assert said == [f"warning: --tensorboard failed ({reason}); training continues without it"]


def test_a_tracker_that_is_not_installed_is_an_error_of_the_options():
    def missing():
        raise UserError("not installed")

    with pytest.raises(UserError, match="not installed"):
        Guarded("tensorboard", missing, print)
