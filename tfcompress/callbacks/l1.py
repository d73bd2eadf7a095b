"""L1 regularization of a model as it is."""

import keras
import tensorflow as tf

from tfcompress.callbacks.base import CompressionCallback
from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.update import around_update, on_each_replica
from tfcompress.keras_hooks.walk import trained_model
from tfcompress.ops.penalties import l1, soft_threshold


class _Sum(keras.regularizers.Regularizer):
    """An L1 penalty on top of the regularizer that the variable had."""

    def __init__(self, previous, strength):
        self.previous = previous
        self.strength = strength

    def __call__(self, weight):
        penalty = l1(weight, self.strength)
        return penalty if self.previous is None else penalty + self.previous(weight)


@keras.saving.register_keras_serializable(package="tfcompress")
class L1Regularization(CompressionCallback):
    """Pull the kernels towards zero while training.

    Adds `strength * sum(|w|)` to the loss, through `variable.regularizer`, on top of regularizers
    that are there. Its gradient never leaves a weight exactly at zero. With `proximal=True` every
    update is followed by `w = sign(w) * max(|w| - learning_rate * strength, 0)` instead, which does
    (ISTA, [Daubechies et al. 2004](https://arxiv.org/abs/math/0307152)).

    Args:
        strength: Weight of the penalty, above 0.
        proximal: Whether to take proximal steps, which reach exact zeros.
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Attributes:
        applied: Path -> what was done to it.
        skipped: Path -> why nothing was.

    Raises:
        ValueError: The strength is not above 0; when training starts: a glob that matches nothing,
            or a model whose loss leaves regularizers out.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> _ = model.fit(tf.zeros((8, 4)), tf.zeros((8, 3)), epochs=20, verbose=0,
    ...               callbacks=[L1Regularization(1.0, proximal=True)])
    >>> int(tf.math.count_nonzero(model.layers[0].kernel.value))
    0
    """

    def __init__(self, strength=1e-4, proximal=False, include=None, exclude=None):
        if not strength > 0:
            raise ValueError(f"strength must be above 0, got {strength}; 1e-4 is a usual value.")
        super().__init__(include, exclude)
        self.strength = strength
        self.proximal = proximal
        self._weights: dict[str, keras.Variable] = {}

    def get_config(self):
        """The constructor arguments."""
        names = ("strength", "proximal", "include", "exclude")
        return {name: getattr(self, name) for name in names}

    def _prepare(self, model):
        self._weights = self._select(model)
        how = "proximal steps" if self.proximal else "in the loss"
        self.applied = dict.fromkeys(self._weights, f"L1 of strength {self.strength}, {how}")

    def _attach(self, session, optimizer):
        if self.proximal:
            session.defer(around_update(optimizer, self._around_update))
            return
        if trained_model(self.model) is not self.model:
            raise ValueError(
                "keras.distillation.Distiller leaves regularizers out of its loss, so an L1 "
                "penalty would do nothing. Use L1Regularization(..., proximal=True)."
            )
        session.defer(self._restore_regularizers)
        session.defer(add_hook(self.model, "compute_loss", self._around_loss))

    def _begin(self, tracing):
        if not self.proximal:
            for weight in self._weights.values():
                weight.regularizer = _Sum(weight.regularizer, self.strength)

    def _restore_regularizers(self):
        for weight in self._weights.values():
            if isinstance(weight.regularizer, _Sum):
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
            for weight in weights:
                weight.assign(soft_threshold(tf.convert_to_tensor(weight), tensors[0]))

        on_each_replica(list(self._weights.values()), shrink, [amount])

    def _finish(self):
        """Nothing to leave: the weights are the result."""
