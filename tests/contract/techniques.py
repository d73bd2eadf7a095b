"""The contract table: every technique, one line each. A new technique joins with its line."""

import dataclasses
from collections.abc import Callable

import tfcompress as tfc

DECAY = tfc.schedules.PolynomialDecay(0.0, 0.75, begin_step=1, end_step=10)

GROUPS = tfc.quantization.Scheme(4, granularity="group", group_size=3)


@dataclasses.dataclass(frozen=True)
class Technique:
    """A technique as a callback, as a layer wrapper, or as both.

    `prunes` gives the expected number of zeros in a kernel of a given size, where there is one.
    `in_weights` is false where a wrapper also changes activations, which no plain layer can hold.
    `leaves_head` is true where the output layer stays as it is.
    """

    callback: Callable | None = None
    wrapper: Callable | None = None
    prunes: Callable[[int], int] | None = None
    in_weights: bool = True
    leaves_head: bool = False


def _three_quarters(size):
    return size - max(round(size * 0.25), 1)


def _half(size):
    return size - max(round(size * 0.5), 1)


def _pruning(sparsity=DECAY, **kwargs):
    return lambda: tfc.callbacks.Pruning(sparsity, frequency=4, **kwargs)


def _prune(**kwargs):
    return lambda layer: tfc.layers.Prune(layer, **{"sparsity": DECAY, "frequency": 4} | kwargs)


def _exact(**kwargs):
    """A way of pruning that leaves a quarter of every kernel."""
    return Technique(_pruning(**kwargs), prunes=_three_quarters)


TECHNIQUES = {
    "pruning": Technique(_pruning(), _prune(), _three_quarters),
    "pruning, random": Technique(
        _pruning(criterion="random"), _prune(criterion="random"), _three_quarters
    ),
    "pruning, gradient": _exact(criterion="gradient"),
    "pruning, fisher": _exact(criterion="fisher"),
    "pruning, movement": _exact(criterion="movement"),
    "pruning, soft movement": Technique(
        _pruning(None, criterion=tfc.criteria.Movement(0.49, strength=3.0, learning_rate=0.1))
    ),
    "pruning, 2:4": Technique(
        _pruning(None, structure="2:4"), _prune(sparsity=0.5, structure="2:4"), _half
    ),
    "pruning, blocks": Technique(
        _pruning(structure=tfc.structures.Block(2, 3)),
        _prune(structure=tfc.structures.Block(2, 3)),
    ),
    "pruning, channels": Technique(
        _pruning(structure="channel"), _prune(structure="channel"), leaves_head=True
    ),
    "pruning, global": Technique(_pruning(allocation="global")),
    "pruning, ERK": Technique(_pruning(allocation="erk")),
    "pruning, LAMP": Technique(_pruning(allocation="lamp")),
    "pruning, cyclic": _exact(
        sparsity=tfc.schedules.Cyclic(0.75, cycles=3, cycle_steps=3, begin_step=1)
    ),
    "pruning, exponential": _exact(
        sparsity=tfc.schedules.Exponential(0.0, 0.75, begin_step=1, end_step=10)
    ),
    # What grows behind a unit that is never active stays at zero.
    "pruning, SET": Technique(_pruning(0.75, regrowth=tfc.regrowth.SET(end_step=9))),
    "pruning, RigL": _exact(sparsity=0.75, regrowth=tfc.regrowth.RigL(end_step=9)),
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
    "QAT, groups of 4 bits": Technique(
        lambda: tfc.callbacks.QuantizationAwareTraining(GROUPS, None),
        lambda each: tfc.layers.Quantize(each, GROUPS, None),
    ),
    "QAT, dynamic": Technique(
        lambda: tfc.callbacks.QuantizationAwareTraining(activations="dynamic"),
        lambda each: tfc.layers.Quantize(each, activations="dynamic"),
        in_weights=False,
    ),
    "QAT, percentiles, then frozen": Technique(
        lambda: tfc.callbacks.QuantizationAwareTraining(
            percentile=99.0, ranges_end_step=4, batch_norm_end_step=6
        ),
        lambda each: tfc.layers.Quantize(each, percentile=99.0),
        in_weights=False,
    ),
    "QAT, LSQ": Technique(
        wrapper=lambda each: tfc.layers.Quantize(each, "w4a8", scales="lsq"), in_weights=False
    ),
    "QAT, LSQ, weights": Technique(
        wrapper=lambda each: tfc.layers.Quantize(each, "w3", scales="lsq")
    ),
    "clustering": Technique(wrapper=tfc.layers.Cluster),
    "clustering, reassigned": Technique(
        wrapper=lambda each: tfc.layers.Cluster(each, reassign=True)
    ),
}
CALLBACKS = [name for name, technique in TECHNIQUES.items() if technique.callback]
WRAPPERS = [name for name, technique in TECHNIQUES.items() if technique.wrapper]
BAKED = [name for name in WRAPPERS if TECHNIQUES[name].in_weights]
PRUNING = [name for name, technique in TECHNIQUES.items() if technique.prunes]
# Those that gather something in the step, which a killed run must find again.
STATEFUL = ["pruning, gradient", "pruning, fisher", "pruning, movement", "pruning, RigL"]
# All whose masks are not a function of the weights: a killed run must find them again.
REMEMBERING = [*STATEFUL, "pruning, soft movement", "pruning, SET"]
