"""L1 regularization of a model as it is."""

import keras
import tensorflow as tf

from tfcompress.callbacks.base import CompressionCallback
from tfcompress.checks import check_strength
from tfcompress.graph.roles import prunable
from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.update import around_update, on_each_replica
from tfcompress.keras_hooks.walk import trained_model
from tfcompress.ops import structures
from tfcompress.ops.penalties import AddedPenalty, group_soft_threshold


@keras.saving.register_keras_serializable(package="tfcompress")
class L1Regularization(CompressionCallback):
    """Pull the kernels towards zero while training.

    Adds `strength * sum(|w|)` to the loss, through `variable.regularizer`, on top of regularizers
    that are there. Its gradient never leaves a weight exactly at zero. With `proximal=True` every
    update is followed by `w = sign(w) * max(|w| - learning_rate * strength, 0)` instead, which does
    (ISTA, [Daubechies et al. 2004](https://arxiv.org/abs/math/0307152)).

    With a structure it is the group lasso ([Yuan & Lin 2006](
    https://doi.org/10.1111/j.1467-9868.2005.00532.x)): `strength * sum(sqrt(|g|) * ||w_g||_2)` over
    the units g, which makes whole channels or blocks small, or zero, so that pruning by the same
    structure finds them.

    Args:
        strength: Weight of the penalty, above 0.
        proximal: Whether to take proximal steps, which reach exact zeros.
        structure: What becomes small as a whole: "unstructured", "channel", "head" (each kernel's
            own), or an object such as `tfcompress.structures.Block(4, 4)`; not n:m.
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Attributes:
        applied: Path -> what was done to it.
        skipped: Path -> why nothing was.

    Raises:
        ValueError: The strength is not above 0, a structure without groups; when training
            starts: a glob that matches nothing, or a model whose loss leaves regularizers out.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> _ = model.fit(tf.zeros((8, 4)), tf.zeros((8, 3)), epochs=20, verbose=0,
    ...               callbacks=[L1Regularization(1.0, proximal=True)])
    >>> int(tf.math.count_nonzero(model.layers[0].kernel.value))
    0
    """

    def __init__(
        self,
        strength=1e-4,
        proximal=False,
        structure="unstructured",
        include=None,
        exclude=None,
    ):
        check_strength(strength)
        super().__init__(include, exclude)
        self.structure = structure
        self._structure = structures.require_groups(structure)
        self.strength = strength
        self.proximal = proximal
        self._weights: dict[str, keras.Variable] = {}

    def get_config(self):
        """The constructor arguments."""
        names = ("strength", "proximal", "structure", "include", "exclude")
        return keras.saving.serialize_keras_object({name: getattr(self, name) for name in names})

    @classmethod
    def from_config(cls, config):
        """The callback that `get_config` described."""
        return cls(**keras.saving.deserialize_keras_object(config))

    def _prepare(self, model):
        fitting = prunable(model, self._select(model), self._structure, None)
        self._weights = fitting.weights
        self._structures = {
            path: self._structure.bind(path, tuple(weight.shape))[0]
            for path, weight in self._weights.items()
        }
        self.skipped |= fitting.skipped
        how = "proximal steps" if self.proximal else "in the loss"
        what = f"{self.structure}, strength {self.strength}, {how}"
        self.applied = dict.fromkeys(self._weights, what)

    def _attach(self, session, optimizer):
        if self.proximal:
            session.defer(around_update(optimizer, self._around_update))
            return
        counts = getattr(self.model, "includes_student_losses", False)
        if trained_model(self.model) is not self.model and not counts:
            raise ValueError(
                "keras.distillation.Distiller leaves regularizers out of its loss, so an L1 "
                "penalty would do nothing. Use L1Regularization(..., proximal=True), or "
                "tfcompress.distillation.Distiller."
            )
        session.defer(self._restore_regularizers)
        session.defer(add_hook(self.model, "compute_loss", self._around_loss))

    def _begin(self, tracing):
        if not self.proximal:
            for path, weight in self._weights.items():
                structure = self._structures[path]
                weight.regularizer = AddedPenalty(weight.regularizer, self.strength, structure)

    def _restore_regularizers(self):
        for weight in self._weights.values():
            if isinstance(weight.regularizer, AddedPenalty):
                weight.regularizer = weight.regularizer.previous

    def _around_loss(self, proceed, *args, **kwargs):
        self._start()  # The first moment at which a model that was not built has weights.
        return proceed(*args, **kwargs)

    def _around_update(self, apply):
        self._start()
        before = tf.convert_to_tensor(self._optimizer.iterations)
        rate = tf.convert_to_tensor(self._optimizer.learning_rate)
        apply()
        # Zero for the micro-batches of a gradient accumulation, which update nothing.
        updates = tf.convert_to_tensor(self._optimizer.iterations) - before
        amount = rate * self.strength * tf.cast(updates, rate.dtype)

        def shrink(weights, tensors):
            for weight, structure in zip(weights, self._structures.values(), strict=True):
                weight.assign(
                    group_soft_threshold(tf.convert_to_tensor(weight), tensors[0], structure)
                )

        on_each_replica(list(self._weights.values()), shrink, [amount])

    def _finish(self):
        """Nothing to leave: the weights are the result."""
