"""Training on replicas and on one device: `python -m tests.parallel.replicas NUMBER [CASE ...]`.

The replicas are devices of this process, or the workers of the cluster in `TF_CONFIG`.
"""

import functools
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import tfcompress as tfc
from tests.models import classification, compile_classifier, mlp
from tests.processes import logical_cpus, report_cases
from tfcompress import parallel
from tfcompress.keras_hooks.distribute import replicas

SGD = keras.optimizers.SGD


def with_batch_norm():
    layers = [keras.Input((12,)), keras.layers.Dense(16, activation="relu")]
    return keras.Sequential([*layers, keras.layers.BatchNormalization(), keras.layers.Dense(3)])


class OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def with_own_step():
    return OwnStep([keras.Input((12,)), keras.layers.Dense(3)])


def with_embedding():
    inputs = keras.Input((12,))
    tokens = keras.ops.cast(keras.ops.clip(4 * inputs + 8, 0, 15), "int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(16, 4)(tokens))
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def student():
    return tfc.distillation.Distiller(mlp(), mlp(), ["logits"])


def bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return mlp()
    finally:
        keras.config.set_dtype_policy("float32")


def ema(frequency=None):
    return SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=frequency)


# 65 examples in batches of 32: the last batch is smaller than the replicas.
CASES = {
    "plain": {},
    "xla": {"jit_compile": True},
    "several steps": {"steps_per_execution": 2, "examples": 77},
    "uneven": {"examples": 75},
    "smaller than the replicas": {"examples": 65},
    "smaller, xla, several steps": {
        "examples": 65,
        "jit_compile": True,
        "steps_per_execution": 4,
    },
    "eager": {"examples": 65, "run_eagerly": True, "steps_per_execution": 2},
    "accumulation": {
        "optimizer": lambda: SGD(0.1, gradient_accumulation_steps=2),
        "examples": 75,
    },
    "ema": {"optimizer": ema},
    "ema that overwrites": {"optimizer": lambda: ema(3), "examples": 75},
    "clipped together": {"optimizer": lambda: SGD(0.1, global_clipnorm=0.1), "examples": 75},
    "clipped": {"optimizer": lambda: SGD(0.1, clipnorm=0.1), "examples": 75},
    "decay": {"optimizer": lambda: SGD(0.1, momentum=0.9, weight_decay=0.01), "examples": 75},
    "loss scale": {
        "optimizer": lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1)),
        "examples": 75,
    },
    "own step": {"make": with_own_step, "examples": 75},
    "embedding": {"make": with_embedding, "examples": 75},
    "batch norm": {"make": with_batch_norm, "examples": 75, "tolerance": 1e-5},
    "threshold, L1, logger": {
        "callbacks": lambda: [
            tfc.callbacks.ThresholdPruning(0.1),
            tfc.callbacks.L1Regularization(1e-2),
            tfc.callbacks.CompressionLogger(),
        ],
        "examples": 75,
    },
    "pruning, xla": {
        "callbacks": lambda: [tfc.callbacks.Pruning(0.5, frequency=2)],
        "jit_compile": True,
    },
    "pruning, accumulation": {
        "callbacks": lambda: [tfc.callbacks.Pruning(0.5, frequency=2)],
        "optimizer": lambda: SGD(0.1, gradient_accumulation_steps=2),
    },
    "shuffled": {"shuffle": True, "examples": 75},
    # What it distils counts each replica alike: full batches, and not those of the validation.
    "distilled": {"make": student, "examples": 96, "logs_tolerance": 1e-2},
    "mixed precision": {
        "make": bfloat16,
        "examples": 75,
        "tolerance": 2e-2,
        "logs_tolerance": 2e-2,
    },
    "QAT": {"callbacks": lambda: [tfc.callbacks.QuantizationAwareTraining()], "examples": 96},
}


def train(
    strategy,
    make=mlp,
    optimizer=lambda: SGD(0.1),
    examples=96,
    callbacks=list,
    tolerance=1e-6,
    logs_tolerance=2e-6,
    shuffle=False,
    **compiling,
):
    keras.utils.set_random_seed(0)
    model = make()
    if strategy is not None:
        parallel.prepare(model, strategy)
    compile_classifier(model, optimizer(), metrics=["accuracy"], **compiling)
    x, y = classification()
    history = model.fit(
        x[:examples],
        y[:examples],
        batch_size=32,
        epochs=2,
        shuffle=shuffle,
        verbose=0,
        callbacks=callbacks(),
        validation_data=(x[:41], y[:41]),
    ).history
    return model, history, model.predict(x[:37], batch_size=16, verbose=0)


def check(strategy, case):
    one, many = train(None, **case), train(strategy, **case)
    tolerance = case.get("tolerance", 1e-6)
    for ours, theirs in zip(one[0].get_weights(), many[0].get_weights(), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=tolerance, rtol=0)
    for name in one[1]:
        allowed = case.get("logs_tolerance", 2e-6)
        np.testing.assert_allclose(many[1][name], one[1][name], atol=allowed)
    np.testing.assert_allclose(many[2], one[2], atol=10 * tolerance)
    first, *others = everywhere(strategy, [*many[0].weights, *many[0].optimizer.variables])
    assert len(others) == strategy.num_replicas_in_sync - 1
    for other in others:
        np.testing.assert_array_equal(other, first)
    weights = many[0].get_weights()
    parallel.release(many[0])
    assert len(replicas(many[0].weights[0])) == 1
    for before, after in zip(weights, many[0].get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def everywhere(strategy, variables):
    """The values of variables as one vector for each replica, those of other workers too."""
    copies = zip(*(replicas(each) for each in variables), strict=True)
    local = np.stack([np.concatenate([np.ravel(each) for each in copy]) for copy in copies])
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return list(strategy.gather(tf.constant(local), axis=0).numpy())
    return list(local)


def make_strategy(number):
    """Of this many replicas: workers where `TF_CONFIG` names them, else devices of this process."""
    if "TF_CONFIG" in os.environ:
        return parallel.strategy("multi_worker")
    logical_cpus(number)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(number)])


def main(number, *names):
    report_cases(functools.partial(check, make_strategy(number)), CASES, names)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
