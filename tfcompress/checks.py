"""Arguments that several techniques take, checked in one place."""

from tfcompress import schedules


def check_threshold(threshold: float) -> None:
    """Raise a ValueError if a threshold is not above 0.

    >>> check_threshold(0.0)
    Traceback (most recent call last):
    ...
    ValueError: threshold must be above 0, got 0.0. It is the smallest magnitude that is kept...
    """
    if not threshold > 0:
        raise ValueError(
            f"threshold must be above 0, got {threshold}. It is the smallest magnitude that is "
            "kept, e.g. 0.1."
        )


def check_strength(strength: float) -> None:
    """Raise a ValueError if the strength of a penalty is not above 0.

    >>> check_strength(-1)
    Traceback (most recent call last):
    ...
    ValueError: strength must be above 0, got -1; 1e-4 is a usual value.
    """
    if not strength > 0:
        raise ValueError(f"strength must be above 0, got {strength}; 1e-4 is a usual value.")


def check_frequency(frequency: int) -> int:
    """The frequency as an int, or a ValueError if it is no whole number of steps above 0.

    >>> check_frequency(10.0)
    10
    """
    if frequency < 1 or frequency != int(frequency):
        raise ValueError(f"frequency must be a whole number of steps, 1 or more: {frequency}.")
    return int(frequency)


def check_one_of(sparsity, threshold) -> None:
    """Raise a ValueError unless exactly one of the two is given.

    >>> check_one_of(0.5, None)
    """
    if (sparsity is None) == (threshold is None):
        raise ValueError(
            f"Give either sparsity or threshold, got sparsity={sparsity} and "
            f"threshold={threshold}; e.g. sparsity=0.8."
        )


def check_sparsity(sparsity, structure=None):
    """The schedule, or the schedules by glob, that `sparsity` and the structure ask for.

    Args:
        sparsity: A float, a schedule, or {glob: float or schedule}; None where the structure says
            it.
        structure: A structure; n:m fixes the final sparsity.

    Returns:
        {glob: schedule}; the glob None stands for every weight.

    Raises:
        ValueError: No sparsity, one outside [0, 1), or one that contradicts the structure.

    Example:

    >>> check_sparsity(0.5)
    {None: Constant(constant=0.5, begin_step=0, end_step=None)}
    """
    fixed = getattr(structure, "sparsity", None)
    sparsity = fixed if sparsity is None else sparsity
    if sparsity is None:
        raise ValueError(
            "sparsity is needed: a fraction of zeros in [0, 1) such as 0.8, a schedule, or "
            "{glob: float or schedule}; got None."
        )
    if sparsity == {}:
        raise ValueError("sparsity is an empty dict; expected {glob: float or schedule}.")
    by_glob = sparsity if isinstance(sparsity, dict) else {None: sparsity}
    found = {glob: schedules.check_sparsity(schedules.get(each)) for glob, each in by_glob.items()}
    for schedule in found.values() if fixed is not None else ():
        final = schedule(schedule.end_step or schedule.begin_step)
        if final != fixed:
            raise ValueError(
                f"{structure} ends at the sparsity {fixed}, got {final} from {schedule}. Leave "
                "sparsity out, or let a schedule end there."
            )
    return found
