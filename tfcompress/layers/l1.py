"""L1 regularization of one layer."""

import keras

from tfcompress.layers.base import CompressionWrapper
from tfcompress.ops.penalties import l1


@keras.saving.register_keras_serializable(package="tfcompress")
class L1(CompressionWrapper):
    """Add `strength * sum(|w|)` of a layer's kernels to the loss.

    The penalty comes on top of the layer's own regularizers. For a whole model, or for proximal
    steps, which reach exact zeros, use `tfcompress.callbacks.L1Regularization`.

    Args:
        layer: The layer to wrap.
        strength: Weight of the penalty, above 0.
        include: Glob or globs over the paths of the layer's variables; None for all kernels.
        exclude: Glob or globs to leave out.
        **kwargs: What every Keras layer takes.

    Raises:
        ValueError: The strength is not above 0; when built: a layer without kernels.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), L1(keras.layers.Dense(3), strength=0.1)])
    >>> _ = model(keras.ops.ones((1, 4)))
    >>> len(model.losses)
    1
    """

    def __init__(self, layer, strength=1e-4, include=None, exclude=None, **kwargs):
        if not strength > 0:
            raise ValueError(f"strength must be above 0, got {strength}; 1e-4 is a usual value.")
        super().__init__(layer, include=include, exclude=exclude, **kwargs)
        self.strength = strength

    def build_state(self, was_built):
        """Check that there is something to regularize."""
        self.kernels()

    def call(self, *args, **kwargs):
        """The layer's own call, and the penalty."""
        for kernel in self.kernels().values():
            self.add_loss(l1(keras.ops.convert_to_tensor(kernel), self.strength))
        return super().call(*args, **kwargs)

    def get_config(self):
        """The constructor arguments."""
        return {**super().get_config(), "strength": self.strength}
