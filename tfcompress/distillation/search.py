"""Which layers fit each other best, measured on a batch."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from tfcompress.distillation.features import Features, PointLoss, same_size
from tfcompress.distillation.losses import float32
from tfcompress.distillation.mapping import cheapest, layer_name
from tfcompress.distillation.points import observe, trace_points


def searched(loss: PointLoss, teacher, student, batch, in_order: bool = True) -> PointLoss:
    """The loss with the pairs of layers that cost least on a batch in place of `"searched"`.

    The cost of a pair is the loss between the two, over what the teacher's layer would cost with
    nothing but its mean (of features) or with nothing (of others), so that layers of large values
    are not shunned. Of features of unequal widths it is what the best projection leaves.

    Args:
        loss: With the mapping `"searched"`.
        teacher: A built model.
        student: A built model.
        batch: Inputs.
        in_order: See `mapping.cheapest`.

    Returns:
        The same loss with explicit pairs.
    """
    batch = keras.tree.map_structure(tf.convert_to_tensor, batch)
    points = [trace_points(model, batch) for model in (teacher, student)]
    candidates = loss.candidates(*points)
    tensors = []
    for model, found in zip((teacher, student), candidates, strict=True):
        wanted = [name for each in found for name in _parts(each)]
        with keras.StatelessScope():
            tensors.append(observe(model, batch, wanted, training=False)[1])
    costs = [[_cost(loss, tensors, one, two) for one in candidates[0]] for two in candidates[1]]
    chosen = cheapest(np.array(costs), in_order)
    pairs = tuple(
        (_escaped(layer_name(candidates[0][i])), _escaped(layer_name(two)))
        for i, two in zip(chosen, candidates[1], strict=True)
    )
    return dataclasses.replace(loss, mapping=pairs)


def _parts(point) -> tuple[str, ...]:
    return (point,) if isinstance(point, str) else point


def _escaped(path: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def _cost(loss, tensors, one, two) -> float:
    target = [tensors[0][name] for name in _parts(one)]
    state = [tensors[1][name] for name in _parts(two)]
    if isinstance(loss, Features):
        return _left_over(*same_size(float32(target[0]), float32(state[0])))
    if loss.head([tuple(x.shape) for x in target], [tuple(x.shape) for x in state]) is not None:
        raise ValueError(
            f"{type(loss).__name__} learns a layer, so its loss says nothing before training. Use "
            'mapping="uniform", "last" or pairs.'
        )
    nothing = float(loss(target, [tf.zeros_like(x) for x in target]))
    return float(loss(target, state)) / max(nothing, 1e-12)


def _left_over(target, state) -> float:
    """The share of the teacher's variance that no projection of the student's explains."""
    target = target.numpy().reshape(-1, target.shape[-1]).astype(np.float64)
    state = state.numpy().reshape(-1, state.shape[-1]).astype(np.float64)
    state = np.concatenate([state, np.ones((len(state), 1))], axis=1)
    fitted = state @ np.linalg.lstsq(state, target, rcond=None)[0]
    variance = np.square(target - target.mean(0)).sum()
    return float(np.square(target - fitted).sum() / max(variance, 1e-12))
