"""The notebook in docs/ runs from top to bottom in a Jupyter kernel, and is kept as it ran."""

import re

import nbformat
import pytest
from helpers.files import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "ensembles.ipynb"
# in the place of the notebook's parameters: a training of a moment
QUICK = "steps, num_cases, num_ensemble = 3, 16, 4"


@pytest.fixture
def book():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs(book):
    return [output for cell in code_cells(book) for output in cell.outputs]


def pictures(book):
    return [output.data["image/png"] for output in outputs(book) if "image/png" in output.get("data", {})]


def text(book):
    return "".join(output.get("text", "") for output in outputs(book))


def assigned(source):
    return set(re.findall(r"\w+", re.sub(r"=.*", "", source)))


@pytest.fixture
def executed(book, environment, monkeypatch, tmp_path):
    """execute(book) runs all cells in a kernel of its own, from docs/ of a copy of what they read."""
    for name in ("data", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    # nothing of the user's own Jupyter is read or written, and pictures go into the notebook whatever is set outside
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
        environment[name] = str(tmp_path / "jupyter")
    environment.pop("MPLBACKEND", None)
    environment.pop("DISPLAY", None)

    def execute(book):
        for cell in code_cells(book):
            cell.outputs, cell.execution_count = [], None
        client = NotebookClient(book, timeout=240, kernel_name="python3", record_timing=False,
                                resources={"metadata": {"path": str(tmp_path / "docs")}})
        client.execute(env=environment)  # raises CellExecutionError where a cell does
        return book

    return execute


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom_and_draws_its_pictures(book, executed, tmp_path):
    kept = len(pictures(book))
    [parameters] = [cell for cell in code_cells(book) if "parameters" in cell.metadata.get("tags", [])]
    assert assigned(parameters.source) == assigned(QUICK)
    parameters.source = QUICK
    executed(book)
    assert all(cell.execution_count for cell in code_cells(book))
    assert len(pictures(book)) == kept and len(set(pictures(book))) == kept
    assert "phantom-000006: 4 masks (128, 128), 4 raters" in text(book)
    results = tmp_path / "results" / "notebook"
    assert (results / "savedmodel000003.pt").is_file()
    assert len(list((results / "saved").glob("phantom-000006_output*.png"))) == 4
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "scripts", "docs", "results", "jupyter"}


def test_the_notebook_is_kept_as_one_run_that_names_no_machine(book):
    assert [cell.execution_count for cell in code_cells(book)] == list(range(1, len(code_cells(book)) + 1))
    assert len(pictures(book)) >= 7 and not any(output.output_type == "error" for output in outputs(book))
    assert not any(output.get("name") == "stderr" for output in outputs(book))
    assert not any("execution" in cell.metadata for cell in book.cells)
    assert set(book.metadata) == {"kernelspec", "language_info"} and set(book.metadata.language_info) == {"name"}
    shown = text(book) + "".join(output.data.get("text/plain", "") for output in outputs(book) if "data" in output)
    assert not re.search(r"(?<![\w.])[/~][\w.-]+/|[A-Za-z]:\\", shown)  # no path from the root of a disk
    assert NOTEBOOK.stat().st_size < 1_500_000
