"""A cache of what teachers say about a `tf.data.Dataset`, and of several teachers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.distillation.networks import copy, data, entropy, net
from tfcompress.distillation import Distiller, Features, TeacherCache
from tfcompress.distillation.cache import unpack
from tfcompress.distillation.examples import hashes

X, Y = data()
IDS = np.random.default_rng(1).permutation(1000)[:48]


def build(teacher, x, losses="logits", **arguments):
    return TeacherCache.build(teacher, x, losses, verbose=0, **arguments)


def batched(*tensors, size=16):
    return tf.data.Dataset.from_tensor_slices(tensors if tensors[1:] else tensors[0]).batch(size)


def with_ids(ids=IDS, x=X):
    return batched({"features": x, "id": ids}, Y)


def assert_knows(cache, dataset, teacher, count=48):
    """Every example of `dataset` comes with what the teacher says about it; gives the labels."""
    labels = []
    for x, y in cache.dataset(dataset):
        inputs, targets = unpack(x)
        inputs = inputs["features"] if isinstance(inputs, dict) else inputs
        said = cache.restore(targets)[0]["output:0"]
        np.testing.assert_allclose(said, teacher(inputs, training=False), atol=2e-3)
        labels += y.numpy().tolist()
    assert len(labels) == count
    return labels


def test_inputs_are_found_again_in_any_order():
    teacher = net(16)
    shuffled = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(48)
    cache = build(teacher, shuffled.batch(20))  # Shuffled anew when it is read again.
    orders = [assert_knows(cache, shuffled.batch(7), teacher) for _ in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    positive = tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda x, y: x[0] > 0)
    count = int((X[:, 0] > 0).sum())
    assert_knows(cache, positive.repeat(2).batch(9), teacher, 2 * count)


@pytest.mark.parametrize("ids", [IDS, "text"])
def test_ids_find_examples_and_do_not_reach_the_models(ids):
    ids = ids if isinstance(ids, np.ndarray) else np.array([f"no. {i}" for i in IDS])
    inputs = keras.Input((6,), name="features")
    teacher = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(8, "tanh")(inputs)))
    cache = build(teacher, with_ids(ids), key="id")
    assert_knows(cache, with_ids(ids).unbatch().shuffle(48).batch(11), teacher)
    # With ids, other inputs are the user's business: the answers are about the first ones.
    x = next(iter(cache.dataset(with_ids(ids, X + 1.0))))[0]
    said = cache.restore(unpack(x)[1])[0]["output:0"]
    np.testing.assert_allclose(said, teacher(X[:16]), atol=2e-3)


def test_training_on_it_is_training_on_the_teachers(tmp_path):
    teachers, losses = [net(16), net(4)], ["logits", "features"]
    weights = np.linspace(0, 2, 48).astype("float32")
    plain = batched(X, Y, weights)
    build(teachers, plain, losses, dtype="float32", path=tmp_path / "cache")
    cache = TeacherCache.open(tmp_path / "cache", [copy(each) for each in teachers], plain)
    trained = []
    for teacher, given in ((teachers, plain), (cache, cache.dataset(plain))):
        keras.utils.set_random_seed(1)
        student = net()
        distiller = Distiller(teacher, student, losses, teacher_weights=[0.9, 0.3])
        distiller.compile(keras.optimizers.SGD(0.1), entropy(), jit_compile=True)
        distiller.fit(given, epochs=2, shuffle=False, verbose=0)
        trained.append(student.get_weights())
    for one, two in zip(*trained, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_stale_cache_of_several_teachers_is_refused(tmp_path):
    teachers = [net(16), net(4)]
    cache = build(teachers, X, path=tmp_path / "cache")
    assert [each.model for each in cache.points] == ["net", "net"]
    TeacherCache.open(tmp_path / "cache", teachers, X)
    with pytest.raises(ValueError, match="other weights"):
        TeacherCache.open(tmp_path / "cache", teachers[::-1], X)
    with pytest.raises(ValueError, match="by 2 teachers, got 1"):
        TeacherCache.open(tmp_path / "cache", teachers[0])
    twin = copy(teachers[1])
    twin.get_layer("second").activation = keras.activations.tanh
    with pytest.raises(ValueError, match="gives other values at 'output:0'"):
        TeacherCache.open(tmp_path / "cache", [teachers[0], twin], X)
    with pytest.raises(ValueError, match=r"lacks the points \['head:input'\]"):
        Distiller(cache, net(), ["features"])
    with pytest.raises(ValueError, match="teacher_weights has 3 entries, expected 2"):
        Distiller(cache, net(), "logits", teacher_weights=[1, 1, 1])


def test_what_the_teacher_has_not_seen_is_refused():
    cache = build(net(16), batched(X, Y))
    augmented = batched(X, Y).map(lambda x, y: (x + tf.random.uniform(x.shape[1:]), y))
    for other in (augmented, batched(X.astype("float16"), Y), batched(X[:, ::-1], Y)):
        with pytest.raises(ValueError, match="not asked about 16, known by inputs.*augmented"):
            cache.dataset(other)
    late = np.concatenate([X[:20], X[20:] + 1.0])
    dataset = cache.dataset(batched(late, Y))  # Only what is read can be refused.
    with pytest.raises(tf.errors.InvalidArgumentError, match="not asked about 12"):
        list(dataset)
    by_id = build(net(16), with_ids(), key="id")
    with pytest.raises(ValueError, match="known by id"):
        by_id.dataset(with_ids(IDS + 1000))


def test_what_has_no_key_is_refused():
    teacher = net(16)
    with pytest.raises(ValueError, match="repeats forever"):
        build(teacher, batched(X).repeat())
    with pytest.raises(ValueError, match="batches of dense tensors"):
        build(teacher, tf.data.Dataset.range(4))
    ragged = tf.data.Dataset.from_tensors(tf.ragged.constant([[1.0], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="pad what is ragged"):
        build(teacher, ragged)
    with pytest.raises(ValueError, match="names no input"):
        build(teacher, batched(X, Y), key="id")
    with pytest.raises(ValueError, match="one integer or string an example"):
        build(teacher, with_ids(IDS.astype("float32")), key="id")
    with pytest.raises(ValueError, match="does not tell 48 examples apart: 1 have"):
        build(teacher, with_ids(np.r_[IDS[:-1], IDS[:1]]), key="id")
    with pytest.raises(ValueError, match="found by index"):
        build(teacher, X, key="id")
    with pytest.raises(ValueError, match="made from arrays, and a tf.data.Dataset"):
        build(teacher, X).dataset(batched(X, Y))
    with pytest.raises(ValueError, match="made from a tf.data.Dataset, and arrays"):
        build(teacher, batched(X)).dataset(X, Y)
    with pytest.raises(ValueError, match="in it already"):
        build(teacher, batched(X)).dataset(batched(X), Y)


def test_a_dataset_that_changes_or_has_shapes_of_its_own_leaves_nothing(tmp_path):
    keep = iter([True] * 48 + [False] * 48)
    changing = tf.data.Dataset.from_generator(
        lambda: (x for x in X if next(keep)), output_signature=tf.TensorSpec((6,))
    )
    with pytest.raises(ValueError, match="48 examples when they were counted, and none"):
        build(net(16), changing.batch(16), path=tmp_path / "cache")
    inputs = keras.Input((None, 2))
    pooled = keras.layers.GlobalAveragePooling1D()(keras.layers.Dense(2, name="states")(inputs))
    teacher = keras.Model(inputs, keras.layers.Dense(3)(pooled))
    lengths = tf.data.Dataset.from_generator(
        lambda: (np.ones((4, n, 2)) for n in (3, 5)), output_signature=tf.TensorSpec((4, None, 2))
    )
    assert build(teacher, lengths).size == 8
    with pytest.raises(ValueError, match="Pad the inputs to one length"):
        build(teacher, lengths, Features("states", "states"), path=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_hash_is_of_values_shapes_and_dtypes():
    x = np.array([[1, 2], [3, 4]])
    found = hashes([x])
    assert found.tolist() == hashes([x[::-1]])[::-1].tolist()
    others = [hashes([other])[0] for other in (x[:, ::-1], x[:, :, None], x.astype("int32"))]
    text = hashes([np.array([b"one", b"two"], object)])
    assert text.tolist() == hashes([np.array([b"one", b"two"], object).copy()]).tolist()
    assert len({found[0], found[1], *others, *text}) == 7
