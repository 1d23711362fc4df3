"""Several processes, usually one a machine, that train one model as one.

Every process runs the same program on its own devices and reads its own samples. What belongs to
the run as a whole, the log and the .pth files, is the first process's; a checkpoint is written by
all of them, each its part. They stop together: at the end, at a signal to any of them, and when one
is lost.
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
from rwkv_jax.errors import UserError, last_words, one_line
from rwkv_jax.parallel.sharding import batch_sharding, in_host_memory

START_TIMEOUT = 300  # seconds that a process waits for the others to start
HEARTBEAT_TIMEOUT = 30  # seconds of silence after which a process counts as lost
END_TIMEOUT = 3600  # seconds that a process waits, when it is done, for the .pth to be written


LOST = (
    "this process or another of the run was lost, so all of them end; start all of them again to "
    "resume from the last checkpoint"
)


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[None]:
    """Inside, this process is one of the run's; alone when the options name no others.

    SLURM, Open MPI, Kubernetes and torchrun say who the others are; elsewhere --coordinator_address
    and --process_id do. When a process is lost, jax aborts the others within `HEARTBEAT_TIMEOUT`.

    Raises:
        UserError: the others are not named.
    """
    if config.num_nodes == 1 and not config.coordinator_address and not _by_torchrun():
        yield
        return
    named = _named(config)
    # It would take SIGTERM from the handlers of `run_command` and `run.Stop`, and write of it.
    jax.config.update("jax_enable_preemption_service", False)
    with _last_word() as ended:
        try:
            jax.distributed.initialize(
                **named,
                initialization_timeout=START_TIMEOUT,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=END_TIMEOUT,
            )
        except ValueError:
            ended()
            raise UserError(
                f"--num_nodes {config.num_nodes}: neither SLURM, Open MPI nor Kubernetes names the "
                "other processes, nor do MASTER_ADDR, MASTER_PORT and NODE_RANK; give each "
                "--coordinator_address HOST:PORT (of the first) and --process_id"
            ) from None
        except RuntimeError as error:
            ended()
            why = str(error).splitlines()[0]
            count = named.get("num_processes", config.num_nodes)
            raise UserError(f"the {count} processes of this run did not meet: {why}") from None
        if not is_first():
            sys.stdout = open(os.devnull, "w")
        try:
            yield
        except SystemExit as status:
            if isinstance(status.code, int) and status.code > 128:  # a signal to this one alone
                ended()
                os._exit(status.code)  # for the reason below
            jax.distributed.shutdown()  # all of them stop, and come here
            ended()
            raise
        except BaseException as error:
            # Not by an exception: at the exit jax would wait for the others, and they for us.
            words, code = last_words(error)
            print(one_line(words), file=sys.stderr, flush=True)
            # Which of jax's errors mean that another is gone differs by backend and version.
            if words.startswith("error: jax: "):
                print(f"error: {LOST}", file=sys.stderr, flush=True)
            ended()
            os._exit(code)
        jax.distributed.shutdown()
        ended()


def _named(config: TrainConfig) -> dict[str, Any]:
    """Who the processes are, as arguments of `jax.distributed.initialize`."""
    nodes, address, number = config.num_nodes, config.coordinator_address, config.process_id
    if address:
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"--coordinator_address {address}: give HOST:PORT")
        return _process(address, nodes, number, "--process_id")
    if _by_torchrun():
        count = _variable("WORLD_SIZE")
        named = _process(_master(), count, _variable("RANK"), "RANK")
        alone = count == nodes or os.environ.get("LOCAL_WORLD_SIZE") == "1"
        if "LOCAL_RANK" in os.environ and not alone:
            named["local_device_ids"] = [_variable("LOCAL_RANK")]
        return named
    # In the order in which jax looks. A process that is the only one of its machine takes all
    # devices there; by itself jax would hide from it all but one.
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("SLURM_NTASKS")
    if not tasks and _are_set("NODE_RANK"):
        return _process(_master(), nodes, _variable("NODE_RANK"), "NODE_RANK")
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
    """Whether torchrun, or what sets its variables, has started this process and others."""
    return _are_set("RANK", "WORLD_SIZE") and _variable("WORLD_SIZE") > 1


def _are_set(*names: str) -> bool:
    """Whether these are variables of the environment, and the first process's address, too."""
    return all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT"))


def _variable(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UserError(f"{name}={text}: give a number, as torchrun does, or unset it")
    return int(text)


def _master() -> str:
    """Where the first process listens, by torchrun's variables."""
    port = _variable("MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port += 1  # torchrun itself listens at that one
    return f"{os.environ['MASTER_ADDR']}:{port}"


@contextlib.contextmanager
def _last_word() -> Iterator[Callable[[], None]]:
    """Has another process print `LOST` if this one ends before it calls what it is given.

    From inside it cannot be said: jax aborts a process from a thread of its own.
    """
    code = f"import sys\nif not sys.stdin.read(): sys.exit({'error: ' + LOST!r})"
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, start_new_session=True
    )

    def ended() -> None:
        watcher.communicate(b"well")

    yield ended


def is_first() -> bool:
    """Whether this process is the one that logs and writes for the run."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_ahead() -> Iterator[None]:
    """What is inside is done by the first process, and when it is done, by the others."""
    several = jax.process_count() > 1
    if several and not is_first():
        multihost_utils.sync_global_devices("first")
    yield
    if several and is_first():
        multihost_utils.sync_global_devices("first")


def from_first(value: int) -> int:
    """The first process's value (of 32 bits), in all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process → device arrays; each process copies its parts."""
    return jax.tree.map(
        lambda leaf, where: jax.make_array_from_callback(
            leaf.shape, where, lambda index: np.asarray(leaf)[index]
        ),
        tree,
        shardings,
    )


def make_batch(
    mesh: Mesh, shape: tuple[int, ...], samples: Callable[[int, range], np.ndarray]
) -> jax.Array:
    """A step's batch [A, B, T + 1], of which each process reads its devices' samples alone.

    Args:
        samples: (number of the micro batch, rows of it) → [rows, T + 1]. Device q of the mesh has
            rows q·B/W to (q + 1)·B/W, as `Dataset.batch` orders them by rank.
    """

    def part(index: Any) -> np.ndarray:
        micro, rows = (range(size)[at] for size, at in zip(shape, index[:2], strict=False))
        return np.stack([samples(number, rows) for number in micro])

    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)


def make_agree(mesh: Mesh) -> Callable[[tuple[bool, ...], jax.Array], tuple[bool, ...]]:
    """A function to call once a step with this process's votes: which of them does any process say?

    Of several processes all get the same answer at the same step, to the votes of the step before,
    so that nobody waits for the device. The second argument is a result of the step, after which
    the vote is taken.
    """
    if jax.process_count() == 1:
        return lambda votes, _: votes
    ask = jax.jit(
        lambda votes, _: jnp.any(votes, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # A CPU's devices keep no order between programs, which then wait for each other in two orders.
    unordered = mesh.devices.flat[0].platform == "cpu"
    answers: list[jax.Array] = []

    def agree(votes: tuple[bool, ...], after: jax.Array) -> tuple[bool, ...]:
        if unordered:
            jax.block_until_ready(after)
        shape = (mesh.size, len(votes))
        given = jax.make_array_from_callback(shape, where, lambda _: np.array([votes]))
        answers.append(ask(given, after))
        if unordered:
            jax.block_until_ready(answers)
        if len(answers) == 1:
            return (False,) * len(votes)
        return tuple(np.asarray(answers.pop(0)).tolist())

    return agree


def to_first(params: Any) -> Any:
    """The whole tree for the first process to write: bf16, if others have parts or it is offloaded.

    Every process has to call it; a layer at a time is gathered. The others' result has no content.
    """
    if jax.process_count() == 1 and not in_host_memory(params):
        return params
    where = jax.tree.leaves(params)[0].sharding.mesh

    @functools.partial(jax.jit, out_shardings=NamedSharding(where, PartitionSpec()))
    def gather(layers: jax.Array, layer: int) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(layers, layer, keepdims=False)
        return row.astype(jnp.bfloat16)

    def whole(leaf: Any) -> np.ndarray:
        here = jax.device_put(leaf, NamedSharding(where, leaf.sharding.spec))
        layers = here if leaf.ndim > 2 else here[None]
        rows = []
        for layer in range(len(layers)):
            row = gather(layers, layer)
            if is_first():
                rows.append(np.asarray(row))
        return np.array(rows).reshape(leaf.shape if rows else 0)

    return jax.tree.map(whole, params)
