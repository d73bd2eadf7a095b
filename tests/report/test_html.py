import html.parser
import re

import pytest

from tests.report.examples import example, example_profiles
from tfcompress import report
from tfcompress.measure import Profile

VOID = {"meta", "path", "use", "rect", "br"}


class Page(html.parser.HTMLParser):
    """The tags of a page, its text, and whether every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    inputs = {"data": "digits <script>alert(1)</script>", "seed": 3, "options": ["a", "b"]}
    assert report.html(example_profiles(), path, title="A & B", inputs=inputs) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_the_page_is_well_formed(page):
    assert page.open == []
    assert page.tags.count("table") == 2
    assert page.tags.count("tr") == 2 + len(example_profiles())


def test_it_has_every_figure(page):
    titles = " ".join(page.text)
    for title in ("Accuracy against size", "Accuracy against latency", "Zeros in each layer"):
        assert titles.count(title) == 2
    # Three for each model, and the weights of the pruned Keras model; files have other layers.
    assert page.tags.count("svg") == 2 * 3 + 1


def test_nothing_is_loaded_from_elsewhere(page):
    loading = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert loading
    assert all(value.startswith("#") for value in loading)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)


def test_everything_is_escaped(source, page):
    assert "<script>" not in source
    assert "<b>" not in re.sub(r"<b>[\d.]+x</b>", "", source)
    text = " ".join(page.text)
    assert "digits <script>alert(1)</script>" in text
    assert "pruned [50%] $x$ <b>" in text
    assert "A & B" in text


def test_figures_follow_the_colour_scheme_of_the_reader(source):
    assert "prefers-color-scheme: dark" in source
    assert "currentColor" in source
    assert "#010203" not in source


def test_the_best_variants_are_named_first(page):
    text = " ".join(" ".join(page.text).split())
    assert "4.0x smaller file pruned [50%] $x$ <b> (litert int8), accuracy -0.5 points" in text
    assert "8.0x faster at batch 1" in text


@pytest.mark.parametrize(
    ("accuracy", "text"), [(0.92, "+0.0"), (0.9197, "+0.0"), (0.9203, "+0.0"), (0.93, "+1.0")]
)
def test_a_change_that_rounds_to_zero_has_no_minus(accuracy, text, tmp_path):
    profiles = [
        example("net", "original", "keras", 400, 0.4),
        example("net", "small", "keras", 100, 0.4, accuracy=accuracy),
    ]
    page = report.html(profiles, tmp_path / "r.html").read_text()
    assert f"small (keras), accuracy {text} points" in page


def test_a_variant_that_loses_accuracy_is_no_highlight(tmp_path):
    profiles = example_profiles()[:2]
    text = report.html(profiles, tmp_path / "r.html").read_text()
    assert 'class="card tile"' not in text


def test_inputs_and_versions_are_recorded(page):
    text = " ".join(page.text)
    for expected in ("seed", "3", '["a", "b"]', "2.21.0", "Linux <test>", "108,000"):
        assert expected in text


def test_profiles_without_measurements_still_make_a_page(tmp_path):
    path = report.html([Profile("net", "original", "keras")], tmp_path / "r.html")
    page = Page(path.read_text())
    assert page.open == []
    assert "svg" not in page.tags


def test_the_same_profiles_give_the_same_page(tmp_path):
    pages = [report.html(example_profiles()[:2], tmp_path / name).read_text() for name in "ab"]
    assert pages[0] == pages[1]


def test_bad_calls_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no profiles were passed. Make some with"):
        report.html([], tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write .*Pass a path"):
        report.html(example_profiles(), tmp_path / "file" / "r.html")
