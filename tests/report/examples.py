"""Profiles written by hand; nothing here needs a model."""

from tfcompress.measure import Latency, Profile, WeightProfile

ENVIRONMENT = {"tensorflow": "2.21.0", "platform": "Linux <test>"}


def weight(path: str, zeros: int, shape=(10, 10)) -> WeightProfile:
    kept = (100 - zeros) // 2
    counts, edges = (kept, zeros, 100 - zeros - kept), (-1.0, -0.3, 0.3, 1.0)
    return WeightProfile(path, shape, 100, 100 - zeros, counts, edges)


def example(model, variant, tool, size, milliseconds, zeros=0, **fields) -> Profile:
    timing = {n: Latency(milliseconds * n, milliseconds, milliseconds * 40, 31) for n in (1, 32)}
    layers = (weight("a/kernel", zeros), weight("b/kernel", zeros // 2))
    values = {"accuracy": 0.92, "params": 109_386, "nonzeros": 21_877, "layers": layers}
    return Profile(
        model=model,
        variant=variant,
        tool=tool,
        bytes=size,
        zipped_bytes=size // 2,
        latency=timing,
        environment=ENVIRONMENT,
        **{**values, **fields},
    )


def example_profiles() -> list[Profile]:
    file_layers = (weight("b/MatMul", 50, (100, 1)), weight("a/MatMul", 80, (100, 1)))
    return [
        example("mlp", "original", "keras", 400_000, 0.4, macs=108_000),
        example("mlp", "pruned [50%] $x$ <b>", "keras", 400_000, 0.8, zeros=50, accuracy=0.9),
        example(
            "mlp", "pruned [50%] $x$ <b>", "litert int8", 100_000, 0.05,
            artefact="m.tflite", layers=file_layers, max_abs_diff=0.004, accuracy=0.915,
        ),
        example("cnn", "original", "keras", 100_000, 0.8),
        example("cnn", "original", "litert int8", 20_000, 0.2, layers=file_layers),
    ]  # fmt: skip
