"""Memory of a calibration: `python -m tests.quantization.memory CALIBRATOR`."""

import gc
import resource
import sys

import keras
import numpy as np

from tfcompress.quantization import quantize
from tfcompress.quantization.calibrate import calibrate

BATCH = np.ones((256, 1024), "float32")
WARM_UP, LONG = 20, 200


def peak() -> int:
    """Bytes that this process has needed at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(calibrator):
    """Print by how many bytes the peak rises over the batches after the first ones."""
    layers = [keras.Input((1024,)), keras.layers.Dense(1024, "relu"), keras.layers.Dense(8)]
    model = quantize(keras.Sequential(layers))
    peaks = []

    def batches():
        for i in range(LONG):
            if i == WARM_UP:
                gc.collect()
                peaks.append(peak())
            yield BATCH * np.float32(i % 7 - 3)

    calibrate(model, batches(), calibrator, verbose=0)
    print(peak() - peaks[0])


if __name__ == "__main__":
    main(sys.argv[1])
