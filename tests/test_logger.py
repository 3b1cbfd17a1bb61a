"""Numbers and lines of a run reach the terminal and its files, and only from rank 0."""

import csv
import json
import os
import sys

import pytest

from guided_diffusion import logger
from guided_diffusion.logger import Logger


@pytest.fixture(autouse=True)
def terminal_only_afterwards():
    yield
    logger.configure()


def rows(folder):
    with open(folder / "progress.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_lines_reach_the_terminal_and_the_log_file(tmp_path, capsys):
    log = Logger(tmp_path / "run" / "1")
    log.log("hello", 3, "größer")
    assert (tmp_path / "run" / "1" / "log.txt").read_text(encoding="utf-8") == "hello 3 größer\n"
    assert capsys.readouterr().out == "hello 3 größer\n"
    log.close()


def test_a_second_run_appends_to_the_files_of_the_first(tmp_path):
    for step in (1, 2):
        log = Logger(tmp_path)
        log.log("run", step)
        log.dump({"loss": step / 2}, step)
        log.close()
    text = (tmp_path / "log.txt").read_text()
    assert text.index("run 1") < text.index("run 2")
    assert [row["loss"] for row in rows(tmp_path)] == ["0.5", "1.0"]
    assert len((tmp_path / "progress.json").read_text().splitlines()) == 2


def test_numbers_are_written_as_json_lines_and_shown_as_a_table(tmp_path, capsys):
    log = Logger(tmp_path)
    log.dump({"loss": 0.123456789, "images": 5}, 10)
    log.dump({"loss": 2.0}, 20)
    first, second = map(json.loads, (tmp_path / "progress.json").read_text().splitlines())
    assert first["step"] == 10 and first["loss"] == 0.123456789 and first["images"] == 5 and first["seconds"] >= 0
    assert second["step"] == 20 and second["loss"] == 2.0
    out = capsys.readouterr().out
    assert "0.1235" in out and out.count("| step") == 2
    assert "0.1235" in (tmp_path / "log.txt").read_text()
    log.close()


def test_csv_gains_a_column_that_appears_later_and_keeps_its_rows(tmp_path):
    log = Logger(tmp_path)
    log.dump({"loss": 1.0}, 1)
    log.dump({"loss": 2.0, "kl": 0.25}, 2)
    log.dump({"kl": 0.5}, 3)
    log.dump({"loss": 4.0, "kl": 1.0}, 4)
    got = rows(tmp_path)
    assert [row["step"] for row in got] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in got] == ["1.0", "2.0", "", "4.0"]
    assert [row["kl"] for row in got] == ["", "0.25", "0.5", "1.0"]
    assert list(got[0]) == ["step", "seconds", "loss", "kl"]
    log.close()


def test_nothing_is_written_or_printed_when_disabled(tmp_path, capsys):
    log = Logger(tmp_path / "run", enabled=False)
    log.log("hello")
    log.dump({"loss": 1.0}, 1)
    log.close()
    assert not os.listdir(tmp_path) and capsys.readouterr().out == ""


def test_without_a_folder_lines_go_to_the_terminal_only(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger.configure()
    logger.log("hello")
    logger.dump({"loss": 1.0}, 1)
    out = capsys.readouterr().out
    assert "hello" in out and "loss" in out and not os.listdir(tmp_path)


def test_closing_ends_the_files_and_keeps_the_terminal(tmp_path, capsys):
    logger.configure(tmp_path)
    logger.log("before")
    logger.close()
    logger.log("after")
    assert (tmp_path / "log.txt").read_text() == "before\n"
    assert capsys.readouterr().out == "before\nafter\n"
    logger.configure(tmp_path, enabled=False)
    logger.close()
    logger.log("from another rank")
    assert capsys.readouterr().out == ""


def test_tensorboard_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = Logger(tmp_path)
    log.dump({"loss": 1.0}, 1)
    log.close()
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "progress.csv", "progress.json"]
