"""`python -m rwkv_jax.plan`: memory and speed of a run on a GPU that this machine does not have.

Compiles the step that `rwkv_jax.train` would run with the same options for the GPU, and reads XLA's
memory plan. This needs no GPU, only the compiler (the extra `plan`).
"""

import shlex
import sys
from pathlib import Path

import jax

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from pallas_kernels.gpu_targets import GPU_TARGETS
from rwkv_jax.config import parse_train_options
from rwkv_jax.device.runtime import override_settings
from rwkv_jax.errors import CommandParser, run_command
from rwkv_jax.planning.batch_size import largest_batch
from rwkv_jax.planning.memory import available
from rwkv_jax.planning.plans import find_target, plan, report

__all__ = ["available", "find_target", "largest_batch", "plan", "report"]  # for scripts


def main() -> None:
    parser = CommandParser(
        usage="%(prog)s --gpu h100 [--size 1.5b] [--micro_bsz 4] [option of train …]",
        description="Plan a run on a GPU that this machine does not have: whether it fits, the "
        "largest batch that fits, and an upper bound on its speed. Compiles the step that "
        "python -m rwkv_jax.train would run, once if --micro_bsz is a number, else three to eight "
        "times to find the largest.",
        epilog="Accepts every option of python -m rwkv_jax.train; these affect the plan: --size, "
        "--n_layer, --n_embd, --ctx_len, --micro_bsz, --accumulate_grad_batches, --grad_cp, "
        "--head_chunk, --precision, --devices, --num_nodes and --strategy.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default="", help=f"one of {', '.join(GPU_TARGETS)}")
    options, rest = parser.parse_known_args()
    override_settings()
    jax.config.update("jax_platforms", "cpu")
    # A kernel's program names the source lines that it was traced from. Without these locations the
    # cache key does not depend on where the code is or on edits that do not change the program.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # A program compiled for an absent GPU cannot be loaded again: jax would write it to the cache
    # of `JAX_COMPILATION_CACHE_DIR`, and warn whenever it finds it there.
    jax.config.update("jax_enable_compilation_cache", False)
    config, _ = parse_train_options(rest)
    result = plan(config, find_target(options.gpu), search=config.micro_bsz < 1)
    micro_bsz = config.micro_bsz if config.micro_bsz > 0 else result.largest or 1
    given = _without(rest, "--micro_bsz")
    command = shlex.join(["python", "-m", "rwkv_jax.train", *given, "--micro_bsz", str(micro_bsz)])
    print(report(result, micro_bsz, command))
    if micro_bsz > result.largest:
        sys.exit(1)


def _without(arguments: list[str], option: str) -> list[str]:
    """The command line without one option and its value."""
    others, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != option:
            others.append(argument)
        skip = argument == option
    return others


if __name__ == "__main__":
    run_command(main)
