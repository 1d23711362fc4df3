"""The largest micro_bsz that fits."""

import dataclasses
import math
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from pallas_kernels.gpu_targets import (
    GpuTarget,
)
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.planning.memory import GIB, Need, device_memory, measure
from rwkv_jax.text.sampler import MINIEPOCH
from rwkv_jax.training.build import default_batch

COMPILATIONS = 8  # that a search for the largest batch takes at most
TOLERANCE = 1.02  # within which a batch is the largest
WAYS_OUT = (
    "try --grad_cp 1, a smaller --ctx_len, --strategy fsdp_offload, or more devices to shard over"
)


def largest_batch(need: Callable[[int], int], limit: int, most: int = 2**31 - 1) -> int:
    """The largest batch whose need is within the limit, of those measured; 0: not even 1 is.

    A need costs a compilation to know, so at most `COMPILATIONS` are measured. It is nearly affine
    in the batch, but for jumps and for slopes that fall or rise: the line through the two largest
    batches that fit is followed, until one is too large or no batch beyond is expected to fit. Then
    the need is interpolated between the largest batch that fits and the next that does not, until
    they are within 2 % (or next to each other). The interpolation stays away from both: from a
    small distance while each measurement halves the interval, else from a growing one, which ends
    in bisection.

    Args:
        need: batch → bytes.
        limit: bytes.
        most: the largest batch of interest.
    """
    known: dict[int, int] = {}
    batch, margin, ratio = 1, TOLERANCE, math.inf
    while True:
        known[batch] = need(batch)
        best = max((b for b in known if known[b] <= limit), default=0)
        beyond = min((b for b in known if b > best), default=most + 1)
        if not best or len(known) == COMPILATIONS or beyond <= max(TOLERANCE * best, best + 1):
            return best
        if beyond > most:  # none was too large so far
            if len(known) == 1:  # of an affine need, limit / need fits
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
        guess = max(affine, best * ratio**power)  # the latter of a need that rises as a power
        low, high = best * margin, beyond / margin
        if low > high:
            low = high = math.sqrt(best * beyond)
        batch = min(max(int(guess), math.ceil(low), best + 1), int(high), beyond - 1)
        batch = max(batch, best + 1)


def _slope(known: dict[int, int], a: int, b: int) -> float:
    return max((known[b] - known[a]) / (b - a), 1e-9)


def find_largest(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    limit: int,
    target: GpuTarget | None = None,
) -> tuple[int, dict[int, Need]]:
    """The largest micro_bsz whose step needs at most `limit` bytes, and all that was measured.

    A step takes at most a miniepoch: the official trainer knows no larger ones. The arguments are
    those of `measure`.
    """
    needs: dict[int, Need] = {}

    def cost_of(batch: int) -> int:
        """Affine in the batch, and beyond the limit if a visit is."""
        need = needs[batch]
        return need.passes if need.visit <= limit else limit + need.passes

    def need(batch: int) -> int:
        progress = f" (compilation {len(needs) + 1} of at most {COMPILATIONS}"
        if fit := max((b for b in needs if cost_of(b) <= limit), default=0):
            progress += f"; {fit} fits"
        if too_large := min((b for b in needs if b > fit), default=0):
            progress += f", {too_large} does not"
        options = dataclasses.replace(config, micro_bsz=batch)
        needs[batch] = measure(options, model, mesh, target, f"{progress})")
        return cost_of(batch)

    return largest_batch(need, limit, most_samples(config, mesh.size)), needs


def most_samples(config: TrainConfig, devices: int) -> int:
    """The micro_bsz at which a step is a miniepoch."""
    return max(1, MINIEPOCH // (devices * config.accumulate_grad_batches))


def fitting_batch(
    config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh, limit: int | None = None
) -> int:
    """The largest micro_bsz that fits the devices of a mesh, which are there: `--micro_bsz auto`.

    Where jax does not say how much memory a device has, as of a CPU: the default, and a note.

    Args:
        limit: bytes of a device; None: what jax's allocator has of it.

    Raises:
        UserError: not even 1 fits.
    """
    kind, platform = mesh.devices.flat[0].device_kind, mesh.devices.flat[0].platform
    if limit is None:
        limit = int(0.97 * device_memory(mesh))  # the rest: the next batch, an export
        if jax.process_count() > 1:  # all compile the same; in MiB, for int32
            limit = 2**20 * int(np.min(process_allgather(np.int32(limit // 2**20))))
    if not limit:
        batch = default_batch(on_gpu=platform != "cpu")
        print(
            f"note: --micro_bsz auto: jax does not know the memory of {kind}: training with the "
            f"default, {batch}",
            file=sys.stderr,
        )
        return batch
    batch = find_largest(config, model, mesh, limit)[0]
    if not batch:
        raise UserError(
            f"--micro_bsz auto: not even 1 fits the {limit / GIB:.1f} GiB of {kind}; {WAYS_OUT}"
        )
    return batch
