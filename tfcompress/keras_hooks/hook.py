"""Functions around a method of one instance, added and removed in any order."""

import functools
from collections.abc import Callable
from typing import Any


class _Hooked:
    """A bound method with functions around it; lives in the instance's `__dict__`."""

    def __init__(self, owner, name):
        self.previous = owner.__dict__.get(name)
        self.original = getattr(owner, name)
        self.arounds: list[Callable] = []
        functools.update_wrapper(self, self.original)

    def __call__(self, *args, **kwargs):
        proceed = self.original
        for around in self.arounds:
            proceed = functools.partial(around, proceed)
        return proceed(*args, **kwargs)


def add_hook(
    owner: Any, name: str, around: Callable, innermost: bool = False
) -> Callable[[], None]:
    """Put `around(proceed, *args, **kwargs)` around `owner.name`, for this instance only.

    Several hooks nest, the last one added outermost. The instance attribute is gone when the last
    hook is. Writing to `__dict__` keeps Keras's attribute tracking out of it.

    Args:
        owner: Any object with a `__dict__`: a layer, a model, an optimizer, a callback.
        name: The method's name.
        around: Called in place of the method, with the method as its first argument.
        innermost: Whether it nests in the hooks that are there, instead of around them.

    Returns:
        A function that removes this hook; calling it twice does no harm.

    Example:

    >>> class Greeter:
    ...     def greet(self, name):
    ...         return f"hello {name}"
    >>> greeter = Greeter()
    >>> remove = add_hook(greeter, "greet", lambda proceed, name: proceed(name).upper())
    >>> greeter.greet("ada")
    'HELLO ADA'
    >>> remove()
    >>> greeter.greet("ada"), vars(greeter)
    ('hello ada', {})
    """
    hooked = owner.__dict__.get(name)
    if not isinstance(hooked, _Hooked):
        hooked = _Hooked(owner, name)
        owner.__dict__[name] = hooked
    entry = functools.partial(around)  # A distinct object, so that each removal finds its own.
    hooked.arounds.insert(0 if innermost else len(hooked.arounds), entry)

    def remove():
        if entry not in hooked.arounds:
            return
        hooked.arounds.remove(entry)
        if not hooked.arounds and owner.__dict__.get(name) is hooked:
            if hooked.previous is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = hooked.previous

    return remove
