"""`python -m rwkv_jax.train`: what it writes, how it resumes, and its one line for bad input."""

import dataclasses
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import train as trainer
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.checkpoints.store import Checkpoints
from rwkv_jax.config import AUTO, ModelConfig, TrainConfig
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.planning import batch_size
from rwkv_jax.text.binidx import BinIdxWriter
from rwkv_jax.text.dataset import Dataset, open_dataset
from rwkv_jax.tracking import progress
from rwkv_jax.tracking.train_log import MiniepochLoss
from rwkv_jax.training import build, report, schedule
from rwkv_jax.training import run as run_module
from rwkv_jax.training.exports import Exporter, exports_after
from rwkv_jax.training.optimizer import with_updates
from rwkv_jax.training.report import Report
from rwkv_jax.training.run_folder import lock
from rwkv_jax.training.step import Metrics
from tests.support import malicious

V, T, STEPS, MINIEPOCH = 512, 16, 12, 5
MODEL = ModelConfig(n_layer=2, n_embd=64, vocab_size=V)
SHAPE = ["--n_layer", "2", "--n_embd", "64", "--vocab_size", str(V)]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "4")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def as_outside_of_tests():
    """optax itself promotes types; and the trainer sets the precision of products globally."""
    precision = jax.config.jax_default_matmul_precision
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_default_matmul_precision", precision)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ids below 64: squares, so that there is something to learn."""
    prefix = tmp_path_factory.mktemp("data") / "squares"
    with BinIdxWriter(prefix) as writer:
        writer.append(np.arange(2000) ** 2 % 61 + 1, [2000])
    return prefix


def config(data: Path, folder: Path, **options) -> TrainConfig:
    usual = dict(
        n_layer=2,
        n_embd=64,
        vocab_size=V,
        data_file=str(data),
        proj_dir=str(folder),
        ctx_len=T,
        my_exit_tokens=STEPS * T,
        devices=1,
        epoch_save=1,
        precision="fp32",
        enable_progress_bar="False",
    )
    return TrainConfig(**{**usual, **options})


def train(options: TrainConfig, stop_after: int | None = None) -> list[float]:
    """Runs with miniepochs of five samples; returns the losses. A real signal may stop it."""
    losses = []
    show = progress.ProgressLine.show

    def listen(self, step, loss, *more):
        losses.append(loss)
        if step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return show(self, step, loss, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "MINIEPOCH", MINIEPOCH)
        patch.setattr(progress.ProgressLine, "show", listen)
        if stop_after:
            with pytest.raises(SystemExit) as stopped:
                trainer.train(options)
            assert stopped.value.code == 1
        else:
            trainer.train(options)
    return losses


STILL = Metrics(jnp.float32(1.0), jnp.float32(0.0), jnp.bool(False))


@pytest.fixture
def standing_still(monkeypatch):
    """Steps that change nothing and cost nothing: for what happens around them."""
    monkeypatch.setattr(run_module, "build_step", lambda *_, **__: lambda state, _: (state, STILL))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> tuple[Path, list[float]]:
    """The folder and the losses of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run") / "new" / "out"
    return folder, train(config(data, folder))


def log(folder: Path) -> list[list[str]]:
    """train_log.txt without its timestamps."""
    lines = (folder / "train_log.txt").read_text().splitlines()
    return [words[:4] + words[6:] for words in map(str.split, lines)]


def test_files_of_a_run(run):
    folder, losses = run
    names = [".lock", "checkpoints", "rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth", "rwkv-init.pth"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *names,
        "step_log.tsv",
        "train_log.txt",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["10", "12"]
    shapes = weights.official_shapes(MODEL)
    for name in names[2:]:
        tensors = pth.read(folder / name)
        assert {key: tensor.shape for key, tensor in tensors.items()} == shapes
        assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    assert len(losses) == STEPS and losses[0] > 6 and losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("step, name", [(10, "rwkv-1.pth"), (12, "rwkv-final.pth")])
def test_a_pth_holds_what_the_checkpoint_of_its_step_holds(run, tmp_path, step, name):
    _, params = rwkv_jax.load_params(run[0] / "checkpoints" / str(step))
    weights.save_pth(tmp_path / name, params)
    assert (tmp_path / name).read_bytes() == (run[0] / name).read_bytes()


def test_the_start_is_the_official_initialisation(run, tmp_path):
    weights.save_pth(tmp_path / "init.pth", init_params(MODEL, 0))
    assert (tmp_path / "init.pth").read_bytes() == (run[0] / "rwkv-init.pth").read_bytes()


def test_train_log(run):
    folder, losses = run
    first = (folder / "train_log.txt").read_text().splitlines()[0]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+"
    assert re.fullmatch(rf"0 \d\.\d{{6}} \d+\.\d{{4}} 0\.\d{{8}} {stamp} 0", first)
    for n, words in enumerate(log(folder)):
        mean = np.mean(losses[n * MINIEPOCH : (n + 1) * MINIEPOCH])
        assert (words[0], words[4]) == (str(n), str(n))
        assert float(words[1]) == pytest.approx(mean, abs=1e-6)
        assert float(words[2]) == pytest.approx(np.exp(mean), rel=1e-4)
    # Of each whole miniepoch's last step: warm-up is at 4/10 and 9/10.
    rates = [float(words[3]) for words in log(folder)]
    expected = [0.45 / 64 * (0.01 + 0.99 * done / 10) for done in (4, 9)]
    assert rates == pytest.approx(expected, abs=1e-8)


@pytest.mark.slow
def test_train_log_of_less_than_a_miniepoch(data, tmp_path, standing_still):
    """Its mean so far; it gives way to the whole one's when the run is made longer."""
    for steps, lines in {MINIEPOCH - 1: ["00"], 2 * MINIEPOCH + 1: ["00", "11"]}.items():
        train(config(data, tmp_path, my_exit_tokens=steps * T))
        assert [words[0] + words[4] for words in log(tmp_path)] == lines


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> tuple[Path, list[float]]:
    """As `run`, but SIGTERM comes while a step in the middle of a miniepoch is at work."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, train(config(data, folder), stop_after=6)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(data, run, stopped, tmp_path):
    folder, before = tmp_path / "[v1]" / "a\\b*", stopped[1]  # moved, to where patterns are
    shutil.copytree(stopped[0], folder)
    assert MINIEPOCH < len(before) < 2 * MINIEPOCH
    assert not (folder / "rwkv-final.pth").exists()
    after = train(config(data, folder))
    assert before + after == run[1]
    assert log(folder) == log(run[0])
    for name in ("rwkv-1.pth", "rwkv-final.pth"):
        assert (folder / name).read_bytes() == (run[0] / name).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_with_its_state_elsewhere(data, run, tmp_path):
    """From the host's memory, saved while the next step is under way, to the device's."""
    options = config(data, tmp_path, strategy="fsdp_offload", save_every_steps=2)
    before = train(options, stop_after=6)
    after = train(config(data, tmp_path, strategy="zero2"))
    assert before + after == pytest.approx(run[1], abs=1e-5)


def command(data: Path, folder: Path, *more: str) -> list[str]:
    """The same options as `config`'s, as a command."""
    options = ["--data_file", str(data), "--proj_dir", str(folder), "--ctx_len", str(T)]
    machine = ["--devices", "1", "--precision", "fp32", "--accelerator", "cpu"]
    machine += ["--epoch_save", "1"]
    return [sys.executable, "-m", "rwkv_jax.train", *SHAPE, *options, *machine, *more]


@pytest.mark.slow
def test_another_process_goes_on_just_so(data, run, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    again = command(data, tmp_path, "--my_exit_tokens", str(STEPS * T))
    done = subprocess.run(again, capture_output=True, text=True, check=True)
    assert f"resumed from {tmp_path}/checkpoints/{len(stopped[1])}" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "rwkv-final.pth").read_bytes() == (run[0] / "rwkv-final.pth").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_signal_to_the_process_saves(data, tmp_path, number):
    endless = command(data, tmp_path, "--my_exit_tokens", str(10**8))
    with subprocess.Popen(
        endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 1
    assert err.strip() == "stopping after this step; Ctrl-C again stops at once"
    (step,) = re.findall(r"stopped and saved at step (\d+): the same command resumes", out)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [step]
    assert not (tmp_path / "rwkv-final.pth").exists()


def test_nothing_left_to_do(data, run, capsys):
    folder = run[0]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(config(data, folder)) == []
    assert "nothing left to do: all 12 steps are done" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_final_model_that_got_lost_is_written_again(data, run, tmp_path):
    """As after a crash between the last checkpoint and the export."""
    folder = tmp_path / "out"
    shutil.copytree(run[0], folder)
    (folder / "rwkv-final.pth").unlink()
    assert train(config(data, folder)) == []
    assert (folder / "rwkv-final.pth").read_bytes() == (run[0] / "rwkv-final.pth").read_bytes()


def test_a_run_goes_on_as_the_same_run_only(data, run, tmp_path, capsys):
    """What has changed is named, and refused when it makes another run."""
    other = tmp_path / "other"
    with BinIdxWriter(other) as writer:
        writer.append(np.arange(2000) % 61 + 1, [2000])
    for options, changed in {
        ("ctx_len", 2 * T): f"ctx_len {T}, not {2 * T}, magic_prime",
        ("micro_bsz", 2): "samples a step 1, not 2;",
        ("data_file", str(other)): r"data \w+ \(2000 uint16\), not \w+ \(2000 uint16\);",
        ("random_seed", 1): "random_seed unset, not 1;",
        (
            "load_model",
            f"{data}.bin",
        ): r"weights of load_model unset, not \w+ \(4000 uint8\); resume "
        "with them, or without --load_model",
        ("epoch_begin", 1): "epoch_begin unset, not 1;",
    }.items():
        with pytest.raises(UserError, match=f"this run was started with {changed}"):
            train(config(data, run[0], **dict([options])))
    assert train(config(data, run[0], weight_decay=0.5)) == []
    assert (
        "note: until now this run was trained with weight_decay 0.001, not 0.5"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_resume_anyway_goes_on_at_as_many_tokens(data, stopped, tmp_path, capsys):
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    options = config(data, tmp_path, micro_bsz=2, my_exit_tokens=14 * T, resume_anyway=1)
    assert len(train(options)) == 14 // 2 - 3  # 7 steps of 1 sample are 3 of 2 and a half
    assert "samples a step 1, not 2" in capsys.readouterr().out
    rates = [float(words[3]) for words in log(tmp_path)]
    assert rates[-1] == pytest.approx(0.45 / 64 * (0.01 + 0.99 * 4 / 10), abs=1e-8)
    (newest,) = Checkpoints(tmp_path / "checkpoints").steps()[:1]
    assert newest == 7


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(data, tmp_path):
    """Begun on one device with batches of four, gone on with on four with one sample each."""
    batch = {"micro_bsz": 4, "my_exit_tokens": 4 * STEPS * T, "warmup_steps": 0, "lr_init": 1e-4}
    before = train(config(data, tmp_path / "a", **batch), stop_after=6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    after = train(config(data, tmp_path / "a", **batch))
    of_four = train(config(data, tmp_path / "b", **{**batch, "micro_bsz": 1, "devices": 4}))
    assert len(before) + len(after) == STEPS
    np.testing.assert_allclose(of_four, after, rtol=1e-6)
    one, four = (rwkv_jax.load_params(tmp_path / name)[1] for name in "ab")
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, four)
    assert max(jax.tree.leaves(differences)) < 1e-6


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    data, run, stopped, tmp_path, capsys
):
    """The logs go back with it."""
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    done = len(stopped[1])
    (array_file,) = (tmp_path / "checkpoints" / str(done)).glob("params/ocdbt*/d/*")
    content = bytearray(array_file.read_bytes())
    content[-100] ^= 1
    array_file.write_bytes(content)
    with (tmp_path / "step_log.tsv").open("a") as lines:
        lines.write("9\t0.1")  # the power went
    (tmp_path / ".rwkv-1.pth.77.tmp").write_bytes(b"PK")
    assert len(train(config(data, tmp_path))) == STEPS - MINIEPOCH
    said = capsys.readouterr().out
    assert (
        f"{done}: damaged: {array_file.relative_to(tmp_path / 'checkpoints' / str(done))}" in said
    )
    assert f"renamed to {done}.aside, continuing from step {MINIEPOCH}" in said
    assert (tmp_path / "rwkv-final.pth").read_bytes() == (run[0] / "rwkv-final.pth").read_bytes()
    assert log(tmp_path) == log(run[0])
    steps = [line.split()[0] for line in (tmp_path / "step_log.tsv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(STEPS))]
    assert not list(tmp_path.glob(".*.tmp"))


def test_checkpoints_that_are_all_damaged_are_no_reason_to_begin_anew(data, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    for manifest in tmp_path.glob("checkpoints/*/manifest"):
        manifest.unlink()
    with pytest.raises(UserError, match="is missing; no other .*: copy .*, move .* elsewhere"):
        train(config(data, tmp_path))


def test_a_checkpoint_that_was_not_fetched_is_not_set_aside(data, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints" / str(len(stopped[1])) / "manifest"
    manifest.unlink()
    manifest.symlink_to(".git/annex/objects/x")
    with pytest.raises(UserError, match="manifest: is a link to .*, which has not been fetched"):
        train(config(data, tmp_path))
    assert manifest.is_symlink()


def test_checkpoints_that_cannot_be_written_are_known_before_the_first_step(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_module, "build_step", None)
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints: cannot be written: it is not a folder"):
        train(config(data, tmp_path))


def test_two_trainers_do_not_share_a_folder(data, tmp_path):
    with lock(tmp_path):
        with pytest.raises(
            UserError, match=f"another trainer is using this folder .process {os.getpid()}"
        ):
            train(config(data, tmp_path))
    with lock(tmp_path):  # and it is let go
        pass


@pytest.mark.slow
def test_a_failed_save_is_tried_again_and_the_run_goes_on(data, run, tmp_path, monkeypatch, capsys):
    """No space for the first three checkpoints."""
    tries, usage = itertools.count(), shutil.disk_usage(tmp_path)

    def free(_):
        return usage._replace(free=0) if next(tries) < 3 else usage

    monkeypatch.setattr("rwkv_jax.checkpoints.store.shutil.disk_usage", free)
    monkeypatch.setattr("rwkv_jax.training.saver.RETRY_SECONDS", 0.0)
    train(config(data, tmp_path))
    said = capsys.readouterr().out
    assert said.count("but only 0 MB are free; the earlier checkpoints are unchanged") == 3
    assert Checkpoints(tmp_path / "checkpoints").steps() == [12, 10]
    assert (tmp_path / "rwkv-final.pth").read_bytes() == (run[0] / "rwkv-final.pth").read_bytes()


def test_max_minutes(data, tmp_path, standing_still, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(config(data, tmp_path, max_minutes=1e-9))
    assert stopped.value.code == 1
    assert "stopped and saved at step 1: the same command resumes" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1]


@pytest.mark.slow
def test_save_every_minutes(data, tmp_path, standing_still):
    train(config(data, tmp_path, save_every_minutes=1e-9, keep_last=99, epoch_save=0))
    assert Checkpoints(tmp_path / "checkpoints").steps() == list(range(STEPS, 0, -1))


def test_bad_data_in_the_middle_stops_with_what_was_done(
    data, tmp_path, monkeypatch, standing_still
):
    batch = Dataset.batch

    def damaged(self, step, *shape):
        if step == 3:
            raise UserError("token 7 has id 999")
        return batch(self, step, *shape)

    monkeypatch.setattr(Dataset, "batch", damaged)
    with pytest.raises(UserError, match="id 999"):
        train(config(data, tmp_path))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]


def test_an_initialisation_of_another_seed_is_taken_as_it_is(
    data, run, tmp_path, standing_still, capsys
):
    """As a base model that was renamed to it is."""
    shutil.copy(run[0] / "rwkv-init.pth", tmp_path)
    train(config(data, tmp_path, random_seed=3))
    assert "rwkv-init.pth does not match --random_seed 3; used as it is" in capsys.readouterr().out
    before = (run[0] / "rwkv-init.pth").read_bytes()
    assert before == (tmp_path / "rwkv-init.pth").read_bytes()
    assert before == (tmp_path / "rwkv-final.pth").read_bytes()


def stumbling(monkeypatch, finite: Callable[[int], bool]):
    """Steps that change nothing, of which some are skipped."""
    steps = itertools.count()

    def step(state, _):
        ok = finite(next(steps))
        return state, Metrics(jnp.float32(1 if ok else np.nan), jnp.float32(0.0), jnp.bool(not ok))

    monkeypatch.setattr(run_module, "build_step", lambda *_, **__: step)


def test_steps_that_are_not_finite_are_skipped(data, tmp_path, monkeypatch, capsys):
    stumbling(monkeypatch, lambda step: step % 5 != 1)
    train(config(data, tmp_path))
    assert re.findall(r"step (\d+): loss nan", capsys.readouterr().out) == ["1", "6", "11"]
    assert [words[1] for words in log(tmp_path)] == ["1.000000"] * 2


@pytest.mark.slow
def test_float16_skips_no_step_at_first(data, tmp_path, capsys):
    train(config(data, tmp_path, precision="fp16"))
    assert "skipped" not in capsys.readouterr().out
    assert len(log(tmp_path)) == 2


def test_many_of_them_in_a_row_stop_the_run(data, tmp_path, monkeypatch):
    """With a checkpoint from before them, and none of theirs."""
    stumbling(monkeypatch, lambda step: step < 2)
    offset = open_dataset(data, T).offsets(np.array([3])).item()
    with pytest.raises(UserError, match=rf"in 8 steps from step 2 on \(.* tokens {offset}\): "):
        train(config(data, tmp_path, save_every_steps=1, keep_last=9))
    assert not (tmp_path / "rwkv-final.pth").exists()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [2, 1]
    assert checkpoints.verify(2).loss == MiniepochLoss(2.0, 2)


@pytest.mark.slow
def test_a_run_that_was_stopped_so_goes_on_from_before(data, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_step", failing_from(7, build.build_step))
        with pytest.raises(UserError, match="in 3 steps from step 7 on"):
            patch.setattr(Report, "PATIENCE", 3)
            train(config(data, tmp_path))
    assert len(train(config(data, tmp_path))) == STEPS - 7
    assert (tmp_path / "rwkv-final.pth").read_bytes() == (run[0] / "rwkv-final.pth").read_bytes()
    assert log(tmp_path) == log(run[0])


def failing_from(first: int, build_step):
    """The true steps, but those from `first` on are skipped as `step` does it."""

    def built(*arguments):
        run_step, steps = build_step(*arguments), itertools.count()

        def step(state, batch):
            before, number = jax.tree.map(jnp.copy, state), next(steps)
            state, result = run_step(state, batch)
            if number >= first:
                state = before._replace(opt_state=with_updates(before.opt_state, number + 1))
            return state, result._replace(skipped=jnp.bool(number >= first))

        return step

    return built


@pytest.mark.slow
def test_micro_bsz_auto_is_chosen_once_in_a_run(data, tmp_path, monkeypatch, standing_still):
    options = config(data, tmp_path, micro_bsz=AUTO, devices=2, accumulate_grad_batches=2)
    monkeypatch.setattr(batch_size, "fitting_micro_bsz", lambda *_: 3)
    assert len(train(options)) == 1  # 12 samples a step
    monkeypatch.setattr(batch_size, "fitting_micro_bsz", lambda *_: 2)
    train(dataclasses.replace(options, my_exit_tokens=24 * T))
    assert train(options) == []


@pytest.mark.slow
def test_accumulated_micro_batches_are_the_samples_of_one_larger(data, tmp_path, monkeypatch):
    seen: dict[str, list[np.ndarray]] = {"accumulated": [], "at once": []}
    metrics = Metrics(jnp.float32(1.0), jnp.float32(0.0), jnp.bool(False))

    def listening(name):
        def step(state, batch):
            seen[name].append(np.asarray(batch))
            return state, metrics

        return lambda *_, **__: step

    monkeypatch.setattr(run_module, "build_step", listening("accumulated"))
    train(config(data, tmp_path / "a", accumulate_grad_batches=2))
    monkeypatch.setattr(run_module, "build_step", listening("at once"))
    train(config(data, tmp_path / "b", micro_bsz=2))
    assert {batch.shape for batch in seen["accumulated"]} == {(2, 1, T + 1)}
    assert {batch.shape for batch in seen["at once"]} == {(1, 2, T + 1)}
    for accumulated, at_once in zip(seen["accumulated"], seen["at once"], strict=True):
        np.testing.assert_array_equal(accumulated[:, 0], at_once[0])


@pytest.mark.slow
def test_wandb_gets_the_official_keys_steps_and_name(data, tmp_path, monkeypatch, standing_still):
    logged, names, options = [], [], []

    def init(**given):
        names.append(given.get("name"))
        options.append(given["config"])
        return types.SimpleNamespace(
            id="x1", log=lambda values, step: logged.append((step, values)), finish=lambda: None,
            offline=False, disabled=True,
        )  # fmt: skip

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train(config(data, tmp_path, wandb="project"))
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    official = {"loss", "lr", "wd", "Gtokens", "kt/s"}
    keys = [set(values) for _, values in logged]
    assert keys == [official - {"kt/s"} | {"grad_norm"}] + [official | {"grad_norm"}] * (STEPS - 1)
    resolved = {
        "lr_init": 0.45 / 64, "lr_final": 0.04 / 64, "magic_prime": 113, "devices": 1,
        "micro_bsz": 1, "real_bsz": 1, "my_exit_tokens": STEPS * T, "vocab_size": V,
        "head_size": 64, "dim_ffn": 256, "dim_w": 32,
    }  # fmt: skip
    assert {name: options[0][name] for name in resolved} == pytest.approx(resolved)
    assert logged[-1][1]["Gtokens"] == STEPS * T / 1e9
    assert logged[-1][1]["wd"] == 0.001
    train(config(data, tmp_path, wandb="project", my_exit_tokens=(STEPS + 1) * T))
    assert re.fullmatch(rf"{V} ctx{T} L2 D64 \d{{4}}(-\d\d){{5}}", names[0])
    assert names[1:] == [None] and logged[-1][0] == STEPS + 1


def test_a_tracker_may_ask_before_there_is_a_bar(data, tmp_path, monkeypatch):
    """wandb asks for an account: nothing is drawn over its question, and Ctrl-C ends it."""
    before, found = signal.getsignal(signal.SIGINT), []

    def init(**_):
        found.append(signal.getsignal(signal.SIGINT))
        raise KeyboardInterrupt

    errors = types.SimpleNamespace(UsageError=ValueError, AuthenticationError=ValueError)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, errors=errors))
    monkeypatch.setattr(report, "ProgressLine", None)
    with pytest.raises(KeyboardInterrupt):
        train(config(data, tmp_path, wandb="project"))
    assert found == [before] and not (tmp_path / "step_log.tsv").exists()


def test_a_tracker_is_closed_when_a_later_one_cannot_be_opened(data, tmp_path, monkeypatch):
    closed = []

    def trackers(*_):
        yield types.SimpleNamespace(close=lambda: closed.append(True))
        raise UserError("--tensorboard 1: not installed")

    monkeypatch.setattr(report, "open_trackers", trackers)
    with pytest.raises(UserError, match="not installed"):
        train(config(data, tmp_path))
    assert closed == [True]


@pytest.mark.slow
def test_plot_draws_the_run(data, tmp_path, standing_still):
    train(config(data, tmp_path, plot=1))
    page = (tmp_path / "loss.html").read_text("utf-8")
    assert str(tmp_path) in page and "http-equiv" not in page
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_stage_one_writes_the_initialisation_alone(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    arguments = ["--train_stage", "1", "--proj_dir", str(folder), *SHAPE]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--my_testing", "x070"])
    with pytest.raises(SystemExit) as done:
        run_command(trainer.main)
    assert done.value.code == 0
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "rwkv-init.pth"]
    assert (folder / "rwkv-init.pth").read_bytes() == (run[0] / "rwkv-init.pth").read_bytes()
    note = "note: without effect here: --my_testing (every model here is x070)\n"
    assert capsys.readouterr().err == note


@pytest.mark.slow
def test_recomputation_and_chunks_change_no_loss(data, run, tmp_path):
    losses = train(config(data, tmp_path, grad_cp=1, head_chunk=5))
    np.testing.assert_allclose(losses, run[1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bf16_stays_close(data, run, tmp_path):
    losses = train(config(data, tmp_path, precision="bf16"))
    np.testing.assert_allclose(losses, run[1], rtol=0, atol=0.05)
    assert losses != run[1]


def test_load_model_takes_the_shape_of_the_file(data, tmp_path, capsys, standing_still):
    other = dataclasses.replace(MODEL, n_layer=1, dim_w=8, dim_a=16, dim_v=24, dim_g=40)
    weights.save_pth(tmp_path / "g1.pth", init_params(other, 3))
    there = {"load_model": str(tmp_path / "g1.pth"), "n_layer": 0, "n_embd": 0}
    train(config(data, tmp_path / "out", **there))
    assert "low-rank 8/16/24/40" in capsys.readouterr().out
    assert not (tmp_path / "out" / "rwkv-init.pth").exists()
    final = tmp_path / "out" / "rwkv-final.pth"
    assert final.read_bytes() == (tmp_path / "g1.pth").read_bytes()


def test_load_model_takes_the_folder_of_a_run(data, run, tmp_path, standing_still):
    train(config(data, tmp_path, load_model=str(run[0])))
    assert (tmp_path / "rwkv-final.pth").read_bytes() == (run[0] / "rwkv-final.pth").read_bytes()


def test_load_partial_fills_in(data, run, tmp_path, standing_still, capsys):
    """Low-rank widths are the file's; the tensors that it lacks are named."""
    other = dataclasses.replace(MODEL, dim_w=8, dim_a=16, dim_v=24, dim_g=40)
    weights.save_pth(tmp_path / "whole.pth", init_params(other, 3))
    lacking = ("blocks.1.ffn.key.weight", "blocks.0.att.w1")
    there = pth.read(tmp_path / "whole.pth")
    there = {name: tensor for name, tensor in there.items() if name not in lacking}
    pth.write(tmp_path / "part.pth", there)
    options = config(data, tmp_path / "out", load_model=str(tmp_path / "part.pth"))
    with pytest.raises(UserError, match=r"part.pth: .*missing blocks.0.att.w1, blocks.1.ffn.key"):
        train(options)
    train(dataclasses.replace(options, load_partial=1))
    said = capsys.readouterr().out
    assert "part.pth; fresh: blocks.0.att.w1, blocks.1.ffn.key.weight\n" in said
    assert "low-rank 8/16/24/40" in said

    weights.save_pth(tmp_path / "fresh.pth", init_params(other, 0))
    merged, fresh, kept = (
        pth.read(tmp_path / name) for name in ("out/rwkv-final.pth", "fresh.pth", "part.pth")
    )
    for name, tensor in merged.items():
        expected = (fresh if name in lacking else kept)[name]
        assert np.array_equal(tensor, expected), name


@pytest.mark.slow
def test_load_partial_adds_layers(data, run, tmp_path, standing_still, capsys):
    more = config(data, tmp_path, load_model=str(run[0]) + "/rwkv-final.pth", load_partial=1)
    train(dataclasses.replace(more, n_layer=3))
    assert "fresh: blocks.2.ln1.weight, blocks.2.ln1.bias, " in capsys.readouterr().out
    assert rwkv_jax.load_params(tmp_path / "rwkv-final.pth")[0].n_layer == 3
    with pytest.raises(UserError, match="final.pth: .*too many layers blocks.1.ln1.weight"):
        train(dataclasses.replace(more, n_layer=1, proj_dir=str(tmp_path / "fewer")))


def test_load_partial_refuses_other_shapes(data, run, tmp_path):
    there = pth.read(run[0] / "rwkv-final.pth")
    there["blocks.1.att.w1"] = there["blocks.1.att.w1"][:, :8]
    pth.write(tmp_path / "part.pth", there)
    options = {"load_model": str(tmp_path / "part.pth"), "load_partial": 1}
    wrong = r"part.pth: .*blocks.1.att.w1 is \[64, 8\] and should be \[64, 32\]"
    with pytest.raises(UserError, match=wrong):
        train(config(data, tmp_path / "out", **options))
    with pytest.raises(UserError, match="part.pth: has n_embd 64, not 128"):
        train(config(data, tmp_path / "out", **{**options, "n_embd": 128}))


def test_an_initialisation_of_other_widths_decides(data, tmp_path, standing_still, capsys):
    """The official way to continue from a base model: renamed, in the output folder."""
    other = dataclasses.replace(MODEL, dim_w=8, dim_a=16, dim_v=24, dim_g=40)
    weights.save_pth(tmp_path / "rwkv-init.pth", init_params(other, 3))
    before = (tmp_path / "rwkv-init.pth").read_bytes()
    train(config(data, tmp_path))
    assert "low-rank 8/16/24/40" in capsys.readouterr().out
    assert (tmp_path / "rwkv-final.pth").read_bytes() == before
    assert (tmp_path / "rwkv-init.pth").read_bytes() == before


@pytest.fixture
def official_folder(run, tmp_path) -> Path:
    """As the official trainer leaves one behind: no checkpoints, a log with its header."""
    folder = tmp_path / "official"
    folder.mkdir()
    for name, source in {"init": "init", "0": "1", "1": "0"}.items():  # which is which shows below
        shutil.copy(run[0] / f"rwkv-{source}.pth", folder / f"rwkv-{name}.pth")
    stamp = "2025-04-24 02:23:42.481256"
    (folder / "train_log.txt").write_text(
        f"NEW RUN 2025\n{{}}\n0 6.2 500.0 0.003 {stamp} 0\n1 6.1 450.0 0.006 {stamp} 1\n"
    )
    return folder


@pytest.mark.slow
def test_an_official_folder_is_continued(data, run, official_folder, capsys):
    """With the largest rwkv-{n}.pth, at miniepoch n + 1, by the official command."""
    folder = official_folder
    files = {path: path.read_bytes() for path in folder.glob("rwkv-*.pth")}
    before = (folder / "train_log.txt").read_text()
    usual = {"load_model": "0", "epoch_begin": 0, "train_stage": 3, "my_exit_tokens": 14 * T}
    first = train(config(data, folder, **usual), stop_after=12)
    said = capsys.readouterr().out
    assert f"continued from {folder}/rwkv-1.pth at miniepoch 2 with weights only" in said
    assert "the optimizer and the warm-up start over, at step 10" in said
    after = train(config(data, folder, **usual))  # now from a checkpoint
    assert "resumed from" in capsys.readouterr().out
    assert len(first) + len(after) == 14 - 2 * MINIEPOCH
    assert files == {path: path.read_bytes() for path in files}
    log_now = (folder / "train_log.txt").read_text()
    assert log_now.startswith(before) and log_now.removeprefix(before).split()[0] == "2"
    steps = [line.split() for line in (folder / "step_log.tsv").read_text().splitlines()[1:]]
    assert [int(words[0]) for words in steps] == [10, 11, 12, 13]
    assert float(steps[0][3]) < 0.45 / 64 * 0.02  # warm-up

    # The same weights, and the same steps, as asked for in words.
    words = {**usual, "load_model": str(folder / "rwkv-1.pth"), "epoch_begin": 2}
    alone = train(config(data, folder.parent / "alone", **words))
    assert first + after == alone


@pytest.mark.slow
def test_warm_up_where_the_official_trainer_decides(data, official_folder, standing_still):
    """--warmup_steps -1, its default: 10 steps when the last weights are continued, else none."""
    options = {"warmup_steps": -1, "my_exit_tokens": 14 * T, "lr_init": 1e-3, "lr_final": 1e-3}
    train(config(data, official_folder.parent / "fresh", **options))
    train(config(data, official_folder, **options), stop_after=12)
    train(config(data, official_folder, **options))
    fresh, warm = (
        [float(line.split()[3]) for line in (folder / "step_log.tsv").read_text().splitlines()[1:]]
        for folder in (official_folder.parent / "fresh", official_folder)
    )
    np.testing.assert_allclose(fresh, [1e-3] * 14, rtol=1e-6)
    np.testing.assert_allclose(warm, 1e-3 * (0.01 + 0.099 * np.arange(4)), rtol=1e-6)


@pytest.mark.slow
def test_a_seed_of_minus_one_is_another_each_time(data, tmp_path, standing_still):
    for name in ("a", "b"):
        train(config(data, tmp_path / name, random_seed=-1))
        train(config(data, tmp_path / name, random_seed=-1, my_exit_tokens=20 * T))
    a, b = ((tmp_path / name / "rwkv-final.pth").read_bytes() for name in "ab")
    assert a != b and a == (tmp_path / "a" / "rwkv-init.pth").read_bytes()


def test_official_weights_are_not_overwritten(data, official_folder, run):
    before = {path: path.read_bytes() for path in official_folder.iterdir()}
    base = {"load_model": str(run[0] / "rwkv-final.pth")}
    with pytest.raises(UserError, match="rwkv-1.pth: exists without .* leave out --load_model"):
        train(config(data, official_folder, **base))
    with pytest.raises(UserError, match="continues at miniepoch 2, not at --epoch_begin 1"):
        train(config(data, official_folder, epoch_begin=1))
    now = {path: path.read_bytes() for path in official_folder.iterdir() if path.name != ".lock"}
    assert now == before


def test_stage_zero_does_not_look_for_official_weights(data, run, official_folder, standing_still):
    options = {"train_stage": 0, "epoch_begin": 2}
    assert len(train(config(data, official_folder, **options))) == STEPS - 2 * MINIEPOCH
    final = (official_folder / "rwkv-final.pth").read_bytes()
    assert final == (run[0] / "rwkv-init.pth").read_bytes()


@pytest.mark.parametrize(
    "cut, taken, miniepoch",
    [([1], "rwkv-0.pth", 1), ([1, 0], "rwkv-init.pth", 0), ([1, 0, "init"], "", -1)],
)
def test_weights_that_were_cut_short(
    data, official_folder, standing_still, capsys, cut, taken, miniepoch
):
    """The ones before are continued, as by the official trainer."""
    for number in cut:
        os.truncate(official_folder / f"rwkv-{number}.pth", 1000)
    if not taken:
        (official_folder / "rwkv-init.pth").unlink()
        with pytest.raises(UserError, match="rwkv-1.pth: .*; no other weights exist: .*proj_dir"):
            train(config(data, official_folder))
        return
    expected = (official_folder / taken).read_bytes()
    losses = train(config(data, official_folder, epoch_save=0))
    assert len(losses) == STEPS - miniepoch * MINIEPOCH
    said = capsys.readouterr().out
    for number in cut:
        assert f"rwkv-{number}.pth: " in said
    assert said.count(f"; using {taken}, at miniepoch {miniepoch}\n") == len(cut)
    assert (official_folder / "rwkv-final.pth").read_bytes() == expected


# What is in the folder → options that would overwrite it, and what the refusal says.
FINISHED = {
    "the end alone": (["final"], {}, "give another --proj_dir .and --load_model .*final.pth"),
    "after the checkpoints": (["init", "0", "1", "final"], {"my_exit_tokens": 99 * T}, "move it"),
    "no stage": (["init", "final"], {"train_stage": 0}, "move it, or give another --proj_dir"),
    "no stage, in between": (["0"], {"train_stage": 0}, "leave out --train_stage"),
    "another's": (["0"], {"load_model": "rwkv-0.pth"}, "leave out --load_model"),
    "itself": (["final"], {"load_model": "rwkv-final.pth"}, "another --proj_dir"),
    "stage one": (["1", "init"], {"train_stage": 1, "random_seed": 7}, "exists, but"),
    "no seed": (["init"], {"train_stage": 1, "random_seed": -1}, "another --proj_dir"),
    "another shape": (["init"], {"train_stage": 1, "n_layer": 1}, "another --proj_dir"),
    "of a longer run": (
        ["checkpoints/10", "final", "step_log.tsv"], {"my_exit_tokens": 11 * T},
        "is from a run of 192 tokens, longer than the planned 176",
    ),
    "the end of a later step": (
        ["checkpoints/10", "final", "step_log.tsv"], {"lr_init": 1e-5},
        "final.pth: is from a later step .* by a run with lr_init unset, not 1e-05",
    ),
    "of a later step": (
        ["checkpoints/10", "1", "2"], {"lr_init": 1e-5},
        "rwkv-2.pth: is from a later step .* by a run with lr_init unset, not 1e-05",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FINISHED)
def test_finished_work_is_not_overwritten(data, run, tmp_path, standing_still, case):
    there, options, message = FINISHED[case]
    for name in there:
        source = run[0] / ("rwkv-1.pth" if name == "2" else name)
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            name = name if "." in name else f"rwkv-{name}.pth"
            shutil.copy(source if source.is_file() else run[0] / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if "load_model" in options:
        options = {"load_model": str(tmp_path / options["load_model"])}
    with pytest.raises(UserError, match=message):
        train(config(data, tmp_path, **options))
    (tmp_path / ".lock").unlink()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_stage_one_twice(data, tmp_path, capsys):
    """The official preparation, given again: nothing is written."""
    for _ in range(2):
        train(config(data, tmp_path, train_stage=1, random_seed=5))
        stamp = (tmp_path / "rwkv-init.pth").stat()
    assert (
        "rwkv-init.pth already exists, with the weights of --random_seed 5"
        in capsys.readouterr().out
    )
    assert stamp == (tmp_path / "rwkv-init.pth").stat()


@pytest.mark.slow
def test_an_export_has_a_checkpoint_from_the_first_on(data, run, stopped, tmp_path, monkeypatch):
    """So a run that is killed between the two makes up for what is missing."""
    there = []

    def note(self, path, params):
        there.append((path.name, Checkpoints(path.parent / "checkpoints").steps()[:1]))
        return try_export(self, path, params)

    try_export = Exporter._try
    with monkeypatch.context() as patch:
        patch.setattr(Exporter, "_try", note)
        patch.setattr(run_module, "build_step", lambda *_, **__: lambda state, _: (state, STILL))
        train(config(data, tmp_path / "a"))
    assert there[0] == ("rwkv-0.pth", [MINIEPOCH])

    shutil.copytree(stopped[0], tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / str(len(stopped[1])))
    (tmp_path / "b" / "rwkv-0.pth").unlink()
    train(config(data, tmp_path / "b"), stop_after=MINIEPOCH + 1)
    assert (tmp_path / "b" / "rwkv-0.pth").read_bytes() == (run[0] / "rwkv-0.pth").read_bytes()


@pytest.mark.slow
def test_a_run_is_known_by_its_content(data, run, tmp_path, standing_still, capsys):
    """Its folder, its data and its base model may lie elsewhere, and the model be gone."""
    base = {"a": tmp_path / "a.pth", "b": tmp_path / "b"}
    shutil.copy(run[0] / "rwkv-1.pth", base["a"])
    shutil.copytree(run[0], base["b"])
    for name, source in base.items():
        folder, steps = tmp_path / "out" / name, STEPS
        train(config(data, folder, load_model=str(source)))
        moved = tmp_path / f"{name}-moved"
        for elsewhere in (source, moved, tmp_path / "nothing", None) if name == "a" else (moved,):
            if elsewhere == moved:
                source.rename(elsewhere)
                folder = folder.rename(tmp_path / f"{name}-out")
            steps += 1
            there = str(elsewhere or "")
            options = config(data, folder, load_model=there, my_exit_tokens=steps * T)
            assert len(train(options)) == 1
        with pytest.raises(UserError, match=r"weights of load_model \w+ .*, not \w+ .* uint8"):
            train(config(data, folder, load_model=str(run[0] / "rwkv-0.pth")))


def test_a_resumed_run_whose_exports_are_gone(data, run, tmp_path, capsys):
    """The official scripts remove them to start over."""
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("rwkv-[0-9f]*.pth"):
        path.unlink()
    assert train(config(data, tmp_path)) == []
    said = capsys.readouterr().out
    assert "its checkpoints are resumed; to start over, give another --proj_dir" in said
    assert train(config(data, tmp_path)) == []
    assert "to start over" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "every, names", [(10, [*range(0, 71, 10), 71]), (0, [71]), (71, [0, 71]), (100, [0, 71])]
)
def test_the_official_exports(every, names):
    """Of the demo: the last whole miniepoch's is there whatever --epoch_save is."""
    options = TrainConfig(epoch_save=every, my_exit_tokens=1498226207)
    demo = schedule.make_schedule(options, 16, 1498226207)
    ends = [step for step in range(2519, demo.last_step, 2520)] + [demo.last_step - 1]
    exports = [
        name for step in ends for name in exports_after(demo, step, options.epoch_begin, every)
    ]
    assert exports == [*(f"rwkv-{number}.pth" for number in names), "rwkv-final.pth"]


def test_passes_are_of_the_samples_that_are_visited(data, tmp_path, standing_still, capsys):
    """And a command that is printed can be pasted."""
    folder = tmp_path / "a run's"
    train(config(data, folder, my_exit_tokens=2 * 113 * T, micro_bsz=113, epoch_save=0))
    said = capsys.readouterr().out
    assert "2 passes over the data" in said
    (line,) = [line for line in said.splitlines() if line.startswith("try it: ")]
    assert str(folder / "rwkv-final.pth") in shlex.split(line)


def test_miniepochs_that_a_run_begins_and_ends_with(data, tmp_path, standing_still):
    """The last whole miniepoch is exported without --epoch_save, too."""
    options = {"epoch_begin": 1, "epoch_count": 1, "save_every_steps": 4, "epoch_save": 0}
    losses = train(config(data, tmp_path, **options))
    assert len(losses) == MINIEPOCH
    assert [words[0] + words[4] for words in log(tmp_path)] == ["10"]
    assert [path.name for path in tmp_path.glob("rwkv-[0-9].pth")] == ["rwkv-1.pth"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "8"]
    with pytest.raises(
        UserError, match="miniepoch 3 begins at step 15, but the run ends at step 12"
    ):
        train(config(data, tmp_path / "late", epoch_begin=3))


def test_a_checkpoint_of_another_model(data, run):
    said = "12: has n_layer 2, not 3, n_embd 64, not 128; .* or give another --proj_dir"
    with pytest.raises(UserError, match=said):
        train(config(data, run[0], n_layer=3, n_embd=128))
    with pytest.raises(UserError, match="12: has vocab_size 512, not 65536, head_size 64, not 32"):
        train(config(data, run[0], vocab_size=65536, head_size=32))
    assert train(config(data, run[0], vocab_size=None, head_size=None)) == []
    with pytest.raises(UserError, match="12: has dim_v 32, not 24"):
        train(config(data, run[0], lora_dims="32,32,24,64"))


def test_ids_are_held_to_the_vocabulary_of_the_file(data, tmp_path, standing_still):
    small = dataclasses.replace(MODEL, vocab_size=48)
    weights.save_pth(tmp_path / "small.pth", init_params(small, 0))
    with pytest.raises(UserError, match="outside the vocabulary of 48"):
        train(
            config(data, tmp_path / "out", load_model=str(tmp_path / "small.pth"), vocab_size=None)
        )


@pytest.fixture
def prepared(data, run, tmp_path) -> Path:
    """A folder with what the bad inputs below name; `data` beside them is good."""
    for ending in (".bin", ".idx"):
        shutil.copy(f"{data}{ending}", tmp_path / f"data{ending}")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "no_json.jsonl").write_text('{"text": "one"}\ntwo\n')
    (tmp_path / "no_text.jsonl").write_text('{"text": "one"}\n{"texts": "two"}\n')
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "half").mkdir()
    content = (run[0] / "rwkv-init.pth").read_bytes()
    (tmp_path / "init.pth").write_bytes(content)
    (tmp_path / "half" / "rwkv-init.pth").write_bytes(content[: len(content) // 2])
    maa = {"blocks.0.att.time_maa_x": np.zeros((1, 1, 64), np.float32)}
    pth.write(tmp_path / "v6.pth", {"emb.weight": np.zeros((V, 64), np.float32), **maa})
    canary = malicious.PAYLOADS["os.system"][0](f"touch {tmp_path}/canary")
    (tmp_path / "evil.pth").write_bytes(malicious.archive(canary))
    return tmp_path


BAD_INPUT = {
    "--data_file nothing": r"nothing: no such file",
    "--data_file nothing.jsonl": r"nothing.jsonl: no such file",
    "--data_file empty.jsonl": r"empty.jsonl: ",
    "--data_file no_json.jsonl": r"no_json.jsonl:2: is not valid JSON",
    "--data_file no_text.jsonl": r"no_text.jsonl:2: .* no string \"text\"",
    "--vocab_size 32": r"data: token \d+ has id \d+, outside the vocabulary of 32",
    "--ctx_len 3000": r"data: 2000 tokens are too few for ctx_len 3000",
    "--magic_prime 7": r"data: magic_prime 7 is 1 mod 3, not 2; use 113",
    "--load_model nothing.pth": r"nothing.pth: ",
    "--load_model v6.pth": r"v6.pth: is RWKV-6, not RWKV-7",
    "--load_model init.pth --n_layer 3 --n_embd 128": (
        r"init.pth: has n_layer 2, not 3, n_embd 64, not 128; leave the option out"
    ),
    "--load_model init.pth --vocab_size 65536 --head_size 32": (
        r"init.pth: has vocab_size 512, not 65536, head_size 64, not 32; leave the option out"
    ),
    "--load_model evil.pth": r"evil.pth: .*os.system",
    "--load_model folder": r"folder: no checkpoints",
    "--size 9b": r"--size 9b: choose one of tiny, 0.1b",
    "--n_layr 3": r"--n_layr 3; did you mean --n_layer\?",
    "--n_layer two": r"--n_layer: 'two' is not a whole number",
    "--proj_dir file": r"--proj_dir file: is a file or inside a file; give a folder",
    "--proj_dir file/out": r"--proj_dir file/out: is a file or inside a file; give a folder",
    "--devices 9": r"--devices 9: jax sees 8",
    "--proj_dir half": r"half/rwkv-init.pth: ",
    "--n_embd 100": r"--n_embd 100 is not a multiple of --head_size 64: try 128",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_is_one_line(arguments, prepared, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    usual = [*SHAPE, "--data_file", "data", "--ctx_len", "16", "--devices", "1"]
    monkeypatch.setattr(sys, "argv", ["train", *usual, *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        run_command(trainer.main)
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(line.startswith("tokenizing ") for line in progress)
    assert stopped.value.code == 2 and line.startswith("error: ")
    assert re.search(BAD_INPUT[arguments], line), line
    assert not (prepared / "canary").exists()
    assert not list(prepared.rglob("rwkv-final.pth")) and not list(prepared.rglob("*.tmp"))


def test_skipped_lines_are_listed_in_the_output(tmp_path, monkeypatch, capsys):
    """Known when the text is read: before the weights, which are not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("x.jsonl").write_text('{"words": "one two three"}\nno\n' * 20)
    given = "--data_file x.jsonl --text_key words --on_bad_line skip --load_model nothing.pth"
    size = "--vocab_size 65536 --ctx_len 8 --devices 1"
    monkeypatch.setattr(sys, "argv", ["train", *SHAPE, *size.split(), *given.split()])
    with pytest.raises(SystemExit):
        run_command(trainer.main)
    *_, note, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: nothing.pth: ")
    assert note == "note: bad lines skipped: 20; out/skipped.tsv lists them"
    first = Path("out/skipped.tsv").read_text("utf-8").split("\n")[0]
    assert first.startswith("x.jsonl:2\tis not valid JSON: ") and first.endswith('\t"no"')


def test_bad_input_is_one_line_of_the_process_too(data, tmp_path):
    tried = subprocess.run(
        command(data, tmp_path, "--magic_prime", "8"), capture_output=True, text=True
    )
    message = f"error: {data}: magic_prime 8 is not a prime; use 113, or leave it out\n"
    assert (tried.returncode, tried.stderr) == (2, message)
