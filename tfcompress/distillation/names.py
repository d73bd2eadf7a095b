"""The names that stand for distillation losses."""

import keras

from tfcompress.distillation.attention import Attention, Relations
from tfcompress.distillation.contrastive import Contrastive
from tfcompress.distillation.features import ActivationMaps, Features, MaskedFeatures
from tfcompress.distillation.losses import CrossEntropy, Logits, Loss, MeanSquaredError
from tfcompress.distillation.relations import RKDAngle, RKDDistance, Similarity
from tfcompress.shorthands import resolve

LOSSES = {
    "activation_maps": ActivationMaps,
    "attention": Attention,
    "contrastive": Contrastive,
    "cross_entropy": CrossEntropy,
    "features": Features,
    "logits": Logits,
    "masked_features": MaskedFeatures,
    "mse": MeanSquaredError,
    "relations": Relations,
    "rkd_angle": RKDAngle,
    "rkd_distance": RKDDistance,
    "similarity": Similarity,
}


def get(identifier) -> Loss:
    """A distillation loss from its name, or from one of Keras's.

    Args:
        identifier: A name, a `Loss`, `keras.distillation.LogitsDistillation` of the divergence, or
            `keras.distillation.FeatureDistillation` of the squared error.

    Returns:
        The loss.

    Raises:
        ValueError: None of these.

    Example:

    >>> get("logits")
    Logits(temperature=3.0, activation=None)
    """
    if isinstance(identifier, keras.distillation.DistillationLoss):
        return _from_keras(identifier)
    if isinstance(identifier, Loss):
        return identifier
    found = resolve("distillation loss", identifier, LOSSES)
    if not (isinstance(found, type) and issubclass(found, Loss)):
        raise ValueError(
            f"Expected a distillation loss, got {identifier!r}. Pass one of {sorted(LOSSES)}, an "
            "object such as tfcompress.distillation.Logits(4.0), or a subclass of "
            "tfcompress.distillation.Loss."
        )
    return found()


def _from_keras(loss) -> Loss:
    """Ours for Keras's, which knows no weights of examples."""
    name = getattr(
        getattr(loss, "loss", None), "__name__", type(getattr(loss, "loss", None)).__name__
    )
    if type(loss) is keras.distillation.LogitsDistillation:
        if name in ("kl_divergence", "KLDivergence"):
            return Logits(loss.temperature)
    elif type(loss) is keras.distillation.FeatureDistillation:
        layers = loss.teacher_layer_name, loss.student_layer_name
        if name in ("mean_squared_error", "MeanSquaredError") and None not in layers:
            return Features(*layers)
    raise ValueError(
        f"{type(loss).__name__} with {name} gives no loss for each example, so sample weights "
        f"could not be honoured. Use one of {sorted(LOSSES)}, or subclass "
        "tfcompress.distillation.Loss."
    )
