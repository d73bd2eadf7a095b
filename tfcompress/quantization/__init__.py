"""Quantization: schemes, and a model into its quantized form."""

from tfcompress.ops.schemes import Scheme
from tfcompress.quantization import calibrators
from tfcompress.quantization.adaround import AdaRound
from tfcompress.quantization.assignment import Budget, Cost, search
from tfcompress.quantization.bias import correct_biases
from tfcompress.quantization.calibrate import calibrate
from tfcompress.quantization.calibrators import MSE, Entropy, MinMax, MovingAverage, Percentile
from tfcompress.quantization.equalization import equalize
from tfcompress.quantization.gptq import GPTQ
from tfcompress.quantization.mixed import Candidate, Sensitivities, auto, costs, sensitivities
from tfcompress.quantization.quantize import quantize
from tfcompress.quantization.rounding import Rounding, round_weights
from tfcompress.quantization.smooth import smooth

__all__ = [
    "AdaRound",
    "Budget",
    "Candidate",
    "Cost",
    "Entropy",
    "GPTQ",
    "MSE",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "Rounding",
    "Scheme",
    "Sensitivities",
    "auto",
    "calibrate",
    "calibrators",
    "correct_biases",
    "costs",
    "equalize",
    "quantize",
    "round_weights",
    "search",
    "sensitivities",
    "smooth",
]
