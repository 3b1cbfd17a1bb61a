"""Training and sampling show what they do: the windows of their pages, and pictures in the results folder."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.files import ROOT
from helpers.models import MODEL
from helpers.visdom import PATIENCE, Server, points, wait_for
from PIL import Image

from guided_diffusion import checkpoint, flags, logger, metrics, script_util
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.masks import to_masks
from guided_diffusion.draw import montage
from guided_diffusion.live import views
from guided_diffusion.live.monitor import recorded
from guided_diffusion.live.views import ProgressPicture
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.sampling import ensembles


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("visdom"))
    yield server
    server.end()


@pytest.fixture(autouse=True)
def afterwards(no_proxy):
    yield
    logger.configure()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


def train(run, folder, data, tiny, server, *flags):
    result = run("segmentation_train.py", "--data_dir", data, "--results_dir", folder, *tiny, "--log_interval", 1,
                 "--visdom_port", server.port, *flags)
    assert result.code == 0, result.err
    return result


def test_training_shows_all_that_it_logs_and_the_validation_cases(server, run, make_cases, tmp_path, tiny):
    data, val = make_cases(tmp_path / "data"), make_cases(tmp_path / "val", count=5, raters=3, seed=1)
    folder = tmp_path / "my run"
    result = train(run, folder, data, tiny, server, "--max_steps", 4, "--sample_interval", 2, "--val_dir", val,
                   "--val_cases", 2, "--learn_sigma", True, "--ema_rate", "0.9,0.5")
    windows, rows = server.windows("my-run"), rows_of(folder)
    assert f"watch it at http://127.0.0.1:{server.port}/env/my-run" in result.out
    order = sorted(windows, key=lambda title: windows[title]["i"])
    assert order[:4] == ["run", "losses", "scores of the validation cases", "cases"]

    def curve(title, names):
        traces = windows[title]["content"]["data"]
        assert len(traces) == len(names)
        for trace, name in zip(traces, names):
            shown = [(x, y) for x, y in zip(trace["x"], trace["y"]) if y is not None]
            assert shown == [(row["step"], row[name]) for row in rows if name in row], (title, name)
        return [trace["name"] for trace in traces]

    assert curve("losses", ["loss", "mse", "vb", "kl"]) == ["loss", "mse", "vb", "kl"]
    scores = ["GED_16", "GED_unbiased_16", "CI_16", "D_max_16"]
    assert curve("scores of the validation cases", [f"val_{name}" for name in scores]) == scores
    assert [x for x, _ in points(windows["scores of the validation cases"])] == [2, 4]
    for name in ("loss", "mse", "vb", "kl"):
        curve(f"{name} by quarter of the timesteps", [f"{name}_q{i}" for i in range(4)])
    curve("norms", ["grad_norm", "param_norm"])
    for title, name in (("learning rate", "lr"), ("images per second", "images_per_second"),
                        ("share of time waiting for data", "waiting_for_data"), ("memory in GB", "memory_gb")):
        curve(title, [name])
    text = windows["run"]["content"]
    assert "step 4 of 4" in text and "segmentation_train.py" in text and str(val) in text and "done" in text
    assert windows["cases"]["type"] == "image"
    panel = Image.open(folder / "panel.png")
    assert panel.width <= 1230 and len(panel.getcolors(2 ** 24)) > 50
    assert Image.open(folder / "progress.png").width > 800
    assert {content["win"] for content in recorded(folder / "visdom.log")} == set(windows)


def test_scores_of_validation_are_those_of_the_scripts_for_the_same_weights(run, make_cases, tmp_path, tiny):
    data, val = make_cases(tmp_path / "data"), make_cases(tmp_path / "val", count=3, raters=3, seed=1)
    folder = tmp_path / "results"
    result = run("segmentation_train.py", "--data_dir", data, "--results_dir", folder, *tiny, "--max_steps", 16,
                 "--log_interval", 100, "--sample_interval", 8, "--val_dir", val, "--ema_rate", "0.6", "--lr", 1e-2)
    assert result.code == 0, result.err
    row = rows_of(folder)[-1]
    assert [row["step"] for row in rows_of(folder)] == [8, 16] and "loss" not in rows_of(folder)[0]
    result = run("segmentation_sample.py", "--data_dir", val, "--model_path", folder / "emasavedmodel_0.6_000016.pt",
                 "--results_dir", tmp_path / "out", "--sampler", "best", "--num_ensemble", 16, "--evaluate", True,
                 "--batch_size", 32)  # as validation draws: the network's rounding follows the shape of its batch
    assert result.code == 0, result.err
    means = json.loads((tmp_path / "out" / "scores.json").read_text())["all"]
    for name in ("GED", "GED_unbiased", "CI", "D_max"):
        assert row[f"val_{name}_16"] == pytest.approx(means[name]["mean"], abs=1e-6), name


def test_looking_does_not_change_what_is_learnt(run, make_cases, tmp_path, tiny):
    data = make_cases(tmp_path / "data")
    weights = []
    for interval in (0, 1):
        folder = tmp_path / str(interval)
        result = run("segmentation_train.py", "--data_dir", data, "--results_dir", folder, *tiny, "--max_steps", 3,
                     "--dropout", 0.2, "--sample_interval", interval)
        assert result.code == 0, result.err
        assert (folder / "panel.png").exists() == bool(interval)
        weights.append(torch.load(folder / "savedmodel.pt", weights_only=True))
    assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in weights)))


def test_a_run_that_goes_on_continues_its_curves(server, run, make_cases, tmp_path, tiny):
    data, folder = make_cases(tmp_path / "data"), tmp_path / "resumed"
    for steps in (3, 5):
        train(run, folder, data, tiny, server, "--max_steps", steps)
    loss = points(server.windows("resumed")["losses"])
    assert loss == [(row["step"], row["loss"]) for row in rows_of(folder)] and [x for x, _ in loss] == [1, 2, 3, 4, 5]
    contents = {content["win"]: content for content in recorded(folder / "visdom.log")}
    assert contents["losses"]["data"][0]["x"] == [1, 2, 3, 4, 5]


def test_name_of_the_environment_can_be_given(server, run, make_cases, tmp_path, tiny):
    train(run, tmp_path / "results", make_cases(tmp_path / "data"), tiny, server, "--max_steps", 1, "--visdom_env",
          "another")
    assert "losses" in server.windows("another")


def test_sampling_shows_the_way_the_cases_and_their_scores(server, run, make_cases, tmp_path, trained):
    data, folder = make_cases(tmp_path / "data", count=4, raters=[3, 3, 2, 3]), tmp_path / "drawn"
    result = run("segmentation_sample.py", "--data_dir", data, "--model_path", trained / "savedmodel.pt",
                 "--results_dir", folder, "--num_ensemble", 4, "--sampler", "best", "--batch_size", 3,
                 "--visdom_port", server.port)
    assert result.code == 0, result.err
    windows = server.windows("drawn-sampling")
    assert sorted(windows, key=lambda title: windows[title]["i"]) == [
        "run", "mean GED of the cases so far", "from noise to a mask", "case"]
    assert "4 of 4 cases" in windows["run"]["content"]
    assert windows["from noise to a mask"]["type"] == windows["case"]["type"] == "image"
    ged = []
    for case in SegmentationCases(data, 16):
        with np.load(folder / f"{case.name}_ensemble.npz") as stored:
            ged.append(metrics.Agreement(to_masks(stored["samples"]), case.raters).ged().item())
    assert points(windows["mean GED of the cases so far"]) == [
        (k, pytest.approx(np.mean(ged[:k]))) for k in range(1, 5)]


@pytest.mark.long
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_training_goes_on_without_its_server_and_shows_all_when_it_is_back(
        no_proxy, environment, make_cases, tmp_path, tiny, signal_name):
    """A real run in a process of its own, whose server is killed, or hangs, on the way."""
    data, server = make_cases(tmp_path / "data"), Server(tmp_path)
    command = [sys.executable, "-c", f"""
import runpy, sys
from guided_diffusion.live.monitor import Monitor
Monitor.patience = 0.5
sys.argv = {["scripts/segmentation_train.py", "--data_dir", str(data), "--results_dir", str(tmp_path / "run"), *tiny,
             "--max_steps", "100000", "--log_interval", "5", "--visdom_port", str(server.port)]!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said,
                                   stderr=said)

    def last_step():
        path = tmp_path / "run" / "progress.json"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    def shown():
        windows = server.windows("run")
        return points(windows["losses"])[-1][0] if windows.get("losses", {}).get("type") == "plot" else 0

    try:
        wait_for(lambda: shown() >= 10, "the first points")
        server.process.send_signal(getattr(signal, signal_name))
        if signal_name == "SIGKILL":
            server.process.wait()
        before = last_step()
        wait_for(lambda: last_step() >= before + 30, "training to go on by itself")
        if signal_name == "SIGKILL":
            server = Server(tmp_path, server.port)
        else:
            server.process.send_signal(signal.SIGCONT)
        wait_for(lambda: shown() >= before + 30, "the view to catch up")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        steps = [x for x, _ in points(server.windows("run")["losses"])]
        assert steps == [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row]
    finally:
        process.kill()
        process.wait()
        server.end()


def test_progress_picture_is_drawn_beside_the_run_and_takes_little_of_its_time(tmp_path, monkeypatch):
    logger.configure(tmp_path)
    picture = ProgressPicture(tmp_path, ["loss"], delay=0)
    drawn = []
    monkeypatch.setattr(picture, "_draw", lambda rows: drawn.append(len(rows)))
    for step in range(3):
        logger.dump({"loss": 1.0}, step)
        picture.draw()
        picture.thread.join()
    assert drawn == [1, 2, 3]
    monkeypatch.undo()
    picture.draw()
    picture.thread.join()
    assert (tmp_path / "progress.png").exists()
    (tmp_path / "progress.png").unlink()
    picture.draw()  # too soon: the last one took a while
    assert not picture.thread.is_alive() and not (tmp_path / "progress.png").exists()
    picture.draw(last=True)
    assert (tmp_path / "progress.png").exists()


def test_masks_of_a_case_are_shown_as_they_are_drawn(make_cases, tmp_path, trained, monkeypatch):
    model, diffusion = script_util.create_model_and_diffusion(**MODEL, timestep_respacing="3")
    checkpoint.load_model(model, trained / "savedmodel.pt")
    cases = list(SegmentationCases(make_cases(tmp_path / "data", count=2, raters=2), 16))
    view = views.SamplingView("x", {**flags.defaults("sampling", "results", "visdom", "server"), "visdom_port": 0},
                              None, 2, 3)
    view.monitor, view.film.every = SimpleNamespace(active=True), 0
    shown, films = [], []
    monkeypatch.setattr(view.case, "show", lambda make: (make(), shown.append(seen[-1])))
    monkeypatch.setattr(view.film, "show", lambda make: films.append(make()))
    seen, draw, film = [], montage.case_montage, montage.film
    monkeypatch.setattr(montage, "case_montage", lambda name, image, masks, drawn: (
        seen.append((name, len(drawn), drawn)), draw(name, image, masks, drawn))[1])
    monkeypatch.setattr(montage, "film", lambda title, frames: (title, len(frames), film(title, frames))[:2])

    def begun():
        for case in cases:
            view.begin(case)
            yield case

    sampler = ensembles.EnsembleSampler(CIMD(diffusion, model).prepare(), batch_size=2)
    for case, samples in sampler.ensembles(begun(), 3, view.on_step):
        view.show_case(case, to_masks(samples))
    # batches are case0's masks 0 and 1; its mask 2 and case1's mask 0; case1's masks 1 and 2
    assert [entry[:2] for entry in shown] == [("case0", 2), ("case1", 1), ("case0", 3), ("case1", 3), ("case1", 3)]
    assert all((a == b).all() for a, b in zip(shown[0][2], shown[2][2])) and not view.begun
    assert films == [(f"{name}, mask {i}", frames) for name, i in (("case0", 0), ("case0", 2), ("case1", 1))
                     for frames in (1, 2, 3)]


def test_training_and_sampling_need_no_package_of_the_extras(processes, make_cases, tmp_path, tiny):
    data, folder = make_cases(tmp_path / "data"), tmp_path / "results"
    flags = ["--data_dir", data, "--results_dir", folder]
    jobs = [["segmentation_train.py", *flags, *tiny, "--max_steps", 2, "--log_interval", 1, "--val_dir", data],
            ["segmentation_sample.py", *flags, "--sampler", "best"]]
    result = processes(sys.executable, "-c", f"""
import runpy, sys
sys.modules.update(dict.fromkeys(["blobfile", "matplotlib", "mpi4py", "visdom"]))
for sys.argv in {[list(map(str, words)) for words in jobs]!r}:
    runpy.run_path({str(ROOT / "scripts")!r} + "/" + sys.argv[0], run_name="__main__")
""")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    named = "progress.png needs the package matplotlib: pip install matplotlib; going on without"
    assert result.stdout.count(named) == result.stdout.count("progress.png") == 1
    assert "val_GED_16" in rows_of(folder)[-1] and (folder / "panel.png").exists()
    assert (folder / "case1_montage.png").exists() and not (folder / "progress.png").exists()
