"""`prune_vocabulary`: the same outputs for the tokens that are kept."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.graph import vocabulary
from tfcompress.graph.vocabulary import prune_vocabulary, used_tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s", "a", "movie"]


def tokenizer():
    models = pytest.importorskip("keras_hub.models")
    return models.BertTokenizer(vocabulary=WORDS, lowercase=True)


def bert():
    models = pytest.importorskip("keras_hub.models")
    return models.BertBackbone(
        vocabulary_size=len(WORDS),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=9,
    )


def classifier(size=50, **kwargs):
    ids = keras.Input((6,), dtype="int32")
    x = layers.Embedding(size, 4, name="words", **kwargs)(ids)
    x = layers.LSTM(5)(x)
    return keras.Model(ids, layers.Dense(2)(x))


def assert_equal(pruned, model, ids):
    a, b = pruned.model.predict(pruned.map(ids), verbose=0), model.predict(ids, verbose=0)
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("mask_zero", [False, True])
def test_kept_tokens_give_the_same_outputs(mask_zero, tmp_path):
    model, keep = classifier(mask_zero=mask_zero), [0, 3, 17, 18, 49]
    before = model.get_weights()
    pruned = prune_vocabulary(model, keep)
    ids = np.random.default_rng(0).choice(keep[1:], (8, 6)).astype("int32")
    ids[:, 4:] = 0
    assert_equal(pruned, model, ids)
    assert pruned.model.count_params() == model.count_params() - 45 * 4
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    pruned.model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    new = pruned.map(ids)
    np.testing.assert_array_equal(
        loaded.predict(new, verbose=0), pruned.model.predict(new, verbose=0)
    )


def test_a_dropped_token_becomes_the_nearest_kept_one_by_angle():
    model = keras.Sequential([keras.Input((2,), dtype="int32"), layers.Embedding(6, 2)])
    rows = [[1, 0], [0, 1], [9, 1], [0.1, 0.2], [-1, 0], [-3, -0.1]]
    model.set_weights([np.array(rows, "float32")])
    pruned = prune_vocabulary(model, [4, 0, 1, 0])
    assert pruned.kept.tolist() == [0, 1, 4]
    assert pruned.old_to_new.tolist() == [0, 1, 0, 1, 2, 2]
    assert pruned.map([[5, 2]]).tolist() == [[2, 0]]
    # Old 0 stands for itself only: what was nearest to it goes elsewhere.
    assert prune_vocabulary(model, [0, 1, 4], special=[0]).old_to_new.tolist() == [0, 1, 1, 1, 2, 2]


def test_map_of_tensors():
    pruned = prune_vocabulary(classifier(), [0, 5, 9])
    ids = keras.ops.convert_to_tensor([[0, 9, 5]])
    np.testing.assert_array_equal(pruned.map(ids), [[0, 2, 1]])


def test_reversible_embedding_shrinks_on_both_sides():
    for tie in (True, False):
        ids = keras.Input((4,), dtype="int32")
        words = layers.ReversibleEmbedding(30, 6, tie_weights=tie, name="words")
        hidden = layers.Dense(6)(words(ids))
        model = keras.Model(ids, layers.Softmax()(words(hidden, reverse=True)))
        pruned = prune_vocabulary(model, [1, 4, 20])
        assert pruned.model.output_shape == (None, 4, 3)
        x = np.array([[1, 4, 20, 4]])
        kept = model.predict(x, verbose=0)[..., [1, 4, 20]]
        # The softmax is over fewer tokens, so that only ratios are the same.
        np.testing.assert_allclose(
            pruned.model.predict(pruned.map(x), verbose=0),
            kept / kept.sum(-1, keepdims=True),
            atol=1e-6,
        )


def test_logits_with_a_bias_are_refused():
    ids = keras.Input((4,), dtype="int32")
    words = layers.ReversibleEmbedding(30, 6, name="words")
    model = keras.Model(ids, layers.Dense(2, name="head")(words(words(ids), reverse=True)))
    with pytest.raises(ValueError, match=r"logits that 'words' makes are read by \['head'\]"):
        prune_vocabulary(model, [1, 2])


def test_rows_that_are_used_as_a_whole_are_refused():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.words = layers.Embedding(30, 6, name="words")

        def call(self, ids):
            x = self.words(ids)
            return keras.ops.matmul(x, keras.ops.transpose(self.words.embeddings))

    model = Tied()
    model(np.zeros((1, 3), "int32"))
    with pytest.raises(ValueError, match="'words' is called on something else"):
        prune_vocabulary(model, [1, 2])


def test_other_readers_of_the_ids():
    def model(compared):
        ids = keras.Input((4,), dtype="int32")
        mask = keras.ops.cast(keras.ops.not_equal(ids, compared), "float32")
        x = layers.Embedding(30, 6)(ids) * keras.ops.expand_dims(mask, -1)
        return keras.Model(ids, layers.GlobalAveragePooling1D()(x))

    ids = np.array([[1, 7, 9, 0], [9, 9, 1, 1]])
    kept = model(1)
    assert_equal(prune_vocabulary(kept, [0, 1, 7, 9]), kept, ids)
    # The id 1 would become 0, and 9 would become 1.
    with pytest.raises(ValueError, match=r"'not_equal.*' \(NotEqual\) also reads the token ids"):
        prune_vocabulary(model(1), [1, 9])


def test_used_tokens_counts_over_all_texts_and_keeps_special_ones():
    old = tokenizer()
    texts = ["a good film", "good films", "a movie"] * 400
    assert used_tokens(old, texts).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert used_tokens(old, texts, min_count=800).tolist() == [0, 1, 2, 3, 4, 5, 7, 9]
    assert used_tokens(old, ["good"], always=[6]).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_bert_with_the_small_tokenizer_or_with_the_map():
    model, old = bert(), tokenizer()
    texts = ["good film", "a film"]
    keep = used_tokens(old, texts)
    pruned = prune_vocabulary(model, keep, special=vocabulary.special_ids(old))
    small = pruned.tokenizer(old)
    assert type(small) is type(old)
    assert small.get_vocabulary() == [WORDS[i] for i in keep]
    assert small.lowercase

    def inputs(ids):
        ones = np.ones_like(ids)
        return {"token_ids": ids, "padding_mask": ones, "segment_ids": 0 * ones}

    ids = np.array([old(x) for x in texts])
    new = np.array([small(x) for x in texts])
    np.testing.assert_array_equal(new, pruned.map(ids))
    a = pruned.model.predict(inputs(new), verbose=0)
    b = model.predict(inputs(ids), verbose=0)
    for key, value in b.items():
        np.testing.assert_allclose(a[key], value, atol=1e-6)
    # "bad" was dropped: the small tokenizer does not know it, the map takes another word for it.
    unknown = small.token_to_id("[UNK]")
    assert np.array(small("bad")).tolist() == [unknown]
    assert pruned.map(np.array(old("bad")))[0] in small("good film a")


def test_tokenizers_that_cannot_shrink():
    pruned = prune_vocabulary(bert(), [0, 1, 2, 3, 5])
    with pytest.raises(ValueError, match=r"needs \['\[MASK\]'\], which were dropped"):
        pruned.tokenizer(tokenizer())
    with pytest.raises(ValueError, match="got a function.*use map"):
        pruned.tokenizer(lambda texts: texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": []}, "at least one"),
        ({"keep": [50]}, "integers from 0 to 49"),
        ({"keep": [1.5]}, "integers from 0 to 49"),
        ({"keep": [1, 2]}, "masks the id 0"),
        ({"keep": [0, 2], "special": [2]}, "All of the 2 ids in keep are special"),
        ({"keep": [0], "embedding": "other"}, r"fits embedding='other'.*\{'words': 50\}"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_vocabulary(classifier(mask_zero=True), **arguments)


def test_wrong_texts_and_ids():
    with pytest.raises(ValueError, match="must be several texts"):
        used_tokens(len, "text")
    with pytest.raises(ValueError, match="texts is empty"):
        used_tokens(len, [])
    with pytest.raises(ValueError, match="min_count must be 1 or more, got 0"):
        used_tokens(len, ["a"], min_count=0)
    with pytest.raises(ValueError, match="ids from 0 to 50; expected"):
        prune_vocabulary(classifier(), [0, 1]).map([0, 50])


@pytest.mark.slow
def test_minilm_on_the_reviews_it_is_pruned_for():
    pytest.importorskip("keras_hub")
    from tfcompress import zoo

    (texts, _), _ = zoo.movie_reviews()
    model, preprocessor = zoo.minilm(), zoo.minilm_preprocessor()
    old = preprocessor.tokenizer
    keep = used_tokens(old, texts)
    pruned = prune_vocabulary(model, keep, special=vocabulary.special_ids(old))
    assert len(keep) < 0.5 * len(pruned.old_to_new)
    assert pruned.model.count_params() == model.count_params() - 384 * (30522 - len(keep))
    inputs = {k: np.asarray(v) for k, v in preprocessor(list(texts[:256])).items()}
    mapped = {**inputs, "token_ids": pruned.map(inputs["token_ids"])}
    a, b = pruned.model.predict(mapped, verbose=0), model.predict(inputs, verbose=0)
    for key, value in b.items():
        np.testing.assert_allclose(a[key], value, atol=1e-5)
    small = pruned.tokenizer(old)
    assert all(
        np.array_equal(small(text), pruned.map(np.asarray(old(text)))) for text in texts[:256]
    )
