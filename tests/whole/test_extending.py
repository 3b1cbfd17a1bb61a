"""docs/extending.md: every example is the whole file that someone would add, and its commands work."""

import itertools
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.files import ROOT

from guided_diffusion.data.cases import SegmentationCases

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)```$", PAGE, re.M | re.S))
COMMANDS = [shlex.split(line) for line in re.findall(r"^cimd-.*--plugin .*$", PAGE, re.M)]
IN_TURN = """
import json, sys
from importlib import import_module
for program, *flags in json.load(open(sys.argv[1])):
    sys.argv = [program, *flags]
    import_module("guided_diffusion.commands." + program.removeprefix("cimd-")).run()
"""
UNET = ("--num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 8 --num_heads 1").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples, written to a folder."""
    folder = tmp_path_factory.mktemp("own files")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def example(folder, name, program):
    """Runs code in a process that has loaded one of the examples; returns what it prints as JSON."""
    start = f"import json\nfrom guided_diffusion.flags import load_plugins\nload_plugins({str(folder / name)!r})\n"
    done = subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def in_turn(processes, tmp_path):
    """in_turn(commands) runs console commands in one process that has nothing to do with this one."""
    def run(*commands):
        (tmp_path / "commands.json").write_text(json.dumps([list(map(str, command)) for command in commands]))
        result = processes(sys.executable, "-c", IN_TURN, tmp_path / "commands.json")
        assert result.returncode == 0, result.stderr
        return result

    return run


def as_arrays(data):
    """The same data folder with .hu.npy files in Hounsfield units and labels 0 and 1."""
    from PIL import Image

    for path in list(data.rglob("*.png")):
        pixels = np.asarray(Image.open(path))
        np.save(path.with_suffix(".hu.npy"), pixels > 127 if "label" in path.name else pixels * 5.0 - 1000)
        path.unlink()
    return data


def test_page_has_an_example_of_each_kind():
    assert list(FILES) == ["flow.py", "features.py", "thresholds.py", "hounsfield.py", "volumes.py", "area.py"]
    assert {command[2] for command in COMMANDS} == FILES.keys()


@pytest.mark.parametrize("name", ["thresholds.py", *(pytest.param(name, marks=pytest.mark.long) for name in (
    "flow.py", "features.py", "hounsfield.py"))])
def test_commands_of_an_example_train_sample_and_score(folder, in_turn, make_cases, tmp_path, name):
    data = make_cases(tmp_path / "data", count=3, raters=[2, 3, 1])
    if name == "hounsfield.py":
        as_arrays(data)
    own = [command for command in COMMANDS if command[2] == name]
    own += [["cimd-evaluate", "--plugin", name]] * ("cimd-evaluate" not in next(zip(*own)))
    more = {"cimd-train": ["--results_dir", "results", "--image_size", 16, "--max_steps", 2, "--batch_size", 2,
                           "--sample_interval", 1, "--val_dir", data, "--val_cases", 2,
                           *([] if name == "features.py" else UNET)],
            "cimd-sample": ["--results_dir", "results", "--num_ensemble", 3,
                            *([] if name == "thresholds.py" else ["--sampling_steps", 2])],
            "cimd-evaluate": ["--samples_dir", "results", "--ensemble_sizes", ""]}
    in_turn(*([program, plugin, folder / file, *flags, "--data_dir", data, *more[program]]
              for program, plugin, file, *flags in own))
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())
    assert scores["cases"] == 3 and 0 <= scores["all"]["GED"]["mean"] <= 2
    assert (tmp_path / "results" / "frozenmodel.pt").exists() == (name == "features.py")


def test_source_of_the_page_prepares_what_training_reads(folder, in_turn, tmp_path):
    command, = (command for command in COMMANDS if command[2] == "volumes.py")
    (tmp_path / "npz").mkdir()
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (5, 3, 8, 8), np.uint8), rng.random((5, 3, 2, 8, 8)) > 0.5
    for i in range(5):
        np.savez(tmp_path / "npz" / f"p{i}.npz", images=images[i], masks=masks[i])
    in_turn([command[0], "--plugin", folder / command[2], *command[3:], "--num_workers", 1])
    patients = [{case.name: case for part in ("train", "val", "test") for case in SegmentationCases(
        tmp_path / "my_data" / part, 8)}[f"p{i}_002"] for i in range(5)]
    assert all(np.array_equal(case.raters, masks[i, 2]) for i, case in enumerate(patients))


def test_prediction_of_the_page_is_exact(folder):
    error = example(folder, "flow.py", """
import torch
from guided_diffusion.script_util import create_gaussian_diffusion
diffusion = create_gaussian_diffusion(prediction="flow")
generator = torch.Generator().manual_seed(0)
x_0, noise = (torch.randn(1000, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
t = torch.arange(1000)
x_t = diffusion.q_sample(x_0, t, noise)
output = diffusion.prediction.target(diffusion, x_0, noise, t)
print(json.dumps((diffusion.prediction.x_start(diffusion, output, x_t, t) - x_0).abs().max().item()))
""")
    assert error < 1e-12


def test_network_of_the_page_encodes_a_scan_once_and_leaves_its_encoder_alone(folder):
    found = example(folder, "features.py", """
import torch
from types import SimpleNamespace
from guided_diffusion.flags import FLAGS
from guided_diffusion.script_util import create_method
flags = SimpleNamespace(**{flag.name: flag.default for flag in FLAGS})
flags.network = "features"
method = create_method(flags, training=False)
method.prepare()
times = []
method.model.encoder.register_forward_hook(lambda *_: times.append(1))
encoded = method.encode(torch.rand(1, 4, 16, 16))
flags.timestep_respacing = "5"
drawer = create_method(flags, method.model, training=False)
drawer.draw(encoded, [(0, "a", i) for i in range(3)], 0, lambda *_: None)
trained = [name for name, p in create_method(flags).model.named_parameters() if p.requires_grad]
print(json.dumps([len(times), drawer.cost, any(name.startswith("encoder") for name in trained), len(trained)]))
""")
    assert found == [1, [1, 5], False, 8]


def test_method_of_the_page_draws_nested_masks_with_the_right_frequencies(folder):
    """A pixel of probability p is marked by a share p of the masks; of two masks, one holds the other."""
    shares = example(folder, "thresholds.py", """
import torch
from guided_diffusion.methods import METHODS
method = METHODS["thresholds"](torch.nn.Identity())
probability = torch.tensor([0.1, 0.5, 0.9]).view(1, 1, 1, 3)
samples = method.draw(probability, [(0, "case", i) for i in range(4000)], 1, lambda *_: None)
masks = samples > 0.5
assert (masks[:, 0, 0] <= masks[:, 0, 1]).all() and (masks[:, 0, 1] <= masks[:, 0, 2]).all()
again = method.draw(probability, [(0, "case", 7)], 1, lambda *_: None)
assert torch.equal(again[0], samples[7])
print(json.dumps(masks.float().mean(0)[0].tolist()))
""")
    assert shares == pytest.approx([0.1, 0.5, 0.9], abs=4 * 0.5 / 4000 ** 0.5)


def test_reader_of_the_page_reads_through_its_window(folder, tmp_path):
    np.save(tmp_path / "image_1.hu.npy", np.array([[-1200.0, -1000.0, -300.0, 400.0]]))
    pixels = example(folder, "hounsfield.py", f"""
from pathlib import Path
from guided_diffusion.data.readers.base import Readers
print(json.dumps([Readers(options).read(Path({str(tmp_path / 'image_1.hu.npy')!r})).pixels.ravel().tolist()
                  for options in ({{}}, {{"window_low": -1200.0}})]))
""")
    assert [np.round(np.array(row) / 65535, 3).tolist() for row in pixels] == [[0, 0, 0.5, 1], [0, 0.125, 0.562, 1]]


def test_score_of_the_page_joins_all_others(folder, in_turn, make_cases, trained, tmp_path):
    data = make_cases(tmp_path / "data", count=2)
    (program, plugin, file, *flags), = [command for command in COMMANDS if command[2] == "area.py"]
    result = in_turn(["cimd-sample", "--data_dir", data, "--model_path", trained / "savedmodel.pt",
                      "--results_dir", "results", "--num_ensemble", 2, "--sampling_steps", 2],
                     [program, plugin, folder / file, *flags, "--data_dir", data, "--samples_dir", "results",
                      "--ensemble_sizes", ""])
    assert "area_error" in result.stdout
    assert "area_error" in (tmp_path / "results" / "scores.csv").read_text().splitlines()[0].split(",")
    rng = np.random.default_rng(0)
    masks, raters = rng.random((3, 4, 5)) < 0.4, rng.random((2, 4, 5)) < 0.6
    found = example(folder, "area.py", f"""
import numpy as np
from guided_diffusion import metrics
masks, raters = (np.array(x, dtype=bool) for x in ({masks.tolist()}, {raters.tolist()}))
print(json.dumps(metrics.scores(masks, raters)["area_error"].item()))
""")
    assert found == pytest.approx(abs(masks.sum((1, 2)).mean() - raters.sum((1, 2)).mean()))


def test_names_of_the_page_are_those_of_the_code():
    from guided_diffusion import gaussian_diffusion, metrics, predictions, samplers
    from guided_diffusion.data import augment, readers
    from guided_diffusion.methods import METHODS
    from guided_diffusion.networks import NETWORKS
    from guided_diffusion.prepare import SOURCES

    tables = [predictions.PREDICTIONS, NETWORKS, METHODS, readers.READERS, SOURCES, metrics.SCORES,
              samplers.SAMPLERS, augment.AUGMENTATIONS, gaussian_diffusion.SCHEDULES]
    rows = re.findall(r"^\| .*? \| `[\w.]+\.(\w+)` \| (?:`--(\w+)`)?", PAGE, re.M)
    for table, (name, flag) in itertools.zip_longest(tables, rows):
        assert flag in ("", table.flag), name
    assert torch.is_tensor(gaussian_diffusion.SCHEDULES["cosine"](10))
