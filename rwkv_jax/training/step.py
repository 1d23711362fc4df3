"""One optimizer step: gradients of the working copy, Adam on the float32 masters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rwkv_jax.config import ModelConfig
from rwkv_jax.model.loss import head_loss
from rwkv_jax.model.rwkv7 import Params, abstract_params, bind
from rwkv_jax.parallel import offload, sharding
from rwkv_jax.parallel.offload import OffloadedStep, Program
from rwkv_jax.training.optimizer import loss_scale

Array = jax.Array


class TrainState(NamedTuple):
    """All that a step reads and writes; with the step number, all that a run is."""

    params: Params  # float32 masters
    opt_state: optax.OptState  # float32 moments


class Metrics(NamedTuple):
    loss: Array  # float32, mean over the batch's tokens, without L2Wrap
    grad_norm: Array  # float32, before clipping
    skipped: Array  # bool: loss or gradient were not finite, so nothing was updated


def abstract_state(
    mesh: jax.sharding.Mesh,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    offloaded: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state: masters and moments are cut over the devices."""
    params = abstract_params(config)
    state = TrainState(params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        sharding.cut(mesh, state, offloaded),
    )


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh,
    strategy: sharding.Strategy,
    dtype: jnp.dtype,
    remat: int,
    head_chunk: int = 0,
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """The compiled step: (state, batch [A, B, T + 1]) → (state, metrics).

    The state that is passed in is consumed. A micro batches of B samples are run one after the
    other and their gradients averaged (in float32 when A > 1). When the loss or the gradient is not
    finite, the masters and the moments stay as they are, to the bit.

    Each device runs the forward and backward pass over its own samples as a program of its own
    (`jax.shard_map`): nothing is communicated but parameters, their gradients and the loss, where
    the code below says so. The optimizer is element by element but for the gradient's norm, and
    works on the part of the state that the device holds.

    Args:
        dtype: in which the parameters are read, of the activations and of the gradients; float16
            wants an optimizer that begins with `optimizer.unscale`.
        remat: what the backward pass computes again, as in `RWKV7.hidden`.
        head_chunk: as in `loss.head_loss`.
    """
    params = abstract_params(config)
    specs = sharding.specs(mesh, params)
    block_specs = jax.tree.map(lambda spec: P(*spec[1:]), specs["blocks"])  # of one layer

    # The passes read whole tensors, or the parts that the devices hold, from which a layer is
    # gathered where it is used. One device has all that there is to gather.
    in_parts = strategy.parameters or mesh.size == 1
    weight_specs = specs if in_parts else jax.tree.map(lambda _: P(), specs)

    def gather(part: Array, spec: P) -> Array:
        """The part that this device holds → the whole tensor, in `dtype`."""
        return sharding.gather(mesh, part.astype(dtype), spec)

    def working_copy(masters: Params) -> Params:
        """What the passes read, of the masters or of some of them, where it is not these."""
        here = sharding.specs(mesh, masters)
        there = here if in_parts else jax.tree.map(lambda _: P(), here)

        def local(masters: Params) -> Params:
            if in_parts:
                return jax.tree.map(lambda part: part.astype(dtype), masters)
            return jax.tree.map(gather, masters, here)

        run = jax.shard_map(local, mesh=mesh, in_specs=(here,), out_specs=there, check_vma=False)
        return run(masters)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def use(gradient: Array, weight: Array, spec: P) -> Array:
        """A whole tensor to compute with; what its gradient is added to is `gradient`, not it.

        So the gradient has the layout and the precision that the strategy says, not the weight's.
        """
        return gather(weight, spec) if in_parts else weight

    def use_forward(gradient: Array, weight: Array, spec: P):
        return use(gradient, weight, spec), None

    def use_backward(spec: P, _: None, g: Array):
        return (sharding.scatter(mesh, g, spec) if strategy.gradients else g), None

    use.defvjp(use_forward, use_backward)

    def loss_fn(gradients: Params, weights: Params, tokens: Array, scale: Array) -> Array:
        """Mean loss of predicting tokens[:, 1:] from tokens[:, :-1]; tokens [B, T + 1]."""

        def read(slots: Params, layer: Array) -> Params:
            at = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
            return jax.tree.map(use, slots, jax.tree.map(at, weights["blocks"]), block_specs)

        def rest(tree: Params) -> Params:
            return {name: leaf for name, leaf in tree.items() if name != "blocks"}

        outside = jax.tree.map(use, rest(gradients), rest(weights), rest(specs))
        model = bind(config, {**outside, "blocks": gradients["blocks"]})
        hidden, _ = model.hidden(tokens[:, :-1], remat=remat, read=read)
        head, targets = model.head.weight[...], tokens[:, 1:]
        return head_loss(hidden, head, targets, head_chunk, scale=scale / mesh.size)

    def slots(dtype: jnp.dtype) -> Params:
        """Zeros, of the shapes that gradients have on a device until the end of the step."""

        def zeros(leaf: jax.ShapeDtypeStruct, spec: P) -> Array:
            part = NamedSharding(mesh, spec).shard_shape(leaf.shape)
            return jnp.zeros(part if strategy.gradients else leaf.shape, dtype)

        return jax.tree.map(zeros, params, specs)

    def local_gradients(weights: Params, batch: Array, scale: Array) -> tuple[Array, Params]:
        """Of this device's samples: the loss and its parts of the sum of the scaled gradients."""

        def of_micro_batch(tokens: Array) -> tuple[Array, Params]:
            return jax.value_and_grad(loss_fn)(slots(dtype), weights, tokens, scale)

        def add(total: tuple[Array, Params], tokens: Array):
            new = of_micro_batch(tokens)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, new), None

        if batch.shape[0] == 1:
            loss, grads = of_micro_batch(batch[0])
        else:
            total, _ = jax.lax.scan(add, (jnp.zeros(()), slots(jnp.float32)), batch)
            loss, grads = jax.tree.map(lambda t: t / batch.shape[0], total)
        if not strategy.gradients:
            grads = jax.tree.map(functools.partial(sharding.scatter, mesh), grads, specs)
        grads = jax.tree.map(functools.partial(sharding.finish, mesh), grads, specs)
        return jax.lax.pmean(loss, mesh.axis_names), grads

    gradients = jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(weight_specs, sharding.batch_spec(mesh), P()),
        out_specs=(P(), specs),
        check_vma=False,
    )

    def differentiate(weights: Params, batch: Array, scale: Array) -> tuple[Params, Metrics]:
        loss, grads = gradients(weights, batch, scale)
        norm = optax.tree.norm(_wide(grads)) / scale
        return grads, Metrics(loss, norm, ~(jnp.isfinite(loss) & jnp.isfinite(norm)))

    def update(state: TrainState, grads: Params, metrics: Metrics) -> TrainState:
        """Element by element, so that a part of the tree's tensors can be updated alone."""
        norm, skip = metrics.grad_norm, metrics.skipped
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(
                _wide(grads), state.opt_state, state.params, norm=norm, skip=skip
            )
            params = jax.tree.map(lambda p, u: jnp.where(skip, p, p + u), state.params, updates)
        return TrainState(params, opt_state)

    if strategy.offload:
        weights = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, dtype, sharding=NamedSharding(mesh, spec)
            ),
            params,
            weight_specs,
        )
        return OffloadedStep(mesh, differentiate, update, working_copy, weights, loss_scale)

    def step(state: TrainState, batch: Array) -> tuple[TrainState, Metrics]:
        weights = state.params if in_parts else working_copy(state.params)
        grads, metrics = differentiate(weights, batch, loss_scale(state.opt_state))
        return update(state, grads, metrics), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, config, optimizer))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, None),
    )


def programs(step: Any, state: TrainState, batch: Any) -> list[Program]:
    """What a step of `make_step` runs, one program after the other, for arguments as shapes."""
    if isinstance(step, OffloadedStep):
        return step.programs(state, batch)
    return [Program(step, (state, batch))]


def fresh_moments(optimizer: optax.GradientTransformation, abstract: TrainState) -> optax.OptState:
    """The optimizer's first state, laid out as `abstract` says; a part at a time is made."""

    def of_part(part: TrainState) -> optax.OptState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), part.params)
        return optimizer.init(zeros)

    made = []
    for group in offload.groups(abstract.params):
        part = offload.part(abstract, group)
        where = jax.tree.map(lambda leaf: leaf.sharding, part.opt_state)
        here = sharding.cut(jax.tree.leaves(where)[0].mesh, part.opt_state)
        zeros = jax.jit(functools.partial(of_part, part), out_shardings=here)()
        made.append(jax.block_until_ready(jax.device_put(zeros, where)))
    return offload.merge(made)


def _wide(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
