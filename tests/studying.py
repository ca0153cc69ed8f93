"A study for real, as small as can be, and what must be true of it after whatever was done to it"

import concurrent.futures as futures, hashlib, io, json, time
from pathlib import Path
import nbformat
import pandas as pd
import pytest
from rg_tickets import batches, conduct
from rg_tickets.batches import Kept, Step, Study
from rg_tickets.executors import Team
from rg_tickets.tickets import Ticket

TINY = dict(
    tasks=["digits8"],
    controls=["imp"],
    seeds=2,
    rounds=2,
    width=4,
    n_train=64,
    epochs=1,
    device="cpu",
)


class Here(futures.Executor):
    "At once, in this process"

    def submit(self, function, *args):
        future = futures.Future()
        try:
            future.set_result(function(*args))
        except Exception as e:
            future.set_exception(e)
        return future


def here():
    return Team(Here(), 1, "this process")


TASKS = [["digits8"], ["digits8/permuted"]]
MANY = Study(
    "many",
    (
        Step(
            "find",
            "resnet_imp",
            {k: v for k, v in TINY.items() if k != "tasks"} | dict(epochs=30, jobs=1),
            dict(tasks=TASKS),
        ),
        Step("tell", "report", after=("find",), folder="."),
    ),
)


def written(study, path):
    "The study as a file"
    steps = [
        dict(
            name=s.name,
            experiment=s.experiment,
            parameters=s.parameters,
            grid=s.grid,
            needs=list(s.needs),
            after=list(s.after),
            **({"folder": s.folder} if s.folder else {}),
        )
        for s in study.steps
    ]
    path.write_text(json.dumps(dict(study=study.study, steps=steps)))  # JSON is YAML
    return path


def running(folder, alive, patience=600):
    "Wait until a job is in the middle of its runs; its note. `alive` tells whether the study is still at work"
    kept, end = Kept(folder), time.monotonic() + patience
    while time.monotonic() < end and alive():
        for job in kept.jobs() if (folder / "study.json").exists() else []:
            note = kept.note(job)
            if (
                note.get("state") == "running"
                and job.experiment != "report"
                and 0.3 < kept.at(job)[0] < kept.at(job)[1] - 0.5
            ):
                return note
        time.sleep(0.02)
    raise AssertionError("the study ended, or nothing was ever running")


def whole(folder, study):
    "All is there, valid, and nothing half written"
    table = batches.status(folder)
    assert set(table.state) == {"done"}, table.to_string()
    for job in study.jobs():
        nbformat.validate(nbformat.read(folder / job.id / "notebook.ipynb", 4))
        for p in (folder / job.id).glob("*/ticket.safetensors"):
            assert (
                len(Ticket.load(p).rounds) == 3
                and len(pd.read_csv(p.parent / "rounds.csv")) == 3
                and not (p.parent / "state.safetensors").exists()
            )
    assert len(list(folder.glob("*/*/ticket.safetensors"))) == 4
    assert not [p for p in folder.rglob("*") if ".tmp" in p.name or p.name == ".notebook.ipynb"]


def digests(folder):
    return {
        p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.glob("*/*/*")
        if p.name in ("ticket.safetensors", "rounds.csv", "flow.csv")
    }


def complete_runs(folder):
    "Tickets of runs that have ended, and when they were written"
    done = lambda home: (
        (home / "progress.json").exists()
        and json.loads((home / "progress.json").read_text())["done"]
    )
    return {
        p: p.stat().st_mtime_ns for p in folder.glob("*/*/ticket.safetensors") if done(p.parent)
    }


def alive_kernels(folder):
    "Processes that work below a folder"
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [p] if str(folder).encode() in p.read_bytes() else []
        except OSError:
            pass
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The same study, left alone"
    folder = tmp_path_factory.mktemp("alone") / "many"
    conduct.conduct(MANY, folder, here(), out=io.StringIO())
    return digests(folder)
