"""The techniques that a stage of a recipe names, each one public object of the package."""

import pathlib
from typing import Annotated, Any, Literal

import pydantic

from tfcompress.callbacks import (
    L1Regularization,
    Pruning,
    QuantizationAwareTraining,
    ThresholdPruning,
)
from tfcompress.distillation import Distiller
from tfcompress.export import export
from tfcompress.graph import (
    drop_layers,
    factorize,
    fold_batch_norm,
    prune_vocabulary,
    shrink_plan,
)
from tfcompress.layers import cluster, strip
from tfcompress.pruning import prune
from tfcompress.quantization import quantize
from tfcompress.recipe.objects import (
    Activations,
    Budget,
    Calibrator,
    Candidate,
    Criterion,
    DistillationLoss,
    Globs,
    Named,
    NumberOrSchedule,
    Positive,
    Ratio,
    Regrowth,
    Sparsity,
    Step,
    Structure,
    Weights,
    model_of,
)

Count = Annotated[int, pydantic.Field(ge=1)]
Unit = Annotated[float, pydantic.Field(ge=0, le=1)]
Percentile = Annotated[float, pydantic.Field(gt=50, le=100)]
Allocation = Literal["uniform", "global", "erk", "lamp"]
FilePath = Annotated[
    str, pydantic.Field(min_length=1, description="A file or folder in the output directory.")
]

_SELECTION = {"include": Globs, "exclude": Globs}
_QUANTIZED = {"weights": Weights, "activations": Activations, **_SELECTION}

# Callbacks, and distillation, which is the model that is trained: any of these act together.
TRAINING: dict[str, type[Named]] = {
    "l1": model_of(
        L1Regularization,
        {"strength": Positive, "proximal": bool, "structure": Structure, **_SELECTION},
    ),
    "threshold": model_of(ThresholdPruning, {"threshold": Positive, **_SELECTION}),
    "pruning": model_of(
        Pruning,
        {
            "sparsity": Sparsity | None,
            "criterion": Criterion,
            "structure": Structure,
            "allocation": Allocation,
            "frequency": Count,
            "regrowth": Regrowth | None,
            **_SELECTION,
        },
    ),
    "qat": model_of(
        QuantizationAwareTraining,
        {
            **_QUANTIZED,
            "begin_step": Step,
            "percentile": Percentile,
            "ranges_end_step": Step | None,
            "batch_norm_end_step": Step | None,
        },
    ),
    "distillation": model_of(
        Distiller,
        {
            "teacher": str,
            "distillation_losses": list[DistillationLoss],
            "distillation_loss_weights": list[NumberOrSchedule] | None,
            "student_loss_weight": NumberOrSchedule,
            "balancing": Literal["magnitude"] | None,
            "unlabelled": int | None,
            "mask": str | None,
        },
        supplied=("student", "teacher_weights", "name"),
        defaults={"teacher": "original", "distillation_losses": ["logits"]},
    ),
}

# Model in, model out: one a stage.
PASSES: dict[str, type[Named]] = {
    "fold": model_of(fold_batch_norm, supplied=("model",)),
    "prune": model_of(
        prune,
        {
            "sparsity": Sparsity | None,
            "threshold": Positive | None,
            "criterion": Criterion,
            "structure": Structure,
            "allocation": Allocation,
            **_SELECTION,
        },
        supplied=("model", "calibration"),
    ),
    "shrink": model_of(
        shrink_plan,
        {
            "ratio": Ratio | None,
            "target_macs": Count | None,
            "target_parameters": Count | None,
            "criterion": Literal["l2", "l1", "batch_norm", "random", "taylor", "fisher"],
            "allocation": Literal["uniform", "global"],
            "round_to": Count,
            **_SELECTION,
        },
        supplied=("model", "data", "target_cost", "cost", "verbose"),
    ),
    "drop_layers": model_of(
        drop_layers,
        {"layers": Globs, "keep": list[int] | None},
        supplied=("model",),
    ),
    "factorize": model_of(
        factorize,
        {
            "energy": Annotated[float, pydantic.Field(gt=0, le=1)] | None,
            "ratio": Ratio | None,
            "target_parameters": Count | None,
            "target_macs": Count | None,
            "method": Literal["auto", "svd", "spatial", "tucker"],
            **_SELECTION,
        },
        supplied=("model", "calibration", "verbose"),
    ),
    "cluster": model_of(
        cluster,
        {"clusters": Annotated[int, pydantic.Field(ge=2)], "initialization": str, **_SELECTION},
        supplied=("model", "verbose"),
    ),
    "prune_vocabulary": model_of(
        prune_vocabulary,
        {"keep": list[int] | Literal["used"], "embedding": str | None, "special": list[int]},
        supplied=("model",),
        defaults={"keep": "used", "special": [0]},
    ),
    "quantize": model_of(
        quantize,
        {
            **_QUANTIZED,
            "scales": Literal["max", "fixed", "lsq"],
            "percentile": Percentile,
            "calibrator": Calibrator,
            "weight_calibrator": Calibrator | None,
            "smooth": Unit | None,
            "rounding": Literal["nearest", "adaround", "gptq"],
            "budget": Budget | None,
            "candidates": list[Candidate],
        },
        supplied=("model", "calibration", "verbose"),
    ),
    "strip": model_of(strip, supplied=("model",)),
}

_EXPORT = model_of(
    export,
    {
        "path": FilePath,
        "precision": Literal["float32", "float16", "dynamic", "int8", "int4", "fastest"] | None,
    },
    supplied=("model", "calibration", "verify_on"),
)


class Export(_EXPORT):
    """Write a file that runs without Keras, and verify it; see `tfcompress.export`."""

    io: Literal["float", "integer"] | None = pydantic.Field(
        None, description="For .tflite at int8: whether its inputs and outputs are integers."
    )
    batch_size: Count | None = pydantic.Field(
        None, description="For .tflite: a fixed number of examples; null leaves it open."
    )
    tolerance: Unit | None = pydantic.Field(
        None, description="For precision fastest: how far a file may be from the model."
    )

    @pydantic.field_validator("path")
    @classmethod
    def _stays_in_the_output_directory(cls, path: str) -> str:
        parts = pathlib.PurePath(path)
        known = (".tflite", ".onnx", ".xml", "")
        if parts.is_absolute() or ".." in parts.parts or not parts.name:
            raise ValueError(
                f"{path!r} leaves the output directory. Name a file in it: model.tflite"
            )
        if parts.suffix not in known:
            raise ValueError(
                f"{path!r} is none of .tflite, .onnx, .xml (OpenVINO), or a folder (SavedModel)."
            )
        return path

    def options(self) -> dict[str, Any]:
        """The options that were given, for `tfcompress.export`."""
        options = {name: getattr(self, name) for name in ("io", "batch_size", "tolerance")}
        return {name: value for name, value in options.items() if value is not None}
