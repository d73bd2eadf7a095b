"""Models in stages and on one device: `python -m tests.parallel.stages NUMBER [CASE ...]`."""

import functools
import sys
import types

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tests.models import classification, mlp
from tests.processes import logical_cpus, report_cases
from tfcompress.parallel import Balance, Pipeline

SGD = keras.optimizers.SGD
RANDOM = np.random.default_rng(0)
LABELS = (np.arange(26) % 3).astype("int32")


def deep():
    hidden = [layers.Dense(16, "relu", kernel_regularizer="l2") for _ in range(3)]
    return keras.Sequential([keras.Input((12,)), *hidden, layers.Dense(3)])


def features():
    return classification(26)


def transformer():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8)(tokens)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, "gelu")(x)))
    return keras.Model(tokens, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def tokens():
    return RANDOM.integers(0, 20, (26, 6)).astype("int32"), LABELS


def tied():
    """The same layer, and the table of the embedding, at both ends."""
    ids = keras.Input((6,), dtype="int32")
    table, shared = layers.Embedding(20, 8), layers.Dense(8, "tanh", name="shared")
    x = shared(layers.Dense(8, "tanh")(layers.Dense(32, "tanh")(shared(table(ids)))))
    rows = table(keras.ops.arange(20) + 0 * keras.ops.sum(ids))
    return keras.Model(ids, keras.ops.matmul(x, keras.ops.transpose(rows)))


def next_tokens():
    return RANDOM.integers(0, 20, (26, 6)).astype("int32"), RANDOM.integers(0, 20, (26, 6))


def several():
    """Two inputs, two outputs, one from the middle; a skip connection from end to end."""
    a, b = keras.Input((12,), name="a"), keras.Input((4,), name="b")
    x = layers.Dense(8, "relu")(a)
    y = layers.Dense(8, "relu")(layers.Concatenate()([x, b]))
    early = layers.Dense(3, name="early")(y)
    z = layers.Dense(8, "relu")(layers.Dense(8, "relu")(y))
    late = layers.Dense(3, name="late")(layers.Concatenate()([z, x, b]))
    return keras.Model({"a": a, "b": b}, {"early": early, "late": late})


def two_inputs():
    x, y = classification(26)
    return {"a": x, "b": x[:, 4:8] ** 2}, {"early": y, "late": LABELS}


def masked():
    """The mask of the padding reaches the last stage, and the loss."""
    ids = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True)(ids)
    x = layers.LSTM(8, return_sequences=True)(x)
    x = layers.LSTM(8, return_sequences=True)(x)
    return keras.Model(ids, layers.Dense(3)(x))


def padded():
    ids = RANDOM.integers(1, 20, (26, 6)).astype("int32")
    ids[np.arange(6) >= RANDOM.integers(1, 7, 26)[:, None]] = 0
    return ids, RANDOM.integers(0, 3, (26, 6))


def normalized():
    hidden = [layers.Dense(16), layers.BatchNormalization(), layers.ReLU()]
    more = [layers.Dense(16), layers.BatchNormalization(), layers.Dense(3)]
    return keras.Sequential([keras.Input((12,)), *hidden, *more])


def weighted():
    return (*features(), np.linspace(0.5, 2, 26).astype("float32"))


# Batches of 8; with 26 examples the last one has 2, fewer than the micro-batches.
CASES = {
    "mlp": {"make": deep, "examples": 26},
    "mlp, 1F1B": {"make": deep, "examples": 26, "schedule": "1f1b"},
    "mlp, xla": {"make": deep, "xla": True},
    "mlp, 1F1B, xla": {"make": deep, "schedule": "1f1b", "xla": True},
    "mlp, five": {"make": deep, "microbatches": 5, "optimizer": lambda: SGD(0.1, momentum=0.9)},
    "adam": {"make": mlp, "optimizer": lambda: keras.optimizers.Adam(1e-2, epsilon=1e-3)},
    "weighted, 1F1B": {"make": mlp, "data": weighted, "schedule": "1f1b"},
    "sum": {"make": mlp, "reduction": "sum", "optimizer": lambda: SGD(0.01)},
    "clipped": {"make": mlp, "optimizer": lambda: SGD(0.1, global_clipnorm=0.1)},
    "loss scale, 1F1B": {
        "make": deep,
        "schedule": "1f1b",
        "optimizer": lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1)),
    },
    "accumulation": {"make": mlp, "optimizer": lambda: SGD(0.1, gradient_accumulation_steps=2)},
    "several steps": {"make": mlp, "steps_per_execution": 2},
    "transformer": {"make": transformer, "data": tokens},
    "transformer, 1F1B": {"make": transformer, "data": tokens, "schedule": "1f1b"},
    "tied": {"make": tied, "data": next_tokens},
    "tied, 1F1B": {"make": tied, "data": next_tokens, "schedule": "1f1b"},
    "several": {"make": several, "data": two_inputs, "examples": 26},
    "several, 1F1B": {"make": several, "data": two_inputs, "schedule": "1f1b"},
    "masked": {"make": masked, "data": padded, "examples": 26},
    "memory limit": {"make": deep, "balance": Balance(memory_limit=2000)},
    "batch norm, whole": {"make": normalized, "microbatches": 1, "tolerance": 1e-5},
}


def losses(y, reduction):
    made = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    return dict.fromkeys(y, made) if isinstance(y, dict) else made


def pair(number, make=mlp, data=features, optimizer=lambda: SGD(0.1), tolerance=1e-6, **rest):
    """Two equal models, the second one in stages, both compiled."""
    reduction = rest.pop("reduction", "sum_over_batch_size")
    steps, size = rest.pop("steps_per_execution", 1), rest.pop("examples", 24)
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        models.append(make())
    one, inside = models
    examples = tf.nest.map_structure(lambda values: values[:size], data())
    pipeline = Pipeline(inside, [f"CPU:{i}" for i in range(number)], **rest)
    for model in (one, pipeline):
        model.compile(optimizer(), losses(examples[1], reduction), steps_per_execution=steps)
    return types.SimpleNamespace(
        one=one, inside=inside, pipeline=pipeline, data=examples, tolerance=tolerance
    )


def gradients(model, inside, x):
    @tf.function
    def function(x):
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(x, training=True))
            loss = tf.add_n([tf.reduce_mean(output**2) for output in outputs])
        found = tape.gradient(loss, [variable.value for variable in inside.trainable_variables])
        return outputs, [tf.convert_to_tensor(each) for each in found]

    return function(tf.nest.map_structure(tf.constant, x))


def check(number, case):
    made = pair(number, **case)
    one, inside, pipeline, (x, *y) = made.one, made.inside, made.pipeline, made.data
    assert len(pipeline.stages) == number
    assert_close(pipeline.predict(x, 8, verbose=0), one.predict(x, 8, verbose=0), made)
    batch = tf.nest.map_structure(lambda values: values[:8], x)
    assert_close(gradients(pipeline, inside, batch), gradients(one, one, batch), made)
    history = [
        model.fit(x, *y[:1], 8, 3, 0, sample_weight=y[1] if y[1:] else None, shuffle=False).history
        for model in (one, pipeline)
    ]
    assert_close(inside.get_weights(), one.get_weights(), made)
    for name in history[0]:
        if name in ("early_loss", "late_loss") and pipeline.schedule == "1f1b":
            continue  # Keras weighs a batch whose size is not static as one example there.
        np.testing.assert_allclose(history[1][name], history[0][name], atol=5e-6, rtol=1e-5)
    check_places(pipeline, case)
    pipeline.release()
    assert {variable.value.device[-5:] for variable in inside.variables} == {"CPU:0"}
    assert_close(inside.predict(x, 8, verbose=0), pipeline.model.predict(x, 8, verbose=0), made)


def assert_close(found, wanted, made):
    for ours, theirs in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=made.tolerance, rtol=1e-5)


def check_places(pipeline, case):
    """Weights lie where their stage says, and slots beside them."""
    held = held_bytes(pipeline.variables)
    limit = case.get("balance", Balance()).memory_limit
    assert limit is None or max(held.values()) <= limit < sum(held.values()), held
    for stage in pipeline.stages:
        assert held.get(stage.device, 0) == stage.weight_bytes, (held, stage)
    optimizer = getattr(pipeline.optimizer, "inner_optimizer", pipeline.optimizer)
    slots = [v for v in optimizer.variables if v.shape and "momentum" in v.name]
    for slot, variable in zip(slots, pipeline.trainable_variables, strict=False):
        assert slot.shape == variable.shape
        assert slot.value.device == variable.value.device, (slot.path, slot.value.device)


def held_bytes(variables):
    held = {}
    for variable in variables:
        device = tf.DeviceSpec.from_string(variable.value.device)
        name = tf.DeviceSpec(device_type=device.device_type, device_index=device.device_index)
        size = variable.value.numpy().nbytes
        held[name.to_string()] = held.get(name.to_string(), 0) + size
    return held


def main(number, *names):
    logical_cpus(number)
    report_cases(functools.partial(check, number), CASES, names)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
