"""Values in a recipe that stand for objects of the package: schedules, structures, losses, ...

Each is a shorthand ("magnitude"), or a mapping of its name and arguments
(`{name: PolynomialDecay, ...}`). The models that check the mapping are made from the signature and
the docstring of the object, so that a recipe knows exactly what the object does.
"""

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import pydantic
import pydantic_core as core

from tfcompress import distillation, schedules
from tfcompress.distillation import names
from tfcompress.ops import criteria, regrowth, structures
from tfcompress.quantization import Budget as QuantizationBudget
from tfcompress.quantization import Scheme, calibrators
from tfcompress.recipe.document import nearest

# Stands for the number of updates of a stage while a recipe is only checked.
NOMINAL_STEPS = 1000


class Strict(pydantic.BaseModel):
    """A part of a recipe: no unknown key, and an error that names the nearest known one."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, value, handler):
        value = {} if value is None else value
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise core.PydanticCustomError(
                "mapping", "expected a mapping of some of {allowed}", {"allowed": cls.keys()}
            )
        known = cls.keys()
        for key in value:
            if key not in known:
                raise core.PydanticCustomError(
                    "unknown_key",
                    "unknown key {key}; allowed here: {allowed}.{near}",
                    {
                        "key": repr(key),
                        "allowed": ", ".join(cls.keys()),
                        "near": nearest(key, cls.keys()),
                        "at": key,
                    },
                )
        return handler(dict(value))

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that a mapping of this kind may have."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def values(self) -> dict[str, Any]:
        """The keys that were given, as plain values of JSON."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Named(Strict):
    """A mapping that makes an object: `build` calls `target` with its arguments."""

    target: typing.ClassVar[Callable]
    supplied: typing.ClassVar[tuple[str, ...]] = ("name",)

    @pydantic.model_validator(mode="after")
    def _can_be_built(self) -> typing.Self:
        """What the object itself refuses is refused with the line that says it."""
        if type(self).supplied == ("name",):
            self.build()
        return self

    def build(self, steps: int = NOMINAL_STEPS, **supplied: Any) -> Any:
        """The object.

        Args:
            steps: Optimizer updates of the stage: what `"50%"` is a share of.
            **supplied: Arguments that are not in the recipe.

        Returns:
            What the constructor or function returned.
        """
        given = {
            name: build(getattr(self, name), steps)
            for name in type(self).model_fields
            if name not in type(self).supplied
        }
        return type(self).target(**given, **supplied)


def build(value: Any, steps: int = NOMINAL_STEPS) -> Any:
    """A value of a recipe with every part that stands for an object replaced by it.

    Args:
        value: A validated value.
        steps: Optimizer updates of the stage.

    Returns:
        The value that the public function takes.

    Example:

    >>> build({"*kernel": "50%"}, steps=10)
    {'*kernel': 5}
    """
    if isinstance(value, Named):
        return value.build(steps)
    if isinstance(value, str) and re.fullmatch(_PERCENT, value):
        return round(float(value[:-1]) / 100 * steps)
    if isinstance(value, dict):
        return {key: build(each, steps) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(build(each, steps) for each in value)
    return value


def documented(target: Callable) -> dict[str, str]:
    """What the section Args of a docstring says, by argument.

    Example:

    >>> documented(structures.NofM)["n"]
    'How many of each group are kept, 1 to m - 1.'
    """
    text = inspect.getdoc(target) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.M | re.S)
    entries = re.split(r"^    (?=\*{0,2}\w+: )", section[1] if section else "", flags=re.M)
    found = (re.match(r"(\w+): (.*)", " ".join(entry.split())) for entry in entries)
    return {match[1]: match[2] for match in found if match}


def model_of(
    target: Callable,
    types: Mapping[str, Any] | None = None,
    name: str | None = None,
    supplied: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> type[Named]:
    """The pydantic model of a public class or function: one field for each of its arguments.

    Args:
        target: The class or function; its signature gives the names and defaults.
        types: Types of arguments in a recipe; default: their annotations.
        name: Makes a field `name` with this one value, which tells the objects of a union apart.
        supplied: Arguments that a run gives, not a recipe.
        defaults: Defaults other than those of the signature.

    Returns:
        A subclass of `Named`.
    """
    types, defaults = types or {}, defaults or {}
    descriptions = documented(target)
    fields: dict[str, Any] = {}
    if name is not None:
        fields["name"] = (Literal[name], pydantic.Field(description=_summary(target)))
    for parameter in inspect.signature(target).parameters.values():
        key = parameter.name
        if key in supplied or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = defaults.get(key, parameter.default)
        default = ... if default is parameter.empty else default
        fields[key] = (
            types[key] if key in types else _annotation(target, key),
            pydantic.Field(default, description=descriptions.get(key)),
        )
    made = pydantic.create_model(
        target.__name__, __base__=Named, __doc__=_summary(target), **fields
    )
    made.target = target
    made.supplied = ("name", *supplied)
    return made


def _summary(target: Callable) -> str:
    return " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())


def _annotation(target: Callable, key: str) -> Any:
    source = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(source)
    if key not in hints:
        raise TypeError(f"{target.__name__} does not say the type of {key!r}; pass types=.")
    return hints[key]


_PERCENT = r"\d+(\.\d+)?%"
Share = Annotated[float, pydantic.Field(ge=0, lt=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
Globs = str | list[str] | None
Step = Annotated[
    Annotated[int, pydantic.Field(ge=0)]
    | Annotated[str, pydantic.StringConstraints(pattern=f"^{_PERCENT}$")],
    pydantic.Field(description="A count of updates, or a share of those of the stage: 50%."),
]


def _check_by(get: Callable) -> Any:
    """A name that the package knows, or its own error."""

    def check(name: str) -> str:
        get(name)
        return name

    return pydantic.AfterValidator(check)


def union(get: Callable | None, models: Mapping[str, type[Named]], names: tuple[str, ...] = ()):
    """The type of a value that is a shorthand or a mapping with a name.

    Args:
        get: Resolves shorthands and raises a `ValueError` at others; None if there are none.
        models: Name -> model.
        names: Shorthands, for the JSON schema.

    Returns:
        A type for a field.
    """

    def tag(value):
        if isinstance(value, str):
            return "shorthand" if get is not None else None
        name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
        return name if isinstance(name, str) and name in models else None

    choices = [Annotated[model, pydantic.Tag(name)] for name, model in models.items()]
    if get is not None:
        text = Annotated[
            str, _check_by(get), pydantic.Field(examples=list(names)), pydantic.Tag("shorthand")
        ]
        choices.append(text)
    return Annotated[
        typing.Union[tuple(choices)],  # noqa: UP007
        pydantic.Discriminator(
            tag,
            custom_error_type="kind",
            custom_error_message=f"expected {_spoken(names, models)}",
        ),
    ]


def _spoken(names: tuple[str, ...], models: Mapping[str, Any]) -> str:
    parts = [f"one of {', '.join(names)}"] if names else []
    return " or ".join([*parts, f"a mapping with name: one of {', '.join(models)}"])


_STEPS = {"begin_step": Step, "end_step": Step, "step": Step, "cycle_steps": Step}
SCHEDULES = {
    cls.__name__: model_of(
        cls,
        {
            **_STEPS,
            "value": float,
            **({"end_step": Step | None} if cls is schedules.Constant else {}),
        },
        name=cls.__name__,
    )
    for cls in (
        schedules.Constant,
        schedules.Cosine,
        schedules.Cyclic,
        schedules.Exponential,
        schedules.Linear,
        schedules.OneShot,
        schedules.PolynomialDecay,
    )
}
Schedule = union(None, SCHEDULES)


def _number_or(kind: str, others: Mapping[str, Any]) -> Any:
    """A union of a number and mappings, told apart by what the value looks like."""

    def tag(value):
        if isinstance(value, Mapping):
            named = value.get("name") in SCHEDULES if isinstance(value.get("name"), str) else False
            return "schedule" if named or "name" in value or "globs" not in others else "globs"
        return "schedule" if isinstance(value, Named) else "number"

    choices = tuple(Annotated[each, pydantic.Tag(name)] for name, each in others.items())
    return Annotated[
        typing.Union[choices],  # noqa: UP007
        pydantic.Discriminator(
            tag, custom_error_type=kind, custom_error_message=f"expected {kind}"
        ),
    ]


ShareOrSchedule = _number_or("a share or a schedule", {"number": Share, "schedule": Schedule})
NumberOrSchedule = _number_or("a number or a schedule", {"number": float, "schedule": Schedule})
Sparsity = _number_or(
    "a share of zeros in [0, 1), a schedule, or {glob: share or schedule}",
    {"number": Share, "schedule": Schedule, "globs": dict[str, ShareOrSchedule]},
)
Ratio = _number_or(
    "a share in (0, 1) or {glob: share}", {"number": Share, "globs": dict[str, Share]}
)

Structure = union(
    structures.get,
    {
        "block": model_of(structures.Block, name="block"),
        "channel": model_of(structures.Channel, name="channel"),
        "nofm": model_of(structures.NofM, name="nofm"),
    },
    ("unstructured", "channel", "head", "2:4"),
)
Criterion = union(
    criteria.get,
    {
        "movement": model_of(criteria.Movement, name="movement"),
        "random": model_of(criteria.Random, name="random"),
        "sparsegpt": model_of(criteria.SparseGPT, name="sparsegpt"),
    },
    ("magnitude", "random", "gradient", "fisher", "movement", "batch_norm", "wanda", "sparsegpt"),
)
Regrowth = union(
    regrowth.get,
    {
        "set": model_of(regrowth.SET, {"end_step": Step | None}, name="set"),
        "rigl": model_of(regrowth.RigL, {"end_step": Step | None}, name="rigl"),
    },
    ("set", "rigl"),
)

_SCHEME = model_of(Scheme)


def _scheme_tag(value):
    if isinstance(value, Mapping):
        return "scheme" if value and set(value) <= set(_SCHEME.keys()) else "globs"
    return "scheme" if isinstance(value, Named) else "shorthand"


def _scheme_type(shorthands: str, globs: bool) -> Any:
    text = Annotated[str | None, pydantic.Field(examples=["int8", "int4", None])]
    choices = {"shorthand": text, "scheme": _SCHEME}
    if globs:
        choices["globs"] = dict[str, _scheme_type(shorthands, globs=False)]
    tagged = tuple(Annotated[each, pydantic.Tag(tag)] for tag, each in choices.items())
    return Annotated[
        typing.Union[tagged],  # noqa: UP007
        pydantic.Discriminator(
            lambda value: (
                "scheme" if not globs and isinstance(value, Mapping) else _scheme_tag(value)
            ),
            custom_error_type="scheme",
            custom_error_message=f"expected {shorthands}, or a mapping such as {{bits: 4}}",
        ),
    ]


Weights = _scheme_type("int2 to int8, w4a8, null", globs=True)
Activations = _scheme_type("int2 to int8, dynamic, null", globs=False)
Candidate = _scheme_type("int2 to int8", globs=False)

Calibrator = union(
    calibrators.get,
    {
        "entropy": model_of(calibrators.Entropy, name="entropy"),
        "minmax": model_of(calibrators.MinMax, name="minmax"),
        "moving_average": model_of(calibrators.MovingAverage, name="moving_average"),
        "mse": model_of(calibrators.MSE, name="mse"),
        "percentile": model_of(calibrators.Percentile, name="percentile"),
    },
    ("minmax", "moving_average", "percentile", "mse", "entropy"),
)
Budget = model_of(
    QuantizationBudget,
    {"size": Positive | None, "bops": Positive | None},
    supplied=("latency", "latencies"),
)
DistillationLoss = union(
    distillation.get,
    {
        name: model_of(
            cls,
            {"temperature": NumberOrSchedule}
            if cls in (distillation.Logits, distillation.CrossEntropy)
            else {},
            name=name,
        )
        for name, cls in names.LOSSES.items()
    },
    tuple(names.LOSSES),
)
