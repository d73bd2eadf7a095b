"""The training of a stage: how long, with what optimizer, and on which loss."""

import logging
from typing import Annotated, Literal

import keras
import numpy as np
import pydantic

from tfcompress.data import Data
from tfcompress.recipe.objects import Positive, Strict

logger = logging.getLogger("tfcompress")

Count = Annotated[int, pydantic.Field(ge=1)]


def _check_optimizer(name: str) -> str:
    keras.optimizers.get(name)
    return name


def _check_loss(name: str | None) -> str | None:
    if name is not None:
        keras.losses.get(name)
    return name


class Training(Strict):
    """How a stage trains; everything has a default."""

    epochs: Count = pydantic.Field(3, description="Passes over the training examples.")
    batch_size: Count = pydantic.Field(32, description="Examples of a step.")
    optimizer: Annotated[str, pydantic.AfterValidator(_check_optimizer)] = pydantic.Field(
        "adam", description="A name of keras.optimizers: adam, adamw, sgd, ..."
    )
    learning_rate: Positive = pydantic.Field(1e-3, description="That of the first step.")
    decay: Literal["cosine", "none"] = pydantic.Field(
        "cosine", description="How the learning rate falls to zero over the stage."
    )
    loss: Annotated[str | None, pydantic.AfterValidator(_check_loss)] = pydantic.Field(
        None,
        description="A name of keras.losses; by default the one that the model was compiled with, "
        "or the one that its outputs and the labels ask for.",
    )
    from_logits: bool | None = pydantic.Field(
        None, description="For a crossentropy: whether the model's outputs are logits."
    )
    patience: Count | None = pydantic.Field(
        None, description="Stop after so many epochs without a better validation loss."
    )

    def steps(self, data: Data) -> int:
        """Optimizer updates of the stage."""
        return self.epochs * data.num_batches(self.batch_size)

    def make_optimizer(self, steps: int) -> keras.optimizers.Optimizer:
        """A new optimizer."""
        rate = self.learning_rate
        if self.decay == "cosine":
            rate = keras.optimizers.schedules.CosineDecay(rate, max(steps, 1))
        optimizer = keras.optimizers.get(self.optimizer)
        return type(optimizer).from_config({**optimizer.get_config(), "learning_rate": rate})

    def make_loss(self, model: keras.Model, data: Data, compiled: keras.Model):
        """The loss: as asked for, as the model was compiled, or as its outputs and labels say."""
        known = getattr(compiled, "loss", None)
        if self.loss is not None:
            return _with_logits(keras.losses.get(self.loss), self.from_logits, model)
        return known if known is not None else infer_loss(model, data)


def _with_logits(loss, from_logits: bool | None, model: keras.Model):
    classes = {
        "binary_crossentropy": keras.losses.BinaryCrossentropy,
        "categorical_crossentropy": keras.losses.CategoricalCrossentropy,
        "sparse_categorical_crossentropy": keras.losses.SparseCategoricalCrossentropy,
    }
    name = getattr(loss, "__name__", None) or getattr(loss, "name", "")
    if name not in classes:
        return loss
    return classes[name](from_logits=_gives_logits(model) if from_logits is None else from_logits)


def _gives_logits(model: keras.Model) -> bool:
    """Whether no softmax or sigmoid comes last."""
    last = model.layers[-1] if getattr(model, "layers", None) else None
    last = getattr(last, "layer", last)  # Inside a wrapper.
    probabilities = (keras.activations.softmax, keras.activations.sigmoid)
    is_layer = isinstance(last, keras.layers.Softmax)
    return not is_layer and getattr(last, "activation", None) not in probabilities


def infer_loss(model: keras.Model, data: Data) -> keras.losses.Loss:
    """The usual loss for these outputs and labels.

    Args:
        model: A model of one output.
        data: Its data.

    Returns:
        A crossentropy for class indices, one-hot rows, or labels 0 and 1; else the mean squared
        error.

    Raises:
        ValueError: The model has several outputs.
    """
    labels, shape = data.labels(), getattr(model, "output_shape", None)
    if not isinstance(shape, tuple):
        raise ValueError(
            f"{model.name!r} has several outputs, so its loss cannot be guessed. Compile it, or "
            "name a loss in the recipe: train: {loss: ...}."
        )
    logits = _gives_logits(model)
    is_binary = bool(np.isin(labels, (0, 1)).all())
    is_one_hot = is_binary and labels.ndim == 2 and labels.shape[-1] > 1
    is_index = labels.dtype.kind in "iub" or labels.size == len(labels) and _whole(labels)
    if shape[-1] == 1 and is_binary and labels.dtype.kind in "iub":
        loss = keras.losses.BinaryCrossentropy(from_logits=logits)
    elif is_one_hot and labels.shape[-1] == shape[-1] and (labels.sum(axis=-1) == 1).all():
        loss = keras.losses.CategoricalCrossentropy(from_logits=logits)
    elif shape[-1] != 1 and is_index and labels.shape != tuple(shape):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
    else:
        loss = keras.losses.MeanSquaredError()
    logger.info("Loss for %s: %s", model.name, loss.name)
    return loss


def _whole(labels: np.ndarray) -> bool:
    return bool((labels == labels.astype(np.int64)).all())


def metrics_for(loss) -> list[str]:
    """The metrics to show beside a loss: accuracy for classes.

    Example:

    >>> metrics_for(keras.losses.SparseCategoricalCrossentropy())
    ['accuracy']
    """
    name = getattr(loss, "name", None) or getattr(loss, "__name__", None) or str(loss)
    return ["accuracy"] if "crossentropy" in name else []
