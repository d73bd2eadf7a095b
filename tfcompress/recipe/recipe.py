"""A recipe: one text that says a whole compression."""

import json
import os
import pathlib
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, Literal, Self

import keras
import pydantic
import pydantic_core as core

from tfcompress.artefact import replacing
from tfcompress.data import Source
from tfcompress.recipe import record
from tfcompress.recipe.document import Document, RecipeError, nearest, to_yaml
from tfcompress.recipe.objects import Strict, model_of
from tfcompress.recipe.techniques import PASSES, TRAINING, Count, Export, Unit
from tfcompress.recipe.training import Training

_READY = resources.files("tfcompress.recipe") / "ready"


def _stage_fields() -> dict[str, Any]:
    techniques = {"train": Training, **TRAINING, **PASSES, "export": Export}
    return {
        name: (model | None, pydantic.Field(None, description=model.__doc__))
        for name, model in techniques.items()
    }


class _Stage(Strict):
    @pydantic.model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, values):
        # `- fold:` says None in YAML, and means the technique with its defaults.
        return {key: {} if value is None else value for key, value in values.items()}

    @pydantic.model_validator(mode="after")
    def _one_pass_or_one_training(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        trained = [name for name in given if name in ("train", *TRAINING)]
        if not given:
            raise core.PydanticCustomError(
                "empty",
                "a stage names a technique: one of {names}",
                {"names": ", ".join(self.keys())},
            )
        if len(given) > 1 and given != trained:
            alone = [name for name in given if name not in trained]
            raise core.PydanticCustomError(
                "mixed",
                "{alone} makes a stage of its own; put the others in stages before or after it",
                {"alone": " and ".join(alone)},
            )
        return self

    @property
    def names(self) -> list[str]:
        """The techniques that act together."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


Stage = pydantic.create_model(
    "Stage",
    __base__=_Stage,
    __doc__="What is done to the model: one of the techniques, or several that train together.",
    **_stage_fields(),
)


class Budget(Strict):
    """What the result must keep to; it is measured at the end, and what is missed is named."""

    max_drop: Unit | None = pydantic.Field(
        None, description="How much accuracy may be lost, as a share: 0.01 is one point."
    )
    max_bytes: Count | None = pydantic.Field(None, description="Size of each exported file.")
    max_zipped_bytes: Count | None = pydantic.Field(
        None, description="Size of each exported file as a zip archive."
    )
    max_parameters: Count | None = pydantic.Field(None, description="Parameters of the model.")
    max_macs: Count | None = pydantic.Field(
        None, description="Multiply-accumulates of the model for one example."
    )


DataSource = model_of(Source, {"validation_split": Annotated[float, pydantic.Field(gt=0, lt=1)]})


class Recipe(Strict):
    """A whole compression: stages, techniques, schedules, data, budget and export.

    Nothing in it executes code: data and models are paths or `zoo:` names; `module:function` is
    only called with `trust=True`.

    Example:

    >>> recipe = Recipe.parse("stages: [{prune: {sparsity: 0.5}}]")
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
    >>> result = recipe.apply(model, verbose=0)
    >>> int((result.model.layers[0].kernel.numpy() == 0).sum())
    10
    >>> Recipe.from_model(result.model) == recipe
    True
    """

    version: Literal[1] = pydantic.Field(1, description="Of this format.")
    name: str | None = pydantic.Field(None, description="What it is called.")
    description: str | None = pydantic.Field(None, description="What it is for.")
    seed: int = pydantic.Field(0, ge=0, description="Of the training.")
    model: str | None = pydantic.Field(
        None, description="A .keras file or zoo:minilm, which `tfcompress run` loads."
    )
    data: DataSource | None = pydantic.Field(
        None, description="What to train, calibrate and validate on: a path, or more about it."
    )
    stages: Annotated[list[Stage], pydantic.Field(min_length=1)] = pydantic.Field(
        description="What is done, one after another."
    )
    budget: Budget | None = pydantic.Field(None, description="What the result must keep to.")

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _a_path_is_a_source(cls, value):
        return {"path": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _no_file_twice(self) -> Self:
        paths = [stage.export.path for stage in self.stages if stage.export is not None]
        if len(set(paths)) != len(paths):
            raise ValueError(f"two stages export to the same file: {paths}")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Recipe":
        """Read a recipe.

        Args:
            path: A YAML (or JSON) file, or one that comes with the package: `recipe:cnn`,
                `recipe:mlp`, ... (`Recipe.ready()` lists them).

        Returns:
            The recipe.

        Raises:
            FileNotFoundError: There is no such file.
            RecipeError: It is no recipe; the message names the line, what is allowed there, and
                the nearest.

        Example:

        >>> [stage.names for stage in Recipe.load("recipe:mlp").stages]
        [['train', 'pruning', 'qat'], ['export']]
        """
        if isinstance(path, str) and path.startswith("recipe:"):
            return cls.parse(cls.ready_text(path.removeprefix("recipe:")), path)
        path = pathlib.Path(path)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError as error:
            ready = ", ".join(f"recipe:{name}" for name in cls.ready())
            raise FileNotFoundError(
                f"There is no recipe {str(path)!r}. Pass a YAML file, or one of {ready}."
            ) from error
        except (IsADirectoryError, UnicodeDecodeError) as error:
            raise RecipeError(f"{str(path)!r} is not a text file: {error}.") from error
        return cls.parse(text, path.name)

    @classmethod
    def parse(cls, text: str, source: str = "recipe") -> "Recipe":
        """Read a recipe from a text.

        Args:
            text: YAML or JSON.
            source: What it is called in messages.

        Returns:
            The recipe.

        Raises:
            RecipeError: See `load`.

        Example:

        >>> Recipe.parse("stages:\\n  - prunning: {sparsity: 0.8}")
        Traceback (most recent call last):
        ...
        tfcompress.recipe.document.RecipeError: recipe, line 2: unknown key 'prunning'; ...
        """
        document = Document.parse(text, source)
        try:
            return cls.model_validate(document.values)
        except pydantic.ValidationError as error:
            raise RecipeError(_message(error, document)) from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from nested dicts and lists, as `to_dict` gives them.

        Raises:
            RecipeError: They are no recipe.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise RecipeError(_message(error, Document.of(values))) from error

    @classmethod
    def from_model(cls, model: keras.Model | str | os.PathLike) -> "Recipe":
        """What was done to a model, to be looked at or done again.

        Args:
            model: The `model` of a `Result`, a `.keras` file of it, or a file that it was exported
                to (`.tflite`, `.onnx`, `.xml`, a SavedModel).

        Returns:
            The recipe; of a model that went through several, all stages.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It was not made by a recipe.
        """
        is_model = isinstance(model, keras.Model)
        values = record.attached(model) if is_model else record.read(model)
        if values is None:
            name = model.name if is_model else os.fspath(model)
            raise ValueError(
                f"{name!r} does not say how it was made: it is not the result of a recipe. A model "
                "that Keras loads forgets it: pass the path of the file."
            )
        return cls.from_dict(values)

    @classmethod
    def ready(cls) -> list[str]:
        """The recipes that come with the package.

        >>> Recipe.ready()
        ['bert', 'cnn', 'lstm', 'mlp', 'mobilenet']
        """
        return sorted(
            file.name.removesuffix(".yaml")
            for file in _READY.iterdir()
            if file.name.endswith(".yaml")
        )

    @classmethod
    def ready_text(cls, name: str) -> str:
        """The text of a recipe that comes with the package, to start one's own from."""
        if name not in cls.ready():
            raise RecipeError(
                f"There is no ready recipe {name!r}; expected one of {', '.join(cls.ready())}."
                f"{nearest(name, cls.ready())}"
            )
        return (_READY / f"{name}.yaml").read_text(encoding="utf-8")

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """The JSON schema, with which editors complete and check recipes.

        Save it, and begin a recipe with `# yaml-language-server: $schema=recipe.schema.json`.

        Example:

        >>> sorted(Recipe.schema()["properties"])
        ['budget', 'data', 'description', 'model', 'name', 'seed', 'stages', 'version']
        """
        schema = cls.model_json_schema()
        data = schema["properties"]["data"]
        data["anyOf"] = [{"type": "string"}, *data["anyOf"]]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def to_dict(self) -> dict[str, Any]:
        """What was given, as nested dicts and lists that JSON can hold."""
        values = self.values()
        # A technique that was given without arguments is an empty mapping, not nothing.
        return json.loads(json.dumps(values))

    def to_yaml(self, path: str | os.PathLike | None = None) -> str:
        """The recipe as YAML, and in a file.

        Args:
            path: A file to write, whole or not at all.

        Returns:
            The text.

        Raises:
            ValueError: The file cannot be written there.

        Example:

        >>> print(Recipe.parse("{name: half, stages: [{prune: {sparsity: 0.5}}]}").to_yaml())
        name: half
        stages:
        - prune:
            sparsity: 0.5
        <BLANKLINE>
        """
        text = to_yaml(self.to_dict())
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def then(self, other: "Recipe") -> "Recipe":
        """This recipe with the stages of another behind its own.

        The rest is that of the other one, where it says something.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        return Recipe.from_dict({**mine, **theirs, "stages": [*mine["stages"], *theirs["stages"]]})

    def apply(
        self,
        model: keras.Model,
        data: Any = None,
        output: str | os.PathLike | None = None,
        trust: bool = False,
        verbose: int = 1,
        on_stage=None,
        keep_model: bool = True,
    ):
        """Do to a model what the recipe says.

        Args:
            model: A built model; it is not touched.
            data: What `tfcompress.data.as_data` takes; default: what the recipe says.
            output: Directory to write to, which is made; default: the current one, for exported
                files alone. Either all files are written or none.
            trust: Whether a `module:function` in the recipe may be called.
            verbose: Whether to show progress.
            on_stage: Called with `(index, stage)` before each stage.
            keep_model: Whether `model.keras`, `recipe.yaml` and `result.json` are written to
                `output` beside the exported files.

        Returns:
            A `Result`.

        Raises:
            ValueError: The model or the data do not fit, or a technique needs data and there is
                none; the message names the stage.
            ExportError: A file could not be written, or does not compute what the model does.
        """
        from tfcompress.recipe.run import run

        return run(self, model, data, output, trust, verbose, on_stage, keep_model)


def _message(error, document: Document) -> str:
    """Every error as a line: where, what, what is allowed, and the nearest."""
    lines = []
    for each in error.errors(include_url=False):
        path = document.within((*each["loc"], *_at(each)))
        line = document.lines.get(path)
        where = ".".join(map(str, path)) or "the recipe"
        place = f", line {line}" if line is not None else ""
        lines.append(f"{document.source}{place}: {_text(each, where)}")
    return "\n".join(dict.fromkeys(lines))


def _at(error: Mapping[str, Any]) -> tuple:
    """The unknown key itself, which pydantic's location does not name."""
    return (error["ctx"]["at"],) if error["type"] == "unknown_key" else ()


def _text(error: Mapping[str, Any], where: str) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("unknown_key", "empty", "mixed"):
        return message
    value = error["input"]
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return (
            f"{where} is {value!r}; expected one of {', '.join(allowed)}.{nearest(value, allowed)}"
        )
    if error["type"] == "kind":
        word = value.get("name") if isinstance(value, Mapping) else value
        known = message.replace("expected one of ", "").replace(" or a mapping with", ",")
        hint = nearest(word, known.replace("name: one of ", "").split(", "))
        return f"{where} is {_short(value)}; {message}.{hint}"
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} is {_short(value)}: {message[:1].lower()}{message[1:]}."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
