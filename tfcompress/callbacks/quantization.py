"""Quantization-aware training of a model as it is."""

import logging

import keras
import tensorflow as tf

from tfcompress.callbacks.base import CompressionCallback
from tfcompress.graph.placement import Placement, Plan, place
from tfcompress.keras_hooks import walk
from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.overlay import attach, outside_of_calls, training_step
from tfcompress.keras_hooks.quantizer import (
    FollowedRange,
    LayerQuantizer,
    MovingRange,
    Range,
    activation_name,
    fixed_range,
    range_places,
    remember,
    weight_axes,
)
from tfcompress.keras_hooks.state import find_state
from tfcompress.keras_hooks.update import unwrap_optimizer
from tfcompress.ops.fake_quant import Scheme, activation_scheme, weight_scheme

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
        weights: `"int8"`, `"int2"` to `"int8"`, a symmetric `Scheme`, or None to leave them float.
        activations: The same, asymmetric per tensor; None to leave them float.
        begin_step: Optimizer updates before anything is rounded; ranges are observed from the
            first one on.
        include: Glob or globs over `variable.path`; None for every kernel and embedding.
        exclude: Glob or globs to leave out. A layer all of whose weights are left out stays float.

    Attributes:
        applied: Path of each quantized weight -> its scheme.
        ranges: Path of each place with a range -> `(low, high)`.
        skipped: Name -> why it is not quantized.

    Raises:
        ValueError: A scheme or `begin_step` is not one of the above, a glob matches nothing, or
            nothing is left to quantize.

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
        weights: str | Scheme | None = "int8",
        activations: str | Scheme | None = "int8",
        begin_step: int = 0,
        include=None,
        exclude=None,
    ):
        super().__init__(include, exclude)
        self.weights = weight_scheme(weights)
        self.activations = activation_scheme(activations)
        if self.weights is None and self.activations is None:
            raise ValueError(
                "QuantizationAwareTraining got weights=None and activations=None, so there is "
                'nothing to quantize; pass weights="int8", activations="int8", or both.'
            )
        if not isinstance(begin_step, int) or begin_step < 0:
            raise ValueError(
                f"QuantizationAwareTraining got begin_step={begin_step!r}; pass a number of "
                "optimizer updates, 0 or more."
            )
        self.begin_step = begin_step
        self.quantizers: list[LayerQuantizer] = []
        self._places: dict[str, Range] = {}
        self._inputs = None

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """`(low, high)` of each place, as they are now."""
        return {
            path: tuple(keras.ops.convert_to_numpy(source.bounds()).tolist())
            for path, source in self._places.items()
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
            paths[id(variable)]: str(self.weights)
            for quantizer in self.quantizers
            for variable, _ in quantizer.weights
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

    def _finish(self):
        remember(walk.trained_model(self.model), self.quantizers, self._inputs)
        # What is no longer listed is not dropped: the ranges stay with the model.
        self._state = {}

    def _choose(self, plan: Plan, paths) -> dict[int, list]:
        """The weights to quantize of each layer, by `id(layer)`."""
        include, exclude = walk.as_globs(self.include), walk.as_globs(self.exclude)
        walk.check_globs([*(include or ()), *(exclude or ())], paths.values())
        chosen = {}
        for placement in plan.placements:
            found = weight_axes(placement.layer)
            kept = [pair for pair in found if _wanted(paths[id(pair[0])], include, exclude)]
            self.skipped.update(
                {paths[id(v)]: "excluded" for v, _ in found if all(v is not k for k, _ in kept)}
            )
            if kept or not found:
                chosen[id(placement.layer)] = kept
        return chosen

    def _quantizers(self, model, plan: Plan, chosen) -> list[LayerQuantizer]:
        self._places = {}
        inputs = [f"input_{index}" for index, wanted in enumerate(plan.inputs) if wanted]
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
        active = self._is_active if self.begin_step else None
        ranges = {} if self.activations is None else ranges
        weights = [] if self.weights is None else weights
        return LayerQuantizer(layer, weights, self.weights, self.activations, ranges, active)

    def _ranges(self, placement: Placement, made) -> dict[str, Range]:
        layer = placement.layer
        places = range_places(layer) if placement.output else ()
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
            self._places[path] = MovingRange(self._add_state(key, start, "float32"))
        return self._places[path]

    def _is_active(self) -> tf.Tensor:
        iterations = unwrap_optimizer(self._optimizer).iterations
        return tf.convert_to_tensor(iterations.value) >= self.begin_step

    def _require_something(self, model):
        if not self.applied and self.weights is not None:
            raise ValueError(
                f"The model {model.name!r} has no weight to quantize. Skipped: "
                f"{self.skipped or 'nothing'}. Expected at least one kernel or embedding with 2 or "
                "more axes; check include and exclude."
            )


def _as_training(proceed, *args, **kwargs):
    with training_step():
        return proceed(*args, **kwargs)


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
