"""Quantization of Keras 3 models, under the names of `tfmot.quantization.keras`."""

from tfcompress.tfmot.quantization.keras import (
    collab_opts,
    default_8bit,
    experimental,
    quantizers,
)
from tfcompress.tfmot.quantization_aware import (
    fix_input_output_range,
    quantize_annotate_layer,
    quantize_annotate_model,
    quantize_apply,
    quantize_model,
    quantize_scope,
    remove_input_range,
)
from tfcompress.tfmot.quantize_config import QuantizeConfig, QuantizeWrapperV2
from tfcompress.tfmot.quantize_config import QuantizeWrapperV2 as QuantizeWrapper
from tfcompress.tfmot.quantize_schemes import (
    QuantizeLayoutTransform,
    QuantizeRegistry,
    QuantizeScheme,
)

__all__ = [
    "QuantizeConfig",
    "QuantizeLayoutTransform",
    "QuantizeRegistry",
    "QuantizeScheme",
    "QuantizeWrapper",
    "QuantizeWrapperV2",
    "collab_opts",
    "default_8bit",
    "experimental",
    "fix_input_output_range",
    "quantize_annotate_layer",
    "quantize_annotate_model",
    "quantize_apply",
    "quantize_model",
    "quantize_scope",
    "quantizers",
    "remove_input_range",
]
