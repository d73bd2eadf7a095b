import numpy as np
import pytest

import tfcompress as tfc
from tests.models import kernels, mlp, nested, subclassed


@pytest.mark.parametrize("make", [mlp, nested, subclassed])
def test_the_count_is_exact(make):
    model = make()
    assert tfc.prune(model, sparsity=0.8) is model
    for weight in kernels(model).values():
        assert (weight == 0).sum() == weight.size - round(weight.size * 0.2)


def test_the_smallest_go_everywhere():
    model = mlp()
    before = kernels(model)
    tfc.prune(model, sparsity=0.5, allocation="global")
    kept = np.concatenate([np.abs(w[w != 0]) for w in kernels(model).values()])
    pruned = np.concatenate([np.abs(before[p][w == 0]) for p, w in kernels(model).items()])
    assert kept.min() >= pruned.max()
    assert kept.size == pruned.size


def test_a_threshold():
    model = mlp()
    before = kernels(model)
    tfc.prune(model, threshold=0.25)
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(
            weight, np.where(np.abs(before[path]) < 0.25, 0, before[path])
        )


def test_a_criterion_of_ones_own():
    model = tfc.prune(mlp(), sparsity=0.5, criterion=lambda weight: -weight)
    assert all((weight <= 0.3).all() for weight in kernels(model).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give either sparsity or threshold"),
        ({"sparsity": 0.5, "threshold": 0.1}, "Give either sparsity or threshold"),
        ({"sparsity": 1.0}, r"fraction of zeros in \[0, 1\), got 1.0"),
        ({"threshold": -1}, "threshold must be above 0, got -1"),
        ({"sparsity": 0.5, "criterion": "magic"}, "Unknown criterion 'magic'"),
        ({"sparsity": 0.5, "include": "nothing"}, "The glob 'nothing' matches no variable"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(arguments, message):
    model = mlp()
    before = kernels(model)
    with pytest.raises(ValueError, match=message):
        tfc.prune(model, **arguments)
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(weight, before[path])
