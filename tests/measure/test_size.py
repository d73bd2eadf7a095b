import keras
import numpy as np
import pytest

from tfcompress.measure import size, sparsity, weights

L = keras.layers


def test_a_shared_weight_counts_once():
    inputs, dense = keras.Input((8,)), L.Dense(8)
    model = keras.Model(inputs, dense(dense(inputs)))
    assert [weight.params for weight in weights(model)] == [64, 8]


def test_a_tied_weight_counts_once():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = L.Embedding(10, 4)
            self.head = Head(self.embedding)

        def call(self, ids):
            return self.head(self.embedding(ids))

    class Head(L.Layer):
        def __init__(self, embedding):
            super().__init__()
            self.embedding = embedding

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))

    model = Tied()
    model(np.zeros((1, 3), "int32"))
    assert [w.shape for w in weights(model)].count((10, 4)) == 1


def test_nested_and_non_trainable_weights_count_and_seeds_do_not():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization()])
    model = keras.Sequential([keras.Input((4,)), inner, L.Dropout(0.5)])
    assert sum(weight.params for weight in weights(model)) == 4 * 3 + 3 + 4 * 3
    assert sum(weight.params for weight in weights(model)) == model.count_params()


def test_sparsity_is_over_kernels_only():
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    assert sparsity(model) == 0.0  # the bias is zero
    model.layers[0].kernel.assign([[0, 1], [0, 2], [0, 3], [4, 5]])
    assert sparsity(model) == 3 / 8


def test_an_unbuilt_model_is_refused():
    with pytest.raises(ValueError, match="has no weights yet. Call it on a batch"):
        weights(keras.Sequential([L.Dense(2)]))


def test_size_leaves_the_optimizer_out_and_on():
    model = keras.Sequential([keras.Input((100,)), L.Dense(100)])
    plain = size(model)
    assert 4 * 100 * 101 < plain.bytes < 4 * 100 * 101 + 20_000
    model.compile("adam", "mse")
    model.fit(np.zeros((4, 100)), np.zeros((4, 100)), verbose=0)
    trained = size(model)
    assert trained.bytes < plain.bytes + 2_000
    model.fit(np.zeros((4, 100)), np.zeros((4, 100)), verbose=0)
    assert int(model.optimizer.iterations) == 2


def test_zeros_shrink_the_zipped_size_only():
    model = keras.Sequential([keras.Input((200,)), L.Dense(200)])
    dense = size(model)
    model.layers[0].kernel.assign(np.eye(200))
    sparse = size(model)
    assert sparse.bytes == dense.bytes
    assert sparse.zipped_bytes < dense.zipped_bytes / 10


def test_a_model_whose_class_cannot_be_serialized_has_a_size():
    class Opaque(keras.Model):
        def __init__(self, function):
            super().__init__()
            self.function, self.dense = function, L.Dense(50)

        def call(self, x):
            return self.function(self.dense(x))

    model = Opaque(lambda x: x)
    model(np.zeros((1, 50)))
    assert size(model).bytes > 4 * 50 * 51


def test_size_of_files_and_directories(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(bytes(500))
    assert size(tmp_path / "a").bytes == 1000
    assert size(tmp_path).bytes == 1500
    assert size(tmp_path).zipped_bytes < 500
    with pytest.raises(FileNotFoundError, match="no file .*missing"):
        size(tmp_path / "missing")
