import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops.regrowth import SET, RigL, get, regrow


@hypothesis.given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@hypothesis.settings(max_examples=60, deadline=None)
def test_it_exchanges_the_smallest_for_the_most_promising(n, kept_share, share, seed):
    random = np.random.default_rng(seed)
    kept = max(1, round(kept_share * n))
    mask = np.zeros(n, bool)
    mask[random.permutation(n)[:kept]] = True
    size, growth = np.where(mask, random.random(n) + 0.1, 0), random.random(n)
    new = regrow([tf.constant(mask)], [tf.constant(size)], [tf.constant(growth)], share)[0].numpy()
    exchanged = min(int(np.floor(share * kept)), kept - 1)
    assert new.sum() == kept
    stayed = np.argsort(-size)[: kept - exchanged]
    assert new[stayed].all()
    grown = np.flatnonzero(new & ~np.isin(np.arange(n), stayed))
    rest = np.flatnonzero(~np.isin(np.arange(n), [*stayed, *grown]))
    assert len(grown) == exchanged
    if len(grown) and len(rest):
        # In float32, as the scores are compared.
        assert growth[grown].astype("float32").min() >= growth[rest].astype("float32").max()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_graph_it_is_the_same(jit_compile):
    random = np.random.default_rng(0)
    mask = tf.constant(random.random((7, 9)) < 0.4)
    size, growth = (tf.constant(random.random((7, 9)), tf.float32) for _ in range(2))

    def run(share):
        return regrow([mask], [size], [growth], share)[0]

    share = tf.constant(0.3, tf.float64)
    compiled = tf.function(run, jit_compile=jit_compile)(share)
    np.testing.assert_array_equal(compiled.numpy(), run(share).numpy())


def test_rigl_decays_along_a_cosine():
    shares = [
        float(RigL(0.4).share(tf.constant(t, tf.int64), tf.constant(100, tf.int64)))
        for t in (0, 50, 100, 200)
    ]
    np.testing.assert_allclose(shares, [0.4, 0.2, 0.0, 0.0], atol=1e-12)


def test_set_draws_anew_at_every_step():
    first, again, later = (
        SET().scores((100,), 3, tf.constant(step, tf.int64)).numpy() for step in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first, later)[0, 1]) < 0.4


def test_names_and_bad_arguments():
    assert get("rigl") == RigL() and get("set") == SET() and get(None) is None
    with pytest.raises(ValueError, match="Unknown regrowth 'ril'.*'rigl'"):
        get("ril")
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got 1.5"):
        RigL(fraction=1.5)
