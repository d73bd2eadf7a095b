"""Peak memory of a choice of masks: `python -m tests.ops.memory ALLOCATION eager|graph SIZE`."""

import resource
import sys

import tensorflow as tf

from tfcompress.ops.masks import choose_masks

NUM_WEIGHTS = 40


def peak() -> int:
    """Bytes that this process has needed at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(allocation, compiled, weight_size):
    """Print by how many bytes the choice of masks raises the peak."""
    weights = [tf.Variable(tf.random.normal([weight_size])) for _ in range(NUM_WEIGHTS)]
    masks = [tf.Variable(tf.ones([weight_size], tf.bool)) for _ in range(NUM_WEIGHTS)]

    def update(sparsity):
        chosen = choose_masks(weights, sparsity, allocation=allocation)
        for mask, each in zip(masks, chosen, strict=True):
            mask.assign(each)

    sparsity = tf.constant(0.8, tf.float64)
    # What tracing takes is not counted; the second call is for weights of any size.
    for size in (9, 11):
        choose_masks([tf.random.normal([size])] * NUM_WEIGHTS, sparsity, allocation=allocation)
    run = tf.function(update).get_concrete_function(sparsity) if compiled else update
    before = peak()
    run(sparsity)
    print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "graph", int(sys.argv[3]))
