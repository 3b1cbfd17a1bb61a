"""Tables of entries, and the files of a user's that add to them."""

import re
import shutil
import sys

import pytest
from helpers.models import MODEL
from helpers.processes import SAMPLE, TRAIN
from helpers.refusals import refusal, refused

from guided_diffusion import checkpoint
from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.flags import FLAGS, TABLES, load_plugins, settle
from guided_diffusion.networks import NETWORKS
from guided_diffusion.system.flag import Flag
from guided_diffusion.system.registry import Registry, load_plugin

WIDTH = Flag("width", int, 8, "channels", "model", least=1)
NETWORK = """
import torch
from torch import nn
from guided_diffusion.networks import NETWORKS
from guided_diffusion.networks.base import Denoiser
from guided_diffusion.system.flag import Flag

@NETWORKS.add("plain", "two convolutions", [Flag("plain_width", int, 8, "channels of the hidden layer", "model")])
class Plain(Denoiser):
    def __init__(self, flags, x_channels, out_channels):
        super().__init__()
        self.first = nn.Conv2d(flags.image_channels + x_channels, flags.plain_width, 3, padding=1)
        self.last = nn.Conv2d(flags.plain_width, out_channels, 3, padding=1)

    def denoise(self, x, timesteps, encoded):
        return self.last(torch.relu(self.first(torch.cat([encoded, x], 1))))
"""


@pytest.fixture
def own(tmp_path):
    """own(name, text) writes a Python file of the user's; what it adds to the tables is gone after the test."""
    known, modules = [dict(table.entries) for table in TABLES], set(sys.modules)

    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    yield write
    for table, entries in zip(TABLES, known):
        table._entries.clear()
        table._entries.update(entries)
    for name in set(sys.modules) - modules:
        if name.startswith("guided_diffusion_plugin_"):
            del sys.modules[name]


def define(table, file, name="a", value="lambda: 0", flags=()):
    """Register an entry as a file of this name would."""
    exec(compile(f"table.add({name!r}, 'some words', flags)({value})", file, "exec"), {"table": table, "flags": flags})


# ---- tables ----

def test_table_reads_as_a_dict_of_what_was_registered_in_order():
    table = Registry("colour")

    @table.add("red", "as blood")
    def red():
        return 1

    class Blue:
        pass

    assert table.add("blue")(Blue) is Blue
    assert dict(table) == {"red": red, "blue": Blue} and list(table) == ["red", "blue"] and len(table) == 2
    assert "red" in table and "green" not in table and table["red"]() == 1
    assert table.words() == "red: as blood; blue"
    assert table.entries["red"].help == "as blood" and table.entries["red"].file == __file__
    with pytest.raises(KeyError, match="no colour is called 'green': there are red, blue"):
        table["green"]


def test_two_files_may_not_use_one_name_and_both_are_named():
    table = Registry("colour")
    define(table, "/one.py")
    assert refusal(define, table, "/other.py") == "colour a: is in /one.py and again in /other.py; rename one"
    assert table.entries["a"].file == "/one.py" and len(table) == 1


def test_a_file_that_is_run_again_replaces_its_entries():
    table = Registry("colour")
    define(table, "/one.py")
    define(table, "/one.py", value="lambda: 7")
    assert len(table) == 1 and table["a"]() == 7


def test_flags_of_all_entries_come_once_and_say_whose_they_are():
    table, other = Registry("colour"), Flag("depth", int, 1, "layers", "model")
    define(table, "/one.py", "a", flags=[WIDTH, other])
    define(table, "/two.py", "b", flags=[WIDTH])
    define(table, "/two.py", "c")
    assert table.flags() == [WIDTH, other]
    assert table.owners("width") == ["a", "b"] and table.owners("depth") == ["a"] and table.owners("height") == []


@pytest.mark.parametrize("change", [{"default": 9}, {"type": float}, {"help": "others"}, {"least": 0}])
def test_flags_of_one_name_that_differ_are_refused_with_both_files(change):
    table = Registry("colour")
    define(table, "/one.py", "a", flags=[WIDTH])
    define(table, "/two.py", "b", flags=[WIDTH._replace(**change)])
    assert refusal(table.flags) == ("--width: is a flag in /one.py, and another one in /two.py; rename one, or import"
                                    " it from there")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.flag)
def test_every_entry_of_the_package_has_words_for_the_help_and_flags_that_the_commands_know(table):
    names = [flag.name for flag in FLAGS]
    for name, entry in table.entries.items():
        assert entry.help, name
        assert {flag.name for flag in entry.flags} <= set(names)
    assert len(table) > 0


# ---- plugins ----

def test_plugin_that_is_not_there_is_named(tmp_path):
    assert refusal(load_plugin, str(tmp_path / "gone.py")) == f"--plugin {tmp_path / 'gone.py'}: no such file"
    assert refusal(load_plugin, str(tmp_path)) == f"--plugin {tmp_path}: no such file"


@pytest.mark.parametrize("text, words", [
    ("x = 1\n\ndef f(:\n    pass\n", ["line 3: SyntaxError: "]),
    ("\n\nraise KeyError('colour')\n", ["line 3: KeyError: 'colour'"]),
    ("import guided_diffusion.nowhere", ["line 1: ModuleNotFoundError: ", "guided_diffusion.nowhere"]),
    ("def deeper():\n    return 1 / 0\n\ndeeper()\n", ["line 2: ZeroDivisionError: division by zero"]),
    ("import json\n\n\nvalues = json.loads('{')\n", ["line 4: JSONDecodeError: "]),
    ("import torch\n\ntorch.zeros(2) + torch.zeros(3)\n", ["line 3: RuntimeError: The size of tensor a (2)"]),
], ids=["syntax", "raises", "import", "function", "line of its data", "library"])
def test_plugin_that_fails_tells_its_own_error_and_the_line(own, text, words):
    path = own("broken.py", text)
    for _ in range(2):  # nothing is left of the first attempt
        message = refusal(load_plugin, path)
        assert message.startswith(f"--plugin {path}: ") and all(word in message for word in words), message
    own("broken.py", "done = True")
    load_plugin(path)
    assert sys.modules["guided_diffusion_plugin_broken"].done


def test_syntax_error_of_a_module_that_a_plugin_imports_is_told_with_the_line_of_the_import(own, monkeypatch, tmp_path):
    own("part_of_plugin.py", "\n\n\n\n\ndef f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = own("whole.py", "x = 1\nimport part_of_plugin\n")
    message = refusal(load_plugin, path)
    assert message.startswith(f"--plugin {path}: line 2: SyntaxError: ") and "part_of_plugin.py, line 6" in message


def test_plugin_is_run_once_and_several_may_be_given(own):
    first = own("first.py", "import builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1\n")
    second = own("second.py", NETWORK)
    try:
        load_plugins(f"{first},{second}")
        load_plugins(first)
        import builtins
        assert builtins.runs == 1 and "plain" in NETWORKS
    finally:
        del builtins.runs


def test_plugin_may_not_take_the_name_of_an_entry_of_the_package(own):
    path = own("second.py", NETWORK.replace('"plain"', '"unet"'))
    message = refusal(load_plugin, path)
    assert message.startswith("network unet: is in ") and f"and again in {path}; rename one" in message
    assert "networks/unet.py" in message.replace("\\", "/")


def test_plugin_may_not_take_the_name_of_another_flag(own):
    load_plugin(own("clash.py", NETWORK.replace("plain_width", "lr")))
    assert refusal(list, FLAGS) == (f"--lr: is declared in {sys.modules['guided_diffusion_plugin_clash'].__file__}, but"
                                    f" is another flag already; rename it there")


def test_flags_of_two_tables_that_differ_are_refused_with_both_files(own):
    load_plugin(own("clash.py", NETWORK.replace("plain_width", "latent_dim")))
    message = refusal(parse_flags, "training", "", [])
    assert message.startswith("--latent_dim: is a flag in ") and message.endswith("clash.py; rename one")
    assert "methods/cimd.py, and another one in" in message.replace("\\", "/")


# ---- on the command line ----

@pytest.mark.parametrize("job", ["training", "sampling"])
def test_entry_of_a_plugin_is_in_the_help_and_its_flag_chooses_it(own, capsys, job):
    path = own("mine.py", NETWORK)
    with pytest.raises(SystemExit):
        parse_flags(job, "", ["--plugin", path, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "plain: two convolutions" in shown and "--plain_width" in shown and "channels of the hidden layer" in shown
    args, given = parse_flags(job, "", ["--plugin", path, "--network", "plain", "--plain_width", "5"])
    assert (args.network, args.plain_width) == ("plain", 5) and given.keys() == {"plugin", "network", "plain_width"}
    network = NETWORKS[args.network](args, 1, 2)
    assert network.first.weight.shape == (5, 5, 3, 3) and network.last.weight.shape == (2, 5, 3, 3)


def test_without_its_plugin_neither_an_entry_nor_its_flag_is_known(own):
    own("mine.py", NETWORK)
    assert "invalid choice: 'plain'" in refusal(parse_flags, "training", "", ["--network", "plain"])
    assert "unknown flag --plain_width" in refusal(parse_flags, "training", "", ["--plain_width", "5"])


def test_flag_of_an_entry_that_is_not_chosen_is_refused_by_name(own):
    path = own("mine.py", NETWORK)
    words = ["--plugin", path, "--plain_width", "5"]
    assert refusal(parse_flags, "training", "", words) == (
        "--plain_width 5: is a flag of --network plain, but --network is unet; leave it away, or choose another"
        " --network")
    assert refusal(parse_flags, "training", "", ["--plugin", path, "--network", "plain", "--num_res_blocks", "3"]) == (
        "--num_res_blocks 3: is a flag of --network unet, but --network is plain; leave it away, or choose another"
        " --network")
    args, given = parse_flags("training", "", ["--plugin", path, "--plain_width", "8"])  # its default changes nothing
    settle(args, given)
    assert args.network == "unet"


def test_broken_plugin_ends_a_command_with_one_line(own, run, tmp_path):
    path = own("broken.py", "\nraise ValueError('no such colour')\n")
    for script in (TRAIN, SAMPLE):
        refused(run(script, "--plugin", path), f"--plugin {path}: line 2: ValueError: no such colour")
        refused(run(script, "--plugin", "gone.py"), "--plugin gone.py: no such file")
    assert not (tmp_path / "results").exists()


def test_entry_of_a_plugin_that_is_not_there_is_missed_by_name(run, make_cases, trained, tmp_path):
    """tests/whole/test_extending.py trains and draws with entries of plugins."""
    shutil.copytree(trained, tmp_path / "model")
    checkpoint.save_flags(tmp_path / "model", {**MODEL, "network": "plain"})
    result = run("segmentation_sample.py", "--data_dir", make_cases(tmp_path / "data"), "--model_path",
                 tmp_path / "model" / "savedmodel.pt", "--results_dir", tmp_path / "out")
    assert result.code == 2 and result.err.count("\n") == 1
    said = re.search(r"model/flags.json: network 'plain': must be one of (.*), or one that --plugin FILE brings",
                     result.err)
    assert {"unet", "conv_unet"} <= set(said[1].split(", "))
    assert not (tmp_path / "out").exists()
