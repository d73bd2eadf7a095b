"""The bridge from TensorFlow Model Optimization (TFMOT) to Keras 3.

`import tfcompress.tfmot as tfmot` instead of `import tensorflow_model_optimization as tfmot`: the
same names, on models of Keras 3. TFMOT itself need not be installed.
"""

from tfcompress.tfmot import clustering, experimental, keras2, quantization, sparsity
from tfcompress.tfmot.conversion import convert

keras2.warn_if_tf_keras_is_keras_2()

__all__ = ["clustering", "convert", "experimental", "quantization", "sparsity"]
