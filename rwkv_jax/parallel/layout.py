"""`Layout`: how a step's parameters and gradients are laid out over the devices.

What a step computes does not depend on the devices (`training/step.py`). This module decides, by
the strategy, what each device holds, gathers and reduce-scatters.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rwkv_jax.model.rwkv7 import Params
from rwkv_jax.parallel import sharding

Array = jax.Array
ReadLayer = Callable[[Params, Array], Params]
LossFn = Callable[[Params, ReadLayer, Array, Array], Array]


class Layout:
    """The layout of a step over the devices of a mesh, by strategy.

    Each device runs the forward and backward pass over its own samples (`jax.shard_map`). Devices
    exchange only parameters, gradients and the loss, and only through the explicit collectives
    below.

    The passes read full tensors, or shards from which each layer is gathered when it is used. With
    one device there is nothing to gather, and no working copy is needed.

    Args:
        params: shapes of the tree of parameters, `model.rwkv7.abstract_params`.
        dtype: of the working copy of the parameters, and of their gradients.
    """

    def __init__(self, mesh: Mesh, strategy: sharding.Strategy, params: Params, dtype: jnp.dtype):
        self.mesh, self.strategy, self.dtype = mesh, strategy, dtype
        self._params, self._specs = params, sharding.specs(mesh, params)
        self._reads_shards = strategy.parameters or mesh.size == 1
        self._weight_specs = self._read_specs(self._specs)

    @property
    def abstract_weights(self) -> Params:
        """What the passes read, as shapes with shardings."""
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, self.dtype, sharding=NamedSharding(self.mesh, spec)
            ),
            self._params,
            self._weight_specs,
        )

    def weights(self, masters: Params) -> Params:
        """What the passes read: the master weights' shards themselves, or a working copy."""
        return masters if self._reads_shards else self.working_copy(masters)

    def working_copy(self, masters: Params) -> Params:
        """Makes the working copy of the float32 master weights, or of any subset of them."""
        specs = sharding.specs(self.mesh, masters)

        def local(masters: Params) -> Params:
            if self._reads_shards:
                return jax.tree.map(lambda shard: shard.astype(self.dtype), masters)
            return jax.tree.map(self._gather, masters, specs)

        run = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs,),
            out_specs=self._read_specs(specs),
            check_vma=False,
        )
        return run(masters)

    def value_and_grad(
        self, loss_fn: LossFn
    ) -> Callable[[Params, Array, Array], tuple[Array, Params]]:
        """(weights, batch [A, B, T + 1], loss scale) → (mean loss, gradients of the scaled loss).

        Gradients are averaged over the A micro batches (in float32 if A > 1) and over the devices,
        and are sharded like the master weights.

        Args:
            loss_fn: (params, read_layer, tokens [B, T + 1], scale) → mean loss of a device's
                samples; its gradient is multiplied by `scale`. `read_layer(params["blocks"],
                layer)` returns the full tensors of one layer; those outside the blocks are full in
                `params`.
        """

        def local(weights: Params, batch: Array, scale: Array) -> tuple[Array, Params]:
            def micro_batch(tokens: Array) -> tuple[Array, Params]:
                slots = self._slots(self.dtype)
                share = scale / self.mesh.size  # of this device's samples in the mean
                return jax.value_and_grad(self._read_through(loss_fn))(
                    slots, weights, tokens, share
                )

            loss, grads = self._average(micro_batch, batch)
            if not self.strategy.gradients:
                grads = jax.tree.map(self._scatter, grads, self._specs)
            grads = jax.tree.map(
                functools.partial(sharding.finish_all_reduce, self.mesh), grads, self._specs
            )
            return jax.lax.pmean(loss, self.mesh.axis_names), grads

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self._weight_specs, sharding.batch_spec(self.mesh), P()),
            out_specs=(P(), self._specs),
            check_vma=False,
        )

    def _average(
        self, micro_batch: Callable[[Array], tuple[Array, Params]], batch: Array
    ) -> tuple[Array, Params]:
        """Gradient accumulation: the mean loss and gradients over the micro batches."""
        if batch.shape[0] == 1:
            return micro_batch(batch[0])

        def add(total: tuple[Array, Params], tokens: Array):
            new = micro_batch(tokens)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, new), None

        total, _ = jax.lax.scan(add, (jnp.zeros(()), self._slots(jnp.float32)), batch)
        return jax.tree.map(lambda t: t / batch.shape[0], total)

    def _read_through(self, loss_fn: LossFn) -> Callable[[Params, Params, Array, Array], Array]:
        """`loss_fn` as a function of (slots, weights, tokens, scale); differentiate by the slots.

        The slots have the layout and precision of the strategy's gradients; those of the weights
        may differ.
        """
        block_specs = jax.tree.map(lambda spec: P(*spec[1:]), self._specs["blocks"])  # of a layer
        full = self._full_tensor()

        def outside(tree: Params) -> Params:
            return {name: leaf for name, leaf in tree.items() if name != "blocks"}

        def loss(slots: Params, weights: Params, tokens: Array, scale: Array) -> Array:
            def read_layer(slots: Params, layer: Array) -> Params:
                at = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
                return jax.tree.map(full, slots, jax.tree.map(at, weights["blocks"]), block_specs)

            params = jax.tree.map(full, outside(slots), outside(weights), outside(self._specs))
            return loss_fn({**params, "blocks": slots["blocks"]}, read_layer, tokens, scale)

        return loss

    def _full_tensor(self) -> Callable[[Array, Array, P], Array]:
        """(slot, weight, spec) → the full tensor; its gradient goes to the slot only."""

        @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
        def full(slot: Array, weight: Array, spec: P) -> Array:
            return self._gather(weight, spec) if self._reads_shards else weight

        def forward(slot: Array, weight: Array, spec: P):
            return full(slot, weight, spec), None

        def backward(spec: P, _: None, g: Array):
            return (self._scatter(g, spec) if self.strategy.gradients else g), None

        full.defvjp(forward, backward)
        return full

    def _slots(self, dtype: jnp.dtype) -> Params:
        """Zeros in the shapes that gradients have on a device until the end of the step."""

        def zeros(leaf: jax.ShapeDtypeStruct, spec: P) -> Array:
            shard = NamedSharding(self.mesh, spec).shard_shape(leaf.shape)
            return jnp.zeros(shard if self.strategy.gradients else leaf.shape, dtype)

        return jax.tree.map(zeros, self._params, self._specs)

    def _gather(self, shard: Array, spec: P) -> Array:
        """This device's shard → the full tensor, in `dtype`."""
        return sharding.all_gather(self.mesh, shard.astype(self.dtype), spec)

    def _scatter(self, full: Array, spec: P) -> Array:
        """This device's shard of the sum over `fsdp`."""
        return sharding.reduce_scatter(self.mesh, full, spec)

    def _read_specs(self, specs: Params) -> Params:
        """The specs of the working copy of parameters with these specs."""
        return specs if self._reads_shards else jax.tree.map(lambda _: P(), specs)
