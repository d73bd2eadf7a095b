"""In which order the stages of a pipeline work on micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True, order=True)
class Work:
    """What a stage does in one go.

    Args:
        stage: From 0.
        microbatch: From 0.
        backward: Whether it is the backward pass.
    """

    stage: int
    microbatch: int
    backward: bool = False


def order(schedule: str, stages: int, microbatches: int) -> list[list[Work]]:
    """What each stage does, in its order, in a training step.

    * `"gpipe"`: every micro-batch forward, then every one backward. A stage keeps the activations
      of all of them.
    * `"1f1b"`: a stage goes backward as soon as it can, and keeps the activations of at most
      `stages - stage` micro-batches. It is as fast.

    Args:
        schedule: `"gpipe"` or `"1f1b"`.
        stages: How many.
        microbatches: How many.

    Returns:
        A list for each stage.

    Raises:
        ValueError: An unknown schedule, or numbers below 1.

    Example:

    >>> for works in order("1f1b", stages=2, microbatches=3):
    ...     print(*("FB"[work.backward] + str(work.microbatch) for work in works))
    F0 F1 B0 F2 B1 B2
    F0 B0 F1 B1 F2 B2

    References: Huang et al. 2019, https://arxiv.org/abs/1811.06965 (GPipe); Narayanan et al. 2019,
    https://arxiv.org/abs/1806.03377, and 2021, https://arxiv.org/abs/2006.09503 (1F1B, flushed
    after each step).
    """
    if schedule not in ("gpipe", "1f1b"):
        raise ValueError(f'schedule must be "gpipe" or "1f1b", got {schedule!r}.')
    for name, number in (("stages", stages), ("microbatches", microbatches)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {number!r}.")
    return [_works(schedule, stage, stages, microbatches) for stage in range(stages)]


def _works(schedule, stage, stages, microbatches) -> list[Work]:
    ahead = microbatches if schedule == "gpipe" else min(stages - 1 - stage, microbatches)
    works = [Work(stage, m) for m in range(ahead)]
    for m in range(microbatches):
        works += [Work(stage, m + ahead)] if m + ahead < microbatches else []
        works.append(Work(stage, m, backward=True))
    return works


def needs(work: Work, stages: int) -> Work | None:
    """What another stage has to have done before.

    >>> needs(Work(1, 0), 3), needs(Work(1, 0, backward=True), 3)
    (Work(stage=0, microbatch=0, backward=False), Work(stage=2, microbatch=0, backward=True))
    """
    if work.backward:
        last = work.stage == stages - 1
        return None if last else dataclasses.replace(work, stage=work.stage + 1)
    return dataclasses.replace(work, stage=work.stage - 1) if work.stage else None


def interleaved(works: Sequence[Sequence[Work]]) -> Iterator[Work]:
    """The work of all stages in one row, each behind what it needs.

    Args:
        works: What each stage does, in its order; see `order`.

    Yields:
        Every `Work` once.

    Example:

    >>> [work.stage for work in interleaved(order("gpipe", 2, 1))]
    [0, 1, 1, 0]
    """
    done: set[Work] = set()
    places = [0] * len(works)
    while len(done) < sum(map(len, works)):
        for stage, own in enumerate(works):
            while places[stage] < len(own):
                needed = needs(own[places[stage]], len(works))
                if needed is not None and needed not in done:
                    break
                done.add(own[places[stage]])
                yield own[places[stage]]
                places[stage] += 1
