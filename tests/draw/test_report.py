"""report.html holds what was scored, as text and pictures, and works in a browser by keyboard without any network."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.browser import start
from helpers.scoring import gather_into
from PIL import Image

from guided_diffusion import metrics
from guided_diffusion.draw import montage, plots, report, style
from guided_diffusion.scoring.evaluation import Evaluation

SIDE = 12
NAMES = ["a1-0", "b2", "<script>alert(1)<", 'c"3\'&amp;<b>', "]]>--><!--"]
DOT = montage.png(Image.new("L", (1, 1)))


def make_case(name, members=6, side=SIDE):
    rng = np.random.default_rng([1, *name.encode()])
    y, x = np.mgrid[:side, :side]
    distance = np.hypot(y - side / 2, x - side / 2)
    radius = rng.uniform(0.1, 0.5, (3 + members, 1, 1)) * side
    return name, rng.random((1, side, side)), distance < radius[:3], distance < radius[3:]


class Reader(HTMLParser):
    """The rows of the table of cases as lists of (text, data-v), and the scripts: those with an id by it."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.scripts, self.tags, self.cell = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.cell = None
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(["", attributes.get("data-v")])
            self.cell = self.rows[-1][-1]
        elif tag == "script":
            self.cell = self.scripts.setdefault(attributes.get("id"), ["", None])

    def handle_data(self, data):
        if self.cell:
            self.cell[0] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th", "script"):
            self.cell = None


@pytest.fixture
def written(monkeypatch, tmp_path):
    """The folder and the page of NAMES, scored."""
    monkeypatch.setattr(plots, "score_figure", lambda *args: DOT)
    evaluation = Evaluation([2])
    for name in NAMES:
        evaluation.add(*make_case(name))
    evaluation.gather()
    evaluation.write(tmp_path)
    return tmp_path, (tmp_path / "report.html").read_text(encoding="utf-8")


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))


# ---- what it holds ----

def test_the_table_holds_the_numbers_of_the_csv_and_names_as_text(written):
    folder, text = written
    read = Reader(text)
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file))
    rows = read.rows[-len(NAMES):]
    assert [row["case"] for row in expected] == sorted(NAMES) and len(read.scripts) == len(NAMES) + 2
    for row, line in zip(rows, expected):
        assert [row[1][0], row[2][0]] == [line["case"], line["patient"]]
        columns = ["raters", "members", *metrics.SCORES, "GED_2"]
        assert [float(value) for _, value in row[3:]] == [float(line[name]) for name in columns]
        assert [shown for shown, _ in row[5:]] == [f"{float(line[name]):.3f}" for name in columns[2:]]
    summary = json.loads((folder / "scores.json").read_text())["all"]["GED"]
    assert f"<td>{summary['mean']:.3f} [{summary['low']:.3f}, {summary['high']:.3f}]</td>" in text
    assert base64.b64encode(DOT).decode() in text


def test_nothing_in_the_page_refers_to_another_place(written):
    _, text = written
    assert "://" not in text and not re.search(r"https?:|url\(|@import|\bimport\(|fetch\(|XMLHttp", text)
    tags = Reader(text).tags
    sources = [values[name] for _, values in tags for name in ("src", "href", "action", "srcset") if name in values]
    assert len(sources) == len(NAMES) + 2 and all(source.startswith("data:") for source in sources)
    policy = next(values["content"] for tag, values in tags if "http-equiv" in values)
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    assert not any(name.startswith("on") or name == "style" for _, values in tags for name in values)


def test_opening_a_case_finds_its_scan_masks_and_mean(written):
    scripts = Reader(written[1]).scripts
    for i, name in enumerate(sorted(NAMES)):
        _, image, raters, predictions = make_case(name)
        case = json.loads(scripts[f"case{i}"][0])
        assert (case["height"], case["width"], case["step"], case["raters"], case["members"]) == (SIDE, SIDE, 1, 3, 6)
        assert np.array_equal(pixels(case["image"]), np.round(image[0] * 255))
        assert np.array_equal(pixels(case["masks"]).reshape(-1, SIDE, SIDE), np.concatenate([raters, predictions]))
        assert np.array_equal(pixels(case["mean"]), np.round(predictions.mean(0) * 255))
        assert len(case["calibration"]) == 3 and list(case["scores"]) == list(metrics.SCORES)


def test_many_masks_are_cut_off_and_large_pictures_thinned_out_but_the_mean_is_of_all():
    _, image, raters, predictions = make_case("x", members=40)
    shown = report.pictures(image, raters, predictions)
    assert np.array_equal(pixels(shown["masks"]).reshape(-1, SIDE, SIDE)[3:], predictions[:report.MEMBERS])
    assert np.array_equal(pixels(shown["mean"]), np.round(predictions.mean(0) * 255))
    large = np.zeros((1, 300, 600))
    large[:, ::3, ::3] = 1
    shown = report.pictures(large, large > 0, large > 0)
    assert (shown["height"], shown["width"], shown["step"]) == (100, 200, 3) and pixels(shown["image"]).all()
    assert pixels(shown["thumbnail"]).shape == (32, 64) and pixels(shown["masks"]).shape == (200, 200)


def test_a_thumbnail_outlines_raters_and_masks_in_two_colours():
    masks = np.zeros((2, 2, 64, 64), bool)
    masks[0, :, 8:20, 8:20], masks[1, :, 30:50, 30:50] = True, True
    text = report.pictures(np.full((1, 64, 64), 0.5), *masks)["thumbnail"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
    assert tuple(picture[8, 10]) == (230, 159, 0) and tuple(picture[30, 40]) == (86, 180, 233)
    assert tuple(picture[12, 12]) == tuple(picture[40, 40]) == tuple(picture[0, 0]) and 120 < picture[0, 0, 0] < 136


def test_pictures_of_two_processes_make_the_page_of_one(written, monkeypatch, tmp_path):
    parts = [Evaluation([2]), Evaluation([2])]
    for i, name in enumerate(NAMES):
        parts[i % 2].add(*make_case(name))
    gather_into(parts[1], parts, monkeypatch, tmp_path)
    (tmp_path / "two").mkdir()
    parts[1].write(tmp_path / "two")
    assert (tmp_path / "two" / "report.html").read_text(encoding="utf-8") == written[1]


# ---- in a browser ----

@pytest.fixture
def browser(tmp_path):
    result = start(tmp_path / "profile")
    yield result
    result.close()


def test_300_cases_are_sorted_searched_and_opened_by_keyboard_and_nothing_is_requested(browser, tmp_path):
    evaluation = Evaluation()
    evaluation.add(*make_case("a", 20))
    rng = np.random.default_rng(0)
    rows = [evaluation.rows[0]._replace(case=f"case{i}", scores={("model", "all"): rng.normal(0, 10, len(
        metrics.SCORES))})
            for i in range(300)]
    geds = np.array([row.scores["model", "all"][0] for row in rows])
    file = tmp_path / "report.html"
    file.write_bytes(report.page(rows, ["p"] * 300, "words", [[["score", "model"], ["GED", "0.5"]]], DOT))
    browser.open(file.as_uri())
    browser.wait("!!document.querySelector('#place')?.textContent")
    names = "[...document.querySelectorAll('#cases tbody tr:not([hidden])')].map(row => row.cells[1].textContent)"
    sort = "document.querySelectorAll('#cases thead th')[5].ariaSort"
    shown = "document.querySelector('#name').textContent"
    charts = "document.querySelectorAll('#view polyline').length"
    is_open = "document.querySelector('dialog').open && document.querySelectorAll('canvas').length"
    assert browser.ask(names) == [f"case{i}" for i in range(300)] and browser.ask(sort) == "none"

    browser.click("#cases thead th:nth-child(6) button")
    assert browser.ask(names) == [f"case{i}" for i in geds.argsort()] and browser.ask(sort) == "ascending"
    for key, order, state in (("Enter", geds.argsort()[::-1], "descending"), (" ", geds.argsort(), "ascending")):
        browser.press(key)  # the heading has the focus
        assert browser.ask(names) == [f"case{i}" for i in order] and browser.ask(sort) == state

    browser.ask("document.querySelector('#cases tbody tr').focus()")
    browser.press("ArrowDown")
    browser.press("Enter")
    browser.wait(f"{is_open} === 6 + 3 + 16")  # of 20 masks
    tops = browser.ask("[...document.querySelectorAll('.overview canvas')].map(e => e.getBoundingClientRect().top)")
    assert len(tops) == 6 and len(set(tops)) == 1  # in one row
    scales = browser.ask("[...document.querySelectorAll('svg.scale')].map(e =>"
                         " [[...e.querySelectorAll('text')].map(text => text.textContent),"
                         " e.querySelector('rect').getAttribute('fill'),"
                         " e.querySelector('rect:last-of-type').getAttribute('fill')])")
    assert scales == [[[*words], "rgb(68,1,84)", "rgb(253,231,37)"] for words in (
        ("0", "0.5", "1"), ("0", "0.5", "1"), ("0", "0.25", "0.5"))]
    assert browser.ask(charts) == 2 and browser.ask(shown) == f"case{geds.argsort()[1]}"
    assert "the first 16 of 20 masks" in browser.ask("document.querySelector('#view').textContent")
    browser.press("ArrowRight")
    browser.wait(f"{shown} === 'case{geds.argsort()[2]}'")
    browser.press("Escape")
    browser.wait("!document.querySelector('dialog').open")
    browser.wait(f"document.activeElement.cells?.[1].textContent === 'case{geds.argsort()[2]}'")

    browser.ask("document.querySelector('#filter').focus()")
    browser.call("Input.insertText", text="SE29")
    assert sorted(browser.ask(names)) == ["case29", *(f"case{i}" for i in range(290, 300))]
    assert browser.ask("document.querySelector('#found').textContent") == "11 of 300"
    browser.click("#cases tbody tr:not([hidden]) td:nth-child(7)")
    browser.wait(f"{is_open} && {shown} === '{browser.ask(names)[0]}'")

    assert all(url == file.as_uri() or url.startswith("data:") for url in browser.requests) and browser.requests
    fetch = f"fetch('{browser.address}', {{mode: 'no-cors'}}).then(() => 'sent', () => 'refused')"
    assert browser.ask(fetch) == "refused"
    assert browser.ask("new Promise(tell => { addEventListener('securitypolicyviolation', event => tell(event."
                       "effectiveDirective)); document.body.append(Object.assign(document.createElement('script'),"
                       " {textContent: 'document.title = 1'})); })") == "script-src-elem"

    # masks that are no independent draws: neither chart
    spread = tmp_path / "spread.html"
    spread.write_bytes(report.page(rows[:1], ["p"], "words", [], None, independent=False))
    browser.open(spread.as_uri())
    browser.wait("!!document.querySelector('#place')?.textContent")
    browser.click("#cases tbody tr td:nth-child(4)")
    browser.wait(f"{is_open} === 6 + 3 + 16")
    assert browser.ask(charts) == 0 and browser.ask("document.querySelectorAll('#view .numbers td').length") == 13


def test_raters_who_agree_share_their_outline_in_the_page(browser, tmp_path):
    masks = np.zeros((4, 12, 16), bool)
    masks[:3, 3:11, :9], masks[3, 0:2, 11:16] = True, True
    evaluation = Evaluation()
    evaluation.add("a", np.full((1, 12, 16), 0.5), masks, masks)
    evaluation.write(tmp_path)
    browser.open((tmp_path / "report.html").as_uri())
    browser.wait("!!document.querySelector('#place')?.textContent")
    browser.click("#cases tbody td:nth-child(7)")
    canvas = "document.querySelectorAll('.overview canvas')[1]"
    browser.wait(canvas)
    width, values = browser.ask(f"(c => [c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]])"
                                f"({canvas})")
    pixels = np.array(values).reshape(-1, width, 4)[..., :3]
    scale, drawn = width // 16, np.ptp(pixels, axis=2) > 0
    large = masks.repeat(scale, 1).repeat(scale, 2)
    padded = np.pad(large, ((0, 0), (2, 2), (2, 2)))  # lines are two pixels thick
    inner = np.logical_and.reduce([padded[:, dy:dy + large.shape[1], dx:dx + large.shape[2]]
                                   for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4))]) & large
    assert (drawn == (large & ~inner).any(0)).all()
    colours = [(pixels == style.OUTLINES[k]).all(2) for k in range(4)]
    assert (sum(colours) == drawn).all() and (colours[3] == (large & ~inner)[3]).all()
    assert all(colour.sum() > 0.2 * (large & ~inner)[0].sum() for colour in colours[:3])
