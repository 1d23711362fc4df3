"""Several processes, usually one per machine, that train one model together.

Every process runs the same program on its own devices and reads its own samples. The first process
writes the log and the .pth files; all processes write the checkpoint, each its own part. They stop
together: at the end, at a signal to any of them, and when one is lost.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError, message_and_status, one_line
from rwkv_jax.parallel.sharding import batch_sharding, in_host_memory

START_TIMEOUT = 300  # seconds that a process waits for the others to start
HEARTBEAT_TIMEOUT = 30  # seconds of silence after which a process counts as lost
END_TIMEOUT = 3600  # seconds that a finished process waits for the .pth to be written


LOST = (
    "this process or another of the run was lost, so all of them end; start all of them again to "
    "resume from the last checkpoint"
)


@contextlib.contextmanager
def process_group(config: TrainConfig) -> Iterator[None]:
    """Context in which this process is part of the run (of one process, if there are no others).

    The other processes are found through SLURM, Open MPI, Kubernetes or torchrun, or given by
    --coordinator_address and --process_id. When a process is lost, jax aborts the others within
    `HEARTBEAT_TIMEOUT`.

    Raises:
        UserError: the addresses of the other processes are unknown, or they do not connect.
    """
    if config.num_nodes == 1 and not config.coordinator_address and not _by_torchrun():
        yield
        return
    arguments = _initialize_arguments(config)
    # jax's preemption handler would replace our SIGTERM handlers (of `run_command` and `Stop`) and
    # log about it.
    jax.config.update("jax_enable_preemption_service", False)
    with _report_if_lost() as end_report:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=START_TIMEOUT,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=END_TIMEOUT,
            )
        except ValueError:
            end_report()
            raise UserError(
                f"--num_nodes {config.num_nodes}: no addresses of the other processes: not found "
                "in SLURM, Open MPI, Kubernetes or MASTER_ADDR, MASTER_PORT and NODE_RANK; give "
                "each process --coordinator_address HOST:PORT (of the first) and --process_id"
            ) from None
        except RuntimeError as error:
            end_report()
            why = str(error).splitlines()[0]
            count = arguments.get("num_processes", config.num_nodes)
            raise UserError(f"the {count} processes of this run did not connect: {why}") from None
        if not is_first():
            sys.stdout = open(os.devnull, "w")
        try:
            yield
        except SystemExit as status:
            if isinstance(status.code, int) and status.code > 128:  # only this process got a signal
                end_report()
                os._exit(status.code)  # for the reason below
            jax.distributed.shutdown()  # all processes stop and reach this point
            end_report()
            raise
        except BaseException as error:
            # No exception: at exit jax would wait for the other processes, and they for this one.
            message, code = message_and_status(error)
            print(one_line(message), file=sys.stderr, flush=True)
            # Which jax errors mean that another process is lost depends on backend and version.
            if message.startswith("error: jax: "):
                print(f"error: {LOST}", file=sys.stderr, flush=True)
            end_report()
            os._exit(code)
        jax.distributed.shutdown()
        end_report()


def _initialize_arguments(config: TrainConfig) -> dict[str, Any]:
    """The processes of the run, as arguments of `jax.distributed.initialize`."""
    nodes, address, number = config.num_nodes, config.coordinator_address, config.process_id
    if address:
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"--coordinator_address {address}: give HOST:PORT")
        return _process(address, nodes, number, "--process_id")
    if _by_torchrun():
        count = _integer_variable("WORLD_SIZE")
        arguments = _process(_master_address(), count, _integer_variable("RANK"), "RANK")
        alone = count == nodes or os.environ.get("LOCAL_WORLD_SIZE") == "1"
        if "LOCAL_RANK" in os.environ and not alone:
            arguments["local_device_ids"] = [_integer_variable("LOCAL_RANK")]
        return arguments
    # In jax's order of detection. A process that is alone on its machine uses all its devices; by
    # default jax would give it only one.
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("SLURM_NTASKS")
    if not tasks and _has_variables("NODE_RANK"):
        return _process(_master_address(), nodes, _integer_variable("NODE_RANK"), "NODE_RANK")
    return {"local_device_ids": []} if tasks == str(nodes) else {}


def _process(address: str, count: int, number: int, name: str) -> dict[str, Any]:
    if not 0 <= number < count:
        raise UserError(
            f"{name} {number}: give each of the {count} processes its own, from 0 to {count - 1}"
        )
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _by_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets its variables, started several processes."""
    return _has_variables("RANK", "WORLD_SIZE") and _integer_variable("WORLD_SIZE") > 1


def _has_variables(*names: str) -> bool:
    """Whether these environment variables and the address of the first process are set."""
    return all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT"))


def _integer_variable(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UserError(f"{name}={text}: give a number, as torchrun does, or unset it")
    return int(text)


def _master_address() -> str:
    """The address of the first process, HOST:PORT, from torchrun's variables."""
    port = _integer_variable("MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port += 1  # torchrun itself listens on MASTER_PORT
    return f"{os.environ['MASTER_ADDR']}:{port}"


@contextlib.contextmanager
def _report_if_lost() -> Iterator[Callable[[], None]]:
    """Starts a helper process that prints `LOST` if this one ends before it calls the function.

    This process cannot print it itself, because jax aborts it from another thread.
    """
    code = f"import sys\nif not sys.stdin.read(): sys.exit({'error: ' + LOST!r})"
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, start_new_session=True
    )

    def end_report() -> None:
        watcher.communicate(b"well")

    yield end_report


def is_first() -> bool:
    """Whether this process is the one that writes the log and the .pth files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block before the others do."""
    several = jax.process_count() > 1
    if several and not is_first():
        multihost_utils.sync_global_devices("first")
    yield
    if several and is_first():
        multihost_utils.sync_global_devices("first")


def from_first(value: int) -> int:
    """Broadcasts the first process's value (32 bits) to all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def device_put_global(tree: Any, shardings: Any) -> Any:
    """Host arrays, equal in all processes → global arrays; each process copies its own shards."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: np.asarray(leaf)[index]
        ),
        tree,
        shardings,
    )


def make_batch(
    mesh: Mesh, shape: tuple[int, ...], samples: Callable[[int, range], np.ndarray]
) -> jax.Array:
    """A step's batch [A, B, T + 1]; each process reads only the samples of its own devices.

    Args:
        samples: (index of the micro batch, rows of it) → [rows, T + 1]. Device q of the mesh has
            rows q·B/W to (q + 1)·B/W, as `Dataset.batch` orders them by rank.
    """

    def shard(index: Any) -> np.ndarray:
        micro, rows = (range(size)[at] for size, at in zip(shape, index[:2], strict=False))
        return np.stack([samples(number, rows) for number in micro])

    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)


def make_any_process(mesh: Mesh) -> Callable[[tuple[bool, ...], jax.Array], tuple[bool, ...]]:
    """Returns a function to call once per step with this process's votes: `jnp.any` over processes.

    All processes get the same answer at the same step. With several processes the answer is about
    the votes of the previous step, so that no process waits for the device. The second argument is
    a result of the step; the vote is taken after it.
    """
    if jax.process_count() == 1:
        return lambda votes, _: votes
    reduce = jax.jit(
        lambda votes, _: jnp.any(votes, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # CPU devices do not run programs in a fixed order, so two collectives could deadlock.
    unordered = mesh.devices.flat[0].platform == "cpu"
    answers: list[jax.Array] = []

    def any_process(votes: tuple[bool, ...], after: jax.Array) -> tuple[bool, ...]:
        if unordered:
            jax.block_until_ready(after)
        shape = (mesh.size, len(votes))
        own = jax.make_array_from_callback(shape, per_device, lambda _: np.array([votes]))
        answers.append(reduce(own, after))
        if unordered:
            jax.block_until_ready(answers)
        if len(answers) == 1:
            return (False,) * len(votes)
        return tuple(np.asarray(answers.pop(0)).tolist())

    return any_process


def gather_to_first(params: Any) -> Any:
    """Gathers the full tree on the first process, which writes it.

    The result is bf16 if there are several processes or the tree is offloaded, else unchanged.
    Every process has to call this; one layer is gathered at a time. The other processes get empty
    arrays.
    """
    if jax.process_count() == 1 and not in_host_memory(params):
        return params
    mesh = jax.tree.leaves(params)[0].sharding.mesh

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def gather(layers: jax.Array, layer: int) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(layers, layer, keepdims=False)
        return row.astype(jnp.bfloat16)

    def gather_leaf(leaf: Any) -> np.ndarray:
        on_device = jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))
        layers = on_device if leaf.ndim > 2 else on_device[None]
        rows = []
        for layer in range(len(layers)):
            row = gather(layers, layer)
            if is_first():
                rows.append(np.asarray(row))
        return np.array(rows).reshape(leaf.shape if rows else 0)

    return jax.tree.map(gather_leaf, params)
