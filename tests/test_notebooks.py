"Every notebook runs from top to bottom, as `nbdev_test` runs it: cells with a test flag (slow, cuda) only when the option is given"

import os, sys
from pathlib import Path
import pytest
from nbdev import test as nbdev_test
from nbdev.config import get_config

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(o.startswith((".", "_")) for o in p.relative_to(ROOT).parts)
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, request, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path[:])  # basepath is put in front of it
    if path.parent.name == "experiments":
        _experiment(path, tmp_path)
        return
    flags = get_config(path=ROOT).tst_flags.split()
    asked = [f for f in flags if f in ("slow", "cuda") and request.config.getoption(f"--{f}")]
    before = {p for p in (ROOT / "nbs").rglob("*")}
    passed, _ = nbdev_test.test_nb(path, skip_flags=flags, force_flags=asked, basepath=ROOT)
    assert passed, f"{path.name} failed; its traceback is in the captured output"
    left = {p for p in (ROOT / "nbs").rglob("*")} - before
    assert not {p for p in left if "__pycache__" not in p.parts}, "the notebook left files behind"


def _experiment(path, folder):
    "An experiment writes into its folder, so it runs on a copy that lies in a folder of its own"
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    passed, _ = nbdev_test.test_nb(copy, basepath=ROOT)
    assert passed, f"{path.name} failed; its traceback is in the captured output"


def test_a_broken_notebook_fails(tmp_path):
    "The check itself can fail"
    import nbformat

    path = tmp_path / "broken.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")]), path
    )
    assert not nbdev_test.test_nb(path, showerr=False)[0]
