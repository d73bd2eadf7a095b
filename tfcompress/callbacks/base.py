"""The life of a compression callback: attach, train, finish, detach."""

import contextlib
import logging
from collections.abc import Iterator

import keras
import tensorflow as tf

from tfcompress.keras_hooks import session as sessions
from tfcompress.keras_hooks import state as states
from tfcompress.keras_hooks.walk import select_kernels, trained_model

logger = logging.getLogger("tfcompress")


class CompressionCallback(keras.callbacks.Callback):
    """Base of the callbacks that change weights or layers while a model trains.

    A subclass defines `_attach`, which sets its hooks, and `_finish`, which leaves its result in
    the model. It may define `_prepare`, which makes the variables of its saved state, and `_begin`,
    which does what has to be done to the weights before the first step. Hooks hang on the model
    from `on_train_begin` until every other callback's `on_train_end` is through.

    Args:
        include: Glob or globs over `variable.path`; None for every weight of the default kind.
        exclude: Glob or globs to leave out.
    """

    def __init__(self, include=None, exclude=None):
        super().__init__()
        self.include = include
        self.exclude = exclude
        self.applied: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._reset()

    def set_model(self, model):
        """Make the saved state, so that a `BackupAndRestore` listed earlier restores it."""
        super().set_model(model)
        self._close()
        if model is not None and model.built and trained_model(model).weights:
            self._optimizer = getattr(model, "optimizer", None)
            self._prepare_once()

    def on_train_begin(self, logs=None):
        """Attach, and arrange for the end."""
        session = self._open(self.model, self.model.optimizer)
        remove = sessions.after_train_end(self.model, self._complete)
        self._waits_for_history = remove is not None
        if remove is not None:
            session.defer(remove)
        session.guard_fit()

    def on_train_end(self, logs=None):
        """Finish here only where Keras offers no later moment."""
        if not self._waits_for_history:
            self._complete()

    @contextlib.contextmanager
    def attached(self, model: keras.Model, optimizer=None) -> Iterator["CompressionCallback"]:
        """Attach to `model` for a custom training loop; finish and detach at the end.

        Functions traced before are not affected: trace the training step inside. When the block
        raises, the hooks are removed and the weights are left as they are.

        Args:
            model: The model that is trained.
            optimizer: The optimizer of the loop; by default the one that `model` was compiled with.

        Yields:
            This callback.
        """
        super().set_model(model)
        self._close()
        self._open(model, optimizer or getattr(model, "optimizer", None))
        try:
            yield self
        except BaseException:
            self._close()
            raise
        self._complete()

    # What a subclass defines.

    def _prepare(self, model):
        """Choose the weights of `model` and make the saved state."""

    def _begin(self, tracing):
        """Make ready for the first step; while `tracing`, the weights have no value yet."""

    def _attach(self, session, optimizer):
        """Set the hooks; each removal goes to `session.defer`."""
        raise NotImplementedError

    def _finish(self):
        """Leave the result in the model, whatever the other callbacks did to its weights."""
        raise NotImplementedError

    # What it uses.

    def _select(self, model):
        selected, self.skipped = select_kernels(model, self.include, self.exclude)
        logger.info("%s skips %s", type(self).__name__, self.skipped)
        return selected

    def _add_state(self, key, value, dtype):
        key = f"{type(self).__name__}/{key}"
        self._state[key] = states.add_state(trained_model(self.model), key, value, dtype)
        return self._state[key]

    def _start(self, tracing=True):
        """Prepare and begin, once: before the first step or, for an unbuilt model, in its trace."""
        if self._started:
            return
        with tf.init_scope(), self.model.distribute_strategy.scope():
            self._prepare_once()
            self._check_alone()
            self._begin(tracing)
        self._started = True

    # The life cycle.

    def _reset(self):
        self._session = None
        self._optimizer = None
        self._prepared = False
        self._started = False
        self._waits_for_history = False
        self._state: dict[str, keras.Variable] = {}

    def _open(self, model, optimizer):
        if optimizer is None:
            raise ValueError(
                f"{type(self).__name__} needs the optimizer that updates the weights; the model "
                f"{model.name!r} has none. Call model.compile(...) first, or pass optimizer=."
            )
        self._optimizer = optimizer
        self._session = sessions.Session(model, on_close=self._drop_state)
        try:
            if trained_model(model).weights:
                self._start(tracing=False)
            self._attach(self._session, optimizer)
        except BaseException:
            self._close()
            raise
        return self._session

    def _prepare_once(self):
        if not self._prepared:
            self._prepare(trained_model(self.model))
            self._prepared = True

    def _check_alone(self):
        entries = states.find_state(trained_model(self.model))
        taken = [key for key, variable in self._state.items() if entries.get(key) is not variable]
        if taken:
            raise ValueError(
                f"Two {type(self).__name__} callbacks work on the same weights, of "
                f"{list(self.applied)}. Give them "
                "include= or exclude= globs that do not overlap."
            )

    def _complete(self):
        if self._session is not None and self._session.is_open:
            self._finish()
        self._close()

    def _close(self):
        if self._session is not None:
            self._session.close()
        self._drop_state()
        self._reset()

    def _drop_state(self):
        if self._state:
            states.remove_state(trained_model(self.model), self._state)
        self._state = {}
