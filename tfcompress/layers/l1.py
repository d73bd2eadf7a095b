"""L1 regularization of one layer."""

import keras

from tfcompress.checks import check_strength
from tfcompress.layers.base import CompressionWrapper
from tfcompress.ops import structures
from tfcompress.ops.penalties import AddedPenalty


@keras.saving.register_keras_serializable(package="tfcompress")
class L1(CompressionWrapper):
    """Add `strength * sum(|w|)` of a layer's kernels to the loss, or the group lasso.

    The penalty comes on top of the layer's own regularizers, through `variable.regularizer`. For a
    whole model, or for proximal steps, which reach exact zeros, use
    `tfcompress.callbacks.L1Regularization`.

    Args:
        layer: The layer to wrap.
        strength: Weight of the penalty, above 0.
        structure: What becomes small as a whole: "unstructured", "channel", or an object such as
            `tfcompress.structures.Block(4, 4)`; not n:m.
        include: Glob or globs over the paths of the layer's variables; None for all kernels.
        exclude: Glob or globs to leave out.
        **kwargs: What every Keras layer takes.

    Raises:
        ValueError: The strength is not above 0, a structure without groups; when built: a layer
            without kernels.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), L1(keras.layers.Dense(3), strength=0.1)])
    >>> _ = model(keras.ops.ones((1, 4)))
    >>> len(model.losses)
    1
    """

    def __init__(
        self,
        layer,
        strength=1e-4,
        structure="unstructured",
        include=None,
        exclude=None,
        **kwargs,
    ):
        check_strength(strength)
        self._structure = structures.require_groups(structure)
        super().__init__(layer, include=include, exclude=exclude, **kwargs)
        self.strength = strength
        self.structure = structure

    def build_state(self, was_built):
        """Set the penalty on the kernels."""
        for path, kernel in self.kernels().items():
            bound = self._structure.bind(path, tuple(kernel.shape))
            if isinstance(bound, str):
                raise ValueError(f"structure={self.structure!r} does not fit {path!r}: {bound}.")
            kernel.regularizer = AddedPenalty(kernel.regularizer, self.strength, bound[0])

    def get_config(self):
        """The constructor arguments."""
        arguments = {"strength": self.strength, "structure": self.structure}
        return {**super().get_config(), **keras.saving.serialize_keras_object(arguments)}
