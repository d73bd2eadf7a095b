"""What distillation costs a step, and what it gains, on digits and on reviews of films.

    python -m tests.benchmarks.distillation [--pairs 9] [--steps 60] [--seeds 5] [--quick]
    python -m tests.benchmarks.distillation --task reviews [--seeds 1] [--cache DIRECTORY]

`--task digits` has two parts, `--cost` and `--accuracy`. The first prints, for a CNN that teaches
one of a ninth of its weights at batch 128, the time of a distillation step over that of a plain
student step and a teacher's forward pass, and, with what the teacher said taken from a cache, over
a plain step (median of interleaved rounds, quartiles). The second trains a student with 500
labelled and 3,500 unlabelled digits, and the same student on the 500 alone with as many updates,
and prints the accuracies on 1,000 others.

`--task reviews` fine-tunes MiniLM with its 6 layers, or takes it from the cache, and makes students
of 3 of them: trained alone, with the teacher's logits, and with its hidden states and attention
relations too. Which 3 layers is chosen by the accuracy of the untrained student on a validation
split, which the training does not see. The embeddings are frozen.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import tensorflow as tf

from tests.benchmarks import text
from tests.benchmarks.training_cost import timed_steps
from tfcompress import demo, distillation, zoo
from tfcompress.artefact import replacing

BATCH = 128
LOSSES = {
    "logits": ["logits"],
    "logits and features": ["logits", "features"],
    "logits and masked features": [
        "logits",
        distillation.MaskedFeatures("max_pooling2d*", "max_pooling2d*"),
    ],
    "logits and RKD": ["logits", "rkd_distance"],
}


def entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Steps:
    """A compiled model and its data; `run` times some training steps."""

    def __init__(self, model, data, jit_compile):
        model.compile("adam", entropy(), jit_compile=jit_compile)
        self.model, self.data = model, iter(data)

    def run(self, steps):
        """Seconds for `steps` steps."""
        return timed_steps(self.model, self.data, steps)


class Forward:
    """A teacher in inference; `run` times some forward passes."""

    def __init__(self, teacher, x, jit_compile):
        self.x = tf.constant(x)
        self.function = tf.function(
            lambda x: teacher(x, training=False), autograph=False, jit_compile=jit_compile
        )

    def run(self, steps):
        """Seconds for `steps` passes."""
        start = time.perf_counter()
        for _ in range(steps):
            outputs = self.function(self.x)
        outputs.numpy()
        return time.perf_counter() - start


def repeated(*batch):
    """The same batch over and over: the input pipeline costs next to nothing."""
    return tf.data.Dataset.from_tensors(batch).cache().repeat()


def ratios(losses, jit_compile, pairs, steps):
    """Of a step to student and teacher; and, cached, of a step to a plain one: a list of each."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x, y = random.uniform(size=(BATCH, 28, 28)).astype("float32"), np.arange(BATCH) % 10
    teacher = demo.cnn()
    cache = distillation.TeacherCache.build(teacher, x, losses, verbose=0)
    said = next(iter(cache.dataset(x, y, batch_size=BATCH, shuffle=False)))
    plain = Steps(demo.cnn(8), repeated(x, y), jit_compile)
    asking = distillation.Distiller(teacher, demo.cnn(8), losses)
    cached = distillation.Distiller(cache, demo.cnn(8), losses)
    runners = {
        "plain": plain,
        "teacher": Forward(teacher, x, jit_compile),
        "asking": Steps(asking, repeated(x, y), jit_compile),
        "cached": Steps(cached, repeated(*said), jit_compile),
    }
    for runner in runners.values():
        runner.run(steps)
    full, short = [], []
    for index in range(pairs):
        order = list(runners)[:: 1 if index % 2 else -1]
        seconds = {name: runners[name].run(steps) for name in order}
        full.append(seconds["asking"] / (seconds["plain"] + seconds["teacher"]))
        short.append(seconds["cached"] / seconds["plain"])
    return full, short


def pipeline_ratios(pairs, steps):
    """Of a step fed by a cache on disk, shuffled, to a plain one fed by shuffled arrays."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).uniform(size=(4000, 28, 28)).astype("float32")
    y = np.arange(4000) % 10
    teacher = demo.cnn()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "cache")
        cache = distillation.TeacherCache.build(teacher, x, path=path, verbose=0)
        arrays = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(4000).batch(BATCH)
        cached = distillation.Distiller(cache, demo.cnn(8), "logits")
        two = (
            Steps(demo.cnn(8), arrays.repeat().prefetch(2), False),
            Steps(cached, cache.dataset(x, y, batch_size=BATCH).repeat(), False),
        )
        for each in two:
            each.run(steps)
        found = []
        for index in range(pairs):
            seconds = {each: each.run(steps) for each in two[:: 1 if index % 2 else -1]}
            found.append(seconds[two[1]] / seconds[two[0]])
    return found


def fit(model, data, updates, learning_rate=1e-2):
    """Train for a number of updates, with a cosine down to zero."""
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, updates)
    model.compile(keras.optimizers.Adam(rate), entropy())
    model.fit(data.repeat(), steps_per_epoch=updates, epochs=1, verbose=0)


def batches(x, y, seed):
    """Shuffled batches of 64."""
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed).batch(64)


def accuracy(model, test):
    """Share of right answers."""
    return float((model.predict(test[0], verbose=0).argmax(1) == test[1]).mean())


def accuracies(seed, updates, losses):
    """Of the teacher, of the student alone, and of the student with each list of losses."""
    (x, y), test = zoo.mnist5k(seed)
    keras.utils.set_random_seed(seed)
    teacher = demo.cnn()
    fit(teacher, batches(x, y, seed), min(updates, 630))
    labelled, _ = zoo.split.stratified_split(y, test_fraction=3500 / 4000, seed=seed)
    part = np.full(len(y), -1)
    part[labelled] = y[labelled]
    found = {"teacher": accuracy(teacher, test)}
    start = demo.cnn(8)
    alone = keras.models.clone_model(start)
    alone.set_weights(start.get_weights())
    fit(alone, batches(x[labelled], y[labelled], seed), updates)
    found["alone"] = accuracy(alone, test)
    for name, chosen in losses.items():
        student = keras.models.clone_model(start)
        student.set_weights(start.get_weights())
        cache = distillation.TeacherCache.build(teacher, x, chosen, verbose=0)
        distiller = distillation.Distiller(cache, student, chosen, unlabelled=-1)
        fit(distiller, cache.dataset(x, part, batch_size=64, seed=seed), updates)
        found[name] = accuracy(student, test)
    found["share of weights"] = start.count_params() / teacher.count_params()
    return found


def _print(console, name, how, found):
    low, median, high = statistics.quantiles(found, n=4)
    console.print(
        f"{name:<44} {how:<6} {median:6.3f} ({low:.3f} to {high:.3f}, {len(found)} rounds)",
        highlight=False,
        soft_wrap=True,
    )


def print_costs(console, pairs, steps, quick):
    """The first part."""
    for name, losses in list(LOSSES.items())[: 1 if quick else None]:
        for jit_compile in (False, True):
            how = "XLA" if jit_compile else "graph"
            full, short = ratios(losses, jit_compile, pairs, steps)
            _print(console, f"{name}: over student + teacher", how, full)
            _print(console, f"{name}, cached: over student", how, short)
    _print(
        console, "logits, cached on disk, with its pipeline", "graph", pipeline_ratios(pairs, steps)
    )


def print_accuracies(console, seeds, updates, quick):
    """The second part."""
    losses = {"logits": ["logits"], "mse": ["mse"]}
    if not quick:
        losses |= {name: chosen for name, chosen in LOSSES.items() if name not in losses}
    rows = []
    for seed in range(seeds):
        rows.append(accuracies(seed, updates, losses))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items())
        console.print(f"seed {seed}: {shown}", highlight=False, soft_wrap=True)
    for name in losses:
        gains = [100 * (row[name] - row["alone"]) for row in rows]
        console.print(
            f"{name:<28} {statistics.mean(gains):+.2f} points over the student alone "
            f"(least {min(gains):+.2f}, most {max(gains):+.2f}, {seeds} seeds)",
            highlight=False,
            soft_wrap=True,
        )


REVIEWS_BATCH = 32
LENGTHS = [16, 24, 32, 48]  # Reviews of up to as many tokens share a batch.
LAYERS = [(0, 2, 5), (1, 3, 5), (0, 2, 4), (0, 1, 2)]
NORMS = "*feedforward_layer_norm"
REVIEW_LOSSES = {
    "logits": ["logits"],
    "logits, states, relations": [
        "logits",
        distillation.Features(NORMS, NORMS, mapping="same"),
        distillation.Relations(mapping="same"),
    ],
}


def reviews(seed, num_train):
    """To train on, to choose by, to test on: a pair of token arrays and labels each."""
    tokens = text.load(seed, num_train)
    train, validation = zoo.split.stratified_split(tokens.y_train, 0.15, seed)
    parts = [
        ({name: x[rows] for name, x in tokens.x_train.items()}, tokens.y_train[rows])
        for rows in (train, validation)
    ]
    return (*parts, (tokens.x_test, tokens.y_test))


def by_length(x, y, seed=None):
    """Batches of reviews of like length, cut to the longest of them; shuffled with a seed."""
    data = tf.data.Dataset.from_tensor_slices((x, y))
    if seed is not None:
        data = data.shuffle(len(y), seed=seed)

    def cut(x, y):
        length = tf.reduce_sum(x["padding_mask"])
        return {name: tokens[:length] for name, tokens in x.items()}, y

    return (
        data.map(cut)
        .bucket_by_sequence_length(
            lambda x, y: tf.size(x["token_ids"]), LENGTHS, [REVIEWS_BATCH] * (len(LENGTHS) + 1)
        )
        .prefetch(2)
    )


def right(model, x, y):
    """Share of right answers about reviews."""
    hits = [
        model.predict_on_batch(tokens).argmax(1) == labels.numpy()
        for tokens, labels in by_length(x, y)
    ]
    return float(np.concatenate(hits).mean())


def train_on_reviews(model, train, validation, seed, epochs, learning_rate=5e-5):
    """Train with a rate that falls to zero, and keep the epoch that is best in validation."""
    steps = epochs * (len(train[1]) // REVIEWS_BATCH + len(LENGTHS))
    rate = keras.optimizers.schedules.PolynomialDecay(learning_rate, steps)
    model.compile(keras.optimizers.Adam(rate), entropy(), metrics=["accuracy"])
    best = keras.callbacks.EarlyStopping(
        "val_accuracy", mode="max", patience=epochs, restore_best_weights=True
    )
    model.fit(
        by_length(*train, seed),
        epochs=epochs,
        validation_data=by_length(*validation),
        callbacks=[best],
        verbose=0,
    )


def fine_tuned(train, validation, seed, cache, epochs=2):
    """MiniLM with all layers, trained on the reviews or read from the cache."""
    name = f"minilm-reviews-{len(train[1])}-epochs-{epochs}-seed-{seed}.keras"
    path = None if cache is None else pathlib.Path(cache, name)
    if path and path.exists():
        return keras.models.load_model(path)
    model = text.classifier(seed=seed, freeze_embeddings=True)
    train_on_reviews(model, train, validation, seed, epochs)
    if path:
        with replacing(path) as temporary:
            model.save(temporary)
    return model


def print_reviews(console, seeds, epochs, cache, num_train):
    """MiniLM with half its layers."""

    def show(line):
        console.print(line, highlight=False, soft_wrap=True)

    for seed in range(seeds):
        train, validation, test = reviews(seed, num_train)
        teacher = fine_tuned(train, validation, seed, cache)
        best = right(teacher, *test)
        show(f"seed {seed}: teacher, 6 layers: test {best:.4f}, {right(teacher, *validation):.4f}")
        tried = {}
        for layers in LAYERS:
            tried[layers] = right(distillation.student(teacher, layers), *validation)
            show(f"  layers {layers}, untrained: validation {tried[layers]:.4f}")
        layers = max(tried, key=tried.get)
        for name, losses in {"alone": None, **REVIEW_LOSSES}.items():
            keras.utils.set_random_seed(seed)
            student = distillation.student(teacher, layers)
            model = student
            if losses:
                model = distillation.Distiller(teacher, student, losses, mask="padding_mask")
            start = time.perf_counter()
            train_on_reviews(model, train, validation, seed, epochs)
            seconds = time.perf_counter() - start
            found = right(student, *test)
            show(
                f"  {layers} {name}: test {found:.4f}, {found / best:.1%} of the teacher's; "
                f"validation {right(student, *validation):.4f}; {seconds:.0f} s"
            )


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["digits", "reviews"], default="digits")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved rounds, 2 or more")
    parser.add_argument("--steps", type=int, default=60, help="training steps a measurement")
    parser.add_argument("--seeds", type=int, default=5, help="of the accuracies")
    parser.add_argument("--updates", type=int, default=1260, help="of each student")
    parser.add_argument("--cost", action="store_true", help="the first part only")
    parser.add_argument("--accuracy", action="store_true", help="the second part only")
    parser.add_argument("--epochs", type=int, default=3, help="of the students of reviews")
    parser.add_argument("--num-train", type=int, help="reviews; all without it")
    parser.add_argument("--cache", help="a directory for the fine-tuned teachers of the reviews")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 10 steps, 1 seed")
    arguments = parser.parse_args()
    pairs, steps, seeds, updates = (
        (2, 10, 1, 100)
        if arguments.quick
        else (arguments.pairs, arguments.steps, arguments.seeds, arguments.updates)
    )
    console = rich.console.Console()
    if arguments.task == "reviews":
        print_reviews(console, seeds, arguments.epochs, arguments.cache, arguments.num_train)
        return
    if not arguments.accuracy:
        print_costs(console, pairs, steps, arguments.quick)
    if not arguments.cost:
        print_accuracies(console, seeds, updates, arguments.quick)


if __name__ == "__main__":
    main()
