"""Model parallelism by stages: parts of a model on several devices, kept busy by micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfcompress.graph.expand import expand
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.capture import compiled_loss, keras_mask
from tfcompress.keras_hooks.devices import build_beside, move, native, set_mask, track_loss
from tfcompress.keras_hooks.distribute import batch_norms
from tfcompress.parallel.costs import example, graph_costs
from tfcompress.parallel.order import Work, interleaved, order
from tfcompress.parallel.partition import Balance, partition
from tfcompress.parallel.stages import Stage, keys, make_stages

_log = logging.getLogger("tfcompress")


class Pipeline(keras.Model):
    """A model whose layers lie on several devices, one stage of them on each.

    A batch is split into micro-batches; while one stage works on one of them, the stages before and
    behind it work on others. It is a Keras model: `compile`, `fit`, `evaluate` and `predict` it.
    Outputs, gradients and trained weights are those of `model` on one device, to rounding.

    The Keras variables stay those of `model`, and are moved to the devices: training the pipeline
    trains `model`, which can be used, and saved, at any time; `release()` brings its variables back
    to one device. The optimizer's slots lie beside the weights, and each weight is updated where
    it lies, so a device holds weights, gradients and slots of its own stage only. A weight that
    several stages use lies with the first; the others read it from there.

    What differs from one device: batch norms take the statistics of a micro-batch, and update
    their averages with each (a warning says so); dropout draws other masks, equally distributed.
    With `schedule="1f1b"` the loss is taken for each micro-batch, so only losses that are means
    over the examples are accepted. A batch of fewer examples than `microbatches` is split into
    single ones, or, where TensorFlow does not know its size beforehand, left whole. Layers that
    add losses of their own are refused.

    Not covered by tests: GPUs, several machines, mixed precision, and `fit` on a model of which
    TensorFlow does not know the sizes besides that of the batch (pass measured costs for those).
    An optimizer's weight decay and moving averages are computed on the default device.

    Called eagerly, the stages work one after the other; `fit`, `predict` and `tf.function` overlap
    them. XLA compiles each stage with `xla=True`, not the step as a whole: leave `jit_compile` out
    of `compile`.

    Args:
        model: Any built model; see `tfcompress.expand`. Set `trainable` before.
        devices: Names such as `["GPU:0", "GPU:1"]`, one for each stage.
        microbatches: How many a batch is split into; a stage idles for about
            `(stages - 1) / (microbatches + stages - 1)` of the time.
        schedule: `"gpipe"`, or `"1f1b"`, which keeps the activations of fewer micro-batches.
        xla: Whether XLA compiles each stage.
        balance: What the cuts are chosen by, a `Balance`; by default estimated costs.

    Attributes:
        model: The model that was passed.
        stages: A `Stage` for each device: its layers, bytes and cost.

    Raises:
        ValueError: An unknown device, a model that cannot be cut into so many stages or within the
            memory limit, or what `tfcompress.expand` raises.

    Example:

    >>> layers = [keras.layers.Dense(64, name="a"), keras.layers.Dense(64, name="b")]
    >>> model = keras.Sequential([keras.Input((64,)), *layers])
    >>> pipeline = Pipeline(model, ["CPU:0", "CPU:0"], microbatches=2)
    >>> [(stage.layers[0], stage.weight_bytes) for stage in pipeline.stages]
    [('a', 16640), ('b', 16640)]
    >>> pipeline.compile("sgd", "mse")
    >>> pipeline.predict(keras.ops.ones((6, 64)), verbose=0).shape
    (6, 64)

    References: Huang et al. 2019, https://arxiv.org/abs/1811.06965 (GPipe); Narayanan et al. 2019,
    https://arxiv.org/abs/1806.03377, and 2021, https://arxiv.org/abs/2006.09503 (1F1B).
    """

    def __init__(
        self,
        model: keras.Model,
        devices: Sequence[str],
        microbatches: int = 4,
        schedule: str = "gpipe",
        xla: bool = False,
        balance: Balance | None = None,
    ):
        devices = check_devices(devices)
        order(schedule, len(devices), microbatches)
        super().__init__(name=f"{model.name}_pipeline", dtype=model.dtype_policy)
        balance = balance or Balance()
        flat = expand(model)
        _refuse_losses(flat)
        costs = balance.costs or graph_costs(flat, example(flat))
        _require_costs_of(flat, costs)
        stages = make_stages(flat, partition(costs, len(devices), balance), devices, costs)
        self.microbatches, self.schedule = microbatches, schedule
        # Out of Keras's sight: the layers of `model` are those of the stages.
        self._held = _Held(model, flat, stages, xla)
        self.parts = [stage.model for stage in stages]
        placed: set[int] = set()
        for stage in stages:
            own = [v for v in stage.model.variables if id(v) not in placed]
            move(own, stage.device)
            placed.update(map(id, own))
        self.built = True
        if microbatches > 1 and (norms := batch_norms(self)):
            _log.warning(
                "Pipeline: the batch norms %s take the statistics of each micro-batch.",
                [layer.name for layer in norms],
            )

    @property
    def model(self) -> keras.Model:
        """The model that was passed, with the variables that are trained."""
        return self._held.model

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What lies on each device."""
        return self._held.stages

    def compile(self, *args, jit_compile=False, **kwargs):
        """As Keras's; without `jit_compile`, for XLA cannot compile across devices."""
        if jit_compile is True:
            raise ValueError(
                "XLA cannot compile a step over several devices, got jit_compile=True. Use "
                "Pipeline(..., xla=True), which compiles each stage."
            )
        super().compile(*args, jit_compile=False, **kwargs)
        build_beside(self.optimizer, self.trainable_variables)

    def call(self, inputs, training=None):
        """The outputs of the model; the pipeline runs forward, and backward for their gradients."""
        inputs = self._held.flatten(inputs)

        def run(number):
            if training:
                return _differentiable(self._held, inputs, number)
            return _masked(_Run(self._held, number).forward(inputs))

        return self._held.pack(_unmasked(_for_size(inputs, self.microbatches, run)))

    def train_step(self, data):
        """Keras's, with the gradients of the schedule."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self.schedule == "1f1b":
            _require_means(self.loss)
        inputs, variables = self._held.flatten(x), self.trainable_variables
        loss, outputs, gradients = _for_size(
            inputs,
            self.microbatches,
            lambda number: self._gradients(inputs, y, sample_weight, number),
        )
        outputs = self._held.pack(_unmasked(outputs))
        penalties, of_penalties = self._penalties(variables)
        track_loss(self, loss + penalties, tf.shape(inputs[0])[0])
        self.optimizer.apply_gradients(
            (_sum(gradient, penalty), variable)
            for gradient, penalty, variable in zip(gradients, of_penalties, variables, strict=True)
        )
        return self.compute_metrics(x, y, outputs, sample_weight=sample_weight)

    def get_config(self):
        """Refused: what is saved is the model that the pipeline was made from."""
        raise NotImplementedError(
            "A Pipeline is not saved: save pipeline.model, which has its weights, or call "
            "pipeline.save_weights."
        )

    def release(self) -> keras.Model:
        """Bring the variables back to one device, TensorFlow's default.

        The pipeline is not to be used afterwards.

        Returns:
            The model that was passed, with the weights that it has now.
        """
        device = tf.config.list_logical_devices(_kinds()[0])[0].name
        move(self.variables, device)
        self.train_function = self.test_function = self.predict_function = None
        return self.model

    def compute_output_spec(self, inputs, training=None):
        """The shapes of the model's outputs."""
        return self._held.flat.compute_output_spec(inputs)

    def _gradients(self, inputs, y, sample_weight, number):
        """The loss, the outputs with their masks, and the gradients of the weights."""
        run = _Run(self._held, number)
        losses = _Losses(self, y, sample_weight, run, _shares(inputs[0], number))
        run.begin(inputs, training=True)
        of_outputs = losses.of_batch if self.schedule == "gpipe" else losses.of_microbatch
        for work in interleaved(order(self.schedule, len(self._held.stages), number)):
            run.work(work, of_outputs)
        gradients = run.of_variables([native(v) for v in self.trainable_variables])
        return tf.add_n(losses.losses), _masked(run.joined()), gradients

    def _penalties(self, variables):
        """The losses of regularizers, and their gradients."""
        with tf.GradientTape() as tape:
            penalties = tf.add_n([tf.cast(loss, tf.float32) for loss in self.losses] or [0.0])
            scaled = self.optimizer.scale_loss(penalties)
        return penalties, tape.gradient(scaled, [native(variable) for variable in variables])


class _Losses:
    """The gradients of a model's outputs: of the loss of a batch, or of a micro-batch.

    Args:
        model: A compiled pipeline.
        y: Targets of the batch.
        sample_weight: Its weights.
        run: Where the outputs come from.
        shares: The part of the examples that each micro-batch has.
    """

    def __init__(self, model, y, sample_weight, run: _Run, shares: Sequence):
        self._model, self._run, self._shares = model, run, shares
        self._pack = run.pack
        self._data = y, sample_weight
        self._of_batch: list = []
        self.losses: list = []

    def of_batch(self, microbatch: int) -> list:
        """Of one loss for all; it is taken once, when the first of them is asked for."""
        if not self._of_batch:
            self._of_batch = self._gradients(self._run.joined(), *self._data, 1.0)
        return [_part(x, microbatch, len(self._shares)) for x in self._of_batch]

    def of_microbatch(self, microbatch: int) -> list:
        """Of a loss for each."""
        targets, weights = keras.tree.map_structure(
            lambda x: _part(x, microbatch, len(self._shares)), self._data
        )
        outputs = self._run.outputs(microbatch)
        return self._gradients(outputs, targets, weights, self._shares[microbatch])

    def _gradients(self, outputs, y, sample_weight, share) -> list:
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            loss = compiled_loss(self._model, y, self._pack(outputs), sample_weight) * share
            scaled = self._model.optimizer.scale_loss(loss)
        self.losses.append(loss)
        return tape.gradient(scaled, outputs)


class _Held:
    """The stages of a model, and how they are run.

    Args:
        model: The model.
        flat: Its flat graph.
        stages: What it was cut into.
        xla: Whether XLA compiles each.
    """

    def __init__(self, model, flat, stages: Sequence[Stage], xla: bool):
        self.model, self.flat, self.stages = model, flat, stages
        key_of = keys(flat)
        self.inputs = [key_of[id(x)] for x in flat.inputs]
        self.outputs = [key_of[id(x)] for x in flat.outputs]
        self._functions = [_function(stage, xla) for stage in stages]

    def flatten(self, inputs) -> list:
        """The inputs of a call, in the order of the graph."""
        if isinstance(self.flat.input, dict) and isinstance(inputs, dict):
            inputs = {key: inputs[key] for key in self.flat.input}
        flat = [tf.convert_to_tensor(x) for x in keras.tree.flatten(inputs)]
        if len(flat) != len(self.inputs):
            names = [x.name for x in self.flat.inputs]
            raise ValueError(f"{self.model.name!r} takes the inputs {names}; got {len(flat)}.")
        return flat

    def pack(self, outputs: Sequence):
        """Outputs in the structure of the model's."""
        return keras.tree.pack_sequence_as(self.flat.output, list(outputs))

    def run(self, number: int, tensors: Sequence, training: bool) -> list:
        """The outputs of a stage, their masks on them."""
        masks = [keras_mask(x) for x in tensors]
        outputs, found = self._functions[number](list(tensors), masks, training)
        for output, mask in zip(outputs, found, strict=True):
            set_mask(output, mask)
        return outputs


def _function(stage: Stage, xla: bool):
    """Traced once for all micro-batches of a size; it would drop masks, so they are passed."""

    def call(tensors, masks, training):
        with tf.device(stage.device):
            outputs = stage.model.call(tensors, training=training, mask=masks)
            outputs = keras.tree.flatten(outputs)
            return outputs, [keras_mask(output) for output in outputs]

    return tf.function(call, jit_compile=xla or None, autograph=False, reduce_retracing=True)


class _Run:
    """One batch on its way through the stages, in micro-batches.

    Args:
        held: The stages.
        number: Of micro-batches.
    """

    def __init__(self, held: _Held, number: int):
        self._held, self._number = held, number
        self._values: dict[tuple[int, int], tf.Tensor] = {}
        self._tapes: dict[tuple[int, int], tuple] = {}
        self._upstream: dict[tuple[int, int], tf.Tensor] = {}
        self._gradients: dict[tuple[int, Any], tf.Tensor] = {}
        # What a stage made last: TensorFlow would work on all micro-batches at once.
        self._last: list[list] = [[] for _ in held.stages]

    def begin(self, inputs: Sequence, training: bool) -> None:
        """Split the inputs."""
        self._training = training
        for key, x in zip(self._held.inputs, inputs, strict=True):
            for m in range(self._number):
                self._values[key, m] = _part(x, m, self._number)

    def forward(self, inputs: Sequence) -> list:
        """The outputs of inference."""
        self.begin(inputs, training=False)
        for work in interleaved(_forward_only(len(self._held.stages), self._number)):
            self.work(work)
        return self.joined()

    def work(self, work: Work, of_outputs: Callable[[int], list] | None = None) -> None:
        """Do it, behind what the stage did before.

        Args:
            work: What.
            of_outputs: Of a micro-batch, the gradients of the model's outputs; called when the
                last stage begins with the backward pass.
        """
        stage = self._held.stages[work.stage]
        with tf.device(stage.device), tf.control_dependencies(self._last[work.stage]):
            if work.backward:
                if work.stage == len(self._held.stages) - 1:
                    self._add_upstream(
                        self._held.outputs, work.microbatch, of_outputs(work.microbatch)
                    )
                made = self._backward(work.stage, work.microbatch)
            else:
                made = self._forward(work.stage, work.microbatch)
        self._last[work.stage] = made or self._last[work.stage]

    def pack(self, outputs: Sequence):
        """Outputs in the structure of the model's."""
        return self._held.pack(outputs)

    def outputs(self, microbatch: int) -> list:
        """Of the model."""
        return [self._values[key, microbatch] for key in self._held.outputs]

    def joined(self) -> list:
        """The outputs for the whole batch, their masks on them."""
        outputs = []
        for parts in zip(*map(self.outputs, range(self._number)), strict=True):
            masks = [keras_mask(part) for part in parts]
            output = tf.concat(parts, 0)
            if masks[0] is not None:
                set_mask(output, tf.concat(masks, 0))
            outputs.append(output)
        return outputs

    def of_inputs(self) -> list:
        """The gradients of the inputs for the whole batch; None where there is none."""
        found = []
        for key in self._held.inputs:
            parts = [self._upstream.get((key, m)) for m in range(self._number)]
            found.append(None if parts[0] is None else tf.concat(parts, 0))
        return found

    def of_variables(self, variables: Sequence[tf.Variable]) -> list:
        """The gradients of weights, summed where each lies; None where there is none."""
        found = []
        for variable in variables:
            parts = [
                self._gradients[stage, variable.ref()]
                for stage in range(len(self._held.stages))
                if (stage, variable.ref()) in self._gradients
            ]
            with tf.device(variable.device):
                found.append(tf.add_n(parts) if parts else None)
        return found

    def _forward(self, number, m) -> list:
        stage = self._held.stages[number]
        inputs = [self._values[key, m] for key in stage.reads]
        if not self._training:
            outputs = self._held.run(number, inputs, training=False)
        else:
            weights = [native(variable) for variable in stage.model.trainable_variables]
            sources = [*(x for x in inputs if x.dtype.is_floating), *weights]
            with tf.GradientTape(persistent=False, watch_accessed_variables=False) as tape:
                tape.watch(sources)
                outputs = self._held.run(number, inputs, training=True)
            self._tapes[number, m] = tape, sources, outputs
        self._values.update(((key, m), x) for key, x in zip(stage.makes, outputs, strict=True))
        return outputs

    def _backward(self, number, m) -> list:
        stage = self._held.stages[number]
        tape, sources, outputs = self._tapes.pop((number, m))
        pairs = [
            (output, self._upstream.pop((key, m)))
            for key, output in zip(stage.makes, outputs, strict=True)
            if (key, m) in self._upstream
        ]
        gradients = tape.gradient(
            [output for output, _ in pairs], sources, [gradient for _, gradient in pairs]
        )
        reads = [key for key in stage.reads if self._values[key, m].dtype.is_floating]
        self._add_upstream(reads, m, gradients[: len(reads)])
        for variable, gradient in zip(sources[len(reads) :], gradients[len(reads) :], strict=True):
            if gradient is not None:
                _add(self._gradients, (number, variable.ref()), tf.convert_to_tensor(gradient))
        return [tf.convert_to_tensor(x) for x in gradients if x is not None]

    def _add_upstream(self, keys_, m, gradients) -> None:
        for key, gradient in zip(keys_, gradients, strict=True):
            if gradient is not None:
                _add(self._upstream, (key, m), tf.convert_to_tensor(gradient))


def _add(sums: dict, key, value) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _forward_only(stages: int, microbatches: int) -> list[list[Work]]:
    return [[Work(stage, m) for m in range(microbatches)] for stage in range(stages)]


def _differentiable(held: _Held, inputs: Sequence, number: int) -> tuple[list, list]:
    """Outputs, with their masks, whose gradients come from a pipelined backward pass."""
    present: list[bool] = []

    @tf.custom_gradient
    def outputs_of(*tensors):
        run = _Run(held, number)
        run.begin(tensors, training=True)
        row = list(interleaved(order("gpipe", len(held.stages), number)))
        for work in row:
            if not work.backward:
                run.work(work)
        outputs, masks = _masked(run.joined())
        present[:] = [mask is not None for mask in masks]

        def gradients_of(*upstream, variables=()):
            upstream = upstream[: len(outputs)]
            for work in row:
                if work.backward:
                    run.work(work, lambda m: [_part(x, m, number) for x in upstream])
            return run.of_inputs(), run.of_variables(variables)

        return [*outputs, *(mask for mask in masks if mask is not None)], gradients_of

    found = list(outputs_of(*inputs))
    masks = iter(found[len(present) :])
    return found[: len(present)], [next(masks) if each else None for each in present]


def _masked(outputs: Sequence) -> tuple[list, list]:
    """Tensors and the masks on them, which TensorFlow's functions would drop."""
    return list(outputs), [keras_mask(output) for output in outputs]


def _unmasked(outputs_and_masks) -> list:
    for output, mask in zip(*outputs_and_masks, strict=True):
        set_mask(output, mask)
    return outputs_and_masks[0]


def _sum(one, two):
    return two if one is None else one if two is None else one + two


def _for_size(inputs: Sequence, microbatches: int, run: Callable[[int], Any]):
    """Run in so many micro-batches as there are examples for; what it returns may hold None."""
    size = inputs[0].shape[0]
    if size is not None or microbatches == 1:
        return run(max(1, microbatches if size is None else min(microbatches, size)))
    structures = []

    def branch(number):
        structures.append(run(number))
        return [x for x in tf.nest.flatten(structures[-1]) if x is not None]

    enough = tf.shape(inputs[0])[0] >= microbatches
    found = iter(tf.cond(enough, lambda: branch(microbatches), lambda: branch(1)))
    return tf.nest.map_structure(lambda x: None if x is None else next(found), structures[0])


def _bounds(size, m: int, number: int):
    return m * size // number, (m + 1) * size // number


def _part(x, m: int, number: int):
    """A micro-batch of a tensor."""
    if x is None or number == 1:
        return x
    size = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    begin, end = _bounds(size, m, number)
    return x[begin:end]


def _shares(x, number: int) -> list:
    """The part of the examples that each micro-batch has."""
    size = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    bounds = [_bounds(size, m, number) for m in range(number)]
    return [tf.cast((end - begin) / size, tf.float32) for begin, end in bounds]


def check_devices(devices: Sequence[str]) -> list[str]:
    """The names of devices that TensorFlow has, or a ValueError that lists those.

    >>> check_devices(["CPU:0"])
    ['/device:CPU:0']
    """
    known = {d.name: d.name for d in tf.config.list_logical_devices()}
    names = [tf.DeviceSpec.from_string(_full(device)).to_string() for device in devices]
    missing = [device for device, name in zip(devices, names, strict=True) if name not in known]
    if missing or not names or isinstance(devices, str):
        raise ValueError(
            f"devices must be names of devices that TensorFlow has, got {devices!r}; there are "
            f"{sorted(known)}. Parts of a CPU or GPU are made with "
            "tf.config.set_logical_device_configuration, before anything runs."
        )
    return names


def _full(device: str) -> str:
    return device if device.startswith("/") else f"/device:{device}"


def _kinds() -> list[str]:
    return ["GPU", "CPU"] if tf.config.list_logical_devices("GPU") else ["CPU"]


def _require_costs_of(flat, costs) -> None:
    names = [call.operation.name for call in nodes.calls(flat)]
    if [cost.name for cost in costs] != names:
        raise ValueError(
            f"The costs are not those of {flat.name!r}: it calls {names}, and there are costs of "
            f"{[cost.name for cost in costs]}. Pass Balance(costs=layer_costs(model, batch))."
        )


def _refuse_losses(flat) -> None:
    for layer in flat.layers:
        regularized = [v for v in layer.trainable_variables if v.regularizer is not None]
        if layer.activity_regularizer is not None or len(layer.losses) > len(regularized):
            raise ValueError(
                f"The layer {layer.name!r} adds losses of its own, which depend on activations of "
                "one stage; Pipeline takes losses of outputs and of weights only. Remove its "
                "activity_regularizer or add_loss."
            )


def _require_means(loss) -> None:
    for each in keras.tree.flatten(loss):
        reduction = getattr(each, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean"):
            raise ValueError(
                'With schedule="1f1b" the loss is the mean over the micro-batches, which is that '
                f"of the batch for means over examples; got {each!r} with the reduction "
                f'{reduction!r}. Use schedule="gpipe", or reduction="sum_over_batch_size".'
            )
