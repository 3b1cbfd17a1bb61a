"""Unreadable files, kill -9, full disks and damaged results cost the cases they hit, none of those that are drawn."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import PATIENCE, SAMPLE
from helpers.refusals import refusal

from guided_diffusion import checkpoint
from guided_diffusion.data import cases as data_cases
from guided_diffusion.data import decoded_file, pictures
from guided_diffusion.data.cases import Case, SegmentationCases
from guided_diffusion.sampling import ensembles, files
from guided_diffusion.sampling.files import is_complete, keep_masks, kept_file, kept_masks
from guided_diffusion.system import storage
from guided_diffusion.system.errors import InputError

SIZE, SCORES = 16, ["best.png", "report.html", "scores.csv", "scores.json", "scores.png", "worst.png"]


@pytest.fixture
def data(make_cases, tmp_path):
    return make_cases(tmp_path / "data", count=4, raters=[2, 1, 4, 2])


@pytest.fixture
def flags(data, trained):
    return ["--data_dir", data, "--model_path", trained / "savedmodel.pt", "--num_ensemble", 2,
            "--timestep_respacing", 2, "--batch_size", 3]


@pytest.fixture
def sample(run, flags):
    """sample(results, *flags): 2 masks a case in 2 steps each, 3 at once."""
    return lambda results, *more: run("segmentation_sample.py", *flags, "--results_dir", results, *more)


def tree(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def without(files, *cases):
    return {name: content for name, content in files.items() if name.split("_")[0] not in cases}


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


# ---- cases whose files cannot be read ----

@pytest.fixture(params=["in memory", "in a file", "at every visit"])
def kept(request, monkeypatch, data):
    """Where decoded cases are kept."""
    if request.param != "in memory":
        monkeypatch.setattr(data_cases, "MEMORY_BYTES", 0)
    if request.param == "at every visit":
        (data / f".decoded_{SIZE}_error").mkdir()
    return request.param


def test_bad_cases_are_left_out_named_at_the_end_and_drawn_once_they_are_mended(sample, data, tmp_path, kept):
    assert sample("whole").code == 0
    shutil.copytree(data / "case1", tmp_path / "case1")
    truncate(data / "case1" / "image_1.png")
    (data / "case3" / "image_3.png").rename(tmp_path / "image_3.png")
    result = sample("results")
    assert result.code == 2 and "Traceback" not in result.err and result.err.count("\n") == 3
    first, *lines = result.err.splitlines()
    assert first.endswith(f": error: 2 problems in {data}; all other cases (2) are complete in results:")
    assert lines[0].startswith(f"  {data / 'case1' / 'image_1.png'}: cannot be read")
    assert lines[1].startswith(f"  {data / 'case3'}: no image")
    start = result.out.index("2 cases from")
    assert start < result.out.index("2 more are left out") < result.out.index("2 cases, 4 masks")
    assert tree("results") == without(tree("whole"), "case1", "case3")  # not one bit is another for the others

    shutil.rmtree(data / "case1")
    shutil.copytree(tmp_path / "case1", data / "case1")
    os.utime(data / "case1" / "image_1.png")
    result = sample("results")
    assert result.code == 2 and result.err.count("\n") == 1 and "2 of them already complete" in result.out
    assert f": error: {data / 'case3'}: no image" in result.err
    assert result.err.endswith("; all other cases (3) are complete in results\n")
    (tmp_path / "image_3.png").rename(data / "case3" / "image_3.png")
    result = sample("results")
    assert result.code == 0 and result.err == "" and "3 of them already complete" in result.out
    assert tree("results") == tree("whole")


def test_no_readable_case_at_all_is_refused_at_once(sample, data, tmp_path):
    for path in data.glob("*/image_*"):
        truncate(path)
    result = sample("results")
    assert result.code == 2 and result.err.count("\n") == 5 and result.out == "" and "complete" not in result.err
    assert not (tmp_path / "results").exists()


def test_num_samples_counts_the_cases_that_cannot_be_read(sample, data):
    truncate(data / "case0" / "image_0.png")
    truncate(data / "case3" / "image_3.png")
    result = sample("results", "--num_samples", 2)
    assert result.code == 2 and "case0" in result.err and "case3" not in result.err
    assert {name.split("_")[0] for name in tree("results")} == {"case1"}


@pytest.mark.parametrize("flag", [[], ["--evaluate", "True"]])
def test_a_file_lost_while_others_are_drawn_costs_its_case_alone(sample, data, monkeypatch, undrawn, flag):
    monkeypatch.setattr(data_cases, "MEMORY_BYTES", 0)
    (data / f".decoded_{SIZE}_error").mkdir()
    original = ensembles.EnsembleSampler.ensembles

    def losing(self, *args):
        truncate(data / "case1" / "image_1.png")
        return original(self, *args)

    with monkeypatch.context() as context:
        context.setattr(ensembles.EnsembleSampler, "ensembles", losing)
        result = sample("results", *flag)
    assert result.code == 2 and result.err.count("\n") == 1 and "left out" not in result.out
    assert "image_1.png: cannot be read" in result.err and "all other cases (3) are complete" in result.err
    assert "3 cases, 6 masks" in result.out
    shutil.rmtree(data / "case1")
    assert sample("without", *flag).code == 0
    got = {name: content for name, content in tree("results").items() if not name.startswith(".drawn")}
    assert got == tree("without") and len(got) == (len(SCORES) if flag else 18)


def same(a, b):
    return a.name == b.name and np.array_equal(a.image, b.image) and np.array_equal(a.raters, b.raters)


def test_places_of_bad_cases_are_kept_and_say_what_is_wrong(data, kept):
    whole = list(SegmentationCases(data, SIZE))
    path = data / "case2" / "label1_.png"
    truncate(path)
    for _ in range(2):  # written, and found again
        cases = SegmentationCases(data, SIZE, skip_bad=True)
        assert len(cases) == 4 and list(cases.problems) == [2] and cases.problems[2].startswith(f"{path}: cannot be")
        assert cases.problems[2] == refusal(cases.__getitem__, 2)
        assert [i for i, _ in cases.readable(range(4))] == [0, 1, 3]
        assert all(same(case, whole[i]) for i, case in cases.readable([3, 2, 0]))
        assert f"{path}: cannot be read" in refusal(SegmentationCases, data, SIZE)  # training finds that file, too
    assert isinstance(cases.decoded, decoded_file.DecodedFile) == (kept == "in a file")


def test_a_decoded_file_that_lacks_cases_is_completed_by_those_that_can_be_read_again(data, monkeypatch):
    monkeypatch.setattr(data_cases, "MEMORY_BYTES", 0)
    whole, decode = list(SegmentationCases(data, SIZE)), pictures.decode
    (data / f".decoded_{SIZE}_error").unlink()

    def failing(path, *args):  # as a disk that fails for a while: name, size and time of the file stay
        if "case1" in str(path):
            raise InputError(f"{path}: cannot be read (Input/output error)")
        return decode(path, *args)

    with monkeypatch.context() as context:
        context.setattr(pictures, "decode", failing)
        assert list(SegmentationCases(data, SIZE, skip_bad=True).problems) == [1]
    for options in ({"skip_bad": True}, {}):
        cases = SegmentationCases(data, SIZE, **options)
        assert isinstance(cases.decoded, decoded_file.DecodedFile) and len(cases.decoded[1][0]) == 0
        assert cases.problems == {} and all(map(same, cases, whole))


FAILING = """
import os, runpy, sys
from guided_diffusion.data import pictures
from guided_diffusion.system.errors import InputError

decode, bad = pictures.decode, {"0": "case0", "1": "case3"}[os.environ["RANK"]]  # of its part

def failing(path, *args):
    if path.parent.name == bad:
        raise InputError(f"{path}: cannot be read (Input/output error)")
    return decode(path, *args)

pictures.decode = failing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_what_one_rank_cannot_read_is_left_out_by_all_and_two_ranks_score_as_one(sample, flags, data, environment,
                                                                                 make_cases, tmp_path):
    for folder in make_cases(tmp_path / "more", 3, seed=1).iterdir():
        folder.rename(data / f"more-{folder.name}")
    (tmp_path / "failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "failing.py",
               SAMPLE, *flags, "--evaluate", "True", "--results_dir", "two", "--visdom_port", 0]
    result = subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True,
                            timeout=PATIENCE)
    assert result.returncode != 0 and "2 more are left out" in result.stdout
    assert result.stderr.count("all other cases (5) are complete in two") == 1
    for name in ("case0", "case3"):
        assert f"  {data / name / f'image_{name[-1]}.png'}: cannot be read (Input/output error)\n" in result.stderr
        shutil.rmtree(data / name)
    assert sample("one", "--evaluate", "True").code == 0
    two = tree("two")
    assert {name for name in two if name not in SCORES} == {f".drawn_{path.name}.pt" for path in data.iterdir()}
    assert {name: two[name] for name in SCORES} == tree("one")


# ---- kill -9 ----

KILLED = """
import itertools, os, runpy, signal, sys
from guided_diffusion.draw import plots

def sample(folder):
    sys.argv = [*flags, "--results_dir", folder]
    runpy.run_path(sys.argv[0], run_name="__main__")

def start(folder, step):
    "Sample in a process of its own, which kills itself before that change to a file (0: at none); its exit code."
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = itertools.count(1)
    for name in ("replace", "unlink", "remove"):
        def change(*args, original=getattr(os, name), **options):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)
        setattr(os, name, change)
    sample(folder)
    os._exit(0)

flags, out = sys.argv[1:], os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
plots.score_figure = lambda *args: b""
sample("whole")  # which also loads all that the others need
for step in itertools.count(1, 5):  # files are renamed and cleaned up in turn, so that both are met
    code = start(str(step), step)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    left = sum(name.endswith(".partial") for name in os.listdir(str(step)))
    os.write(out, f"{step} {left} {start(str(step), 0)}\\n".encode())
"""


def killed_everywhere(environment, *flags):
    """Sample into folder "whole", then into 1, 6, ..., the process of folder k killed before its k-th change to any
    file, and again; returns [k, temporary files that the killed one left, exit code of the second one] for each."""
    command = [sys.executable, "-c", KILLED, SAMPLE, *flags, "--visdom_port", 0]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True,
                            text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return [list(map(int, line.split())) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("flag, files, left", [([], 2 * 5, 2), (["--evaluate", "True"], len(SCORES), 1)])
def test_killed_between_two_files_and_run_again_is_as_if_never_killed(run, flags, environment, flag, files, left):
    runs = killed_everywhere(environment, *flags, "--num_samples", 2, "--num_ensemble", 1, *flag)
    whole = tree("whole")
    assert len(whole) == files and len(runs) >= 3 and all(tree(str(step)) == whole for step, *_ in runs)
    assert all(code == 0 for *_, code in runs) and sum(partial for _, partial, _ in runs) >= left


def test_kill_from_outside_keeps_the_cases_that_are_complete(sample, flags, environment, tmp_path):
    steps = ["--timestep_respacing", 30]
    command = [sys.executable, SAMPLE, *flags, *steps, "--results_dir", "results", "--visdom_port", 0]
    process = subprocess.Popen(list(map(str, command)), env=environment, cwd=tmp_path,
                               stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("results/*.npz")):
        time.sleep(0.005)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    complete = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("results/*.npz")}
    result = sample("results", *steps)
    assert result.code == 0 and f"{len(complete)} of them already complete" in result.out
    assert all((tmp_path / "results" / name).stat().st_mtime_ns == when for name, when in complete.items())
    assert sample("whole", *steps).code == 0 and tree("results") == tree("whole")


class Killed(BaseException):
    """In the place of a kill -9 at some call."""


def killing(function, call):
    calls = []

    def wrapped(*args):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return function(*args)

    return wrapped


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_ensemble_is_not_complete_once_a_file_of_it_is_of_another(sample, monkeypatch, call):
    for seed in (0, 1):
        assert sample(seed, "--num_samples", 1, "--seed", seed).code == 0
    shutil.copytree("0", "mixed")
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(storage, "write_bytes", killing(storage.write_bytes, call))
        sample("mixed", "--num_samples", 1, "--seed", 1)
    for seed in (0, 1):
        shutil.copytree("mixed", f"mixed{seed}")
        assert sample(f"mixed{seed}", "--num_samples", 1, "--seed", seed).code == 0
        assert tree(f"mixed{seed}") == tree(str(seed))


# ---- scores that are taken up ----

def stopped(sample, monkeypatch, folder, after, *flags):
    """Score, and end as by a kill when so many cases have been kept."""
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(files, "keep_masks", killing(keep_masks, after + 1))
        sample(folder, "--evaluate", "True", *flags)


def test_scoring_draws_only_cases_that_were_not_kept_from_the_same_command(sample, monkeypatch, undrawn, tmp_path):
    assert sample("whole", "--evaluate", "True").code == 0
    stopped(sample, monkeypatch, "results", 3)
    assert set(tree("results")) == {f".drawn_case{i}.pt" for i in range(3)}
    shutil.copytree("results", "other seed")
    files = tree("results")
    truncate(tmp_path / "results" / ".drawn_case0.pt")
    (tmp_path / "results" / ".drawn_case1.pt").write_bytes(files[".drawn_case2.pt"])  # of another case
    result = sample("results", "--evaluate", "True")
    assert result.code == 0 and "1 of them already complete" in result.out and "3 cases, 6 masks" in result.out
    assert tree("results") == tree("whole") and sorted(tree("whole")) == SCORES
    result = sample("other seed", "--evaluate", "True", "--seed", 1)
    assert result.code == 0 and "0 of them already complete" in result.out
    assert tree("other seed")["scores.csv"] != tree("whole")["scores.csv"]


def test_masks_stay_kept_until_every_case_is_scored(sample, data, undrawn, tmp_path):
    assert sample("whole", "--evaluate", "True").code == 0
    shutil.copy2(data / "case1" / "label0_.png", tmp_path / "label")
    (data / "case1" / "label0_.png").unlink()
    result = sample("results", "--evaluate", "True")
    assert result.code == 2 and "3 cases of 3 patients" in result.out and f"{data / 'case1'}: no labels" in result.err
    assert sorted(tree("results")) == [*(f".drawn_case{i}.pt" for i in (0, 2, 3)), *SCORES]
    shutil.copy2(tmp_path / "label", data / "case1" / "label0_.png")
    result = sample("results", "--evaluate", "True")
    assert result.code == 0 and "3 of them already complete" in result.out and "1 cases, 2 masks" in result.out
    assert tree("results") == tree("whole")


def test_scoring_into_a_bucket_goes_on_too_and_leaves_nothing_but_scores(sample, bucket, monkeypatch, undrawn):
    import blobfile

    monkeypatch.setattr(blobfile, "remove", bucket.pop, raising=False)
    folder = "gs://bucket/run"
    stopped(sample, monkeypatch, folder, 1, "--num_samples", 2)
    assert list(bucket) == [f"{folder}/.drawn_case0.pt"]
    result = sample(folder, "--evaluate", "True", "--num_samples", 2)
    assert result.code == 0 and "1 of them already complete" in result.out
    assert sorted(bucket) == [f"{folder}/{name}" for name in SCORES]


def test_kept_masks_come_back_or_not_at_all(tmp_path):
    masks = np.random.default_rng(0).random((3, 5, 7)) < 0.5
    keep_masks(tmp_path, "a", masks, "f")
    path = Path(kept_file(tmp_path, "a"))
    got = kept_masks(tmp_path, "a", (3, 5, 7), "f")
    assert got.dtype == bool and np.array_equal(got, masks)
    assert kept_masks(tmp_path, "a", (3, 5, 7), "g") is None and kept_masks(tmp_path, "b", (3, 5, 7), "f") is None
    assert kept_masks(tmp_path, "a", (2, 5, 7), "f") is None and kept_masks(tmp_path, "a", (3, 9, 9), "f") is None
    data = path.read_bytes()
    for damaged in (b"", b"hello", data[:len(data) // 2], data[:-1]):
        path.write_bytes(damaged)
        assert kept_masks(tmp_path, "a", (3, 5, 7), "f") is None
    for state in ([], {"masks": 1}, {"fingerprint": "f"}, *({"fingerprint": "f", "masks": value} for value in (
            "?", torch.zeros(3, 5), torch.zeros(3, 1, 5)))):
        checkpoint.save(path, state)
        assert kept_masks(tmp_path, "a", (3, 5, 7), "f") is None


# ---- samples that are no samples ----

@pytest.fixture
def written(tmp_path):
    """A complete case of shape (2, 16, 16), and the path of its samples."""
    case = Case("a", np.zeros((1, SIZE, SIZE), np.float32), np.zeros((0, SIZE, SIZE), bool))
    samples = np.random.default_rng(0).random((2, SIZE, SIZE)).astype(np.float32)
    files.write_case(tmp_path, case, samples, samples > 0.5, "f")
    return tmp_path / "a_ensemble.npz"


def complete(path, shape=(2, SIZE, SIZE)):
    """is_complete, and the most memory it took, in bytes."""
    tracemalloc.start()
    answer = is_complete(path.parent, "a", shape, "f")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return answer, peak


def rewritten(path, name, value):
    """Put another array into an npz, or the bytes of one."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    if not isinstance(value, bytes):
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=True)
        value = buffer.getvalue()
    members[f"{name}.npy"] = value
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def header(shape, dtype="<f4"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def test_samples_of_the_right_shape_are_complete(written):
    rewritten(written, "more", b"")
    assert complete(written)[0] is True and complete(written, (2, SIZE, SIZE + 1))[0] is False


@pytest.mark.parametrize("name, value", [
    ("samples", np.zeros((2, 1 << 10, 1 << 9), np.float32)), ("fingerprint", np.array("f".ljust(1 << 20))),
    ("samples", header((1 << 50,))), ("samples", header((2, 1 << 20, 1 << 10))),
    ("samples", header((1,), "<U1000000000")), ("samples", np.zeros((2, SIZE, SIZE), object)),
    ("samples", b"cos\nsystem\n(S'touch here'\ntR."),
], ids=["bomb", "bomb beside", "absurd header", "large header", "large item", "objects", "pickle"])
def test_bombs_absurd_headers_and_pickles_are_no_samples(written, name, value):
    rewritten(written, name, value)
    assert written.stat().st_size < 6656  # no more than the true file might have
    answer, peak = complete(written)
    assert answer is False
    if not isinstance(value, bytes):  # what a header only claims is reserved at most, but never touched
        assert peak < 1 << 20


def test_a_huge_file_is_not_read(written):
    os.truncate(written, 1 << 33)
    answer, peak = complete(written)
    assert answer is False and peak < 1 << 20


# ---- disks ----

def ended_well(result, path):
    """Whether a run ended with one line that names this file and what to do."""
    return result.code == 2 and "Traceback" not in result.err + result.out and result.err.count("\n") == 1 and (
        f"error: {path}" in result.err and "give the same command again" in result.err)


@pytest.mark.parametrize("flag, count, size", [([], 10, 160), (["--evaluate", "True"], 3, 32)])
def test_a_full_disk_ends_the_run_in_one_line_and_more_room_lets_it_go_on(sample, disk, undrawn, tmp_path, flag, size,
                                                                          count):
    assert sample("whole", *flag).code == 0
    disk(f"size={size}k")
    result = sample("results", *flag)
    assert ended_well(result, "results/") and "No space left on device" in result.err, result.err
    files = tree("results")
    assert count <= len(files) and not any(name.endswith(".partial") for name in files)
    complete = sum(name.endswith((".npz", ".pt")) for name in files)
    assert 0 < complete < 4
    disk("size=10m")
    result = sample("results", *flag)
    assert result.code == 0 and f"{complete} of them already complete" in result.out
    assert tree("results") == tree("whole")


def test_a_folder_that_becomes_read_only_ends_the_run_in_one_line(sample, disk, monkeypatch, tmp_path):
    disk("size=10m")
    write, written = files.write_case, []

    def failing(*args):
        written.append(args[1].name)
        if len(written) == 3:
            disk("ro")
        write(*args)

    with monkeypatch.context() as context:
        context.setattr(files, "write_case", failing)
        result = sample("results")
    assert ended_well(result, "results/case2_") and "Read-only" in result.err, result.err
    # what a disk that takes no change keeps, too, are the leases of the others
    assert {name.split("_")[0] for name in tree("results") if name[0] != "."} == {"case0", "case1"}
    disk("rw")
    result = sample("results")
    assert result.code == 0 and "2 of them already complete" in result.out
    assert sample("whole").code == 0 and tree("results") == tree("whole")


def test_scores_that_cannot_be_written_keep_what_was_drawn(sample, monkeypatch, undrawn, tmp_path):
    assert sample("whole", "--evaluate", "True").code == 0
    (tmp_path / "results" / "scores.json").mkdir(parents=True)
    result = sample("results", "--evaluate", "True")
    assert ended_well(result, "results/scores.json"), result.err
    (tmp_path / "results" / "scores.json").rmdir()
    result = sample("results", "--evaluate", "True")
    assert result.code == 0 and "4 of them already complete" in result.out and "0 cases, 0 masks" in result.out
    assert tree("results") == tree("whole")
