"""Two processes of four devices train as one of eight, and none goes on without the other."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rwkv_jax import train
from rwkv_jax.config import TrainConfig, parse_train_options
from rwkv_jax.errors import UserError
from rwkv_jax.parallel import distributed, sharding
from rwkv_jax.tracking.step_log import read_step_log

ROOT = Path(__file__).parents[2]
STEPS, CTX, DEVICES = 20, 16, 8
OPTIONS = {
    "n_layer": 1, "n_embd": 32, "head_size": 16, "vocab_size": 65536, "ctx_len": CTX,
    "micro_bsz": 1, "my_exit_tokens": STEPS * CTX * DEVICES,
    "lr_init": 1e-3, "save_every_steps": 5, "accelerator": "cpu", "precision": "fp32",
    "strategy": "fsdp", "data_file": ROOT / "data" / "demo.jsonl",
}  # fmt: skip

# The command, noting whose samples it reads, and pausing at step 15 until a file lets it continue:
# what happens before then depends on no machine's speed. By its devices' memory, which a CPU does
# not tell, the first process has room for two samples, the second for one.
PROGRAM = """
import os, sys, time
import jax
from rwkv_jax import train
from rwkv_jax.planning import batch_size, memory
from rwkv_jax.text import dataset
from rwkv_jax.errors import run_command
batch_size.device_memory = lambda _: (7 - 2 * jax.process_index()) * memory.GIB
need = lambda config, *_: memory.StepCost(0, 0, 3 * config.micro_bsz * memory.GIB, 0, 0, 0)
batch_size.measure = need
batch = dataset.Dataset.batch
def noting(self, step, world_size, micro_bsz, rows):
    while step >= 15 and not os.path.exists(os.environ["CONTINUE"]):
        time.sleep(0.05)
    print("read", *rows, file=sys.stderr)
    return batch(self, step, world_size, micro_bsz, rows)
dataset.Dataset.batch = noting
run_command(train.main)
"""


def options(folder: Path, **more: object) -> list[str]:
    values = {**OPTIONS, "proj_dir": folder, **more}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def named_by(cluster: str, number: int, port: int) -> tuple[dict[str, object], dict[str, str]]:
    """Options and environment of a process, as whatever starts it gives them.

    SLURM's and Open MPI's job numbers are such that jax takes this port, from 61440 up.
    """
    job = port - 61440
    return {
        "options": ({"coordinator_address": f"localhost:{port}", "process_id": number}, {}),
        "SLURM": (
            {"strategy": "fsdp_offload"},
            {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost,elsewhere",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": "0",
            },
        ),
        "Open MPI": (
            {},
            {
                "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:4711",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": str(number),
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
        ),
    }[cluster]


def free_port() -> int:
    for port in range(61440 + os.getpid() % 4000, 65536):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("localhost", port))
            return port
    raise OSError("no port is free")


def start(folder: Path, cluster: str) -> list[subprocess.Popen]:
    port = free_port()
    quick = {"NPROC": "16", "JAX_NUM_CPU_DEVICES": "4"}

    def process(number: int) -> subprocess.Popen:
        named, environment = named_by(cluster, number, port)
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM]
            + options(folder, num_nodes=2, micro_bsz="auto", **named),
            cwd=ROOT,
            env={**os.environ, **quick, **environment, "CONTINUE": str(folder / "continue")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return [process(number) for number in range(2)]


def wait_for(checkpoint: Path, process: subprocess.Popen) -> None:
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_stop_go_on_and_train_as_one(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    first, second = start(together, "options")
    wait_for(together / "checkpoints" / "5", first)
    second.kill()
    said = first.communicate()[1]
    assert first.returncode != 0
    assert said.splitlines()[-1].startswith("error: this process or another of the run was lost")
    assert "Traceback" not in said
    second.communicate()
    assert not (together / "rwkv-final.pth").exists()

    first, second = start(together, "Open MPI")
    wait_for(together / "checkpoints" / "10", first)
    second.send_signal(signal.SIGTERM)  # to one of them: all stop, after the same step
    (together / "continue").touch()
    said, others = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode) == (1, 1), said[1] + others[1]
    stopped = re.findall(r"stopped and saved at step (\d+)", said[0] + said[1])
    assert "micro_bsz 1 x 1" in said[0] and len(stopped) == 1
    assert (together / "checkpoints" / stopped[0]).exists()

    running = start(together, "SLURM")
    out, errors = zip(*(process.communicate() for process in running), strict=True)
    assert f"at step {stopped[0]}" in out[0]
    assert "resumed from" in out[0] and (together / "rwkv-final.pth").exists(), errors[0]
    assert all(line.startswith("[Gloo]") for line in out[1].splitlines())  # one of them logs
    for number, said in enumerate(errors):
        ranks = {int(rank) for rank in re.findall(r"^read (\d+)$", said, re.M)}
        assert ranks == set(range(4 * number, 4 * number + 4))

    shutil.copytree(together, alone, ignore=lambda *_: ["checkpoints", "rwkv-final.pth"])
    (alone / "step_log.tsv").unlink()
    with jax.numpy_dtype_promotion("standard"):  # optax mixes them
        train.train(parse_train_options(options(alone, devices=DEVICES))[0])
    ours, expected = (read_step_log(folder / "step_log.tsv") for folder in (together, alone))
    assert len(expected["loss"]) == len(ours["loss"]) == STEPS
    np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=0, atol=1e-5)


def test_a_device_gets_the_samples_of_its_rank():
    """Of [A, B, T + 1]: rank q has rows q·B/W to (q + 1)·B/W of each micro batch."""
    mesh = sharding.mesh_from_devices(jax.devices(), data=2)
    asked = []

    def samples(micro: int, rows: range) -> np.ndarray:
        asked.append((micro, *rows))
        return np.array([[micro, row, 0] for row in rows])

    batch = distributed.make_batch(mesh, (2, 16, 3), samples)
    assert sorted(asked) == [(micro, 2 * q, 2 * q + 1) for micro in range(2) for q in range(8)]
    for shard in batch.addressable_shards:
        rank = list(mesh.devices.flat).index(shard.device)
        assert shard.data[:, :, 1].tolist() == [[2 * rank, 2 * rank + 1]] * 2


@pytest.mark.parametrize(
    "given, said",
    [
        (
            "--coordinator_address here:1 --num_nodes 2",
            "--process_id -1: give each of the 2 processes",
        ),
        ("--coordinator_address here:1 --process_id 2 --num_nodes 2", "from 0 to 1"),
        ("--coordinator_address here --process_id 0 --num_nodes 2", "give HOST:PORT"),
    ],
)
def test_wrong_options_are_one_line(given, said):
    with pytest.raises(UserError, match=said):
        with distributed.process_group(parse_train_options(given.split())[0]):
            pass


@pytest.mark.parametrize("tasks, named", [("2", {"local_device_ids": []}), ("16", {})])
def test_the_only_process_of_a_machine_takes_all_of_its_devices(monkeypatch, tasks, named):
    unset_variables(monkeypatch)
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert distributed._initialize_arguments(parse_train_options(["--num_nodes", "2"])[0]) == named


TORCH = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
RANKS = {**TORCH, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # that is at MASTER_PORT itself


@pytest.mark.parametrize(
    "given, variables, named",
    [
        ("--num_nodes 2", RANKS, ("10.0.0.1:29500", 16, 9, [1])),
        ("", RANKS | AGENT, ("10.0.0.1:29501", 16, 9, [1])),
        ("", RANKS | {"LOCAL_WORLD_SIZE": "1"}, ("10.0.0.1:29500", 16, 9, None)),
        ("--num_nodes 16", RANKS, ("10.0.0.1:29500", 16, 9, None)),
        ("--num_nodes 2", RANKS | {"SLURM_NTASKS": "2"}, ("10.0.0.1:29500", 16, 9, [1])),
        ("--num_nodes 2", {**TORCH, "NODE_RANK": "1"}, ("10.0.0.1:29500", 2, 1, None)),
        (
            "--num_nodes 2 --process_id 1 --coordinator_address here:1",
            RANKS,
            ("here:1", 2, 1, None),
        ),
        # Without who is who, jax asks its clusters.
        ("--num_nodes 2", TORCH, (None, None, None, None)),
        ("--num_nodes 2", {"RANK": "1", "WORLD_SIZE": "2"}, (None, None, None, None)),
        (
            "--num_nodes 2",
            {**TORCH, "NODE_RANK": "1", "SLURM_NTASKS": "2"},
            (None, None, None, []),
        ),
    ],
)
def test_variables_of_torchrun_and_of_lightning(monkeypatch, given, variables, named):
    unset_variables(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = distributed._initialize_arguments(parse_train_options(given.split())[0])
    keys = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    assert tuple(found.get(key) for key in keys) == named


def unset_variables(monkeypatch):
    for name in (*RANKS, *AGENT, "NODE_RANK", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "given, variables, said",
    [
        ("", RANKS | {"RANK": "16"}, "RANK 16: give each of the 16 processes its own"),
        ("", RANKS | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two: give a number"),
        ("", RANKS | {"MASTER_PORT": ""}, "MASTER_PORT=: give a number"),
        ("--num_nodes 2", {**TORCH, "NODE_RANK": "2"}, "NODE_RANK 2: give each of the 2"),
    ],
)
def test_wrong_variables_are_one_line(monkeypatch, given, variables, said):
    unset_variables(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        with distributed.process_group(parse_train_options(given.split())[0]):
            pass


def test_a_signal_to_one_process_waits_for_no_other(monkeypatch):
    """Which may be in a collective, where they wait for this one."""
    unset_variables(monkeypatch)
    did = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: did.append("waited"))
    monkeypatch.setattr(os, "_exit", lambda status: (did.append(status), sys.exit()))
    config = TrainConfig(num_nodes=2, coordinator_address="here:1", process_id=0)
    for status in (1, 128 + signal.SIGHUP):  # that of a stop at the same step in all; of a signal
        with pytest.raises(SystemExit), distributed.process_group(config):
            sys.exit(status)
    assert did == ["waited", 129]


@pytest.mark.parametrize(
    "error, status, said",
    [
        (UserError("a\nb: no"), 2, ["error: a\\nb: no"]),
        (OSError(28, "No space left", "x"), 2, ["error: x: No space left"]),
        (KeyError("k"), 1, ["error: unexpected KeyError: 'k'; please report it with "]),
        (MemoryError("9 TiB"), 2, ["error: out of memory: 9 TiB"]),
        (
            jax.errors.JaxRuntimeError("INTERNAL: gone\nmore"), 2,
            ["error: jax: INTERNAL: gone", f"error: {distributed.LOST}"],
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1"), 2, ["error: out of memory: "]),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_of_one_process_is_reported_as_of_any_command(
    error, status, said, monkeypatch, capsys, tmp_path
):
    """In a line, and the traceback of a bug in a file; others that are lost are named with it."""
    unset_variables(monkeypatch)
    left = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(os, "_exit", lambda code: (left.append(code), sys.exit()))
    config = TrainConfig(num_nodes=2, coordinator_address="here:1", process_id=0)
    with pytest.raises(SystemExit), distributed.process_group(config):
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert left == [status] and len(lines) == len(said)
    assert all(line.startswith(words) for line, words in zip(lines, said, strict=True))
    assert len(list(tmp_path.iterdir())) == ("unexpected" in lines[0])


def test_one_process_of_torchrun_is_alone(monkeypatch):
    unset_variables(monkeypatch)
    for name, value in (RANKS | {"RANK": "0", "WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    with distributed.process_group(parse_train_options([])[0]):
        assert jax.process_count() == 1


def test_processes_of_torchrun_meet():
    program = (
        "import jax\n"
        "from rwkv_jax import config\nfrom rwkv_jax.parallel import distributed, sharding\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "with distributed.process_group(config.parse_train_options(['--devices', '2'])[0]):\n"
        "    mesh = sharding.make_mesh(2)\n"
        "    print('mesh', mesh.size, flush=True)\n"
        "    assert jax.process_count() == mesh.size\n"
    )
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "mesh 2" in out[0]


def test_machines_that_nothing_names_are_one_line(monkeypatch):
    unset_variables(monkeypatch)
    command = [sys.executable, "-m", "rwkv_jax.train", "--num_nodes", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "no addresses of the other processes: not found in SLURM, Open MPI" in run.stderr


@pytest.mark.parametrize(
    "shape, said",
    [
        ("data=2,fsdp=3", "data=2,fsdp=3: does not multiply up to the number of devices, 8"),
        ("data=3", "does not multiply up"),
        ("fsdp=16", "does not multiply up"),
        ("data=2,tensor=4", "give sizes as in data=2,fsdp=4"),
        ("8", "give sizes as in"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(shape, said):
    with pytest.raises(UserError, match=said):
        sharding.make_mesh(0, 1, shape)


@pytest.mark.parametrize("shape", ["data=2,fsdp=4", "data=2", "fsdp=4"])
def test_a_mesh_by_its_options(shape):
    assert dict(sharding.make_mesh(0, 1, shape).shape) == {"data": 2, "fsdp": 4}
