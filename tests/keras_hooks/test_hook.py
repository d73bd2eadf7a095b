from tfcompress.keras_hooks.hook import add_hook


class Counter:
    def count(self, by=1):
        """How far."""
        return by


def test_hooks_nest_the_last_one_outermost():
    counter = Counter()
    add_hook(counter, "count", lambda proceed, by=1: proceed(by) + 10)
    add_hook(counter, "count", lambda proceed, by=1: proceed(by) * 2)
    assert counter.count(3) == (3 + 10) * 2


def test_a_hook_may_nest_in_the_others():
    counter = Counter()
    add_hook(counter, "count", lambda proceed, by=1: proceed(by) + 10)
    remove = add_hook(counter, "count", lambda proceed, by=1: proceed(by) * 2, innermost=True)
    assert counter.count(3) == 3 * 2 + 10
    remove()
    assert counter.count(3) == 3 + 10


def test_hooks_are_removed_in_any_order_and_leave_nothing():
    counter = Counter()
    first = add_hook(counter, "count", lambda proceed, by=1: proceed(by) + 10)
    second = add_hook(counter, "count", lambda proceed, by=1: proceed(by) * 2)
    first()
    assert counter.count() == 2
    first()
    second()
    assert counter.count() == 1
    assert vars(counter) == {}


def test_the_same_function_can_hang_twice():
    counter = Counter()

    def double(proceed, by=1):
        return proceed(by) * 2

    remove = add_hook(counter, "count", double)
    add_hook(counter, "count", double)
    remove()
    assert counter.count() == 2


def test_an_attribute_that_was_there_comes_back():
    counter = Counter()
    counter.count = lambda by=1: -by
    remove = add_hook(counter, "count", lambda proceed, by=1: proceed(by) * 2)
    assert counter.count(2) == -4
    remove()
    assert counter.count(2) == -2


def test_other_instances_are_untouched_and_the_name_stays():
    counter, other = Counter(), Counter()
    add_hook(counter, "count", lambda proceed, by=1: 0)
    assert other.count() == 1
    assert counter.count.__name__ == "count"
