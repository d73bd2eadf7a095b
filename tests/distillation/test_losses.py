"""Values of the losses, against formulas written out in numpy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress import distillation, schedules
from tfcompress.distillation import names
from tfcompress.distillation.losses import Context

RANDOM = np.random.default_rng(0)
T = RANDOM.normal(size=(5, 4)).astype("float32")
S = RANDOM.normal(size=(5, 4)).astype("float32")
WEIGHTS = np.array([0.5, 0.0, 2.0, 1.0, 0.0], "float32")


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def value(loss, teacher, student, weights=None, **context):
    as_list = isinstance(teacher, list)
    one, two = (teacher, student) if as_list else ([teacher], [student])
    return float(loss(one, two, Context(weights=weights, **context)))


def huber(x):
    return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def test_logits():
    losses = 9 * kl(softmax(T / 3), softmax(S / 3))
    loss = distillation.get("logits")
    assert value(loss, T, S) == pytest.approx(losses.mean(), rel=1e-5)
    assert value(loss, T, S, WEIGHTS) == pytest.approx((WEIGHTS * losses).mean(), rel=1e-5)


def test_logits_of_independent_labels():
    p, q = 1 / (1 + np.exp(-T / 2)), 1 / (1 + np.exp(-S / 2))
    losses = 4 * (kl(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1))).sum(-1)
    loss = distillation.Logits(2.0, activation="sigmoid")
    assert value(loss, T, S) == pytest.approx(losses.mean(), rel=1e-5)
    told = distillation.Logits(2.0)
    assert value(told, T, S, activations=("sigmoid", "sigmoid")) == value(loss, T, S)


def test_one_class_has_no_softmax():
    with pytest.raises(ValueError, match=r'activation="sigmoid"'):
        value(distillation.Logits(), T[:, :1], S[:, :1])


def test_temperature_follows_a_schedule_in_a_graph():
    loss = distillation.Logits(schedules.Linear(4.0, 1.0, begin_step=0, end_step=10))
    at = tf.function(lambda step: loss([T], [S], Context(step=step)), jit_compile=True)
    for step, temperature in ((0, 4.0), (5, 2.5), (10, 1.0), (99, 1.0)):
        expected = value(distillation.Logits(temperature), T, S)
        assert float(at(tf.constant(step, tf.int64))) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy():
    losses = -4 * (softmax(T / 2) * np.log(softmax(S / 2))).sum(-1)
    loss = distillation.CrossEntropy(2.0)
    assert value(loss, T, S, WEIGHTS) == pytest.approx((WEIGHTS * losses).mean(), rel=1e-5)


def test_mean_squared_error():
    losses = ((T - S) ** 2).mean(-1)
    loss = distillation.get("mse")
    assert value(loss, T, S, WEIGHTS) == pytest.approx((WEIGHTS * losses).mean(), rel=1e-5)


def sequences(width=4):
    return RANDOM.normal(size=(5, 3, width)).astype("float32")


MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)


def test_features_count_where_the_mask_is():
    t, s = sequences(), sequences()
    s[~MASK] = np.inf  # What is padded must not matter, whatever it is.
    squares = ((t - s) ** 2).mean(-1)
    losses = np.array([squares[i][MASK[i]].mean() if MASK[i].any() else 0.0 for i in range(5)])
    loss = distillation.get("features")
    assert value(loss, t, s, WEIGHTS, mask=MASK) == pytest.approx(
        (WEIGHTS * losses).mean(), rel=1e-5
    )


def test_weights_may_be_of_positions():
    t, s = sequences(), sequences()
    weights = RANDOM.uniform(size=(5, 3)).astype("float32")
    expected = (weights * ((t - s) ** 2).mean(-1)).mean()
    assert value(distillation.Features(), t, s, weights) == pytest.approx(expected, rel=1e-5)


def test_features_of_unequal_widths_are_projected():
    loss = distillation.Features()
    head = loss.head([(None, 6)], [(None, 4)])
    kernel, bias = (np.asarray(w) for w in head.get_weights())
    t = RANDOM.normal(size=(5, 6)).astype("float32")
    expected = ((t - (S @ kernel + bias)) ** 2).mean()
    assert value(loss, t, S, head=head) == pytest.approx(expected, rel=1e-5)
    assert loss.head([(None, 4)], [(None, 4)]) is None
    assert distillation.Features(project=True).head([(None, 4)], [(None, 4)]) is not None
    with pytest.raises(ValueError, match="widths 6 of the teacher and 4"):
        distillation.Features(project=False).head([(None, 6)], [(None, 4)])


def test_maps_are_averaged_to_the_smaller():
    t = RANDOM.normal(size=(2, 4, 4, 3)).astype("float32")
    s = RANDOM.normal(size=(2, 2, 2, 3)).astype("float32")
    pooled = t.reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
    expected = ((pooled - s) ** 2).mean()
    assert value(distillation.Features(), t, s) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="no multiple"):
        value(distillation.Features(), t, s.repeat(3, 1)[:, :3])


def test_activation_maps():
    t = RANDOM.normal(size=(5, 4, 4, 3)).astype("float32")
    s = RANDOM.normal(size=(5, 4, 4, 2)).astype("float32")
    maps = [(x**2).sum(-1).reshape(5, -1) for x in (t, s)]
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in maps)
    losses = ((one - two) ** 2).mean(-1)
    loss = distillation.get("activation_maps")
    assert value(loss, t, s, WEIGHTS) == pytest.approx((WEIGHTS * losses).mean(), rel=1e-5)


def test_masked_features_are_generated_from_what_is_left():
    loss = distillation.MaskedFeatures(ratio=0.5)
    shape = (None, 6, 6, 3)
    head = loss.head([shape], [(None, 6, 6, 2)])
    x = tf.ones((4, 6, 6, 2))
    whole, part = head(x, training=False), head(x, training=True)
    assert float(tf.reduce_max(tf.abs(whole - part))) > 1e-3
    t = RANDOM.normal(size=(4, 6, 6, 3)).astype("float32")
    expected = np.square(t - whole.numpy()).mean()
    assert value(loss, t, x, head=head, training=False) == pytest.approx(expected, rel=1e-5)
    drawn = head.align(x).numpy()
    seen = []
    head.first.call, first = lambda x: seen.append(x.numpy()) or first(x), head.first.call
    head(x, training=True)
    masked = (seen[0] == 0).all(-1)
    assert 0.3 < masked.mean() < 0.7
    np.testing.assert_array_equal(seen[0][~masked], drawn[~masked])
    assert loss.head([shape], [shape]).align is None  # As in the authors' code.


def test_contrastive():
    loss = distillation.Contrastive(temperature=0.5)
    v, u = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (T, S))
    logits = u @ v.T / 0.5
    losses = -np.log(softmax(logits).diagonal())
    assert value(loss, T, S) == pytest.approx(losses.mean(), rel=1e-5)
    kept = WEIGHTS > 0
    losses = -np.log(softmax(logits[np.ix_(kept, kept)]).diagonal())
    expected = (WEIGHTS[kept] * losses).sum() / 5
    assert value(loss, T, S, WEIGHTS) == pytest.approx(expected, rel=1e-5)


def test_contrastive_remembers_earlier_examples():
    loss = distillation.Contrastive(width=3, temperature=0.5, bank=8)
    head = loss.head([(None, 4)], [(None, 4)])
    batches = [
        (RANDOM.normal(size=(3, 4)).astype("float32"), RANDOM.normal(size=(3, 4)).astype("float32"))
        for _ in range(4)
    ]
    weights = np.array([1.0, 0.0, 2.0], "float32")
    kept, filled = np.zeros((0, 3)), np.zeros(0)
    for t, s in batches:
        v, u = (np.asarray(layer(x)) for layer, x in ((head.teacher, t), (head.student, s)))
        v, u = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, u))
        negatives = np.concatenate([v[weights > 0], kept[filled > 0]])
        logits = u[weights > 0] @ negatives.T / 0.5
        losses = -np.log(softmax(logits).diagonal())
        expected = (weights[weights > 0] * losses).sum() / 3
        watched = value(loss, t, s, weights, head=head, training=False)
        assert watched == pytest.approx(expected, rel=1e-5)
        assert value(loss, t, s, weights, head=head) == pytest.approx(expected, rel=1e-5)
        kept = np.concatenate([v, kept])[:8]
        filled = np.concatenate([weights > 0, filled])[:8]
    np.testing.assert_allclose(head.bank.embeddings, kept, atol=1e-6)
    np.testing.assert_array_equal(head.bank.filled, filled)
    assert filled.sum() == 5


def test_what_the_bank_holds_has_no_gradient():
    loss = distillation.Contrastive(width=3, bank=4)
    head = loss.head([(None, 4)], [(None, 4)])
    value(loss, T, S, head=head)
    assert head.bank.filled.numpy().tolist() == [1.0] * 4  # Of a batch of 5.
    assert {v.path for v in head.trainable_variables} & {v.path for v in head.bank.variables} == (
        set()
    )


def rkd_distance(t, s, w):
    n = len(t)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    weight = np.array([w[i] * w[j] for i, j in pairs])
    relative = []
    for x in (t, s):
        d = np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
        relative.append(d / ((weight * d).sum() / weight.sum()))
    return (weight * huber(relative[0] - relative[1])).sum() / len(pairs)


def rkd_angle(t, s, w):
    n, total, count = len(t), 0.0, 0
    for i in range(n):
        for j in range(n):
            for k in range(n):
                if len({i, j, k}) < 3:
                    continue
                cosines = []
                for x in (t, s):
                    a, b = x[j] - x[i], x[k] - x[i]
                    cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                total += w[i] * w[j] * w[k] * huber(cosines[0] - cosines[1])
                count += 1
    return total / count


def similarity(t, s, w):
    grams = []
    for x in (t, s):
        gram = x @ x.T
        grams.append(gram / np.sqrt((w[None] * gram**2).sum(1, keepdims=True)))
    return (w[:, None] * w[None] * (grams[0] - grams[1]) ** 2).mean()


@pytest.mark.parametrize("reference", [rkd_distance, rkd_angle, similarity])
def test_relations_of_examples(reference):
    loss = distillation.get(reference.__name__)
    s = RANDOM.normal(size=(5, 7)).astype("float32")
    for weights in (np.ones(5, "float32"), WEIGHTS):
        expected = reference(T.astype(float), s.astype(float), weights)
        assert value(loss, T, s, weights) == pytest.approx(expected, rel=1e-4)
    assert value(loss, T, s) == pytest.approx(value(loss, T, s, np.ones(5)), rel=1e-6)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "similarity"])
def test_equal_examples_have_finite_gradients(name):
    s = tf.Variable(np.repeat(S[:1], 5, 0))
    with tf.GradientTape() as tape:
        loss = distillation.get(name)([T], [s])
    assert np.isfinite(tape.gradient(loss, s).numpy()).all()


def qkv(heads, size):
    return [RANDOM.normal(size=(5, 3, heads, size)).astype("float32") for _ in range(3)]


def scores(query, key):
    return np.einsum("bihd,bjhd->bhij", query, key) / np.sqrt(query.shape[-1])


def test_attention_scores():
    t, s = qkv(2, 4), qkv(2, 3)
    squares = ((scores(*t[:2]) - scores(*s[:2])) ** 2).mean(1)
    loss = distillation.get("attention")
    assert value(loss, t, s) == pytest.approx(squares.mean(), rel=1e-5)
    losses = [
        squares[i][np.ix_(MASK[i], MASK[i])].mean() if MASK[i].any() else 0.0 for i in range(5)
    ]
    expected = (WEIGHTS * losses).mean()
    assert value(loss, t, s, WEIGHTS, mask=MASK) == pytest.approx(expected, rel=1e-5)


def test_attention_maps_of_unequal_heads():
    t, s = qkv(4, 4), qkv(2, 3)
    maps = [softmax(scores(*x[:2])).mean(1) for x in (t, s)]
    loss = distillation.Attention(on="maps")
    assert value(loss, t, s) == pytest.approx(kl(*maps).mean(), rel=1e-4)
    means = [scores(*x[:2]).mean(1) for x in (t, s)]
    expected = np.square(means[0] - means[1]).mean()
    assert value(distillation.Attention(), t, s) == pytest.approx(expected, rel=1e-4)


def test_relations_of_queries_keys_and_values():
    t, s = qkv(4, 2), qkv(2, 3)
    loss = distillation.Relations(heads=2)
    split = [[x.reshape(5, 3, 2, -1) for x in each] for each in (t, s)]
    total = 0.0
    for i in filter(lambda i: MASK[i].any(), range(5)):
        for part in range(3):
            for head in range(2):
                maps = []
                for each in split:
                    x = each[part][i, MASK[i], head]
                    maps.append(softmax(x @ x.T / np.sqrt(x.shape[-1])))
                total += WEIGHTS[i] * kl(*maps).mean() / 2
    assert value(loss, t, s, WEIGHTS, mask=MASK) == pytest.approx(total / 5, rel=1e-4)
    with pytest.raises(ValueError, match="cannot be split into 4"):
        value(distillation.Relations(), t, s)


def test_the_first_minilm():
    t, s = qkv(2, 4), qkv(2, 3)
    queries = kl(*[softmax(scores(*x[:2])) for x in (t, s)]).mean()
    values = kl(*[softmax(scores(x[2], x[2])) for x in (t, s)]).mean()
    loss = distillation.Relations(relations=("qk", "vv"))
    assert value(loss, t, s) == pytest.approx(queries + values, rel=1e-4)


@pytest.mark.parametrize("name", sorted(names.LOSSES))
def test_every_loss_survives_its_config(name):
    loss = distillation.get(name)
    config = keras.saving.serialize_keras_object(loss)
    assert config["registered_name"].startswith("tfcompress>")
    assert keras.saving.deserialize_keras_object(config) == loss


def test_arguments_survive_too():
    losses = [
        distillation.Logits(schedules.Linear(4.0, 1.0, 0, 10)),
        distillation.Features(("a", "b"), "c*", mapping=(("a", "c1"), ("b", "c2"))),
        distillation.Relations("encoder_3", relations=("qk", "vv"), heads=4),
    ]
    for loss in losses:
        config = keras.saving.serialize_keras_object(loss)
        assert keras.saving.deserialize_keras_object(config) == loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distillation.Logits(0.0), "above 0"),
        (lambda: distillation.Logits("hot"), "number or a schedule"),
        (lambda: distillation.Logits(activation="tanh"), "softmax"),
        (lambda: distillation.Features(mapping="nearest"), "Unknown mapping"),
        (lambda: distillation.Features(mapping=(("a", "b", "c"),)), "pairs"),
        (lambda: distillation.MaskedFeatures(ratio=1.0), r"\[0, 1\)"),
        (lambda: distillation.Attention(on="weights"), "scores"),
        (lambda: distillation.Relations(relations=("qx",)), "Unknown relations"),
        (lambda: distillation.Contrastive(temperature=0), "above 0"),
        (lambda: distillation.Contrastive(bank=-1), "0 or more"),
        (lambda: distillation.get("logit"), "Did you mean 'logits'"),
        (lambda: distillation.get(3), "Unknown distillation loss"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_of_keras_become_ours():
    theirs = keras.distillation
    assert distillation.get(theirs.LogitsDistillation(2.0)) == distillation.Logits(2.0)
    feature = theirs.FeatureDistillation("mse", "a", "b")
    assert distillation.get(feature) == distillation.Features("a", "b")
    with pytest.raises(ValueError, match="sample weights"):
        distillation.get(theirs.FeatureDistillation("mae", "a", "b"))
