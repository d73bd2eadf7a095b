"""Vocabulary pruning: a token embedding with the rows that are used, and what goes with it."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import Uses, copied, replay
from tfcompress.keras_hooks import nodes

_TEXTS_AT_ONCE = 512
_ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """A model with a smaller vocabulary, and how old token ids become new ones.

    Args:
        model: Takes new ids, 0 to `len(kept) - 1`.
        kept: The old ids that are left, ascending, int32: the new id is the position here.
        old_to_new: New id of each old one, int32, `(old vocabulary size,)`; that of a dropped
            token is the one of its nearest kept neighbour.
    """

    model: keras.Model
    kept: np.ndarray
    old_to_new: np.ndarray

    def map(self, ids: Any) -> Any:
        """New ids for old ones, to be used behind the full tokenizer.

        This is the better way to read text with dropped tokens: a rare word becomes the kept one
        whose embedding is most alike. The small tokenizer splits it into shorter pieces, which
        moves the mean hidden state of MiniLM half as far again (on film reviews that have any).

        Args:
            ids: Old ids, integers of any shape: arrays, lists, or tensors (in `tf.data` too).

        Returns:
            Int32 of the same shape: a NumPy array, or a tensor for a tensor.

        Raises:
            ValueError: An id of an array or list is not in the old vocabulary.
        """
        if keras.ops.is_tensor(ids):
            return keras.ops.take(self.old_to_new, ids, axis=0)
        ids = np.asarray(ids)
        size = len(self.old_to_new)
        if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= size):
            raise ValueError(
                f"map got {ids.dtype} ids from {ids.min()} to {ids.max()}; expected integers of "
                f"the old vocabulary, 0 to {size - 1}."
            )
        return self.old_to_new[ids]

    def tokenizer(self, old: Any) -> Any:
        """A tokenizer of the same class that gives new ids itself, for WordPiece of KerasHub.

        It needs no full vocabulary, and equals `map` behind the old one on texts whose tokens are
        all kept. Elsewhere it splits a dropped word into pieces that are kept, or `[UNK]`.

        Args:
            old: A tokenizer with `get_vocabulary()` whose config has a `vocabulary` and no
                `merges`, such as `keras_hub.tokenizers.WordPieceTokenizer`.

        Returns:
            The new tokenizer.

        Raises:
            ValueError: `old` is of another kind, has another vocabulary, or one of its special
                tokens was dropped.
        """
        config = old.get_config() if hasattr(old, "get_config") else {}
        if "vocabulary" not in config or "merges" in config or not hasattr(old, "get_vocabulary"):
            raise ValueError(
                f"tokenizer got a {type(old).__name__}, whose pieces depend on more than a list of "
                "tokens. Expected a WordPiece tokenizer; with any other, keep it and use map(ids)."
            )
        tokens = list(old.get_vocabulary())
        if len(tokens) > len(self.old_to_new):
            raise ValueError(
                f"The tokenizer has {len(tokens)} tokens and the embedding had "
                f"{len(self.old_to_new)} rows. Pass the tokenizer that the model was trained with."
            )
        kept = set(self.kept.tolist())
        lost = [tokens[i] for i in special_ids(old) if i not in kept]
        if lost:
            raise ValueError(
                f"The tokenizer needs {lost}, which were dropped. Keep special_ids(tokenizer) too, "
                "as used_tokens does."
            )
        smaller = [tokens[i] for i in self.kept if i < len(tokens)]
        return type(old).from_config({**config, "vocabulary": smaller})


def used_tokens(
    tokenizer: Callable[[list[str]], Any],
    texts: Iterable[str],
    min_count: int = 1,
    always: Iterable[int] = (),
) -> np.ndarray:
    """The ids of the tokens that texts are made of.

    Args:
        tokenizer: From a list of texts to token ids: one sequence a text, ragged or not; e.g. a
            tokenizer of KerasHub.
        texts: The texts that the model is for, e.g. those it was trained on.
        min_count: How often a token must occur, 1 or more.
        always: Ids to keep in any case; the special tokens of a KerasHub tokenizer always are.

    Returns:
        Ids, int32, ascending.

    Raises:
        ValueError: `texts` is one text or none, or an argument is out of range.

    Example:

    >>> used_tokens(lambda texts: [[ord(x) for x in text] for text in texts], ["ab", "b"], 2, [0])
    array([ 0, 98], dtype=int32)
    """
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"texts must be several texts, got the one {texts!r}; pass [text].")
    if min_count < 1:
        raise ValueError(f"min_count must be 1 or more, got {min_count}.")
    texts = list(map(str, texts))
    if not texts:
        raise ValueError("texts is empty; pass the texts that the model is for.")
    counts: collections.Counter[int] = collections.Counter()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        counts.update(_flat_ids(tokenizer(texts[start : start + _TEXTS_AT_ONCE])))
    used = {i for i, count in counts.items() if count >= min_count}
    return np.array(sorted(used | set(map(int, always)) | set(special_ids(tokenizer))), np.int32)


def special_ids(tokenizer: Any) -> list[int]:
    """The ids of the special tokens of a KerasHub tokenizer, with `[UNK]`, ascending.

    Args:
        tokenizer: Any object; of one that has no special tokens there are none.

    Returns:
        Ids.
    """
    ids = set(getattr(tokenizer, "special_token_ids", ()))
    unknown = getattr(tokenizer, "oov_token", None)
    if unknown is not None:
        ids.add(tokenizer.token_to_id(unknown))
    return sorted(int(i) for i in ids if i is not None)


def _flat_ids(ids: Any) -> list[int]:
    if hasattr(ids, "flat_values"):
        return np.asarray(ids.flat_values).tolist()
    return [int(i) for row in ids for i in np.ravel(np.asarray(row))]


def prune_vocabulary(
    model: keras.Model,
    keep: Iterable[int],
    embedding: str | None = None,
    special: Iterable[int] = (),
) -> Vocabulary:
    """Keep some rows of the token embedding, and number the tokens anew.

    The result computes on `map(ids)` what `model` computes on `ids`, if all of them are kept. A
    dropped token is mapped to the kept one with the greatest cosine similarity of the rows.

    An embedding that also makes logits (`ReversibleEmbedding` called with `reverse=True`) shrinks
    on both sides, if these are outputs of the model, at most behind a softmax: logit `i` is then
    that of the token `kept[i]`.

    Args:
        model: Any built model. It is not touched.
        keep: Ids of the tokens to keep, e.g. from `used_tokens`.
        embedding: A glob for the name of the embedding in the flat graph (`tfcompress.expand`);
            several that read the same ids may fit. None is the largest that reads an input.
        special: Kept ids that take no dropped token in, e.g. `special_ids(tokenizer)`. With
            `mask_zero=True`, 0 is one.

    Returns:
        `Vocabulary`, whose model is flat and has weights of its own.

    Raises:
        ValueError: There is no such embedding, an id is not one of its rows, or what else reads the
            ids or the whole embedding does not allow it; the message names that.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(90, 4)])
    >>> pruned = prune_vocabulary(model, keep=[0, 7, 89])
    >>> pruned.map([[7, 89, 0]])
    array([[1, 2, 0]], dtype=int32)
    >>> pruned.model.count_params()
    12

    See Abdaoui et al. 2020, "Load What You Need: Smaller Versions of Multilingual BERT",
    https://arxiv.org/abs/2010.05609.
    """
    flat = expand(model)
    uses = Uses(flat)
    chosen = _embeddings(flat, uses, embedding)
    size = chosen[0].input_dim
    kept = _checked_ids("keep", keep, size)
    alone = _alone(chosen, kept, special, size)
    _require_same_ids(uses, chosen, kept)
    for layer in chosen:
        _require_shrinkable(uses, layer)
    old_to_new = np.zeros(size, np.int32)
    old_to_new[kept] = np.arange(len(kept), dtype=np.int32)
    table = np.concatenate([x.get_weights()[0] for x in chosen], axis=1)
    dropped = np.setdiff1d(np.arange(size), kept)
    old_to_new[dropped] = old_to_new[_nearest(table, dropped, np.setdiff1d(kept, alone))]
    return Vocabulary(_shrunk(flat, chosen, kept), kept.astype(np.int32), old_to_new)


def _embeddings(flat: keras.Model, uses: Uses, glob: str | None) -> list[keras.layers.Embedding]:
    every = [x for x in flat.layers if isinstance(x, keras.layers.Embedding)]
    if glob is not None:
        chosen = [x for x in every if fnmatch.fnmatch(x.name, glob)]
    else:
        inputs = [x for x in every if _reads_input(uses, x)]
        size = max((x.input_dim for x in inputs), default=0)
        chosen = [x for x in inputs if x.input_dim == size]
    names = {x.name: x.input_dim for x in every}
    if not chosen:
        what = "reads an input" if glob is None else f"fits embedding={glob!r}"
        raise ValueError(
            f"No embedding of {flat.name!r} {what}. Its embeddings and their rows are {names}; "
            "pass the name of one as embedding=."
        )
    ids = {id(_source(uses, _look_ups(uses, x)[0].inputs[0])) for x in chosen}
    if len({x.input_dim for x in chosen}) > 1 or len(ids) > 1:
        raise ValueError(
            f"The embeddings {[x.name for x in chosen]} of {flat.name!r} do not read the same ids, "
            f"or are of different sizes: {names}. Pass the name of one as embedding=."
        )
    return chosen


def _reads_input(uses: Uses, layer) -> bool:
    return any(_source(uses, x.inputs[0]) is not None for x in _calls(uses, layer))


def _calls(uses: Uses, layer) -> list[nodes.Call]:
    return [x for x in uses.calls if x.operation is layer]


def _is_reverse(call: nodes.Call) -> bool:
    return bool(call.kwargs.get("reverse")) or any(x is True for x in call.args[1:])


def _look_ups(uses: Uses, layer) -> list[nodes.Call]:
    """The calls on ids; all of them must be on an input, or the embedding is used as a whole."""
    found = [x for x in _calls(uses, layer) if not _is_reverse(x)]
    if not found or any(_source(uses, x.inputs[0]) is None for x in found):
        raise ValueError(
            f"The embedding {layer.name!r} is called on something else than an input of the model, "
            "such as all of its rows for tied output weights: prune_vocabulary can shrink the "
            "other side only of a ReversibleEmbedding."
        )
    return found


def _source(uses: Uses, x: keras.KerasTensor) -> keras.KerasTensor | None:
    """The input of the model that `x` is, cast or not."""
    while id(x) in uses.producers:
        call = uses.producers[id(x)]
        if type(call.operation).__name__ != "Cast":
            return None
        x = call.inputs[0]
    return x


def _checked_ids(name: str, ids: Iterable[int], size: int) -> np.ndarray:
    ids = np.asarray(list(ids))
    if not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= size:
        raise ValueError(
            f"{name} must be ids of tokens, integers from 0 to {size - 1} and at least one, got "
            f"{ids!r}."
        )
    return np.unique(ids)


def _alone(chosen, kept, special: Iterable[int], size: int) -> np.ndarray:
    """The kept ids that stand for themselves only."""
    masks = any(x.mask_zero for x in chosen)
    if masks and 0 not in kept:
        raise ValueError("The embedding masks the id 0 (mask_zero=True): keep must have 0.")
    special = [*special, *([0] if masks else [])]
    alone = _checked_ids("special", special, size) if special else np.array([], np.int64)
    if set(kept) <= set(alone):
        raise ValueError(f"All of the {len(kept)} ids in keep are special; keep others too.")
    return alone


def _require_same_ids(uses: Uses, chosen: list, kept: np.ndarray) -> None:
    """Nothing else may read what the ids are."""
    pending = [_source(uses, _look_ups(uses, chosen[0])[0].inputs[0])]
    while pending:
        x = pending.pop()
        for call in uses.readers.get(id(x), []):
            kind = type(call.operation).__name__
            if kind == "Cast":
                pending.append(call.outputs[0])
            elif not (
                any(call.operation is layer for layer in chosen)
                or kind in ("ZerosLike", "OnesLike")
                or (kind in ("NotEqual", "Equal") and _keeps_compared(call, kept))
            ):
                raise ValueError(
                    f"{call.operation.name!r} ({kind}) also reads the token ids, which get other "
                    "numbers. Expected the embedding alone, or comparisons with an id that stays "
                    "what it is: one that is kept, with all below it."
                )


def _keeps_compared(call: nodes.Call, kept: np.ndarray) -> bool:
    """Whether the constant that ids are compared with is the same token before and after."""
    constants = [
        x
        for x in keras.tree.flatten((call.args, call.kwargs))
        if not isinstance(x, keras.KerasTensor) and x is not None
    ]
    if len(constants) != 1 or np.ndim(constants[0]):
        return False
    value = int(constants[0])
    return value < 0 or (value < len(kept) and kept[value] == value)


_SHAPELESS = ("Softmax", "LogSoftmax", "Activation", "Cast", "Identity")


def _require_shrinkable(uses: Uses, layer) -> None:
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"The embedding {layer.name!r} is quantized or has LoRA weights. Prune the vocabulary "
            "first."
        )
    for call in _calls(uses, layer):
        reader = call if _is_reverse(call) else None
        while reader is not None and not uses.is_output(reader):
            following = uses.only_reader(reader)
            if following is None or type(following.operation).__name__ not in _SHAPELESS:
                readers = [x.operation.name for x in uses.readers.get(id(reader.outputs[0]), [])]
                raise ValueError(
                    f"The logits that {layer.name!r} makes are read by {readers}, which may be of "
                    "the size of the vocabulary. Expected them to be outputs of the model, at most "
                    f"behind {_SHAPELESS}; cut the model there."
                )
            reader = following


def _nearest(table: np.ndarray, dropped: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidate with the most similar row, for each dropped id."""
    rows = table.astype(np.float32)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    parts = np.split(dropped, range(_ROWS_AT_ONCE, len(dropped), _ROWS_AT_ONCE))
    found = [candidates[np.argmax(rows[x] @ rows[candidates].T, axis=1)] for x in parts]
    return np.concatenate(found)


def _shrunk(flat: keras.Model, chosen: list, kept: np.ndarray) -> keras.Model:
    smaller = {id(layer): _with_rows(layer, kept) for layer in chosen}

    def call(node, args, kwargs):
        if id(node.operation) in smaller:
            return smaller[id(node.operation)](*args, **kwargs)
        shapes = [x.shape for x in nodes.symbolic_tensors((args, kwargs))]
        if shapes != [x.shape for x in node.inputs]:  # Behind logits.
            return node.operation(*args, **kwargs)
        return nodes.record_call(node.operation, args, kwargs, node.outputs)

    return copied(replay(flat, call))


def _with_rows(layer, kept: np.ndarray) -> keras.layers.Embedding:
    copy = type(layer).from_config({**layer.get_config(), "input_dim": len(kept)})
    copy.build()
    copy.set_weights(
        [
            np.take(x.numpy(), kept, axis=1 if x.name == "reverse_embeddings" else 0)
            for x in layer.weights
        ]
    )
    return copy
