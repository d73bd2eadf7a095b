"""Settings that must be in place before TensorFlow is imported."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_keras():
    """Every test starts from the same seed and layer names, whatever ran before it."""
    # Without free_memory=False it collects garbage, which takes longer than most tests.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
