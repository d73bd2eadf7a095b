"""Quantization-aware training of a model as it is."""

import functools
import logging

import keras
import tensorflow as tf

from tfcompress.callbacks.base import CompressionCallback
from tfcompress.graph.placement import Placement, Plan, place
from tfcompress.keras_hooks import walk
from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.overlay import (
    all_layers,
    attach,
    in_training,
    outside_of_calls,
    training_step,
)
from tfcompress.keras_hooks.quantizer import (
    DynamicRange,
    FollowedRange,
    LayerQuantizer,
    MovingRange,
    QuantizedWeight,
    Range,
    activation_name,
    dynamic_places,
    fixed_range,
    range_places,
    remember,
    weight_axes,
)
from tfcompress.keras_hooks.state import find_state
from tfcompress.keras_hooks.update import unwrap_optimizer
from tfcompress.layers.quantize import check_percentile
from tfcompress.ops.schemes import Scheme, scheme_pair

logger = logging.getLogger("tfcompress")
_PREFIX = "QuantizationAwareTraining/"


class QuantizationAwareTraining(CompressionCallback):
    """Train a model with the rounding that its integer version will have.

    While it trains, each layer sees `fake_quant(w)` for its weights `w`, on the symmetric grid of
    each output channel, and activations are rounded on the asymmetric grid of a moving range:
    `low <- 0.99 * low + 0.01 * min(batch)`, and likewise the maximum, set by the first batch.
    Gradients pass straight through inside the ranges. Zeros in the weights stay zeros.

    Afterwards the model is plain Keras again, with the float weights it was trained to, and the
    ranges stay with it: `tfcompress.export(model, "m.tflite")` rounds the weights and writes them
    with the ranges. A later `fit` with this callback continues from them.

    Args:
        weights: `"int8"`, `"int2"` to `"int8"`, a `Scheme`, or None to leave them float; `"w4a8"`
            says both; or a dict of glob over `variable.path` -> `"int8"`, a `Scheme` or None.
        activations: `"int8"`, `"int2"` to `"int8"`, `"dynamic"` (the input of a layer with weights
            is rounded on the range of each row), a `Scheme`, or None to leave them float.
        begin_step: Optimizer updates before anything is rounded; ranges are observed from the
            first one on.
        percentile: Share of a batch's values that its range is to hold, in (50, 100]: less than 100
            leaves outliers out.
        ranges_end_step: Optimizer updates after which ranges stay as they are; None to let them
            move to the end.
        batch_norm_end_step: Optimizer updates after which batch norms use their moving statistics
            in training too, and keep them; gamma and beta still learn. None for never.
        include: Glob or globs over `variable.path`; None for every kernel and embedding.
        exclude: Glob or globs to leave out. A layer all of whose weights are left out stays float.

    Attributes:
        applied: Path of each quantized weight -> its scheme.
        ranges: Path of each place with a range -> `(low, high)`.
        skipped: Name -> why it is not quantized.

    Raises:
        ValueError: A scheme or a step is not one of the above, a glob matches nothing, or nothing
            is left to quantize. Learned scales (LSQ) must exist before the optimizer does: those
            are for `tfcompress.quantize(model, scales="lsq")` and `tfcompress.layers.Quantize`.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> model.compile("sgd", "mse")
    >>> qat = QuantizationAwareTraining()
    >>> _ = model.fit(np.eye(4), np.ones((4, 2)), verbose=0, callbacks=[qat])
    >>> [path.split("/")[-2:] for path in qat.applied]
    [['head', 'kernel']]
    >>> list(qat.ranges.values())[0]
    (0.0, 1.0)

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """

    def __init__(
        self,
        weights: str | dict | Scheme | None = "int8",
        activations: str | Scheme | None = "int8",
        begin_step: int = 0,
        percentile: float = 100.0,
        ranges_end_step: int | None = None,
        batch_norm_end_step: int | None = None,
        include=None,
        exclude=None,
    ):
        super().__init__(include, exclude)
        self.weights, self.activations = scheme_pair(weights, activations)
        if not self.weights and self.activations is None:
            raise ValueError(
                f"QuantizationAwareTraining got weights={weights!r} and activations=None, so there "
                'is nothing to quantize; pass weights="int8", activations="int8", or both.'
            )
        check_percentile(percentile)
        _check_steps(
            begin_step=begin_step,
            ranges_end_step=ranges_end_step,
            batch_norm_end_step=batch_norm_end_step,
        )
        self.begin_step = begin_step
        self.percentile = percentile
        self.ranges_end_step = ranges_end_step
        self.batch_norm_end_step = batch_norm_end_step
        self.quantizers: list[LayerQuantizer] = []
        self._places: dict[str, Range] = {}
        self._inputs = None

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """`(low, high)` of each place, as they are now."""
        return {
            path: tuple(keras.ops.convert_to_numpy(source.bounds()).tolist())
            for path, source in self._places.items()
            if not isinstance(source, DynamicRange)
        }

    def _prepare_once(self):
        if self._can_plan():
            super()._prepare_once()

    def _start(self, tracing=True):
        if self._can_plan():
            super()._start(tracing)

    def _can_plan(self) -> bool:
        """Whether the graph can be known; a subclassed model tells its inputs at its first call."""
        model = walk.trained_model(self.model)
        knows_inputs = hasattr(model, "operations") or model.get_build_config()
        return bool(model.built and (knows_inputs or self._inputs is not None))

    def _prepare(self, model):
        with outside_of_calls():
            plan = place(model, self._inputs)
        paths = {id(variable): path for path, variable in walk.named_variables(model).items()}
        self.skipped = dict(plan.skipped)
        self._known_ranges = {
            key: keras.ops.convert_to_numpy(variable)
            for key, variable in find_state(model, _PREFIX).items()
        }
        chosen = self._choose(plan, paths)
        self.quantizers = self._quantizers(model, plan, chosen)
        self.applied = {
            paths[id(weight.variable)]: str(weight.scheme)
            for quantizer in self.quantizers
            for weight in quantizer.weights
        }
        self._require_something(model)
        logger.info("QuantizationAwareTraining skips %s", self.skipped)

    def _attach(self, session, optimizer):
        session.defer(add_hook(self.model, "train_step", _as_training))
        model = walk.trained_model(self.model)
        if self._started:
            self._attach_quantizers(session)
            return

        def start_first(proceed, *args, **kwargs):
            if not model.built:  # Keras calls a subclassed model once to build it.
                return proceed(*args, **kwargs)
            remove()  # Planning calls the model too.
            self._inputs = keras.tree.map_structure(_spec, (*args, *kwargs.values())[0])
            self._start()
            self._attach_quantizers(session)
            # The range of the input hangs on this very call, which is past its hooks.
            return model.call(*args, **kwargs)

        remove = add_hook(model, "call", start_first)
        session.defer(remove)

    def _attach_quantizers(self, session):
        for quantizer in self.quantizers:
            session.defer(attach(quantizer.layer, quantizer.overlay()))
        if self.batch_norm_end_step is None:
            return
        frozen = functools.partial(self._reached, self.batch_norm_end_step)
        for layer in all_layers(walk.trained_model(self.model)):
            if isinstance(layer, keras.layers.BatchNormalization):
                session.defer(add_hook(layer, "call", functools.partial(_normalize, frozen)))

    def _finish(self):
        remember(walk.trained_model(self.model), self.quantizers, self._inputs)
        # What is no longer listed is not dropped: the ranges stay with the model.
        self._state = {}

    def _choose(self, plan: Plan, paths) -> dict[int, list[QuantizedWeight]]:
        """The weights to quantize of each layer, by `id(layer)`."""
        include, exclude = walk.as_globs(self.include), walk.as_globs(self.exclude)
        by_glob = self.weights if isinstance(self.weights, dict) else {"*": self.weights}
        globs = [*(include or ()), *(exclude or ()), *(by_glob if by_glob is self.weights else ())]
        walk.check_globs(globs, paths.values())
        chosen = {}
        for placement in plan.placements:
            kept, found = [], weight_axes(placement.layer)
            for variable, axes in found:
                path = paths[id(variable)]
                scheme = walk.first_match(path, by_glob)
                if not _wanted(path, include, exclude):
                    self.skipped[path] = "excluded"
                elif scheme is None and self.weights is not None:
                    self.skipped[path] = "no glob of weights= matches it"
                else:
                    kept.append(QuantizedWeight(variable, axes, scheme))
            if kept or not found:
                chosen[id(placement.layer)] = [each for each in kept if each.scheme is not None]
        return chosen

    def _quantizers(self, model, plan: Plan, chosen) -> list[LayerQuantizer]:
        self._places = {}
        observed = self.activations is not None and not self.activations.dynamic
        inputs = [f"input_{i}" for i, wanted in enumerate(plan.inputs) if wanted and observed]
        made = {id(model): {place: self._range(model, place) for place in inputs}}
        quantizers = [self._quantizer(model, [], made[id(model)])]
        for placement in plan.placements:
            weights = chosen.get(id(placement.layer))
            if weights is None:
                continue
            made[id(placement.layer)] = self._ranges(placement, made)
            quantizers.append(self._quantizer(placement.layer, weights, made[id(placement.layer)]))
        return [each for each in quantizers if each.weights or each.ranges]

    def _quantizer(self, layer, weights, ranges) -> LayerQuantizer:
        active = functools.partial(self._reached, self.begin_step) if self.begin_step else None
        ranges = {} if self.activations is None else ranges
        return LayerQuantizer(layer, weights, self.activations, ranges, active)

    def _ranges(self, placement: Placement, made) -> dict[str, Range]:
        layer = placement.layer
        if self.activations is None:
            return {}
        if self.activations.dynamic:
            return {place: DynamicRange() for place in dynamic_places(layer)}
        places = range_places(layer, placement.output)
        followed = made.get(id(placement.follows), {})
        source = followed.get("output", followed.get("input_0"))
        return {
            place: self._range(layer, place, source if place == "output" else None)
            for place in places
        }

    def _range(self, layer, place, followed: Range | None = None) -> Range:
        path = _unique(f"{layer.path or layer.name}/{place}", self._places)
        fixed = None
        if place == "output" and self.activations is not None:
            fixed = fixed_range(activation_name(layer), self.activations)
        if followed is not None:
            self._places[path] = FollowedRange(followed)
        elif fixed is not None:
            self._places[path] = fixed
        else:
            # By its place in the graph: layers made anew have new names.
            key = f"range_{len(self._places)}"
            start = self._known_ranges.get(key, [0.0, 0.0])
            self._places[path] = MovingRange(
                self._add_state(key, start, "float32"),
                self.percentile,
                None if self.ranges_end_step is None else self._ranges_move,
            )
        return self._places[path]

    def _ranges_move(self) -> tf.Tensor:
        return tf.logical_not(self._reached(self.ranges_end_step))

    def _reached(self, step: int) -> tf.Tensor:
        iterations = unwrap_optimizer(self._optimizer).iterations
        return tf.convert_to_tensor(iterations.value) >= step

    def _require_something(self, model):
        if not self.applied and self.weights:
            raise ValueError(
                f"The model {model.name!r} has no weight to quantize. Skipped: "
                f"{self.skipped or 'nothing'}. Expected at least one kernel or embedding with 2 or "
                "more axes; check include and exclude."
            )


def _as_training(proceed, *args, **kwargs):
    with training_step():
        return proceed(*args, **kwargs)


def _normalize(frozen, proceed, inputs, training=None, **kwargs):
    """The call of a batch norm, with its moving statistics once they are frozen."""
    if not in_training():
        return proceed(inputs, training=training, **kwargs)
    return tf.cond(
        frozen(),
        lambda: proceed(inputs, training=False, **kwargs),
        lambda: proceed(inputs, training=training, **kwargs),
    )


def _check_steps(**steps):
    for name, step in steps.items():
        if step is not None and (not isinstance(step, int) or step < 0):
            raise ValueError(
                f"QuantizationAwareTraining got {name}={step!r}; pass a number of optimizer "
                "updates, 0 or more."
            )


def _spec(x) -> keras.InputSpec:
    return keras.InputSpec(
        shape=(None, *x.shape[1:]), dtype=keras.backend.standardize_dtype(x.dtype)
    )


def _wanted(path: str, include, exclude) -> bool:
    included = include is None or walk.matches(path, include)
    return included and not (exclude and walk.matches(path, exclude))


def _unique(path: str, taken) -> str:
    count, candidate = 2, path
    while candidate in taken:
        candidate, count = f"{path}#{count}", count + 1
    return candidate
