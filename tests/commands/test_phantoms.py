"""The phantoms' own job: what it writes and what it refuses."""

from pathlib import Path

import pytest

from guided_diffusion.commands.phantoms import main
from guided_diffusion.system import terminal


def test_it_adds_cases_beside_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    main(["--output_dir", str(tmp_path), "--count", "2", "--size", "32", "--num_raters", "3"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "phantom-000000", "phantom-000001"]
    names = sorted(path.name for path in (tmp_path / "phantom-000001").iterdir())
    assert names == ["image_1.jpg", "label0_.jpg", "label1_.jpg", "label2_.jpg", "truth.npz"]


def test_it_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "FIRST", 0)
    main(["--output_dir", str(tmp_path), "--count", "2", "--size", "32"])
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("making phantoms: 2 of 2 cases (100 %)") and out.startswith("2 cases in ")


@pytest.mark.parametrize("flags", [["--count", "0"], ["--size", "100"], ["--num_raters", "0"], ["--seed", "-1"],
                                   ["--output_dir", "file/inside"]])
def test_it_refuses_in_one_line_that_names_the_flag(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", "out", *flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1 and flags[0] in message
    assert not Path("out").exists()
