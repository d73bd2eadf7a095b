"""Wanda: weights by their magnitude and the norm of their input."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfcompress.keras_hooks.walk import named_variables
from tfcompress.ops.criteria import Wanda
from tfcompress.pruning.inputs import input_norms


def wanda_scores(
    model: keras.Model, paths: Sequence[str], calibration: Any
) -> tuple[dict[str, tf.Tensor], dict[str, str]]:
    """`|w| * ||x||_2`: each weight by how much it adds to its output on calibration data.

    Args:
        model: A built model of any kind; its weights stay as they are.
        paths: Paths of kernels.
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator.

    Returns:
        Path -> scores of the kernel's shape and dtype, 0 or more; and path -> reason for every
        kernel whose inputs cannot be captured.

    Raises:
        ValueError: A path is not in the model, there is no batch, or values are NaN or infinite.

    Example:

    >>> import numpy as np
    >>> dense = keras.layers.Dense(1, kernel_initializer="ones", name="dense")
    >>> model = keras.Sequential([keras.Input((2,)), dense], name="model")
    >>> scores, _ = wanda_scores(model, ["model/dense/kernel"], np.array([[3.0, 0.0], [4.0, 1.0]]))
    >>> scores["model/dense/kernel"].numpy().tolist()
    [[5.0], [1.0]]

    Reference: Sun et al. 2023, https://arxiv.org/abs/2306.11695.
    """
    norms, skipped = input_norms(model, paths, calibration)
    variables = named_variables(model)
    scores = {
        path: Wanda()(tf.convert_to_tensor(variables[path]), norm) for path, norm in norms.items()
    }
    return scores, skipped
