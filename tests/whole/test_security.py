"""Nothing that is read can run code, take memory out of proportion, or lead a write out of its folder."""

import ast
import functools
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import ROOT
from helpers.loops import callback, make_loop, next_floats
from helpers.models import MODEL, make_cimd
from helpers.refusals import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guided_diffusion import checkpoint
from guided_diffusion.data import phantoms
from guided_diffusion.data.cases import Case, SegmentationCases
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.sampling import files
from guided_diffusion.sampling.segmenter import Segmenter
from guided_diffusion.scoring.ensemble_folder import EnsembleFolder
from guided_diffusion.system.errors import InputError
from guided_diffusion.training.resume import Checkpoints, resume


def one_line(result):
    """A script's refusal: exit code 2 and one line, which is returned."""
    assert result.code == 2 and "Traceback" not in result.err + result.out, result.err
    assert result.err.count(": error: ") == 1 and result.err.count("\n") == 1, result.err
    return result.err


def tree(folder):
    """Every file and link below a folder, with its content."""
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_symlink() or path.is_file()}


# ---- the source ----

FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "np.frompyfunc", "torch.jit.load",
             "yaml.load", "yaml.unsafe_load", "joblib.load", "pd.read_pickle", "runpy.run_path"}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code", "runpy"}
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
            "np.lib.format.read_array": ("allow_pickle", False)}
DANGEROUS = {("shell", True), ("allow_pickle", True), ("weights_only", False)}


def dangers(source):
    """What a program calls that can run what it reads, as (line, words)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, name) for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).replace("numpy.", "np.")
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if called in FORBIDDEN or called in REQUIRED and (REQUIRED[called] not in keywords.items()):
                found.append((node.lineno, called))
            found += [(node.lineno, f"{name}={value}") for name, value in keywords.items()
                      if (name, value) in DANGEROUS]
    return found


def test_no_source_calls_what_could_run_data():
    for path in [*ROOT.glob("guided_diffusion/**/*.py"), *ROOT.glob("scripts/*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.name == "pickles.py":  # which knows NumPy's arrays only, see tests/prepare/test_pickles.py
            text, allowed = re.subn(r"^from pickle import _Unpickler\b.*", "", text, flags=re.MULTILINE)
            assert allowed == 1
        assert not dangers(text), path


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "eval(text)", "exec(text)", "os.system(text)", "import marshal, os",
    "subprocess.run(text, shell=True)", "yaml.load(text)", "np.load(f)", "np.load(f, allow_pickle=True)",
    "numpy.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "import shelve"])
def test_the_search_of_the_source_finds_each_danger(line):
    assert dangers(line)
    assert not dangers("model.eval(); torch.load(f, weights_only=True); np.load(f, allow_pickle=False); 'eval(x)'")


# ---- code in files ----

class Attack:
    """Runs code that makes a file, when unpickled."""

    def __init__(self, kind, marker):
        self.kind, self.marker = kind, str(marker)

    def __reduce__(self):
        python = f"open({self.marker!r}, 'w').close()"
        return {"system": (os.system, (f"touch '{self.marker}'",)), "exec": (exec, (python,)),
                "eval": (eval, (python,))}[self.kind]


class Hidden(torch.Tensor):
    """Weights of a class of its own, whose unpickling runs code."""

    attack = None

    def __reduce_ex__(self, protocol):
        return self.attack.__reduce__()


def hidden(attack):
    weight = torch.ones(2).as_subclass(Hidden)
    weight.attack = attack
    return weight


def object_array(attack, write, path):
    with open(path, "wb") as file:  # a name would get a suffix
        write(file, np.array([attack, None], dtype=object))


FORMS = {  # form of the attack: write(attack, path)
    "pickle": lambda attack, path: path.write_bytes(pickle.dumps({"w": attack}, 4)),
    "legacy": lambda attack, path: torch.save({"w": attack}, path, _use_new_zipfile_serialization=False),
    "zip": lambda attack, path: torch.save(attack, path),
    "nested": lambda attack, path: torch.save(
        functools.reduce(lambda inner, i: {"a": torch.ones(1), "b": [i, inner]}, range(40), attack), path),
    "among weights": lambda attack, path: torch.save({"w": torch.ones(2), "b": hidden(attack)}, path),
    "npz": lambda attack, path: object_array(attack, lambda file, array: np.savez(
        file, samples=array, fingerprint=array, outlines=array, shape=array, probabilities=array), path),
    "npy": lambda attack, path: object_array(attack, np.save, path),
}
TORCH = ["pickle", "legacy", "zip", "nested", "among weights"]

CARELESS = """
import pickle, sys, numpy as np, torch
for path in sys.argv[1:]:
    try:
        if "np" not in path:
            torch.load(path, weights_only=False)
        elif isinstance(found := np.load(path, allow_pickle=True), np.lib.npyio.NpzFile):
            found["samples"]
    except Exception as error:
        print(path, error)
"""


def test_each_attack_would_succeed_on_a_careless_reader(tmp_path):
    paths = []
    for i, (form, write) in enumerate(FORMS.items()):
        for kind in ("system", "exec", "eval"):
            paths.append(tmp_path / f"{i}{kind}.{form.replace(' ', '')}")
            write(Attack(kind, f"{paths[-1]}-ran"), paths[-1])
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", CARELESS, *map(str, paths)], capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in paths if not Path(f"{path}-ran").exists()] == [], result.stdout


@pytest.mark.parametrize("kind", ["system", "exec", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_no_reader_of_a_file_runs_an_attack(tmp_path, form, kind):
    marker, path = tmp_path / "it-ran", tmp_path / "truth.npz"
    FORMS[form](Attack(kind, marker), path)
    for read in (checkpoint.load, phantoms.load_truth):
        assert str(path) in refusal(read, path if read is checkpoint.load else tmp_path)
    for name in files.result_names("a", 1):
        (tmp_path / name).write_bytes(path.read_bytes())
    Path(files.kept_file(tmp_path, "a")).write_bytes(path.read_bytes())
    assert not files.is_complete(str(tmp_path), "a", (1, 2, 1), "")
    assert files.kept_masks(str(tmp_path), "a", (1, 2, 1), "") is None
    assert not marker.exists()


def spoil_training(folder, form, marker, *names):
    for name in names:
        FORMS[form](Attack("system", marker), folder / name)


@pytest.mark.parametrize("form", TORCH)
def test_attack_at_model_path_is_refused(tmp_path, trained, run, make_cases, form):
    results, marker = tmp_path / "results", tmp_path / "it-ran"
    results.mkdir()
    (results / "flags.json").write_bytes((trained / "flags.json").read_bytes())
    spoil_training(results, form, marker, "savedmodel.pt")
    result = run("segmentation_sample.py", "--data_dir", make_cases(tmp_path / "data"), "--results_dir", results)
    assert f"{results / 'savedmodel.pt'}: " in one_line(result)
    assert str(results / "savedmodel.pt") in refusal(Segmenter.load, results / "savedmodel.pt")
    assert not marker.exists()


def loss_aware():
    return make_cimd(timestep_respacing="4", schedule_sampler=LossSecondMomentResampler(4, history_per_term=1))


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """The results folder of a training run with two checkpoints, 1 and 2, and its files."""
    folder = tmp_path_factory.mktemp("run")
    make_loop(folder, loss_aware(), max_steps=2, save_interval=1).run_loop()
    for path in folder.glob("optsavedmodel*.pt"):
        rest = checkpoint.load(path)
        rest.pop("data", None)  # so that it goes on with whatever cases
        torch.save(rest, path)
    return folder


TRAIN = ["--image_size", 16, "--image_channels", 1, "--num_channels", 32, "--channel_mult", "1,2", "--num_res_blocks",
         1, "--num_heads", 1, "--attention_resolutions", "8", "--num_filters", "8,16", "--no_convs_per_block", 2,
         "--max_steps", 3]


@pytest.fixture
def train(tmp_path, run_of_two, run, make_cases):
    """train(*flags) goes on with a copy of run_of_two in tmp_path/results."""
    results, data = tmp_path / "results", make_cases(tmp_path / "data")
    results.mkdir()
    for path in run_of_two.iterdir():
        (results / path.name).write_bytes(path.read_bytes())
    return lambda *flags: run("segmentation_train.py", "--data_dir", data, "--results_dir", results, *TRAIN, *flags)


KINDS = ["savedmodel", "emasavedmodel_0.9999_", "optsavedmodel"]


@pytest.mark.parametrize("kind, form", zip(KINDS, ["zip", "legacy", "nested"]))
def test_attack_at_resume_checkpoint_is_refused(tmp_path, train, kind, form):
    spoil_training(tmp_path / "results", form, tmp_path / "it-ran", f"{kind}000002.pt")
    result = train("--resume_checkpoint", tmp_path / "results" / "savedmodel000002.pt")
    assert f"{kind}000002.pt" in one_line(result) and not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("kind, form", zip(KINDS, ["legacy", "among weights", "zip"]))
def test_attack_in_a_results_folder_is_passed_over_when_training_goes_on(tmp_path, train, kind, form):
    spoil_training(tmp_path / "results", form, tmp_path / "it-ran", f"{kind}000002.pt", "savedmodel.pt")
    result = train()
    assert result.code == 0 and f"{kind}000002.pt" in result.out and "resumed at step 1" in result.out, result.err
    spoil_training(tmp_path / "results", form, tmp_path / "it-ran",
                   *(f"{kind}{step:06}.pt" for step in (1, 2, 3)))
    result = train()
    assert result.code == 2 and "holds no whole checkpoint" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("form", FORMS)
def test_attack_in_the_place_of_a_picture_is_refused(tmp_path, make_cases, form, run):
    marker, samples = tmp_path / "it-ran", tmp_path / "samples"
    samples.mkdir()
    data = make_cases(tmp_path / "data", count=1)
    FORMS[form](Attack("exec", marker), samples / "case0_output0.png")
    result = run("segmentation_evaluate.py", "--data_dir", data, "--samples_dir", samples)
    assert "case0_output0.png: cannot be read" in one_line(result)
    for name in ("image_0.png", "label0_.png"):
        good = (data / "case0" / name).read_bytes()
        FORMS[form](Attack("exec", marker), data / "case0" / name)
        assert f"{name}: cannot be read" in refusal(SegmentationCases, data, 16)
        (data / "case0" / name).write_bytes(good)
    assert not marker.exists()


def test_attack_in_an_ensemble_is_drawn_anew(tmp_path, trained, run, make_cases):
    flags = ["segmentation_sample.py", "--data_dir", make_cases(tmp_path / "data", count=1), "--results_dir", tmp_path,
             "--model_path", trained / "savedmodel.pt", "--num_ensemble", 1, "--sampling_steps", 2]
    assert run(*flags).code == 0
    path = tmp_path / "case0_ensemble.npz"
    whole = path.read_bytes()
    for form in ("npz", "npy", "pickle"):
        FORMS[form](Attack("system", tmp_path / "it-ran"), path)
        assert run(*flags).code == 0 and path.read_bytes() == whole
    assert not (tmp_path / "it-ran").exists()


# ---- flags.json ----

HOSTILE = {  # content of flags.json: the words of the refusal, None if the file means what MODEL says
    "brackets": ("[" * 100_000, "flags.json"),
    "braces": ('{"a":' * 100_000, "flags.json"),
    "long number": ('{"image_size": ' + "9" * 100_000 + "}", "flags.json"),
    "large number": (json.dumps({**MODEL, "num_channels": 32 * 10 ** 30}), "num_channels"),
    "negative number": (json.dumps({**MODEL, "num_res_blocks": -1}), "num_res_blocks"),
    "absurd size": (json.dumps({**MODEL, "diffusion_steps": 10 ** 15}), "diffusion_steps"),
    "nan": (json.dumps({**MODEL, "image_size": float("nan")}), "image_size"),
    "infinity": (json.dumps(MODEL).replace("16", "1e999", 1), "image_size"),
    "text for a number": (json.dumps({**MODEL, "image_size": "16"}), "image_size"),
    "number for a text": (json.dumps({**MODEL, "channel_mult": 12}), "channel_mult"),
    "list": (json.dumps({**MODEL, "num_heads": [1]}), "num_heads"),
    "object": (json.dumps({**MODEL, "num_channels": {"__class__": "os.system"}}), "num_channels"),
    "null": (json.dumps({**MODEL, "image_channels": None}), "image_channels"),
    "number for a truth": (json.dumps({**MODEL, "learn_sigma": 2}), "learn_sigma"),
    "text for a truth": (json.dumps({**MODEL, "class_cond": "False"}), "class_cond"),
    "no such word": (json.dumps({**MODEL, "noise_schedule": "__import__('os')"}), "noise_schedule"),
    "code in a list of numbers": (json.dumps({**MODEL, "channel_mult": "__import__('os').getcwd()"}), "--channel_mult"),
    "twice": (json.dumps(MODEL)[:-1] + ', "num_channels": 32}', None),
    "names of Python": (json.dumps({**MODEL, "__class__": "os.system", "__dict__": {}, "__init__": 1}), None),
    "unknown": (json.dumps({**MODEL, "no_such_flag": [1]}), None),
    "flags of other kinds": (json.dumps({**MODEL, "num_ensemble": 3, "data_dir": "/", "results_dir": "/",
                                         "visdom_port": 1, "evaluate": True, "seed": 7}), None),
}


@pytest.fixture(scope="module")
def meant(trained):
    """What the stored model draws for a scan."""
    return Segmenter.load(trained / "savedmodel.pt").sample(np.zeros((16, 16)), num_ensemble=1, steps=2)


@pytest.mark.parametrize("content, words", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_flags_are_refused_by_name_or_ignored(tmp_path, trained, run, make_cases, meant, content, words):
    (tmp_path / "savedmodel.pt").symlink_to(trained / "savedmodel.pt")
    (tmp_path / "flags.json").write_text(content)
    result = run("segmentation_sample.py", "--data_dir", make_cases(tmp_path / "data", count=1), "--results_dir",
                 tmp_path / "out", "--model_path", tmp_path / "savedmodel.pt", "--sampling_steps", 2)
    if words:
        line = one_line(result)
        assert words in line and (str(tmp_path) in line or words.startswith("--"))
        assert words in refusal(Segmenter.load, tmp_path / "savedmodel.pt")
    else:
        assert result.code == 0, result.err
        assert len(list((tmp_path / "out").glob("*_output?.png"))) == 5  # as the command line says
        drawn = Segmenter.load(tmp_path / "savedmodel.pt").sample(np.zeros((16, 16)), num_ensemble=1, steps=2)
        assert np.array_equal(drawn, meant)


def test_hostile_flags_of_a_run_that_goes_on_are_refused_by_name(tmp_path, train):
    (tmp_path / "results" / "flags.json").write_text(json.dumps({"latent_dim": "6", "image_size": 16}))
    line = one_line(train())
    assert "flags.json" in line and "latent_dim" in line


# ---- more than its file: decompression bombs, absurd headers, files without end ----

def deflated(data):
    """A torch checkpoint again, its entries compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def torch_bytes(thing, **options):
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


def npy(shape, dtype="|u1", data=b""):
    """An array's file whose header claims a shape of one's own choice."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def npz(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                for _ in range(-(-data // (1 << 20)) if isinstance(data, int) else 0):
                    file.write(bytes(1 << 20))
                if not isinstance(data, int):
                    file.write(data)
    return buffer.getvalue()


def npz_bomb(size):
    """`size` bytes of zeros in each array, headers that fit them."""
    zeros = npy((size,), data=bytes(size))
    return npz(samples=zeros, outlines=zeros, fingerprint=npy((), "<U1", b"x\0\0\0"), probabilities=zeros,
               shape=npy((3,), "<i8", struct.pack("<3q", 8, size, 1)))


def claims(shape, dtype="|u1"):
    """Arrays that claim a shape and hold next to nothing."""
    return npz(**{name: npy(shape, dtype, b"\1" * 64) for name in
                  ("samples", "outlines", "fingerprint", "shape", "probabilities")})


def overlapping(count=40, size=5 << 20):
    """A torch checkpoint of `count` tensors in a file little larger than one of them: the data of each entry are the
    entries after it."""
    names = [f"archive/data/{i}" for i in range(10, 10 + count)]  # of one length
    head = 30 + len(names[0])
    sizes = [size + head * (count - 1 - i) for i in range(count)]
    buffer = io.BytesIO()
    tensors = [torch.zeros(n, dtype=torch.uint8) for n in [1] * 10 + sizes]
    with zipfile.ZipFile(io.BytesIO(torch_bytes(tensors))) as whole, zipfile.ZipFile(buffer, "w") as archive:
        for name in ("data.pkl", "version", *(f"data/{i}" for i in range(10))):
            archive.writestr(f"archive/{name}", whole.read(f"archive/{name}"))
        start, body = archive.start_dir, bytes(size)
        for i in reversed(range(count)):
            info = zipfile.ZipInfo(names[i])
            info.CRC, info.header_offset = zlib.crc32(body), start + head * i
            info.file_size = info.compress_size = sizes[i]
            archive.filelist.append(info)
            body = info.FileHeader(zip64=False) + body
        buffer.seek(start)
        buffer.write(body)
        archive.start_dir, archive._didModify = buffer.tell(), True
    return buffer.getvalue()


HUGE = 192 << 20  # bytes that a bomb unpacks to
BOMBS = {
    "deflated weights": lambda: deflated(torch_bytes({"w": torch.zeros(HUGE // 4)})),
    "overlapping weights": overlapping,
    "legacy, absurd storage": lambda: torch_bytes({"w": torch.zeros(4)}, _use_new_zipfile_serialization=False).replace(
        b"cpuq\x06K\x04", b"cpuq\x06J\xff\xff\xff\x7f"),
    "npz of zeros": lambda: npz_bomb(HUGE),
    "npz header of 1 TB": lambda: claims((1 << 40,)),
    "npz header of 2 GB": lambda: claims((1 << 31,)),
    "npz header beyond 64 bits": lambda: claims((1 << 62, 1 << 62)),
    "npz header of negative size": lambda: claims((-1, -5)),
    "npz header of long text": lambda: claims((), f"<U{1 << 28}"),
    "npz header that is deep": lambda: npz(samples=npy("(" * 3000), fingerprint=npy("[" * 3000), shape=b"",
                                           outlines=b"", probabilities=b""),
}

ENDLESS = ["link to /dev/zero", "sparse file of 1 TB"]
DOORS = {"checkpoint": "file", "flags": "flags.json", "truth": "truth.npz", "ensemble": "a_ensemble.npz",
         "masks": ".drawn_a.pt"}

CONFINED = """
import json, resource, sys
from pathlib import Path
from guided_diffusion import checkpoint
from guided_diffusion.data import phantoms
from guided_diffusion.sampling import files
from guided_diffusion.system.errors import InputError
from guided_diffusion.training.resume import Checkpoints, resume

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

def attempt(read):
    before = peak()
    try:
        outcome = str(read())
    except InputError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, peak() - before

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1200 << 20),) * 2)
doors = {
    "checkpoint": lambda folder: checkpoint.load(folder / "file"),
    "flags": lambda folder: checkpoint.load_flags(folder),
    "truth": phantoms.load_truth,
    "ensemble": lambda folder: files.is_complete(str(folder), "a", (1, 64, 64), "x") or None,
    "masks": lambda folder: files.kept_masks(str(folder), "a", (1, 64, 64), "x"),
}
print(json.dumps({folder.name: {name: attempt(lambda: read(folder)) for name, read in doors.items()}
                  for folder in sorted(Path(sys.argv[1]).iterdir())}))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{bomb: {door: [what came of it, MB that it took]}}, in a process of little memory."""
    root = tmp_path_factory.mktemp("bombs")
    for bomb in (*BOMBS, *ENDLESS):
        folder = root / bomb.replace("/", " ")
        folder.mkdir()
        data = BOMBS[bomb]() if bomb in BOMBS else b""
        assert len(data) < HUGE / 20
        for name in (*files.result_names("a", 1), *DOORS.values()):
            (folder / name).unlink(missing_ok=True)
            if bomb == "link to /dev/zero":
                (folder / name).symlink_to("/dev/zero")
            else:
                (folder / name).write_bytes(data)
                if bomb == "sparse file of 1 TB":
                    os.truncate(folder / name, 1 << 40)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", CONFINED, str(root)], env=env, capture_output=True,
                            text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory as Linux does")
@pytest.mark.parametrize("bomb", [*BOMBS, *ENDLESS])
@pytest.mark.parametrize("door", DOORS)
def test_what_claims_more_than_it_holds_is_refused_with_little_memory(outcomes, bomb, door):
    outcome, megabytes = outcomes[bomb.replace("/", " ")][door]
    if door in ("ensemble", "masks"):
        assert outcome == "None"  # drawn anew
    else:
        assert outcome.startswith("refused: ") and DOORS[door] in outcome and "\n" not in outcome
    assert megabytes < 100


# offset, bytes a value, channels, rows, columns, raters, bytes a mask, rows and columns of the scan
RECORD = [0, 1, 1, 16, 16, 2, 32, 16, 16]


def records(*changes):
    """Two records that differ from RECORD in numbers at these places."""
    record = list(RECORD)
    for place, number in changes:
        record[place] = number
    return [record] * 2


@pytest.mark.parametrize("records", [
    records((0, 1 << 62)), records((3, 1 << 31)), records((4, 1 << 31)), records((0, -4096)), records((5, -2)),
    records((5, 1 << 40)), records((1, 8)), [RECORD], records((3, 8), (4, 8), (6, 8)), records((2, 3)),
    records((2, 1 << 40), (3, 0)), records((0, "0")), [[0, 1, 1]], [], {}, None, records((6, 1e300)),
    records((6, 10 ** 400)), records((7, 1 << 40)), records((8, 15)), "[" * 100_000])
def test_decoded_file_with_an_absurd_index_is_made_anew(tmp_path, make_cases, monkeypatch, records):
    monkeypatch.setattr("guided_diffusion.data.cases.MEMORY_BYTES", 0)
    data = make_cases(tmp_path / "data")
    whole = SegmentationCases(data, 16)
    path = data / ".decoded_16_error"
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[-16:-8])
    index = json.loads(content[-16 - length:-16])
    assert index["records"][0] == RECORD
    text = records.encode() if isinstance(records, str) else json.dumps({**index, "records": records}).encode()
    path.write_bytes(content[:-16 - length] + text + struct.pack("<Q", len(text)) + content[-8:])
    again = SegmentationCases(data, 16)
    for a, b in zip(whole, again, strict=True):
        assert a.name == b.name and np.array_equal(a.image, b.image) and np.array_equal(a.raters, b.raters)
    assert [again.fitting(i) for i in range(len(again))] == [whole.fitting(i) for i in range(len(whole))]


# ---- names ----

@pytest.fixture
def outside(tmp_path):
    """A folder that nothing may change, which links in other folders lead to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    return folder


def link_all(folder, outside, names):
    for name in names:
        (folder / name).symlink_to(outside / "mine")


def test_results_replace_links_and_never_follow_them(tmp_path, outside, trained, run, make_cases):
    data, results = make_cases(tmp_path / "data", count=1), tmp_path / "results"
    results.mkdir()
    link_all(results, outside, [*files.result_names("case0", 1), "scores.csv", "scores.json", "scores.png",
                                "best.png", "worst.png", "report.html"])
    before = tree(outside)
    result = run("segmentation_sample.py", "--data_dir", data, "--results_dir", results, "--num_ensemble", 1,
                 "--model_path", trained / "savedmodel.pt", "--sampling_steps", 2)
    assert result.code == 0, result.err
    result = run("segmentation_evaluate.py", "--data_dir", data, "--samples_dir", results)
    assert result.code == 0, result.err
    assert tree(outside) == before and not any(path.is_symlink() for path in results.iterdir())


def test_training_never_writes_through_a_link(tmp_path, outside, train):
    results, before = tmp_path / "results", tree(outside)
    names = ["savedmodel.pt", "savedmodel000003.pt", "optsavedmodel000003.pt", "emasavedmodel_0.9999_000003.pt",
             "flags.json", "log.txt", "progress.csv", "progress.json", ".training.lock"]
    for name in names:
        (results / name).unlink(missing_ok=True)
    link_all(results, outside, [name for name in names if name != "flags.json"])
    train()
    assert tree(outside) == before


def test_decoded_file_is_never_written_through_a_link(tmp_path, outside, make_cases, monkeypatch):
    monkeypatch.setattr("guided_diffusion.data.cases.MEMORY_BYTES", 0)
    data, before = make_cases(tmp_path / "data"), tree(outside)
    link_all(data, outside, [f".decoded_16_error{end}" for end in ("", ".part", ".lock")])
    assert len(list(SegmentationCases(data, 16))) == 2
    assert tree(outside) == before


@pytest.mark.parametrize("name", ["../escaped", "../../escaped", "{tmp}/escaped", "a/../../escaped", "/", "a/b"])
def test_case_of_a_name_that_leads_elsewhere_is_not_written(tmp_path, name):
    (tmp_path / "results" / "a").mkdir(parents=True)
    case = Case(name.format(tmp=tmp_path), np.zeros((1, 8, 8), np.float32), np.zeros((0, 8, 8), bool))
    before = tree(tmp_path)
    refusal(files.write_case, str(tmp_path / "results"), case, np.zeros((1, 8, 8), np.float32), case.raters)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("pattern", ["../{case}_{i}.png", "{case}/../{i}.png", "/{case}/{i}.png", "{case}/{i}/../x.png",
                                     "a/../../{case}{i}.png", "//{case}_{i}.png", "{case.__class__}{i}.png",
                                     "{case}/{i:>{case}}.png", "{case!r}_{i}.png", "{i:99999999}{case}.png"])
def test_pattern_that_leads_out_of_the_samples_is_refused(tmp_path, pattern, make_cases, run):
    result = run("segmentation_evaluate.py", "--data_dir", make_cases(tmp_path / "data", count=1), "--samples_dir",
                 tmp_path / "data", "--pattern", pattern)
    assert "--pattern" in one_line(result)


@pytest.mark.parametrize("case", ["..", ".", "", "../data/case0", "/data/case0", "a/../.."])
@pytest.mark.parametrize("pattern", ["{case}/label{i}_.png", "{case}/case0/label{i}_.png"])
def test_case_of_a_name_that_leads_elsewhere_is_not_read(tmp_path, make_cases, pattern, case):
    make_cases(tmp_path / "case0", count=1)
    (tmp_path / "samples").mkdir()
    assert "is no name of a case" in refusal(EnsembleFolder(tmp_path / "samples", pattern).find, [case])


def test_case_and_file_names_write_nothing_outside_the_results(tmp_path, trained, run, make_cases):
    names = ["a..", "~", "$(touch escaped)", "n" * 200, "a\\..\\b", "--help", "größer (é) %s {0}", "CON"]
    data = make_cases(tmp_path / "data", count=len(names))
    for i, name in enumerate(names):
        (data / f"case{i}").rename(data / name)
    before = tree(tmp_path)
    result = run("segmentation_sample.py", "--data_dir", data, "--results_dir", tmp_path / "results", "--num_ensemble",
                 1, "--model_path", trained / "savedmodel.pt", "--sampling_steps", 2)
    assert result.code == 0, result.err
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    assert all(path.parent == tmp_path / "results" for path in after.keys() - before.keys())
    assert {path.name for path in after if "_output0" in path.name} == {f"{name}_output0.png" for name in names}


# ---- going on from a checkpoint whose parts are anything ----

def places(thing, path=()):
    """The place of every value in nested containers, as tuples of keys."""
    yield path
    items = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, (list, tuple)) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(thing, path, change):
    """A copy of nested containers with change(value) at a place; KeyError of `change` leaves the place out."""
    if not path:
        return change(thing)
    if isinstance(thing, dict):
        items = {key: value for key, value in thing.items() if key != path[0]}
        try:
            return {**items, path[0]: changed(thing[path[0]], path[1:], change)}
        except KeyError:
            return items
    items = list(thing)
    try:
        items[path[0]] = changed(items[path[0]], path[1:], change)
    except KeyError:
        del items[path[0]]
    return type(thing)(items)


def left_out(value):
    raise KeyError


CHANGES = {
    "left out": left_out,
    **{repr(value): lambda old, value=value: value for value in (
        None, True, -1, 0, 0.5, 2 ** 70, 10 ** 400, float("nan"), float("inf"), "text", "", b"bytes", (), [], {},
        {"a": 1}, [1, 2, 3], {0: {}}, {"step": 1})},
    "twice": lambda old: old + old if isinstance(old, (list, tuple)) else [old, old],
    "a tensor of one": lambda old: torch.ones(()),
    "a negative tensor": lambda old: -torch.ones_like(old) if isinstance(old, torch.Tensor) else torch.tensor(-1),
    "another shape": lambda old: torch.ones(3, 5),
    "absurdly expanded": lambda old: torch.ones(1).expand(1 << 40),
    "absurdly expanded integers": lambda old: torch.ones(1, dtype=torch.int8).expand(1 << 40),
    "complex": lambda old: torch.ones(old.shape if isinstance(old, torch.Tensor) else (), dtype=torch.complex64),
    "truths": lambda old: torch.ones(old.shape if isinstance(old, torch.Tensor) else (), dtype=torch.bool),
    "sparse": lambda old: (old if isinstance(old, torch.Tensor) and old.dim() else torch.ones(2)).to_sparse(),
    "without memory": lambda old: torch.empty(old.shape if isinstance(old, torch.Tensor) else (), device="meta"),
    "expanded": lambda old: torch.zeros(1).expand(old.shape) if isinstance(old, torch.Tensor) and old.dim() else 0,
}


@pytest.fixture(scope="module")
def saved(run_of_two):
    """What optsavedmodel000002.pt holds, and the places in it, those of each kind together."""
    rest = checkpoint.load(run_of_two / "optsavedmodel000002.pt")
    kinds = {}
    for path in places(rest):
        kinds.setdefault(tuple("n" if isinstance(key, int) else key for key in path[:4] if path[0] not in (
            "posterior", "prior")) or path[:1], []).append(path)
    return rest, kinds


@pytest.fixture(scope="module")
def going_on(run_of_two, saved, tmp_path_factory):
    """going_on(rest): resume from a checkpoint that holds `rest`; refused by name, or the loop takes a step."""
    folder = tmp_path_factory.mktemp("changed")
    for path in run_of_two.iterdir():
        if path.name != "optsavedmodel000002.pt":
            (folder / path.name).symlink_to(path)

    loops = [make_loop(folder, loss_aware())]

    def call(rest):
        path = folder / "optsavedmodel000002.pt"
        torch.save(rest, path)
        loop = loops.pop() if loops else make_loop(folder, loss_aware())
        try:
            resume(loop, folder / "savedmodel000002.pt")
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            loops.append(loop)  # a resume that succeeds leaves nothing of it
            return False
        assert loop.step >= 0 and loop.position >= 0
        for p, moments in loop.optimizer.state.items():  # the fused step writes to their memory as if it were p's
            for name in ("exp_avg", "exp_avg_sq"):
                assert moments[name].layout == torch.strided and moments[name].device == p.device
                assert moments[name].dtype == p.dtype and moments[name].stride() == p.stride()
        before = loop.step
        loop.run_step(next_floats(loop.data.batches(2, start=loop.position)))
        checkpoints = callback(loop, Checkpoints)
        checkpoints.save(loop)
        checkpoints.saver.wait()
        assert loop.step == before + 1 and not checkpoints.saver.problem
        return True

    return call


def test_what_was_saved_goes_on(going_on, saved):
    assert going_on(saved[0])


@settings(max_examples=15, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_to_what_is_gone_on_from_is_refused_by_name_or_does_no_harm(going_on, saved, data):
    rest, kinds = saved
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        place = data.draw(st.sampled_from(kinds[data.draw(st.sampled_from(sorted(kinds)), "kind")]), "place")
        try:
            rest = changed(rest, place, CHANGES[data.draw(st.sampled_from(sorted(CHANGES)), "change")])
        except (KeyError, IndexError, TypeError, AttributeError):  # the first change took the place of the second away
            pass
    going_on(rest)


FIRST = ("optimizer", "state", 0)


@pytest.mark.parametrize("place, change", [
    (("step",), "-1"), (("step",), "'text'"), (("step",), "nan"), (("position",), "-1"), (("position",), "None"),
    (("optimizer",), "left out"), (("optimizer", "state"), "[]"), (("optimizer", "param_groups"), "twice"),
    (("optimizer", "param_groups"), "[]"), ((*FIRST, "exp_avg"), "absurdly expanded"),
    ((*FIRST, "exp_avg"), "absurdly expanded integers"), ((*FIRST, "exp_avg_sq"), "another shape"),
    ((*FIRST, "exp_avg"), "left out"), ((*FIRST, "exp_avg"), "sparse"), ((*FIRST, "exp_avg"), "without memory"),
    ((*FIRST, "exp_avg"), "complex"), ((*FIRST, "exp_avg_sq"), "a negative tensor"), ((*FIRST, "exp_avg"), "expanded"),
    ((*FIRST, "step"), "another shape"), ((*FIRST, "step"), "'text'"), ((*FIRST, "step"), "a negative tensor"),
    (("optimizer", "param_groups", 0, "betas"), "'text'"), (("optimizer", "param_groups", 0, "foreach"), "True"),
    (("optimizer", "param_groups", 0, "params"), "twice"), (("optimizer", "param_groups", 0, "fused"), "None"),
    (("schedule_sampler", "history"), "left out"), (("schedule_sampler", "counts"), "another shape"),
    (("schedule_sampler",), "[1, 2, 3]"), (("schedule_sampler", "history"), "complex"), (("posterior",), "left out"),
    (("posterior",), "{0: {}}"), (("prior",), "None"), (("scaler",), "'text'"),
    (("position",), repr(2 ** 70)), (("step",), repr(10 ** 400)),
], ids=str)
def test_a_change_that_could_do_harm_is_refused_by_name_or_does_none(going_on, saved, place, change):
    going_on(changed(saved[0], place, CHANGES[change]))


@pytest.mark.parametrize("change", ["sparse", "without memory", "complex", "absurdly expanded", "another shape",
                                    "None"])
def test_weights_of_another_kind_are_refused_by_name(tmp_path, change):
    model = torch.nn.Linear(2, 2)
    torch.save({**model.state_dict(), "weight": CHANGES[change](model.weight.detach())}, tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in refusal(checkpoint.load_model, model, tmp_path / "a.pt")
    torch.save({**model.state_dict(), 1: torch.ones(2)}, tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in refusal(checkpoint.load_model, model, tmp_path / "a.pt")
