"""The benchmarks run as documented, at a small scale."""

import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.files import ROOT
from helpers.models import MeanOutline

from guided_diffusion import checkpoint, metrics, script_util
from guided_diffusion.commands import cli
from guided_diffusion.data import phantoms
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.methods import METHODS
from guided_diffusion.system.flag import Flag


@pytest.fixture
def benchmark(environment, monkeypatch, capsys, tmp_path):
    """benchmark("steps.py", *flags) runs a benchmark as its command line would, in this process and in tmp_path.

    The runs that it starts itself are processes of their own. Returns code and out.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            cli.run_script(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as stop:
            code = stop.code or 0
        return SimpleNamespace(code=code, out=capsys.readouterr().out)

    return call


@pytest.mark.long
def test_phantom_benchmark_reports_every_row_and_the_same_again(benchmark, tmp_path, monkeypatch):
    tables = []
    flags = ["--methods", "cimd,energy", "--num_train", 3, "--num_cases", 2, "--num_ensemble", 2, "--max_steps", 2,
             "--points", 2, "--sampling_steps", "2,1", "--results_dir", "a"]
    for _ in range(2):  # the second one finds its models trained, and their masks scored
        result = benchmark("phantom.py", *flags)
        tables.append((tmp_path / "a" / "table.md").read_text())
        assert result.code == 0 and tables[-1] in result.out
        monkeypatch.setattr(importlib.import_module("phantom"), "load_sampler", None)
    assert tables[0] == tables[1] and (tmp_path / "a" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    trained = [tuple(row[name] for name in ("method", "training_steps", "sampling_steps", "scans_seen"))
               for row in results.values() if "method" in row]
    assert trained == [("cimd", 1, 2, 8), ("cimd", 2, 2, 16), ("cimd", 2, 1, 16),
                       ("energy", 1, None, 8), ("energy", 2, None, 16)] and len(results) == len(trained) + 3
    for row in results.values():
        assert row["excess_GED"]["low"] <= row["excess_GED"]["mean"] <= row["excess_GED"]["high"]
    assert benchmark("phantom.py", "--methods", "emergy").code == 2


def test_training_takes_the_flags_of_every_method_of_the_phantom_benchmark(benchmark):
    for flags, _ in importlib.import_module("phantom").METHODS.values():
        args, _ = cli.parse_flags("training", "", [word for flag in flags.items() for word in flag])
        assert args.image_size == importlib.import_module("phantom").CROP


def test_truth_scores_tell_the_oracle_from_samplers_that_are_wrong_on_purpose():
    rows = {"oracle": [], "most likely": [], "mean": []}
    for i in range(40):
        phantom = phantoms.make_phantom(77, i, 64)
        truth = phantom.outlines, phantom.probabilities
        for name, masks in (("oracle", phantom.draw(16, [5, i])), ("most likely", phantom.outlines[:1].repeat(16, 0)),
                            ("mean", (phantom.mean > 0.5)[None].repeat(16, 0))):
            scores = metrics.truth_scores(masks, *truth)
            rows[name].append([scores["excess_GED"], scores["total_variation"]])
    (_, oracle_low, oracle_high), *wrong = (metrics.bootstrap_interval(np.array(row)) for row in rows.values())
    assert oracle_low[0] <= 0 <= oracle_high[0]
    for _, low, _ in wrong:
        assert low[0] > oracle_high[0] and low[1] > oracle_high[1]


@pytest.mark.long
def test_benchmark_on_real_cases_trains_samples_and_writes_a_row(benchmark, tmp_path):
    phantoms.write_cases(tmp_path / "train", 3, 1, 64)
    phantoms.write_cases(tmp_path / "test", 5, 2, 64)
    flags = ["--train_dir", "train", "--test_dir", "test", "--preset", "cpu-32", "--results_dir", "r", "--num_cases", 3,
             "--num_ensemble", 2, "--timestep_respacing", "trailing1", "--train_flags",
             "--max_steps 2"]
    result = benchmark("lidc.py", *flags)
    table = (tmp_path / "r" / "table.md").read_text()
    assert result.code == 0 and table in result.out
    head, _, row, raters, background = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    assert [word.strip() for word in head[2:4]] == ["GED_2", "HM_IoU_2"]
    assert row[1].strip() == "cpu-32, dpm++sde trailing1" and row[-2].strip() == "16" and row[-4].strip() == "1"
    scored = [line.split(",")[0] for line in (tmp_path / "r" / "scores.csv").read_text().splitlines()[1:]]
    assert scored == ["phantom-000000", "phantom-000001", "phantom-000003"]  # spread over the names
    assert benchmark("lidc.py", *flags).code == 0  # trains no further, and scores the same
    again = (tmp_path / "r" / "table.md").read_text().splitlines()[4].split("|")
    assert again[:10] == row[:10] and again[-2:] == row[-2:]


class Shifted(MeanOutline):
    """Draws that differ; spread, every second one is empty."""

    @classmethod
    def from_flags(cls, flags, model=None, training=True):
        method = cls(model=model)
        method.independent = not flags.spread
        return method

    def draw(self, encoded, rows, seed, on_step=lambda *_: None):
        masks = super().draw(encoded, rows, seed, on_step) > 0.5
        for mask, (_, case, i) in zip(masks, rows):
            mask ^= i % 2 == 1 if self.independent else mask & (i % 2 == 1)
        return masks.float()


def test_table_of_trained_models_has_a_row_each_and_computes_none_twice(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS, "_entries", {"cimd": METHODS.entries["cimd"]})
    METHODS.add("shifted", flags=[Flag("spread", bool, True, "", "sampling")])(Shifted)
    monkeypatch.setattr(importlib.import_module("table"), "SLOW", 0)
    phantoms.write_cases(tmp_path / "test", 4, 2, 32)
    flags = {"image_size": 32, "image_channels": 1, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1,
             "num_heads": 1, "attention_resolutions": "16", "prediction": "xstart", "noise_schedule": "cosine"}
    for name, network, more in (("a", script_util.create_model_and_diffusion(**flags)[0], {}),
                                ("b", Shifted().model, {"method": "shifted"})):
        (tmp_path / name).mkdir()
        checkpoint.save_flags(tmp_path / name, {**flags, **more})
        checkpoint.save(tmp_path / name / "savedmodel.pt", network.state_dict())
    log = [{"step": 1, "seconds": 1800.0}, {"step": 2, "seconds": 3600.0, "samples": 8}, {"step": 3, "seconds": 7200.0}]
    (tmp_path / "b" / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in [*log, *log[:2]]))
    (tmp_path / "b" / "log.txt").write_text("command: train b\n")
    words = ["--table", "--test_dir", "test", "--num_cases", 3, "--num_ensemble", 4, "--results_dir", "t"]
    assert benchmark("lidc.py", *words, "--sample_flags", "--sampler ddim --sampling_steps 1", "b").code == 0
    result = benchmark("lidc.py", *words, "--sample_flags", "--sampler ddim --sampling_steps 1", "a", "b")
    assert result.code == 0 and (tmp_path / "t" / "table.md").read_text() in result.out
    assert len(json.loads((tmp_path / "t" / "table.json").read_text())) == 2
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.splitlines() if line[:1] == "|"]
    a, b = (dict(zip(lines[0], line)) for line in lines[2:])
    assert (a["method"], b["method"]) == ("cimd --sampler ddim --sampling_steps 1", "shifted")
    assert (b["core-hours"], b["scans seen"], a["core-hours"]) == ("3.00", "8", "") and "- b: `train b`" in result.out
    assert float(a["GFLOP a mask"]) > 0.1 and float(b["GFLOP a scan"]) == pytest.approx(2 * 9 * 32 * 32 / 1e9, rel=0.01)
    assert b["parameters (M)"] == "0.00" and b["GED_4 independent"] != b["GED_4 spread"] and a["GED_4 spread"] == ""
    # against the scores of the masks themselves
    method = Shifted()
    checkpoint.load_model(method.model, tmp_path / "b" / "savedmodel.pt")
    cases = SegmentationCases(tmp_path / "test", 32, 1)
    for column, independent in (("GED_4 independent", True), ("GED_4 spread", False), ("GED_100", True)):
        method.independent = independent
        drawn = [method.draw(method.encode(torch.from_numpy(cases[i].image)[None]), [(0, "", k) for k in range(4)], 0)
                 for i in (0, 1, 2)]
        scores = [metrics.scores((masks > 0.5).numpy(), cases[i].raters) for i, masks in enumerate(drawn)]
        ged = [s["GED"] if "4" in column else s["GED_unbiased"] + s["diversity"] / 100
               + s["rater_diversity"] / len(cases[i].raters) for i, s in enumerate(scores)]
        assert float(b[column].split()[0]) == pytest.approx(np.mean(ged), abs=6e-4)


@pytest.mark.long
def test_steps_are_compared_case_by_case_and_a_stopped_run_goes_on(benchmark, tmp_path):
    phantoms.write_cases(tmp_path / "test", 5, 2, 32)
    flags = {"image_size": 32, "image_channels": 1, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1,
             "num_heads": 1, "attention_resolutions": "16", "predict_xstart": True, "noise_schedule": "cosine"}
    (tmp_path / "model").mkdir()
    checkpoint.save_flags(tmp_path / "model", flags)
    model, _ = script_util.create_model_and_diffusion(**flags)
    torch.nn.init.normal_(model.out[2].weight, std=0.1)
    checkpoint.save(tmp_path / "model" / "savedmodel.pt", model.state_dict())
    flags = ["--model_path", "model/savedmodel.pt", "--data_dir", "test", "--num_cases", 3, "--num_ensemble", 4,
             "--reference", "ancestral uniform2", "--output_dir", "out"]
    assert benchmark("steps.py", *flags, "--samplers", "ancestral", "--calls", "1,2").code == 0
    before = json.loads((tmp_path / "out" / "steps.json").read_text())
    result = benchmark("steps.py", *flags, "--samplers", "ancestral,heun", "--calls", "2,3", "--float32")
    rows = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert all(rows[name] == row for name, row in before.items())
    assert {name: row["calls"] for name, row in rows.items()} == {
        "ancestral uniform1": 1, "ancestral uniform2": 2, "ancestral float32 uniform2": 2,
        "ancestral float32 uniform3": 3, "heun float32 uniform1": 1, "heun float32 uniform2": 3}
    table = (tmp_path / "out" / "table.md").read_text()
    assert result.code == 0 and table in result.out
    assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    reference = rows["ancestral uniform2"]["values"]
    for line, row in zip(lines, rows.values(), strict=True):
        assert row["case"] == [0, 1, 3] and len(row["values"]["excess_GED"]) == 3
        for key in ("GED", "HM_IoU"):
            assert row[key]["mean"] == pytest.approx(np.mean(row["values"][key]))
            difference = np.mean(row["values"][key]) - np.mean(reference[key])
            shown = line[header.index(f"{key} less that of ancestral uniform2")]
            assert float(shown.split()[0]) == pytest.approx(difference, abs=6e-4)


def test_timing_of_scores_agrees_with_the_double_loop(benchmark):
    result = benchmark("scores.py", "--cases", 3, "--loop_cases", 3, "--predictions", 7, "--raters", 3, "--size", 24)
    assert result.code == 0 and "ratio" in result.out


# ---- speed: what it measures is not tested, only that it is there ----

@pytest.fixture
def speed(benchmark, monkeypatch):
    """speed(*flags): a small network, and every variant called but once or twice."""
    monkeypatch.setattr(importlib.import_module("speed"), "SECONDS", 0.001)
    return lambda *flags: benchmark("speed.py", "--image_size", 32, "--num_channels", 32, "--threads", 1, "--rounds", 1,
                                    *flags)


@pytest.mark.long
def test_every_part_is_measured_and_written(speed, tmp_path):
    done = speed("--batch_size", "2", "--train_batch_size", "2", "--output_dir", "out")
    assert done.code == 0
    text = (tmp_path / "out" / "speed.md").read_text()
    assert text.strip() in done.out and "torch" in text.splitlines()[0] and "1 CPU threads" in text.splitlines()[0]
    assert (tmp_path / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")
    parts = json.loads((tmp_path / "out" / "speed.json").read_text())["parts"]
    assert list(parts) == ["ceilings", "unet", "profile", "training", "ensemble", "one_pass", "memory",
                           "loader"]
    for part, rows in parts.items():
        assert len(rows) > 1 and (rows[0]["ratio"] == 1 or part == "profile")
        for row in rows:
            assert row["variant"] in text and row["ratio"] > 0 and len(row["rounds"]) == 1 and row["rounds"][0] > 0
    for row in parts["ensemble"]:
        assert ("EXTRAPOLATED" in row["how found"]) == ("1000 ancestral steps" in row["variant"])
    assert parts["ensemble"][2]["ratio"] == 1  # 16 masks have a first variant of their own
    _, *kinds = parts["profile"]
    assert sum(row["rounds"][0] for row in kinds) == pytest.approx(parts["profile"][0]["rounds"][0])
    for row in parts["unet"] + parts["training"]:
        assert row["% of convolution"] > 0 and row["% of product"] > 0


@pytest.mark.long
def test_scaling_is_measured_to_its_end_and_file_operations_grow_with_cases_alone(benchmark, tmp_path, monkeypatch):
    if not shutil.which("strace"):
        pytest.skip("needs strace, which pip cannot bring")
    monkeypatch.setattr(importlib.import_module("scaling"), "TRACED", (1, 2))
    done = benchmark("speed.py", "--scaling", "--rounds", 1, "--train_batch_size", 1, "--output_dir", "out")
    assert done.code == 0, done.out
    parts = json.loads((tmp_path / "out" / "scaling.json").read_text())["parts"]
    assert list(parts) == ["paper", "steps", "files"]
    assert [row["MB of gradients"] for row in parts["steps"]] == pytest.approx([0, 31.8, 15.9], abs=0.1)
    assert len({row["a case"] for row in parts["files"]}) == 1


def test_parts_are_chosen_and_mistakes_refused(speed, tmp_path):
    done = speed("--rounds", "2", "--parts", "loader", "--output_dir", "out")
    assert done.code == 0
    parts = json.loads((tmp_path / "out" / "speed.json").read_text())["parts"]
    assert list(parts) == ["loader"] and [len(row["rounds"]) for row in parts["loader"]] == [2, 2, 2]
    for flags in (["--parts", "loader,unets"], ["--rounds", "0"]):
        assert speed(*flags).code == 2
