"""The ranges of a quantized model, from a stream of data."""

import logging
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.batches import calibration_batches, num_batches
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.keras_hooks.quantizer import LearnedRange, MovingRange, calibrating
from tfcompress.layers.quantize import Quantize
from tfcompress.ops import histogram
from tfcompress.quantization import calibrators
from tfcompress.quantization.calibrators import Calibrator

logger = logging.getLogger("tfcompress")


def calibrate(
    model: keras.Model, data: Any, calibrator: str | Calibrator = "minmax", verbose: int = 1
) -> None:
    """Set the ranges of a quantized model from what it computes on `data`, in one pass.

    Nothing is rounded but the weights while the data passes. Of each place a histogram of one size
    is kept, or its extremes only, however long the stream is. The ranges are set at the end: if
    anything fails, the model is as it was.

    Args:
        model: From `quantize`, or with `layers.Quantize` in it.
        data: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator; some hundred
            examples of what the model will see.
        calibrator: `"minmax"` widens the ranges to hold all that is computed; `"moving_average"`,
            `"percentile"`, `"mse"` and `"entropy"` set them anew; or a calibrator of
            `tfcompress.quantization.calibrators`.
        verbose: 0 shows nothing, 1 a progress bar, 2 one line at the end.

    Raises:
        ValueError: `data` holds no batch, the calibrator is unknown, or the model computes NaN or
            infinite values.

    Example:

    >>> import keras, numpy as np
    >>> from tfcompress.quantization.quantize import quantize
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> quantized = quantize(model)
    >>> calibrate(quantized, 3 * np.eye(4), "minmax", verbose=0)
    >>> quantized.layers[1].ranges
    {'output': (0.0, 3.0)}
    """
    calibrator = calibrators.get(calibrator)
    observed = _Observed(calibrator)
    step = tf.function(lambda inputs: _finite(model, inputs, observed), reduce_retracing=True)
    progress = keras.utils.Progbar(num_batches(data), verbose=verbose, unit_name="batch")
    seen = 0
    with calibrating(observed.observe):
        for batch in calibration_batches(model, data):
            finite = step(keras.tree.map_structure(tf.convert_to_tensor, batch))
            seen += 1
            observed.check(finite.numpy(), seen)
            progress.update(seen, finalize=False)
    progress.update(seen, finalize=True)
    observed.settle(_schemes(model))
    logger.info("Calibrated %s on %d batches with %s", model.name, seen, calibrator)


def _finite(model, inputs, observed):
    """Call the model; for each place whether all of its values were finite."""
    model(inputs, training=False)
    flags = [tf.convert_to_tensor(stream.finite) for _, stream in observed.places.values()]
    return tf.stack(flags) if flags else tf.ones(0, tf.bool)


def _schemes(model):
    """How each range of the model is quantized, by its id."""
    wrappers = [layer for layer in all_layers(model) if isinstance(layer, Quantize)]
    return {
        id(source): wrapper.activations_scheme
        for wrapper in wrappers
        for source in wrapper.quantizer.ranges.values()
    }


class _Observed:
    """What the ranges of a model have seen: a stream of variables for each."""

    def __init__(self, calibrator: Calibrator):
        self.calibrator = calibrator
        self.places: dict[int, tuple[MovingRange | LearnedRange, histogram.Stream]] = {}

    def observe(self, source: MovingRange | LearnedRange, x: tf.Tensor) -> None:
        """Take a batch into account, in-graph."""
        if id(source) not in self.places:
            self.places[id(source)] = source, self._new(source)
        _, stream = self.places[id(source)]
        read = histogram.Stream(*(tf.convert_to_tensor(variable) for variable in stream))
        moved = histogram.updated(
            read, x, self.calibrator.momentum, self.calibrator.reads_histogram
        )
        for variable, value in zip(stream, moved, strict=True):
            variable.assign(value)

    def _new(self, source):
        with tf.init_scope():
            start = histogram.empty()
            if self.calibrator.widens:
                start = start._replace(extremes=source.bounds())
            return histogram.Stream(*(tf.Variable(part, trainable=False) for part in start))

    def check(self, finite: np.ndarray, batch: int) -> None:
        """Raise a ValueError for the first place with a value that is not finite."""
        if finite.all():
            return
        source, _ = list(self.places.values())[int(np.argmin(finite))]
        raise ValueError(
            f"Batch {batch} of the calibration data makes NaN or infinite values where "
            f"{source.variable.path!r} is observed, first of all places. Look for such values in "
            "the data, and in the weights of that layer and those before it. No range was changed."
        )

    def settle(self, schemes) -> None:
        """Set the ranges."""
        bounds = [
            self.calibrator.bounds(stream, schemes[key]) for key, (_, stream) in self.places.items()
        ]
        for (source, _), found in zip(self.places.values(), bounds, strict=True):
            source.variable.assign(found)
