"""The largest micro_bsz that fits."""

import dataclasses
import math
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from pallas_kernels.gpu_targets import GpuTarget
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.planning.memory import GIB, StepCost, device_memory, measure
from rwkv_jax.text.sampler import MINIEPOCH
from rwkv_jax.training.build import default_batch

COMPILATIONS = 8  # limit of a search for the largest batch
TOLERANCE = 1.02  # a batch this close to one that does not fit counts as the largest
SUGGESTIONS = (
    "try --grad_cp 1, a smaller --ctx_len, --strategy fsdp_offload, or more devices to shard over"
)


def largest_batch(memory: Callable[[int], int], limit: int, most: int = 2**31 - 1) -> int:
    """The largest measured batch whose memory is within the limit; 0: not even 1 fits.

    Each measurement takes a compilation, so there are at most `COMPILATIONS`. The memory is nearly
    affine in the batch, except for jumps and changes of slope. The search extrapolates the line
    through the two largest batches that fit, until a batch does not fit or no larger batch is
    expected to fit. Then it interpolates between the largest batch that fits and the smallest
    that does not, until they are within 2 % (or adjacent). The next point keeps a distance from
    both ends. The distance is small while each measurement halves the interval; otherwise it grows,
    which ends in bisection.

    Args:
        memory: batch → bytes; one compilation per call.
        limit: bytes.
        most: the largest batch of interest.
    """
    known: dict[int, int] = {}
    batch, margin, ratio = 1, TOLERANCE, math.inf
    while True:
        known[batch] = memory(batch)
        best = max((b for b in known if known[b] <= limit), default=0)
        beyond = min((b for b in known if b > best), default=most + 1)
        if not best or len(known) == COMPILATIONS or beyond <= max(TOLERANCE * best, best + 1):
            return best
        if beyond > most:  # every batch has fitted so far
            if len(known) == 1:  # if the memory is affine, limit / memory fits
                batch = max(2, limit // max(known[best], 1))
            else:
                slope = _slope(known, sorted(known)[-2], best)
                batch = best + int((limit - known[best]) / slope)
                if batch <= TOLERANCE * best:
                    return best
            batch = min(batch, 64 * best, most)
            continue
        halved, ratio = beyond / best <= math.sqrt(ratio), beyond / best
        margin = TOLERANCE if halved else margin**3
        affine = best + (limit - known[best]) / _slope(known, best, beyond)
        fits = max(known[best], 1)
        power = math.log(limit / fits) / math.log(known[beyond] / fits)
        guess = max(affine, best * ratio**power)  # the second is for memory that grows as a power
        low, high = best * margin, beyond / margin
        if low > high:
            low = high = math.sqrt(best * beyond)
        batch = min(max(int(guess), math.ceil(low), best + 1), int(high), beyond - 1)
        batch = max(batch, best + 1)


def _slope(known: dict[int, int], a: int, b: int) -> float:
    return max((known[b] - known[a]) / (b - a), 1e-9)


def find_largest_micro_bsz(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    limit: int,
    target: GpuTarget | None = None,
) -> tuple[int, dict[int, StepCost]]:
    """The largest micro_bsz whose step needs at most `limit` bytes, and all measured costs.

    A step has at most a miniepoch of samples, as in the official trainer. The arguments are those
    of `measure`.
    """
    costs: dict[int, StepCost] = {}

    def effective(batch: int) -> int:
        """Bytes: affine in the batch, and above the limit if the offloaded update is."""
        cost = costs[batch]
        return cost.passes if cost.update <= limit else limit + cost.passes

    def memory(batch: int) -> int:
        progress = f" (compilation {len(costs) + 1} of at most {COMPILATIONS}"
        if fit := max((b for b in costs if effective(b) <= limit), default=0):
            progress += f"; {fit} fits"
        if too_large := min((b for b in costs if b > fit), default=0):
            progress += f", {too_large} does not"
        options = dataclasses.replace(config, micro_bsz=batch)
        costs[batch] = measure(options, model, mesh, target, f"{progress})")
        return effective(batch)

    return largest_batch(memory, limit, max_micro_bsz(config, mesh.size)), costs


def max_micro_bsz(config: TrainConfig, devices: int) -> int:
    """The micro_bsz at which a step has a miniepoch of samples."""
    return max(1, MINIEPOCH // (devices * config.accumulate_grad_batches))


def fitting_micro_bsz(
    config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh, limit: int | None = None
) -> int:
    """The largest micro_bsz that fits the devices of a mesh that is present: `--micro_bsz auto`.

    If jax does not know a device's memory (a CPU), returns the default and prints a note.

    Args:
        limit: bytes per device; None: what jax may allocate.

    Raises:
        UserError: not even 1 fits.
    """
    kind, platform = mesh.devices.flat[0].device_kind, mesh.devices.flat[0].platform
    if limit is None:
        limit = int(0.97 * device_memory(mesh))  # the rest: the next batch, an export
        if jax.process_count() > 1:  # all processes have to compile the same; in MiB, for int32
            limit = 2**20 * int(np.min(process_allgather(np.int32(limit // 2**20))))
    if not limit:
        batch = default_batch(on_gpu=platform != "cpu")
        print(
            f"note: --micro_bsz auto: jax does not report the memory of {kind}; using the "
            f"default, {batch}",
            file=sys.stderr,
        )
        return batch
    batch = find_largest_micro_bsz(config, model, mesh, limit)[0]
    if not batch:
        raise UserError(
            f"--micro_bsz auto: not even 1 fits the {limit / GIB:.1f} GiB of {kind}; {SUGGESTIONS}"
        )
    return batch
