"""The contract table: every technique, one line each. A new technique joins with its line."""

import dataclasses
from collections.abc import Callable

import tfcompress as tfc

DECAY = tfc.schedules.PolynomialDecay(0.0, 0.75, begin_step=1, end_step=10)


@dataclasses.dataclass(frozen=True)
class Technique:
    """A technique as a callback, as a layer wrapper, or as both.

    `prunes` gives the expected number of zeros in a kernel of a given size, where there is one.
    `in_weights` is false where a wrapper also changes activations, which no plain layer can hold.
    """

    callback: Callable | None = None
    wrapper: Callable | None = None
    prunes: Callable[[int], int] | None = None
    in_weights: bool = True


def _three_quarters(size):
    return size - max(round(size * 0.25), 1)


def _pruning(**kwargs):
    return lambda: tfc.callbacks.Pruning(DECAY, frequency=4, **kwargs)


def _prune(layer):
    return tfc.layers.Prune(layer, sparsity=DECAY, frequency=4)


TECHNIQUES = {
    "pruning": Technique(_pruning(), _prune, _three_quarters),
    "pruning, global": Technique(_pruning(allocation="global")),
    "threshold pruning": Technique(
        lambda: tfc.callbacks.ThresholdPruning(0.1),
        lambda each: tfc.layers.Prune(each, threshold=0.1),
    ),
    "L1": Technique(
        lambda: tfc.callbacks.L1Regularization(1e-2),
        lambda each: tfc.layers.L1(each, strength=1e-2),
    ),
    "L1, proximal": Technique(lambda: tfc.callbacks.L1Regularization(0.1, proximal=True)),
    "QAT": Technique(
        tfc.callbacks.QuantizationAwareTraining, tfc.layers.Quantize, in_weights=False
    ),
    "QAT, weights": Technique(
        lambda: tfc.callbacks.QuantizationAwareTraining(activations=None),
        lambda each: tfc.layers.Quantize(each, activations=None),
    ),
}
CALLBACKS = [name for name, technique in TECHNIQUES.items() if technique.callback]
WRAPPERS = [name for name, technique in TECHNIQUES.items() if technique.wrapper]
BAKED = [name for name in WRAPPERS if TECHNIQUES[name].in_weights]
PRUNING = [name for name, technique in TECHNIQUES.items() if technique.prunes]
