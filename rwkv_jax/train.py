"""`python -m rwkv_jax.train`: trains a model, from text to rwkv-final.pth."""

import contextlib
import dataclasses
import datetime
import functools
import shlex
import sys
import time
from pathlib import Path

import jax

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from pallas_kernels.gpu_targets import current_compute_capability
from rwkv_jax.checkpoints.store import Checkpoints, require_orbax
from rwkv_jax.config import TrainConfig, parse_train_options
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.diagnosis import rules
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.parallel import distributed, sharding
from rwkv_jax.planning import batch_size
from rwkv_jax.training import loop
from rwkv_jax.training.build import resolve_config
from rwkv_jax.training.initial_weights import initial_model, prepare_init
from rwkv_jax.training.run import Run
from rwkv_jax.training.run_folder import FINAL, INIT, lock
from rwkv_jax.training.setup import describe, is_finished, setup_run
from rwkv_jax.training.stopping import Stop

DEMO = Path(__file__).parents[1] / "data" / "demo.jsonl"


def train(config: TrainConfig) -> None:
    """Trains with these options, or resumes the run in their output folder.

    Raises:
        UserError: the options cannot be satisfied.
    """
    began = time.monotonic()
    require_orbax()
    mesh = choose_devices(config)
    config = resolve_options(config, mesh)
    folder = make_folder(config.proj_dir)
    with lock(folder) if distributed.is_first() else contextlib.nullcontext():
        if config.train_stage == 1:
            if distributed.is_first():
                print(prepare_init(folder / INIT, config))
            return
        with contextlib.closing(Checkpoints(folder / "checkpoints", config.keep_last)) as saved:
            run = setup_run(config, mesh, saved, functools.partial(fitting_micro_bsz, mesh))
            describe(run)
            if is_finished(run):
                final, steps = folder / FINAL, run.schedule.last_step
                print(f"nothing left to do: all {steps} steps are done, see {final}")
                return
            saved.check_writable()
            loop.train(run, Stop(began + 60 * config.max_minutes if config.max_minutes else None))
    print_end(run, time.monotonic() - began)


def choose_devices(config: TrainConfig) -> jax.sharding.Mesh:
    """Returns the mesh for the options; reports on standard error why no GPU is used.

    Raises:
        UserError: the requested devices are not available.
    """
    if config.accelerator == "cpu":
        jax.config.update("jax_platforms", "cpu")
    mesh = sharding.make_mesh(config.devices, config.num_nodes, config.mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if on_cpu and config.accelerator != "cpu":
        why = rules.why_no_gpu()
        if config.accelerator == "gpu":
            raise UserError(f"--accelerator gpu: {why or 'there is no NVIDIA driver here'}")
        if why:
            print(f"note: training on the CPU: {why}", file=sys.stderr)
    strategy = sharding.STRATEGIES.get(config.strategy)
    if mesh.size == 1 and strategy and not strategy.offload:
        print(
            f"note: --strategy {config.strategy} has no effect on one device; --devices selects "
            "more, if available",
            file=sys.stderr,
        )
    return mesh


def resolve_options(config: TrainConfig, mesh: jax.sharding.Mesh) -> TrainConfig:
    """Resolves the defaults that depend on the devices and on the checkout.

    Raises:
        UserError: no data is given, and the demo data does not exist.
    """
    if not config.data_file and not DEMO.is_file():
        raise UserError(
            "--data_file is required: text (a .jsonl, a .txt …), or the prefix of a .bin and .idx"
        )
    config = dataclasses.replace(config, data_file=config.data_file or str(DEMO))
    on_gpu = mesh.devices.flat[0].platform != "cpu"
    return resolve_config(config, on_gpu, current_compute_capability() if on_gpu else None)


def make_folder(proj_dir: str) -> Path:
    """Creates the output folder.

    Raises:
        UserError: it cannot be created.
    """
    folder = Path(proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--proj_dir {folder}: is a file or inside a file; give a folder") from None
    except OSError as error:
        raise UserError(f"--proj_dir {folder}: {error.strerror}; give another folder") from None
    return folder


def fitting_micro_bsz(mesh: jax.sharding.Mesh, config: TrainConfig) -> int:
    """Returns the largest micro_bsz that fits the devices, for `--micro_bsz auto`."""
    return batch_size.fitting_micro_bsz(config, initial_model(config), mesh)


def print_end(run: Run, seconds: float) -> None:
    """Prints the path of the final model and a command that uses it."""
    final = run.folder / FINAL
    print(
        f"wrote {final} after {datetime.timedelta(seconds=round(seconds))}\n"
        f"try it: python -m rwkv_jax.generate --load_model {shlex.quote(str(final))} "
        "--prompt $'User: 123+456=?\\n\\nAssistant:'"
    )


def main() -> None:
    config, notes = parse_train_options(sys.argv[1:])
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    prepare_jax(deterministic=bool(config.deterministic))
    with distributed.process_group(config):
        train(config)


if __name__ == "__main__":
    run_command(main)
