"""Which variables a technique works on: a flat, de-duplicated walk, and globs over their paths.

Private Keras API used here, with a test in `tests/keras_hooks/test_walk.py`: the class
`Functional`, which has no public name.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
from keras.src.models import Functional

_NOT_KERNELS = ("bias", "gamma", "beta", "moving_", "scale", "centroids")


def trained_model(model: keras.Model) -> keras.Model:
    """The model that training changes: the student of a `keras.distillation.Distiller`."""
    if isinstance(model, keras.distillation.Distiller):
        return model.student
    return model


def is_graph(model: keras.Model) -> bool:
    """Whether `model` is Sequential or Functional: made of layers that can be replaced."""
    return isinstance(model, (keras.Sequential, Functional))


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Every variable of `model` once, in order, by its path; equal paths get `#2`, `#3`, ...

    Layers at any depth are reached, shared layers and tied weights come once.

    Args:
        model: Any Keras model, built or in part.

    Returns:
        Path -> variable.

    Example:

    >>> layers = [keras.Input((2,)), keras.layers.Dense(3, name="head")]
    >>> model = keras.Sequential(layers, name="model")
    >>> list(named_variables(model))
    ['model/head/kernel', 'model/head/bias']
    """
    named: dict[str, keras.Variable] = {}
    seen: set[int] = set()
    for variable in model.weights:
        if id(variable) in seen:
            continue
        seen.add(id(variable))
        path, count = variable.path, 2
        while path in named:
            path, count = f"{variable.path}#{count}", count + 1
        named[path] = variable
    return named


def select_kernels(
    model: keras.Model, include=None, exclude=None
) -> tuple[dict[str, keras.Variable], dict[str, str]]:
    """The weights that are compressed by default: trainable kernels and embeddings.

    Args:
        model: Any Keras model with at least one variable.
        include: Glob or globs over variable paths; None for all. A weight that a glob names is
            taken only if it is a kernel.
        exclude: Glob or globs to leave out.

    Returns:
        The selected variables by path, and path -> reason for every other one.

    Raises:
        ValueError: A glob matches no variable, or nothing is selected.

    Example:

    >>> layers = [keras.Input((2,)), keras.layers.Dense(3, name="head")]
    >>> model = keras.Sequential(layers, name="model")
    >>> selected, skipped = select_kernels(model)
    >>> list(selected), skipped
    (['model/head/kernel'], {'model/head/bias': 'not a kernel: fewer than 2 axes'})
    """
    variables = named_variables(model)
    include, exclude = as_globs(include), as_globs(exclude)
    check_globs([*(include or ()), *(exclude or ())], variables)
    trainable = {id(each) for each in model.trainable_variables}
    reasons = {
        path: _reason_to_skip(path, variable, trainable, include, exclude)
        for path, variable in variables.items()
    }
    selected = {path: each for path, each in variables.items() if reasons[path] is None}
    skipped = {path: reason for path, reason in reasons.items() if reason is not None}
    if not selected:
        raise ValueError(
            f"The model {model.name!r} has no weight to compress. Skipped: {skipped or 'nothing'}. "
            "Expected at least one trainable kernel or embedding with 2 or more axes; check "
            "include, exclude and layer.trainable."
        )
    return selected, skipped


def as_globs(globs) -> tuple[str, ...] | None:
    """Globs as a tuple: None stays None, a string becomes one glob."""
    if globs is None:
        return None
    several = not isinstance(globs, str) and isinstance(globs, Iterable)
    found = tuple(globs) if several else (globs,)
    if not all(isinstance(glob, str) for glob in found):
        raise ValueError(
            f"Expected a glob over variable.path, or several, got {globs!r}. Pass e.g. '*kernel'."
        )
    return found


def check_globs(globs: Sequence[str], paths: Iterable[str]) -> None:
    """Raise a ValueError that shows the paths, if a glob matches none of them."""
    paths = list(paths)
    for glob in globs:
        if not fnmatch.filter(paths, glob):
            raise ValueError(
                f"The glob {glob!r} matches no variable. It is compared with whole paths; "
                f"this model has: {', '.join(paths)}. Use e.g. '*{paths[0].split('/')[-1]}'."
            )


def group_by_glob(globs: Iterable[str | None], paths: Iterable[str]) -> dict[str | None, list[str]]:
    """Each path under the first of `globs` that matches it; paths that none matches are left out.

    Args:
        globs: Globs over whole paths; None matches every path.
        paths: What is grouped.

    Returns:
        Glob -> paths, without empty groups.

    Raises:
        ValueError: A glob matches no path at all.

    Example:

    >>> group_by_glob(["*head*", None], ["m/hidden/kernel", "m/head/kernel"])
    {None: ['m/hidden/kernel'], '*head*': ['m/head/kernel']}
    """
    globs, paths = list(globs), list(paths)
    check_globs([glob for glob in globs if glob is not None], paths)
    grouped: dict[str | None, list[str]] = {}
    for path in paths:
        for glob in globs:
            if glob is None or matches(path, [glob]):
                grouped.setdefault(glob, []).append(path)
                break
    return grouped


def matches(path: str, globs: Sequence[str]) -> bool:
    """Whether any of `globs` matches the whole of `path`."""
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def is_wanted(
    path: str, include: Sequence[str] | None, exclude: Sequence[str] | None = None
) -> bool:
    """Whether `path` is included, as everything is by None, and not excluded.

    Example:

    >>> is_wanted("m/head/kernel", None), is_wanted("m/head/kernel", None, ["*head*"])
    (True, False)
    """
    included = include is None or matches(path, include)
    return included and not (exclude and matches(path, exclude))


def first_match(path: str, by_glob: Mapping[str, Any]) -> Any:
    """The value under the first glob that matches the whole of `path`; None if none does.

    Example:

    >>> first_match("m/head/kernel", {"*/head/*": 8, "*": 4})
    8
    """
    return next((value for glob, value in by_glob.items() if matches(path, [glob])), None)


def _reason_to_skip(path, variable, trainable, include, exclude):
    name = variable.name
    if exclude and matches(path, exclude):
        return "excluded"
    if include is not None and not matches(path, include):
        return "not included"
    if len(variable.shape) < 2:
        return "not a kernel: fewer than 2 axes"
    if any(word in name for word in _NOT_KERNELS):
        return f"not a kernel: named {name}"
    if not keras.backend.is_float_dtype(variable.dtype):
        return f"not floating point: {variable.dtype}"
    if id(variable) not in trainable:
        return "frozen: trainable=False"
    if 0 in variable.shape:
        return "empty: size 0"
    return None
