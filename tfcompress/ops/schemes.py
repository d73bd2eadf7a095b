"""How tensors are quantized, as values: bits, symmetry, what shares a scale."""

import dataclasses
import re

import keras

from tfcompress.values import Value

GRANULARITIES = ("tensor", "channel", "group")


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Scheme(Value):
    """How a tensor is quantized: an integer grid and what shares one scale.

    A symmetric scheme has zero point 0 and leaves out the most negative integer, so that
    `-w` is representable whenever `w` is; an asymmetric one covers `[low, high]` exactly once.
    0 is on every grid: what was pruned stays pruned.

    Args:
        bits: Width of the integers, 2 to 8.
        symmetric: Whether the zero point is 0.
        granularity: What shares one scale: `"tensor"`, `"channel"` (of weights an output channel;
            of dynamic activations a row: all but the last axis) or `"group"` (of weights:
            `group_size` input features of an output channel).
        group_size: Input features of a group, 1 or more; the last group may be smaller.
        power_of_two: Whether scales are rounded up to powers of two, so that hardware can shift.
        dynamic: Of activations: whether the range is that of the batch at hand, also in inference,
            instead of one that was observed.

    Raises:
        ValueError: `bits` or `granularity` is not one of the above, or they contradict each other.

    Example:

    >>> Scheme(bits=4).limits
    (-7, 7)
    >>> Scheme(symmetric=False, granularity="tensor").limits
    (-128, 127)
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "channel"
    group_size: int | None = None
    power_of_two: bool = False
    dynamic: bool = False

    def __post_init__(self):
        if self.bits not in range(2, 9):
            raise ValueError(f"Scheme has bits={self.bits!r}; pass an integer from 2 to 8.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Scheme has granularity={self.granularity!r}; pass one of {GRANULARITIES}."
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"Scheme has granularity={self.granularity!r} and group_size={self.group_size!r}; "
                'pass both, as in Scheme(4, granularity="group", group_size=32), or no group_size.'
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"Scheme has group_size={self.group_size!r}; pass 1 or more.")

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer of the grid."""
        return integer_limits(self.bits, narrow=self.symmetric)


def integer_limits(bits: int, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest signed integer of `bits` bits; `narrow` leaves out the smallest.

    Example:

    >>> integer_limits(8), integer_limits(8, narrow=True)
    ((-128, 127), (-127, 127))
    """
    high = 2 ** (bits - 1) - 1
    return (-high if narrow else -high - 1), high


def weight_scheme(spec: "str | dict | Scheme | None") -> Scheme | None:
    """Resolve what a user passes as `weights`: `"int8"` is symmetric, one scale a channel.

    Args:
        spec: `"int2"` to `"int8"`, a `Scheme`, its config, or None (leave float).

    Returns:
        The scheme, or None.

    Raises:
        ValueError: `spec` is none of these, or a dynamic scheme.

    Example:

    >>> weight_scheme("int8").granularity
    'channel'
    """
    scheme = _resolve(spec, "weights", Scheme())
    if scheme is not None and scheme.dynamic:
        raise ValueError(
            f"weights={spec!r} is dynamic, but weights do not depend on a batch; pass "
            "dynamic=True with activations= only."
        )
    return scheme


def activation_scheme(spec: "str | dict | Scheme | None") -> Scheme | None:
    """Resolve what a user passes as `activations`: `"int8"` is asymmetric, one scale a tensor.

    Args:
        spec: `"int2"` to `"int8"`, `"dynamic"` (int8, each row on the range it has), a `Scheme`,
            its config, or None (leave float).

    Returns:
        The scheme, or None.

    Raises:
        ValueError: `spec` is none of these, or a scheme with one scale a channel that is not
            dynamic, or one a group.

    Example:

    >>> activation_scheme("int8").symmetric
    False
    """
    default = Scheme(symmetric=False, granularity="tensor")
    if spec == "dynamic":
        return dataclasses.replace(default, granularity="channel", dynamic=True)
    scheme = _resolve(spec, "activations", default)
    if scheme is None or scheme.granularity == "tensor":
        return scheme
    if scheme.granularity == "channel" and scheme.dynamic:
        return scheme
    raise ValueError(
        f"activations={spec!r} must have one scale a tensor, which is what integer kernels read: "
        'Scheme(bits=..., symmetric=False, granularity="tensor"); or pass "dynamic".'
    )


def scheme_pair(weights, activations):
    """Both schemes, where `weights` may name both: `"w4a8"`, or `"w4"` for weights only.

    Args:
        weights: See `weight_scheme`; or `"w4a8"`, which leaves `activations` at its default; or a
            dict of glob -> any of these.
        activations: See `activation_scheme`.

    Returns:
        `(weights, activations)`, resolved; the first may be a dict of glob -> scheme.

    Raises:
        ValueError: One of the two is not a scheme, or they contradict each other.

    Example:

    >>> [scheme and scheme.bits for scheme in scheme_pair("w4a8", "int8")]
    [4, 8]
    >>> scheme_pair("w4", "int8")[1] is None
    True
    """
    if isinstance(weights, dict) and "bits" not in weights:
        schemes = {glob: weight_scheme(spec) for glob, spec in weights.items()}
        return schemes, activation_scheme(activations)
    match = re.fullmatch(r"w([2-8])(?:a([2-8]))?", weights) if isinstance(weights, str) else None
    if match is None:
        return weight_scheme(weights), activation_scheme(activations)
    named = f"int{match[2]}" if match[2] else None
    if activations not in ("int8", named):
        raise ValueError(
            f"weights={weights!r} says the activations too, but activations={activations!r} was "
            f'passed. Leave it out, or pass weights="int{match[1]}".'
        )
    return weight_scheme(f"int{match[1]}"), activation_scheme(named)


def _resolve(spec, argument, default: Scheme) -> Scheme | None:
    if spec is None or isinstance(spec, Scheme):
        return spec
    if isinstance(spec, dict):
        return Scheme(**spec)
    match = re.fullmatch(r"int([2-8])", spec) if isinstance(spec, str) else None
    if match is None:
        raise ValueError(
            f'{argument}={spec!r} is not a quantization scheme; pass "int8" ("int2" to "int8"), '
            "a tfcompress.quantization.Scheme, or None to leave them float."
        )
    return dataclasses.replace(default, bits=int(match[1]))
