"""What Keras lacks under `tf.distribute`: the step, the update and the variables.

Keras compiles the whole distributed step with XLA, which cannot span devices; its loops and
conditions hold values or calls that cannot be there; it clips gradients before they are reduced;
and it weighs the replicas of an uneven batch alike. Here, in one replica's step, only forward and
backward pass are compiled. Gradients are reduced first; then every replica runs Keras's plain
one-device update on its own copies, so conditions inside it are free to do what they like.

Private Keras API used here, each with a test in `tests/keras_hooks/test_distribute.py`:
`Trainer._make_function`, `_maybe_symbolic_build`, `_autoconvert_optionals`,
`_compute_loss`, `_loss_tracker`, `_call_has_training_arg`, `_distribute_strategy` and
`_symbolic_build`; the epoch iterator's `_distributed_dataset`; `scale_loss_for_distribution` and
`unscale_loss_for_distribution`;
`BaseOptimizer._apply_weight_decay`, `_backend_update_step`,
`_backend_increment_gradient_accumulators` and `_overwrite_model_variables_with_average_value`;
`TFOptimizer._distribution_strategy` and `_trainable_variables_indices`;
`LossScaleOptimizer._tf_apply` and `_common_apply`; `Variable._value` and `_initialize`;
`get_keras_mask` and `set_keras_mask`.
"""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.losses import loss as keras_loss
from keras.src.optimizers.base_optimizer import BaseOptimizer
from tensorflow.python.distribute import distribute_lib

from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.keras_hooks.state import find_state
from tfcompress.keras_hooks.update import unwrap_optimizer
from tfcompress.keras_hooks.walk import trained_model
from tfcompress.keras_hooks.workers import has_workers, join_workers

# The part of the step's examples that this replica has, while its step runs.
_SHARE = contextvars.ContextVar("share", default=None)


def distribute(model: keras.Model, strategy: tf.distribute.Strategy) -> Callable[[], None]:
    """Let `fit`, `evaluate`, `predict` and the `_on_batch` methods work under a strategy.

    Args:
        model: Any Keras model, built or not, compiled or not.
        strategy: Where it trains: the replicas of `MirroredStrategy`, in one process, or of
            `MultiWorkerMirroredStrategy`, in several.

    Returns:
        A function that takes the hooks off. Variables stay where they are; see `undistribute`.
    """
    removes = contextlib.ExitStack()
    before = model._distribute_strategy
    model._distribute_strategy = strategy
    removes.callback(_set_strategy, model, before)
    optimizers = contextlib.ExitStack()
    removes.callback(optimizers.close)
    hooks = {
        "_make_function": functools.partial(_make_function, model, strategy),
        "_maybe_symbolic_build": functools.partial(_build, model, strategy, optimizers),
        "train_step": functools.partial(_train_step, model),
        "test_step": functools.partial(_test_step, model),
    }
    if has_workers(strategy):
        hooks["predict_step"] = _predict_step
    for name, around in hooks.items():
        removes.callback(add_hook(model, name, around, innermost=True))
    removes.callback(join_workers(model, strategy))
    _forget_functions(model)
    place(model, strategy)
    return removes.close


def _set_strategy(model, strategy):
    model._distribute_strategy = strategy
    _forget_functions(model)


def _forget_functions(model):
    model.train_function = model.test_function = model.predict_function = None


# The variables.


def place(model: keras.Model, strategy: tf.distribute.Strategy) -> None:
    """Give every variable of a model and of its optimizer a copy on each replica.

    The Keras variables stay the same objects. Those that are there already are left alone.
    """
    for variable in _variables(model):
        _create(variable, strategy)
    _settle_optimizer(model, strategy)


def undistribute(model: keras.Model) -> None:
    """Bring the variables back to one device, with the values that they have.

    Raises:
        ValueError: It is called inside of a strategy's scope, where variables are distributed.
    """
    if tf.distribute.has_strategy():
        raise ValueError(
            "Variables cannot be brought back to one device inside of a strategy's scope; "
            "call this outside of `with strategy.scope()`."
        )
    for variable in _variables(model):
        _create(variable, tf.distribute.get_strategy())
    _settle_optimizer(model, tf.distribute.get_strategy())


def replicas(variable: keras.Variable) -> list[tf.Variable]:
    """The copies of a variable on this machine's replicas, in order."""
    return list(_strategy_of(variable.value).experimental_local_results(variable.value))


def _variables(model) -> list[keras.Variable]:
    optimizer = getattr(model, "optimizer", None)
    metrics = [each for metric in model.metrics for each in metric.variables]
    state = find_state(trained_model(model)).values()
    found = [*model.variables, *metrics, *state, *(optimizer.variables if optimizer else ())]
    return list({id(variable): variable for variable in found}.values())


def _strategy_of(native):
    # A variable made without a strategy has none, or the default one.
    return getattr(native, "distribute_strategy", None) or tf.distribute.get_strategy()


def _create(variable, strategy):
    native = variable._value
    if native is None or _strategy_of(native) is strategy:
        return
    with tf.init_scope():
        value = keras.ops.convert_to_numpy(variable)
        with strategy.scope():
            variable._initialize(tf.constant(value, variable.dtype))


def _settle_optimizer(model, strategy):
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    for each in (optimizer, unwrap_optimizer(optimizer)):
        each._distribution_strategy = strategy
        if each.built:
            trained = each._trainable_variables
            # Keyed by what holds the value, which may be new.
            each._trainable_variables_indices = {
                each._var_key(variable): index for index, variable in enumerate(trained)
            }


def _build(model, strategy, optimizers, proceed, iterator=None, data_batch=None):
    """What `fit` and `evaluate` do first: make what is missing, from the shape of a batch."""
    place(model, strategy)
    if iterator is not None:
        data_batch = _batch_spec(iterator._distributed_dataset.element_spec)
    with strategy.scope():
        model._symbolic_build(data_batch=data_batch)
    place(model, strategy)
    optimizers.close()  # Another `compile` brings another optimizer.
    if model.optimizer is not None:
        _hook_optimizer(model.optimizer, optimizers)


def _batch_spec(element_spec):
    """One replica's part of a distributed batch, as specs; without reading any data."""

    def local(spec):
        spec = getattr(spec, "_value_specs", (spec,))[0]
        return None if isinstance(spec, tf.OptionalSpec) or not hasattr(spec, "shape") else spec

    return tf.nest.map_structure(local, element_spec)


# The step.


def _make_function(model, strategy, proceed, step_function):
    """The function that `fit` and `evaluate` call with an iterator, for several steps at once."""
    layout = _Layout()

    def on_replica(data):
        with _share_of(data):
            return layout.pack(step_function(data))

    def one_step(data):
        with _scaling_by_share():
            packed = strategy.run(on_replica, args=(data,))
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, packed, axis=None)

    one_step = model._autoconvert_optionals(one_step)
    next_step = _next_step(one_step, compiled=not model.run_eagerly)

    def function(iterator):
        # A loop in the graph cannot hold a distributed batch that may not be there.
        packed = None
        for _ in range(model.steps_per_execution):
            try:
                packed = next_step(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if packed is None:
                    raise
                break
        return layout.unpack(packed)

    return function


def _next_step(one_step, compiled):
    """The step on the next batch of an iterator; a distributed one is read within the graph.

    Outside of it, several workers would trace anew at every batch, to tell whether all have one.
    """
    if not compiled:
        return lambda iterator: one_step(next(iterator))
    on_batch = tf.function(one_step, reduce_retracing=True, autograph=False)
    on_iterator = tf.function(
        lambda iterator: one_step(iterator.get_next()), reduce_retracing=True, autograph=False
    )

    def next_step(iterator):
        if isinstance(iterator, tf.distribute.DistributedIterator):
            return on_iterator(iterator)
        return on_batch(next(iterator))

    return next_step


class _Layout:
    """How the results of a step lie in one vector, so that one reduction is enough for them."""

    def pack(self, results):
        flat = [tf.convert_to_tensor(each) for each in tf.nest.flatten(results)]
        self.results, self.specs = results, [(each.shape, each.dtype) for each in flat]
        return tf.concat(
            [tf.reshape(tf.cast(each, tf.float32), [-1]) for each in flat] or [tf.zeros(0)], axis=0
        )

    def unpack(self, packed):
        parts = tf.split(packed, [shape.num_elements() for shape, _ in self.specs])
        flat = [
            tf.cast(tf.reshape(part, shape), dtype if dtype.is_floating else tf.float32)
            for part, (shape, dtype) in zip(parts, self.specs, strict=True)
        ]
        return tf.nest.pack_sequence_as(self.results, flat)


def _train_step(model, proceed, data):
    """Keras's step on one replica, of which XLA compiles forward and backward pass."""
    if type(model).train_step is not keras.Model.train_step:
        _warn_of_own_step(model, "train_step")
        return proceed(data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    weights = model.trainable_weights

    def forward_and_backward():
        with tf.GradientTape() as tape:
            y_pred, loss = _forward(model, x, y, sample_weight, training=True)
            scaled = loss if model.optimizer is None else model.optimizer.scale_loss(loss)
        return y_pred, loss, tape.gradient(scaled, weights) if weights else []

    y_pred, loss, gradients = _compiled(model, forward_and_backward)
    _track_loss(model, loss, x)
    if weights:
        model.optimizer.apply_gradients(zip(gradients, weights, strict=True))
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _test_step(model, proceed, data):
    if type(model).test_step is not keras.Model.test_step:
        _warn_of_own_step(model, "test_step")
        return proceed(data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y_pred, loss = _compiled(model, lambda: _forward(model, x, y, sample_weight, training=False))
    _track_loss(model, loss, x)
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _predict_step(proceed, data):
    """Collectives gather predictions of workers, and know no bfloat16; float32 holds its values."""

    def gatherable(y):
        return tf.cast(y, tf.float32) if y.dtype == tf.bfloat16 else y

    return tf.nest.map_structure(gatherable, proceed(data))


def _forward(model, x, y, sample_weight, training):
    known = {"training": training} if model._call_has_training_arg else {}
    y_pred = model(x, **known)
    loss = model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )
    # Eagerly, Keras leaves the loss of no examples as it is: empty.
    return y_pred, tf.reduce_sum(loss)


def _track_loss(model, loss, x):
    # The division by the share of a replica without examples gives 0, of weight 0.
    model._loss_tracker.update_state(
        keras_loss.unscale_loss_for_distribution(loss), sample_weight=_rows(x)
    )


def _compiled(model, function):
    """`(y_pred, *rest) = function()`, by XLA where the model asks for it and it can be had."""
    if not model.jit_compile:
        return function()
    masks = []

    def call():
        y_pred, *rest = function()
        masks[:] = [
            None if y is None else backend.get_keras_mask(y) for y in tf.nest.flatten(y_pred)
        ]
        return (y_pred, *rest), list(masks)

    try:
        (y_pred, *rest), found = tf.function(call, jit_compile=True, autograph=False)()
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        _warn_of_communication(model)
        return function()
    for y, mask in zip(tf.nest.flatten(y_pred), found, strict=True):
        if mask is not None:
            backend.set_keras_mask(y, mask)
    return (y_pred, *rest)


def _warn_of_own_step(model, name):
    if model.jit_compile:
        warnings.warn(
            f"{type(model).__name__} has a {name} of its own, which XLA cannot compile under a "
            "strategy as a whole: it runs as a graph. Override compute_loss instead of the step, "
            "or compile with jit_compile=False.",
            stacklevel=2,
        )


def _warn_of_communication(model):
    warnings.warn(
        f"The replicas of {model.name!r} exchange values in the middle of the forward pass "
        "(synchronized batch normalization, or the ranges of quantization-aware training), which "
        "XLA cannot compile: it runs as a graph. Compile with jit_compile=False to silence this.",
        stacklevel=2,
    )


# Losses: every example weighs the same, whichever replica has it.


@contextlib.contextmanager
def _share_of(data) -> Iterator[None]:
    """Know this replica's part of the step's examples, for the losses in a `with` block."""
    token = _SHARE.set(_share(data))
    try:
        yield
    finally:
        _SHARE.reset(token)


def _share(data):
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    context = tf.distribute.get_replica_context()
    # A static shape tells nothing of the others: 3 replicas have 11, 11 and 10 of 32 examples.
    rows = tf.cast(_rows(x), tf.float32)
    return rows / context.all_reduce(tf.distribute.ReduceOp.SUM, rows)


def _first(x):
    return next(each for each in tf.nest.flatten(x) if each is not None)


def _rows(x):
    return tf.shape(_first(x))[0]


@contextlib.contextmanager
def _scaling_by_share() -> Iterator[None]:
    """Let Keras scale means, and the losses that layers add, by each replica's share."""
    scale, unscale = (
        keras_loss.scale_loss_for_distribution,
        keras_loss.unscale_loss_for_distribution,
    )

    def scale_by_share(value):
        share = _SHARE.get()
        return scale(value) if share is None else value * tf.cast(share, value.dtype)

    def unscale_by_share(value):
        share = _SHARE.get()
        if share is None:
            return unscale(value)
        return tf.math.divide_no_nan(value, tf.cast(share, value.dtype))

    keras_loss.scale_loss_for_distribution = scale_by_share
    keras_loss.unscale_loss_for_distribution = unscale_by_share
    try:
        yield
    finally:
        keras_loss.scale_loss_for_distribution = scale
        keras_loss.unscale_loss_for_distribution = unscale


# The update.


def _hook_optimizer(optimizer, stack):
    inner = unwrap_optimizer(optimizer)
    add = functools.partial(_add_and_defer, stack)
    add(optimizer, "apply", _reduce_then_apply)
    if optimizer is not inner:
        add(optimizer, "_tf_apply", functools.partial(_apply_as_one_device, optimizer))
    add(inner, "_backend_update_step", functools.partial(_update_step, inner))
    add(inner, "_apply_weight_decay", functools.partial(_decay, inner))
    for name in (
        "_backend_increment_gradient_accumulators",
        "_overwrite_model_variables_with_average_value",
    ):
        add(inner, name, functools.partial(_plainly, inner, name))


def _add_and_defer(stack, owner, name, around):
    stack.callback(add_hook(owner, name, around, innermost=True))


def _reduce_then_apply(proceed, grads, trainable_variables=None):
    """Sum the gradients over the replicas; then update each replica's copies on its own."""
    if tf.distribute.in_cross_replica_context():
        return proceed(grads, trainable_variables)
    context = tf.distribute.get_replica_context()
    variables = list(trainable_variables)
    known = [i for i, gradient in enumerate(grads) if gradient is not None]
    reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, [grads[i] for i in known])

    def across(strategy, reduced):
        def on_copies(_, reduced):
            filled = dict(zip(known, reduced, strict=True))
            proceed([filled.get(i) for i in range(len(variables))], variables)

        strategy.extended.update(variables[0].value, on_copies, args=(reduced,), group=False)

    return context.merge_call(across, args=(reduced,))


def _apply_as_one_device(optimizer, proceed, grads, trainable_variables=None):
    optimizer._common_apply(grads, trainable_variables)


def _update_step(optimizer, proceed, grads, trainable_variables, learning_rate):
    if distribute_lib.get_update_replica_id() is None:
        return proceed(grads, trainable_variables, learning_rate)
    for gradient, variable in zip(grads, trainable_variables, strict=True):
        optimizer.update_step(gradient, _own_copy(variable), learning_rate)
    return None


def _decay(optimizer, proceed, variables):
    if distribute_lib.get_update_replica_id() is None:
        return proceed(variables)
    return BaseOptimizer._apply_weight_decay(optimizer, [_own_copy(each) for each in variables])


def _plainly(optimizer, name, proceed, *args):
    if distribute_lib.get_update_replica_id() is None:
        return proceed(*args)
    return getattr(BaseOptimizer, name)(optimizer, *args)


def _own_copy(variable):
    return replicas(variable)[distribute_lib.get_update_replica_id()]


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The batch normalization layers at any depth."""
    return [each for each in all_layers(model) if isinstance(each, keras.layers.BatchNormalization)]
