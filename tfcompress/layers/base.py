"""The base of the layer wrappers."""

import keras
import tensorflow as tf

from tfcompress.keras_hooks.walk import select_kernels
from tfcompress.keras_hooks.wrapper import forward_signatures


class CompressionWrapper(keras.layers.Wrapper):
    """A layer inside another that compresses it; its state is its own saved variables.

    It is called, built and masked as the layer inside. A subclass defines `build_state`, which
    makes its variables once the layer's weights exist, and `bake`, which says what becomes of a
    weight when `tfcompress.strip` takes the wrapper off; it may override `call`.

    Args:
        layer: The layer to wrap, built or not, a model included.
        include: Glob or globs over the paths of the layer's variables; None for all kernels.
        exclude: Glob or globs to leave out.
        **kwargs: What every Keras layer takes: `name`, `dtype`, `trainable`.
    """

    _tfcompress_primitive = True  # Graph passes keep the wrapper whole.

    def __init__(self, layer, include=None, exclude=None, **kwargs):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                f"{type(self).__name__} wraps a Keras layer, got {layer!r}. Pass e.g. "
                f"{type(self).__name__}(keras.layers.Dense(10))."
            )
        kwargs.setdefault("name", f"{type(self).__name__.lower()}_{layer.name}")
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.include = include
        self.exclude = exclude
        forward_signatures(self)

    def build(self, *args, **kwargs):
        """Build the layer inside, if it is not, then the wrapper's own state."""
        was_built = self.layer.built
        if not was_built:
            self.layer.build(*args, **kwargs)
        self.build_state(was_built)

    def build_state(self, was_built: bool):
        """Make the wrapper's variables; `was_built` tells that the weights were there before."""
        raise NotImplementedError

    def bake(self, variable: keras.Variable, value: tf.Tensor) -> tf.Tensor:
        """What `value`, of the layer's `variable`, becomes in the plain layer."""
        return value

    def kernels(self) -> dict[str, keras.Variable]:
        """The weights that are compressed, by path."""
        return select_kernels(self.layer, self.include, self.exclude)[0]

    def call(self, *args, **kwargs):
        """The layer's own call."""
        return self.layer(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        """The layer's own."""
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        """The layer's own."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, *args, **kwargs):
        """The layer's own."""
        return self.layer.compute_mask(*args, **kwargs)

    def get_build_config(self):
        """The shapes that the layer was built with."""
        return self.layer.get_build_config()

    def get_config(self):
        """The constructor arguments."""
        return {**super().get_config(), "include": self.include, "exclude": self.exclude}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The wrapper that `get_config` described."""
        return cls(**keras.saving.deserialize_keras_object(config, custom_objects))
