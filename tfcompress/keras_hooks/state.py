"""What a technique must remember, saved and restored with the model and gone when it is done.

The state is Keras variables in one saveable that hangs on the model as an attribute. Keras walks a
model's attributes when it saves, so `BackupAndRestore`, `ModelCheckpoint` and `model.save` include
it; when the attribute is gone the file is plain, and a plain file loads into a model that has it.

Private Keras API used here, each with a test in `tests/keras_hooks/test_state.py`: `KerasSaveable`
and its `_obj_type`, and the walk of Keras's saving over a model's attributes.
"""

import keras
from keras.src.saving.keras_saveable import KerasSaveable

_ATTRIBUTE = "compression_state"


class CompressionState(KerasSaveable):
    """Named variables: masks, ranges, step counters."""

    def __init__(self):
        self.entries: dict[str, keras.Variable] = {}

    def _obj_type(self):
        return "Operation"  # Saving knows a closed set of kinds; this one adds nothing of its own.

    def save_own_variables(self, store):
        """Called by Keras when the model is saved."""
        for key, variable in self.entries.items():
            store[_store_key(key)] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        """Called by Keras when weights are loaded; a file without compression state is fine."""
        if not store.keys():
            return
        missing = [key for key in self.entries if _store_key(key) not in store]
        if missing:
            raise ValueError(
                f"The file holds the state of another compression run: it lacks {missing}. "
                "Restore it with the same compression callbacks, or load the weights before "
                "training starts."
            )
        for key, variable in self.entries.items():
            variable.assign(store[_store_key(key)])


def model_state(model: keras.Model) -> CompressionState:
    """The state that hangs on `model`, made if there is none."""
    if _ATTRIBUTE not in model.__dict__:
        model.__dict__[_ATTRIBUTE] = CompressionState()
    return model.__dict__[_ATTRIBUTE]


def find_state(model: keras.Model, prefix: str = "") -> dict[str, keras.Variable]:
    """The entries of `model`'s state whose key starts with `prefix`, without it; empty if none."""
    state = model.__dict__.get(_ATTRIBUTE)
    entries = state.entries if state is not None else {}
    return {key[len(prefix) :]: each for key, each in entries.items() if key.startswith(prefix)}


def remove_state(model: keras.Model, entries: dict[str, keras.Variable]) -> None:
    """Take these very variables off `model`; the attribute goes with the last one."""
    state = model.__dict__.get(_ATTRIBUTE)
    if state is None:
        return
    for key, variable in entries.items():
        if state.entries.get(key) is variable:
            del state.entries[key]
    if not state.entries:
        del model.__dict__[_ATTRIBUTE]


def add_state(model: keras.Model, key: str, value, dtype: str) -> keras.Variable:
    """A new variable in `model`'s state, mirrored where the model is, equal on all replicas.

    Args:
        model: Where it hangs.
        key: Its name in the file, unique in the model.
        value: Initial value.
        dtype: Its dtype.

    Returns:
        The variable; it replaces an earlier one of the same key.
    """
    with model.distribute_strategy.scope():
        variable = keras.Variable(
            value,
            dtype=dtype,
            trainable=False,
            name=key.replace("/", "_"),
            aggregation="only_first_replica",
        )
    model_state(model).entries[key] = variable
    return variable


def _store_key(key: str) -> str:
    return key.replace("/", "|")  # A slash would open a group in the HDF5 file.
