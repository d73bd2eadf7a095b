import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfcompress import distillation
from tfcompress.distillation.mapping import cheapest, pairs


def test_uniform_is_tinybert():
    twelve, six = [f"t{i}" for i in range(1, 13)], [f"s{i}" for i in range(1, 7)]
    found = pairs("uniform", twelve, six, "x")
    assert found == [(f"t{2 * i}", f"s{i}") for i in range(1, 7)]
    assert [t for t, _ in pairs("uniform", twelve[:5], six[:2], "x")] == ["t3", "t5"]
    assert [t for t, _ in pairs("last", twelve, six[:2], "x")] == ["t11", "t12"]


def test_pairs_name_one_layer_each():
    layers = ["block_1", "block_2"]
    assert pairs((("*_2", "a"),), layers, ["a"], "x") == [("block_2", "a")]
    with pytest.raises(ValueError, match="matches 2 of the layers"):
        pairs((("block*", "a"),), layers, ["a"], "x")
    with pytest.raises(ValueError, match="2 layers of the teacher for 3"):
        pairs("uniform", layers, ["a", "b", "c"], "x")
    with pytest.raises(ValueError, match="distiller.search"):
        pairs("searched", layers, ["a"], "x")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 10**6), st.booleans())
def test_no_other_choice_is_cheaper(students, more, seed, in_order):
    teachers = students + more
    costs = np.random.default_rng(seed).integers(0, 9, (students, teachers)).astype(float)
    choose = itertools.combinations if in_order else itertools.permutations
    best = min(costs[range(students), list(c)].sum() for c in choose(range(teachers), students))
    chosen = cheapest(costs, in_order)
    assert costs[range(students), chosen].sum() == best
    assert len(set(chosen)) == students
    assert not in_order or chosen == sorted(chosen)


def test_bad_costs_are_refused():
    with pytest.raises(ValueError, match="finite"):
        cheapest(np.array([[np.nan, 1.0]]))


def test_search_finds_the_layers_that_were_copied():
    def make(widths, name):
        layers = [keras.layers.Dense(w, "tanh", name=f"{name}{i}") for i, w in enumerate(widths)]
        return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(2, name="head")])

    teacher, student = make([8, 7, 6, 5], "t"), make([8, 7], "s")
    for copied, layer in (("t0", "s0"), ("t1", "s1")):
        student.get_layer(layer).set_weights(teacher.get_layer(copied).get_weights())
    loss = distillation.Features("t?", "s?", mapping="searched")
    distiller = distillation.Distiller(teacher, student, [loss, "logits"])
    x = np.random.default_rng(0).normal(size=(200, 6)).astype("float32")
    with pytest.raises(ValueError, match="distiller.search"):
        distiller(x)
    assert distiller.search(x) == {0: (("t0", "s0"), ("t1", "s1"))}
    distiller.compile("adam", "mse")
    distiller.fit(x, np.zeros((200, 2)), verbose=0)
    assert len(distiller.heads) == 0  # Equal widths.
