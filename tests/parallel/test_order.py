"""The order in which stages work on micro-batches."""

import pytest

from tfcompress.parallel.order import Work, interleaved, needs, order


def text(works):
    return " ".join("FB"[work.backward] + str(work.microbatch) for work in works)


def test_gpipe_goes_forward_with_all_before_it_goes_backward():
    assert list(map(text, order("gpipe", 2, 3))) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_alternates_once_every_later_stage_has_something_to_do():
    assert list(map(text, order("1f1b", 3, 4))) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (4, 2), (2, 7), (5, 5)])
def test_everything_is_done_once_and_behind_what_it_needs(schedule, stages, microbatches):
    works = order(schedule, stages, microbatches)
    row = list(interleaved(works))
    assert len(set(row)) == len(row) == 2 * stages * microbatches
    place = {work: number for number, work in enumerate(row)}
    for work in row:
        needed = needs(work, stages)
        assert needed is None or place[needed] < place[work]
        if work.backward:
            assert place[Work(work.stage, work.microbatch)] < place[work]
    for own in works:
        assert sorted(own, key=place.get) == own


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='schedule must be "gpipe" or "1f1b", got "?\'?pipe'):
        order("pipe", 2, 2)
    with pytest.raises(ValueError, match="microbatches must be a whole number, 1 or more, got 0"):
        order("gpipe", 2, 0)
