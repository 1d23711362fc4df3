"""How the parameters and gradients of a step are laid out over devices: `Layout`.

What a step computes does not depend on the devices (`training/step.py`). What each device holds,
gathers and scatters is decided here, by the strategy.
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
    """The layout that a strategy gives to a step over the devices of a mesh.

    Each device runs the forward and the backward pass over its own samples as a program of its own
    (`jax.shard_map`). Nothing is communicated but parameters, their gradients and the loss, where
    the code below says so.

    Parameters are read as whole tensors, or as the parts that the devices hold, from which a layer
    is gathered where it is used. A single device holds all parts: it gathers nothing, and needs no
    working copy.

    Args:
        params: shapes of the tree of parameters, `model.rwkv7.abstract_params`.
        dtype: of the parameters as the passes read them, and of their gradients.
    """

    def __init__(self, mesh: Mesh, strategy: sharding.Strategy, params: Params, dtype: jnp.dtype):
        self.mesh, self.strategy, self.dtype = mesh, strategy, dtype
        self._params, self._specs = params, sharding.specs(mesh, params)
        self.reads_parts = strategy.parameters or mesh.size == 1
        self._weight_specs = self._read_specs(self._specs)

    @property
    def weights(self) -> Params:
        """What the passes read, as shapes with shardings."""
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, self.dtype, sharding=NamedSharding(self.mesh, spec)
            ),
            self._params,
            self._weight_specs,
        )

    def working_copy(self, masters: Params) -> Params:
        """What the passes read, made of the float32 masters or of any part of their tree."""
        here = sharding.specs(self.mesh, masters)
        there = self._read_specs(here)

        def local(masters: Params) -> Params:
            if self.reads_parts:
                return jax.tree.map(lambda part: part.astype(self.dtype), masters)
            return jax.tree.map(self._gather, masters, here)

        run = jax.shard_map(
            local, mesh=self.mesh, in_specs=(here,), out_specs=there, check_vma=False
        )
        return run(masters)

    def value_and_grad(
        self, loss_fn: LossFn
    ) -> Callable[[Params, Array, Array], tuple[Array, Params]]:
        """(weights, batch [A, B, T + 1], loss scale) → (mean loss, gradients of the scaled loss).

        Gradients are averaged over the A micro batches (in float32 where A > 1) and over the
        devices, and come out cut like the masters.

        Args:
            loss_fn: (params, read_layer, tokens [B, T + 1], scale) → mean loss of a device's
                samples, its gradient times `scale`. `read_layer(params["blocks"], layer)` is one
                layer of the blocks, whole; what lies outside of the blocks is whole in `params`.
        """

        def local(weights: Params, batch: Array, scale: Array) -> tuple[Array, Params]:
            def of_micro_batch(tokens: Array) -> tuple[Array, Params]:
                slots = self._slots(self.dtype)
                share = scale / self.mesh.size  # of this device's samples in the mean
                return jax.value_and_grad(self._read_through(loss_fn))(
                    slots, weights, tokens, share
                )

            loss, grads = self._average(of_micro_batch, batch)
            if not self.strategy.gradients:
                grads = jax.tree.map(self._scatter, grads, self._specs)
            grads = jax.tree.map(functools.partial(sharding.finish, self.mesh), grads, self._specs)
            return jax.lax.pmean(loss, self.mesh.axis_names), grads

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self._weight_specs, sharding.batch_spec(self.mesh), P()),
            out_specs=(P(), self._specs),
            check_vma=False,
        )

    def _average(
        self, of_micro_batch: Callable[[Array], tuple[Array, Params]], batch: Array
    ) -> tuple[Array, Params]:
        """The mean loss and gradients of micro batches, one after the other."""
        if batch.shape[0] == 1:
            return of_micro_batch(batch[0])

        def add(total: tuple[Array, Params], tokens: Array):
            new = of_micro_batch(tokens)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, new), None

        total, _ = jax.lax.scan(add, (jnp.zeros(()), self._slots(jnp.float32)), batch)
        return jax.tree.map(lambda t: t / batch.shape[0], total)

    def _read_through(self, loss_fn: LossFn) -> Callable[[Params, Params, Array, Array], Array]:
        """`loss_fn` as a function of (slots, weights, tokens, scale), differentiated by the slots.

        The slots have the layout and the precision that the strategy gives to gradients, which the
        weights do not have.
        """
        block_specs = jax.tree.map(lambda spec: P(*spec[1:]), self._specs["blocks"])  # of a layer
        use = self._use()

        def outside(tree: Params) -> Params:
            return {name: leaf for name, leaf in tree.items() if name != "blocks"}

        def loss(slots: Params, weights: Params, tokens: Array, scale: Array) -> Array:
            def read_layer(slots: Params, layer: Array) -> Params:
                at = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
                return jax.tree.map(use, slots, jax.tree.map(at, weights["blocks"]), block_specs)

            whole = jax.tree.map(use, outside(slots), outside(weights), outside(self._specs))
            return loss_fn({**whole, "blocks": slots["blocks"]}, read_layer, tokens, scale)

        return loss

    def _use(self) -> Callable[[Array, Array, P], Array]:
        """(slot, weight, spec) → the whole tensor, whose gradient goes to the slot alone."""

        @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
        def use(slot: Array, weight: Array, spec: P) -> Array:
            return self._gather(weight, spec) if self.reads_parts else weight

        def forward(slot: Array, weight: Array, spec: P):
            return use(slot, weight, spec), None

        def backward(spec: P, _: None, g: Array):
            return (self._scatter(g, spec) if self.strategy.gradients else g), None

        use.defvjp(forward, backward)
        return use

    def _slots(self, dtype: jnp.dtype) -> Params:
        """Zeros, of the shapes that gradients have on a device until the end of the step."""

        def zeros(leaf: jax.ShapeDtypeStruct, spec: P) -> Array:
            part = NamedSharding(self.mesh, spec).shard_shape(leaf.shape)
            return jnp.zeros(part if self.strategy.gradients else leaf.shape, dtype)

        return jax.tree.map(zeros, self._params, self._specs)

    def _gather(self, part: Array, spec: P) -> Array:
        """The part that this device holds → the whole tensor, in `dtype`."""
        return sharding.gather(self.mesh, part.astype(self.dtype), spec)

    def _scatter(self, whole: Array, spec: P) -> Array:
        """This device's part of the sum over `fsdp`."""
        return sharding.scatter(self.mesh, whole, spec)

    def _read_specs(self, specs: Params) -> Params:
        """Of what the passes read, of parameters with these specs."""
        return specs if self.reads_parts else jax.tree.map(lambda _: P(), specs)
