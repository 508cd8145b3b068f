"""The page of a report: what it may ask for, what it escapes, and how it behaves in a browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.made_runs import LAYERS, hydra, make_run
from PIL import Image

from pattern_bench.commands.report import main

EVIL = '</script><script>window.harmed = 1</script><img src=x onerror="window.harmed = 2">\'&'
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of runs of two criteria, a job that is missing, a gallery and sanity checks, and names that would be markup."""
    root = tmp_path_factory.mktemp("page")
    runs = root / "runs"
    for criterion in ("all", "rectified"):
        for number, estimator in enumerate(("random", "x", "w", "a", "a_plus_minus")):
            make_run(
                runs / f"{criterion}-{estimator}", estimator=estimator, criterion=criterion, better=0.02 * number,
                resamples=0 if estimator == "x" else 5, picture=True, seed=number,
                overrides=[f"estimator={estimator}", f"criterion={criterion}"],
            )  # fmt: skip
    make_run(runs / "gradient", method="gradient", overrides=["method=gradient"])
    make_run(runs / "partial", estimator="mine", layers={"features.0": 8}, criterion="rectified")
    make_run(
        runs / "evil", model=EVIL, data=EVIL, layers={EVIL: 4}, method=EVIL, estimator=EVIL, picture=True,
        overrides=[f"model={EVIL}"], settings={"seed": 0, EVIL: EVIL},
    )  # fmt: skip
    hydra(runs / "begun", [f"estimator={EVIL}"])
    for kind, about, pictures in (
        ("gallery", {"figure": "fig5", "images": [{"true": EVIL, "predicted_name": "2"}], "columns": []}, ["fig5"]),
        ("sanity", {}, ["randomisation", "convergence"]),
    ):
        hydra(runs / kind, [], kind)
        (runs / kind / f"{kind}.json").write_text(json.dumps({"model": EVIL, "data": "digits", **about}))
        for name in pictures:
            Image.new("RGB", (90, 60), "green").save(runs / kind / f"{name}.png")
    (runs / "gallery" / "fig5.png").write_bytes(b"no picture")
    main([str(runs), "--output", str(root / "report")])
    return root / "report" / "index.html"


class Elements(HTMLParser):
    """Every element that is opened, with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.all = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))

    def named(self, *tags):
        return [attributes for tag, attributes in self.all if tag in tags]


# --- the file ---


def test_the_page_is_one_file_that_names_no_other(page):
    elements = Elements(page.read_text())
    for tag, attributes in elements.all:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", page.read_text(), re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert {file.suffix for file in page.parent.iterdir()} == {".html", ".csv", ".md", ".tex", ".png"}


def test_only_the_pages_own_script_and_style_may_run(page):
    text = page.read_text()
    (policy,) = [e["content"] for e in Elements(text).named("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_names_are_text(page):
    text = page.read_text()
    assert "<script>window" not in text
    assert "<img src=x" not in text
    assert EVIL.split("<img")[0].replace("<", "&lt;").replace(">", "&gt;") in text
    # In the data of the figures, where entities mean nothing.
    data = re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)
    assert any(EVIL in json.dumps(json.loads(each), ensure_ascii=False).replace('\\"', '"') for each in data)


def test_landmarks_headings_and_alternative_texts(page):
    elements = Elements(page.read_text())
    assert [tag for tag, _ in elements.all if tag in ("header", "nav", "main", "footer")] == [
        "header", "nav", "main", "footer",
    ]  # fmt: skip
    levels = [int(tag[1]) for tag, _ in elements.all if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(len(picture["alt"]) > 40 for picture in elements.named("img"))
    assert len(elements.named("img")) == 5 + 1 + 2
    ids = [attributes["id"] for _, attributes in elements.all if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in elements.named("a")} <= set(ids)
    assert "gallery/fig5.png cannot be read" in page.read_text()


def test_every_value_of_the_figures_stands_in_a_table(page):
    text = page.read_text()
    sections = {key: text[text.index(f'<section id="{key}"') :] for key in ("fig3", "fig4a", "distributions")}
    fig3 = sections["fig3"][: len(sections["fig3"]) - len(sections["fig4a"])]
    assert fig3.count("<summary>Values: ") == fig3.count('<div class="plot"') == 3
    assert "missing</td>" in fig3
    assert text.count('class="lacking"') == 2  # features.2 and classifier of the estimator that has one layer


# --- in a browser ---


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with Browser() as started:
        yield started


@pytest.fixture
def shown(browser, page):
    browser.said.clear()
    browser.asked.clear()
    browser.open(page)
    yield browser
    assert browser.said == []
    assert {url for url in browser.asked if not url.startswith("data:")} == {page.as_uri()}
    assert browser.run("window.harmed") is None


COLUMN = "[...document.querySelectorAll('#overview tbody tr')].map((row) => row.cells[{}].innerText.split('\\n')[0])"


def test_a_table_sorts_by_number_and_text_with_mouse_and_keyboard(shown):
    head = "document.querySelectorAll('#overview thead th')[{}]"
    shown.run(head.format(4) + ".querySelector('button').click()")
    means = shown.run(COLUMN.format(4))
    numbers = [float(text) for text in means if text not in ("–", "missing")]
    assert numbers == sorted(numbers)
    assert len(numbers) == 4 + 5 + 1
    assert means[: len(numbers)] == [f"{number:.3f}" for number in numbers]  # what has no value comes last
    assert shown.run(head.format(4) + ".getAttribute('aria-sort')") == "ascending"
    shown.run(head.format(4) + ".querySelector('button').focus()")
    shown.press("Enter", "\r")
    down = [float(text) for text in shown.run(COLUMN.format(4)) if text not in ("–", "missing")]
    assert down == numbers[::-1]
    assert shown.run(head.format(4) + ".getAttribute('aria-sort')") == "descending"
    shown.run(head.format(2) + ".querySelector('button').click()")
    criteria = shown.run(COLUMN.format(2))
    assert criteria == sorted(criteria, key=lambda text: (text == "–", text)) or criteria[0] == "–"
    assert shown.run(head.format(4) + ".hasAttribute('aria-sort')") is False


def test_the_legend_hides_a_series_and_the_keyboard_passes_it_by(shown):
    figure = "document.querySelector('#fig4a-0')"
    names = shown.run(f"[...{figure}.querySelectorAll('.legend button')].map((one) => one.textContent.trim())")
    assert names[-2:] == ["gradient", "random order"]
    shown.run(f"{figure}.querySelectorAll('.legend button')[1].click()")
    assert shown.run(f"{figure}.querySelectorAll('.legend button')[1].getAttribute('aria-pressed')") == "false"
    visible = "getComputedStyle({}.querySelectorAll('svg g[data-series]')[{}]).visibility"
    assert [shown.run(visible.format(figure, i)) for i in (0, 1)] == ["visible", "hidden"]
    shown.run(f"{figure}.querySelector('.plot').focus()")
    reading = f"{figure}.querySelector('.reading').textContent"
    shown.press("ArrowRight")
    assert shown.run(reading).startswith(f"{names[0].replace('Sx', 'S_x')}, 0 patches")
    shown.press("ArrowDown")
    assert names[1] not in shown.run(reading)
    shown.run(f"{figure}.querySelectorAll('.legend button')[1].click()")
    assert shown.run(visible.format(figure, 1)) == "visible"


def test_the_arrow_keys_read_the_values_of_the_table(shown):
    figure = "document.querySelector('#fig3-1')"
    shown.run(f"{figure}.querySelector('.plot').focus()")
    read = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "End", "Home"):
        shown.press(key)
        read.append(shown.run(f"{figure}.querySelector('.reading').textContent"))
    places = [text.split(": ")[0] for text in read]
    assert places == [
        "random, features.0", "random, features.2", "S_w, features.2", "S_w, classifier", "S_w, features.0",
    ]  # fmt: skip
    median = re.search(r"median ([\d.]+)", read[2]).group(1)
    row = "[...document.querySelector('#fig3-1 + details').querySelectorAll('tbody tr')].map((r) => r.textContent)"
    (values,) = [text.split() for text in shown.run(row) if text.split()[:2] == ["features.2", "Sw"]]
    assert values[3] == median
    # The missing values of a figure can be read, too.
    figure = figure.replace("fig3-1", "fig3-2")
    shown.run(f"{figure}.querySelector('.plot').focus()")
    for key in ("ArrowRight", "ArrowUp", "End"):
        shown.press(key)
    assert shown.run(f"{figure}.querySelector('.reading').textContent") == "mine, classifier: missing"


def test_the_pointer_reads_the_nearest_value(shown):
    shown.run("document.documentElement.style.scrollBehavior = 'auto'; "
              "document.querySelector('#fig4a-0 svg').scrollIntoView()")  # fmt: skip
    box = shown.run("document.querySelector('#fig4a-0 .plot > svg').getBoundingClientRect().toJSON()")
    # Twelve units left of the plot's right end, at its foot: the last step of the lowest curve.
    scale = box["width"] / 760
    shown.point(box["x"] + (760 - 26) * scale, box["y"] + 380 * scale)
    text = shown.run("document.querySelector('#fig4a-0 .reading').textContent")
    assert "8 patches replaced" in text
    assert "0.320" in text or "0.400" in text
    assert shown.run("document.querySelector('#fig4a-0 .cursor').getAttribute('visibility')") == "visible"


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_systems_colours(shown, page, width, scheme):
    shown.open(page, width=width, scheme=scheme)
    assert shown.run("document.documentElement.scrollWidth") <= width
    light = shown.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    # The button turns it round.
    shown.run("document.getElementById('theme').click()")
    assert (shown.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") != light
    assert shown.run("document.getElementById('theme').getAttribute('aria-pressed')") == str(light).lower()


def test_the_first_tab_leads_past_the_navigation(shown):
    shown.press("Tab")
    assert shown.run("document.activeElement.className") == "skip"
    shown.press("Enter", "\r")
    shown.press("Tab")
    assert shown.run("document.querySelector('main').contains(document.activeElement)")


def test_a_comparison_behaves_as_well(browser, tmp_path):
    make_run(tmp_path / "a", resamples=5)
    make_run(tmp_path / "b", resamples=5, better=0.1)
    main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path)])
    browser.said.clear()
    browser.open(tmp_path / "index.html", width=390)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.run("document.querySelector('#change-0 .plot').focus()")
    browser.press("ArrowRight")
    reading = browser.run("document.querySelector('.reading').textContent")
    assert re.match(r"S_a, features.0: 0\.1000 \(.*: better$", reading)
    assert browser.said == []
    assert len(LAYERS) == browser.run("document.querySelectorAll('#change-0 .mark').length") - 1  # one in the legend
