"""The time during which something hangs on a model: opened for a training, closed in one go."""

import contextlib
from collections.abc import Callable

import keras
import tensorflow as tf

from tfcompress.keras_hooks.hook import add_hook

_END_OF_DATA = (StopIteration, tf.errors.OutOfRangeError)


class Session:
    """Hooks on a model that are removed together, whatever happens.

    Functions that were traced before a hook was set ignore it, and those traced while it was set
    keep it: the model's train, test and predict functions are therefore dropped at both ends, and
    Keras makes them anew.

    Args:
        model: The model that is trained.
        on_close: Called once when the session closes, after the hooks are gone.
    """

    def __init__(self, model: keras.Model, on_close: Callable[[], None] = lambda: None):
        self.model = model
        self.is_open = True
        self._stack = contextlib.ExitStack()
        self._stack.callback(on_close)
        self._stack.callback(_forget_functions, model)
        _forget_functions(model)

    def defer(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the session closes; the last one deferred comes first."""
        self._stack.callback(undo)

    def close(self) -> None:
        """Undo everything; a second call does nothing."""
        self.is_open = False
        self._stack.close()

    def guard_fit(self) -> None:
        """Call in `on_train_begin`: close the session when the step raises, or at the next `fit`.

        Keras calls no hook when `fit` raises. What raises inside the step passes through the train
        function, which is wrapped here. What raises elsewhere (another callback, the data) leaves
        the session open, until the next `fit` asks for its train function.
        """

        def make(proceed, force=False):
            if not force:  # `fit` and `train_on_batch` ask like this; sessions of one fit force.
                self.close()
                return proceed(force)
            proceed(force)
            self.model.train_function = self._close_on_error(self.model.train_function)
            return None

        self.defer(add_hook(self.model, "make_train_function", make))
        self.model.make_train_function(force=True)

    def _close_on_error(self, function):
        def guarded(iterator):
            try:
                return function(iterator)
            except _END_OF_DATA:
                raise
            except BaseException:
                self.close()
                raise

        return guarded


def after_train_end(model: keras.Model, finish: Callable[[], None]) -> Callable[[], None] | None:
    """Call `finish` after every listed callback's `on_train_end`.

    Keras appends `History` behind the user's callbacks, so that is where work can come last.

    Args:
        model: The model in `fit`.
        finish: Called once Keras's own end of training is through.

    Returns:
        A function that removes the hook; None where no `History` is in use.
    """
    history = getattr(model, "history", None)
    if not isinstance(history, keras.callbacks.History):
        return None

    def hooked(proceed, logs=None):
        proceed(logs)
        finish()

    return add_hook(history, "on_train_end", hooked)


def _forget_functions(model):
    model.train_function = None
    model.test_function = None
    model.predict_function = None
