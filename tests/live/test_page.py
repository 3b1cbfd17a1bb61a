"""Visdom's page in a real browser: a training run's windows, and two runs in one environment."""

import json

import pytest
from helpers import browser
from helpers.visdom import Server

from guided_diffusion.live.client import page as page_of

pytestmark = pytest.mark.long

# title -> name -> number of points that are drawn, of every plot on the page
PLOTS = """Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(plot => [
    plot.closest('.react-grid-item').querySelector('.bar div').innerText,
    Object.fromEntries(plot.data.map((trace, i) => [trace.name, trace.y.filter(y => y !== null).length]))]))"""
TITLES = """[...document.querySelectorAll('.react-grid-item .bar div')].map(title => title.innerText)"""
# left, top, right and bottom of every window
PLACES = """[...document.querySelectorAll('.react-grid-item')].map(window => {
    const box = window.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; })"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / ".visdom").mkdir()  # comparing runs looks there
    return home


@pytest.fixture(scope="module")
def server(visdom_page, home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        server = Server(home / ".visdom")
    yield server
    server.end()


@pytest.fixture(scope="module")
def tab(home):
    tab = browser.start(home / "profile", (1400, 1000))
    yield tab
    tab.close()


@pytest.fixture
def train(no_proxy, server, run, make_cases, tmp_path, tiny):
    data = make_cases(tmp_path / "data", count=4, raters=4)

    def train(name, *flags):
        result = run("segmentation_train.py", "--data_dir", data, "--results_dir", tmp_path / name, *tiny,
                     "--log_interval", 1, "--visdom_port", server.port, *flags)
        assert result.code == 0, result.err
        return tmp_path / name, data

    return train


def test_the_page_of_a_run_has_all_windows_and_every_point_of_its_curves(server, tab, train, tmp_path):
    folder, data = train("run", "--max_steps", 7, "--sample_interval", 3, "--val_dir", tmp_path / "data")
    tab.open(page_of(f"http://127.0.0.1:{server.port}", "run"))
    tab.wait("document.querySelectorAll('.js-plotly-plot').length === 10 && !!document.querySelector('img')")
    rows = [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    plots = tab.ask(PLOTS)
    assert plots["losses"] == {"loss": 7, "mse": 7, "kl": 7}
    assert plots["scores of the validation cases"] == {
        "GED_16": 3, "GED_unbiased_16": 3, "CI_16": 3, "D_max_16": 3}
    for name in ("loss", "mse", "kl"):
        assert plots[f"{name} by quarter of the timesteps"] == {
            f"q{i}": sum(f"{name}_q{i}" in row for row in rows) for i in range(4)}
    assert set(plots) | {"run", "cases"} == set(tab.ask(TITLES))
    assert "step 7 of 7" in tab.ask("document.body.innerText")

    tab.wait("document.querySelector('img').naturalWidth > 0")
    shown, natural = tab.ask("(() => { const i = document.querySelector('img'); const b = i.getBoundingClientRect();"
                             " return [[b.width, b.height], [i.naturalWidth, i.naturalHeight]]; })()")
    assert shown == natural  # pixel for pixel, so that its text can be read

    places = tab.ask(PLACES)
    assert sum(top < 450 for _, top, _, _ in places) == 4  # run, losses, scores and, below, the cases: is it learning?
    for i, (left, top, right, bottom) in enumerate(places):
        assert 0 <= left and right <= 1400
        for other in places[:i]:  # no two overlap
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_two_runs_are_compared_in_one_environment(server, tab, train):
    train("run-a", "--max_steps", 3)
    train("run-b", "--max_steps", 2, "--seed", 1)
    tab.open(f"http://127.0.0.1:{server.port}/compare/run-a+run-b")
    tab.wait("document.querySelectorAll('.js-plotly-plot').length === 9")
    assert tab.ask(PLOTS)["losses"] == {"0_loss": 3, "0_mse": 3, "0_kl": 3, "1_loss": 2, "1_mse": 2, "1_kl": 2}
    colours = tab.ask("(() => { const plot = document.querySelector('.js-plotly-plot');"
                      " return plot._fullData.map(trace => trace.line.color); })()")
    assert len(set(colours)) == 6
