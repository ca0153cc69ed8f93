"Runs and their folders: files that are whole at any time, names, plain numbers, every combination of controls"

import hashlib, io, itertools, json, subprocess, sys
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from killing import posix
from playing import play
from rg_tickets import notebooks
from rg_tickets.batches import Kept, Step, Study
from rg_tickets.imp import CONTROLS
from rg_tickets.progress import note, plan, watching
from rg_tickets.runs import execute, grid, trajectories, write_csv, write_figure, write_text
from rg_tickets.specs import Spec, check
from rg_tickets.stretching import Bridge, Stretching
from rg_tickets.studies import Crossing, transfers

slow = pytest.mark.slow
SMALL = Spec(width=4, rounds=2, prune=0.5, n_train=64, n_test=50, recipe=dict(epochs=1))
THERE = replace(SMALL, task="mnist5k")

# Files that another process may read


READER = """
import sys
from pathlib import Path
folder, names = Path(sys.argv[1]), sys.argv[2:]
whole, reads, torn = {name: (folder / name).stat().st_size for name in names}, 0, []
print("begun", flush=True)
while not (folder / "over").exists():
    for name, size in whole.items():
        reads += 1
        if len((folder / name).read_bytes()) < 0.9 * size:
            torn.append(name)
print(reads, len(torn))
"""


def test_a_reader_never_sees_a_torn_file(tmp_path):
    "A finished folder is started again, three times, while another process reads what lies in it"
    given = dict(jobs=1, seeds=2, rounds=2, n_train=64, epochs=1, width=4)
    play("resnet_imp", tmp_path, **given)
    names = [p.name for p in tmp_path.iterdir() if p.suffix in (".csv", ".txt", ".png", ".json")]
    assert len(names) == 6
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    reader = [sys.executable, "-c", READER, tmp_path, *names]
    reader = subprocess.Popen(reader, stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "begun\n"
    for _ in range(3):
        play("resnet_imp", tmp_path, **given)
    (tmp_path / "over").touch()
    reads, torn = map(int, reader.communicate(timeout=60)[0].split())
    assert reads > 1000 and torn == 0
    assert all((tmp_path / name).stat().st_mtime_ns > before[name] for name in names), "not written"


FULL = """
import resource, sys
import pandas as pd
from rg_tickets.runs import write_csv, write_text
path = sys.argv[1]
write_csv(path, pd.DataFrame(dict(a=range(10))))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as on a disk that is nearly full
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for write in (lambda: write_csv(path, pd.DataFrame(dict(a=range(100_000)))), lambda: write_text(path, "x" * 10**6)):
    try:
        write()
    except OSError as e:
        print(e)
"""


@posix
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "table.csv"
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"could not write {path}") == 2, done.stdout
    assert pd.read_csv(path).a.tolist() == list(range(10))
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_tables_texts_and_figures(tmp_path):
    import matplotlib.pyplot as plt

    write_csv(tmp_path / "a.csv", pd.DataFrame(dict(x=[1 / 3]), index=["r"]), index=True, digits=3)
    assert (tmp_path / "a.csv").read_text() == ",x\nr,0.333\n"
    write_text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\n".encode()
    for ending in ("png", "pdf", "svg"):
        write_figure(tmp_path / f"a.{ending}", plt.figure())
        assert (tmp_path / f"a.{ending}").stat().st_size > 100
    plt.close("all")


# Names


def test_names_have_64_bits():
    way = Crossing(SMALL, THERE, 1)
    deep = Stretching(SMALL, replace(SMALL, model="cifar_resnet14"))
    job = Study("s", (Step("find", "resnet_imp", {}, dict(prune=[0.1, 0.2])),)).jobs()[0]
    for name in (SMALL.id, way.id, deep.id, Bridge(deep).id, job.id):
        assert len(name.rpartition("-")[2]) == 16 and int(name.rpartition("-")[2], 16) >= 0
    assert job.id.startswith("find-prune=0.1-")
    assert len({Spec(prune=0.2 + i * 1e-6).id for i in range(10_000)}) == 10_000


def test_a_name_is_of_the_facts_that_differ_from_defaults():
    "As in earlier versions, with more digits: the hash is that of the same text"
    spec = Spec(width=8, rounds=2, recipe=dict(epochs=1), n_train=400, n_test=200)
    facts = dict(n_test=200, n_train=400, recipe=dict(epochs=1), rounds=2, width=8)
    digits = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert spec.id == f"digits8-imp-seed0-{digits[:16]}"
    assert spec.named(8) == "digits8-imp-seed0-7b79c7e9"  # as version 0.1 called it


def test_folders_of_an_earlier_version_are_used(tmp_path):
    "They get the longer name; nothing in them is made again"
    todo = [Crossing(SMALL, THERE, 1), Crossing(THERE, THERE, 1, "own")]
    frame = transfers(todo, tmp_path, jobs=1, device="cpu")
    files = sorted([*tmp_path.glob("*/ticket.safetensors"), *tmp_path.glob("*/transfer.csv")])
    stamps = {p.name + p.parent.name: p.stat().st_mtime_ns for p in files}
    for o in (SMALL, THERE, *todo):
        (tmp_path / o.id).rename(tmp_path / o.named(8))
    again = transfers(todo, tmp_path, jobs=1, device="cpu")
    pd.testing.assert_frame_equal(again, frame)
    found = sorted([*tmp_path.glob("*/ticket.safetensors"), *tmp_path.glob("*/transfer.csv")])
    assert {p.name + p.parent.name: p.stat().st_mtime_ns for p in found} == stamps
    assert not (tmp_path / SMALL.named(8)).exists()


def test_a_new_folder_is_preferred_to_an_old_one(tmp_path):
    execute(SMALL, tmp_path, device="cpu")
    (tmp_path / SMALL.named(8)).mkdir()
    execute(SMALL, tmp_path, device="cpu")
    assert (tmp_path / SMALL.named(8)).exists() and (tmp_path / SMALL.id / "flow.csv").exists()


def test_jobs_of_an_earlier_version(tmp_path):
    "A grid's folder is found by its short name, with the runs in it"
    study = Study("s", (Step("find", "resnet_imp", {}, dict(prune=[0.1, 0.2])),))
    job = study.jobs()[0]
    assert job.old == "find-" + job.id.rpartition("-")[2][:6]
    (tmp_path / job.old / "a-run").mkdir(parents=True)
    Kept(tmp_path).keep(study, study.jobs())
    assert (tmp_path / job.id / "a-run").is_dir() and not (tmp_path / job.old).exists()


# Plain numbers

NUMBERS = [
    dict(seed=np.int64(3)),
    dict(seed=torch.tensor(3)),
    dict(seed=np.uint8(3)),
    dict(prune=np.float64(0.25)),
    dict(prune=np.float32(0.25)),
    dict(rounds=np.int32(4)),
    dict(n_train=np.int64(70), n_test=torch.tensor(50)),
    dict(recipe=dict(epochs=np.int64(2), lr=np.float32(0.5))),
    dict(options=dict(size=np.int64(8))),
]


@pytest.mark.parametrize("given", NUMBERS, ids=str)
def test_numbers_of_any_library(given):
    plain = json.loads(json.dumps(given, default=lambda o: o.item()))
    assert replace(SMALL, **given).id == replace(SMALL, **plain).id
    check(replace(SMALL, **given))


def test_grids_of_numpy(tmp_path):
    specs = grid(SMALL, seed=np.arange(2), prune=np.array([0.5]))
    assert [s.seed for s in specs] == [0, 1] and all(type(s.seed) is int for s in specs)
    flow = trajectories(specs, tmp_path, jobs=1, device="cpu")
    assert set(flow.frame.seed) == {0, 1}


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(seed=1.2), "seed must be a whole number, not 1.2"),
        (dict(seed=np.float64(1.7)), "seed must be a whole number, not 1.7"),
        (dict(seed=True), "seed must be a whole number, not True"),
        (dict(seed="1"), "seed must be a whole number, not '1'"),
        (dict(seed=None), "seed must be a whole number, not None"),
        (dict(rounds=2.5), "rounds must be a whole number, not 2.5"),
        (dict(n_train=0), "n_train must be a whole number, 1 or more, not 0"),
        (dict(width=-4), "width must be a whole number, 1 or more, not -4"),
        (dict(task=3), "task must be a name, not 3"),
        (dict(model=None), "model must be a name, not None"),
    ],
    ids=str,
)
def test_wrong_kinds_are_refused_when_a_spec_is_made(given, says):
    with pytest.raises(ValueError, match=says):
        Spec(**given)


# Every combination of controls

OTHERS = [c for c in CONTROLS if c != "imp"]
SUBSETS = [list(o) for n in range(len(OTHERS) + 1) for o in itertools.combinations(OTHERS, n)]
FEW = [[], ["untrained"], ["random"], ["shuffled", "reinit"], OTHERS]
PLAIN = dict(jobs=1, device="cpu", seeds=2, rounds=2)
WITH_CONTROLS = {
    "resnet_imp": PLAIN | dict(width=4, n_train=64, epochs=1),
    "resnet_pretrain": PLAIN | dict(tasks=["digits8"], n_train=64, epochs=1),
    "bert_imp": PLAIN | dict(tasks=["topic"], variants=["-"], n_train=64, epochs=1),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Folders in which every control of an experiment is run already, made when they are asked for"
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            play(name, made[name], **WITH_CONTROLS[name], controls=["imp", *OTHERS])
        return made[name]

    return folder


def drawn(name, folder, controls):
    "Start an experiment again with some of the controls; which its tables hold"
    play(name, folder, **WITH_CONTROLS[name], controls=controls)
    assert (folder / "verdict.txt").stat().st_size and (folder / "exponents.png").stat().st_size
    return [set(pd.read_csv(folder / f"{o}.csv").control) for o in ("flow", "exponents")]


def all_drawn(name, folder, subsets):
    wrong = []
    for others in subsets:
        try:
            if drawn(name, folder, ["imp", *others]) != [{"imp", *others}] * 2:
                wrong.append((others, "other controls in the tables"))
        except Exception as e:
            wrong.append((others, f"{type(e).__name__}: {e}"))
    assert not wrong, wrong


def test_some_combinations_of_controls(trained):
    all_drawn("resnet_imp", trained("resnet_imp"), FEW)


@slow
@pytest.mark.parametrize("name", WITH_CONTROLS)
def test_all_combinations_of_controls(name, trained):
    "With the real runs each of the 64 runs through"
    assert len(SUBSETS) == 64
    all_drawn(name, trained(name), SUBSETS)


@pytest.mark.parametrize("name", WITH_CONTROLS)
def test_controls_without_the_real_runs_are_refused(name, tmp_path):
    for others in SUBSETS[1:]:
        with pytest.raises(ValueError, match="lack 'imp'"):
            play(name, tmp_path, **WITH_CONTROLS[name], controls=others)
    with pytest.raises(ValueError, match="is empty"):
        play(name, tmp_path, **WITH_CONTROLS[name], controls=[])
    assert not any(tmp_path.iterdir())


@slow
@pytest.mark.parametrize("others", [o for o in SUBSETS if len(o) in (0, 1, 6)], ids=str)
def test_controls_of_transfers(others, tmp_path_factory):
    "They are run beside the real runs, which are always there"
    folder = tmp_path_factory.getbasetemp() / "resnet_transfer"
    given = dict(PLAIN, n_train=64, epochs=1, sources=["digits8"], targets=["mnist5k"])
    play("resnet_transfer", folder, **given, controls=others)
    flow = pd.read_csv(folder / "flow.csv")
    assert set(flow.control) == {"imp", "untrained", *others}  # the null is shared by all tasks


KINDS = ["layerwise", "uniform", "dense"]


@slow
@pytest.mark.parametrize("name", ["resnet_transfer", "bert_transfer"])
def test_kinds_of_transfers(name, tmp_path_factory):
    "Every choice of what a ticket is compared with"
    folder = tmp_path_factory.getbasetemp() / f"kinds-{name}"
    given = dict(PLAIN, n_train=64)
    given |= dict(others=False) if name == "bert_transfer" else dict(epochs=1)
    for n in range(len(KINDS) + 1):
        for some in itertools.combinations(KINDS, n):
            kinds = ["own", "transferred", *some]
            play(name, folder, **given, kinds=kinds)
            assert set(pd.read_csv(folder / "gaps.csv").kind) == set(kinds)


# What is shown


class Stream(io.StringIO):
    "A stream that is a terminal, or not"

    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


class KernelStream(Stream):
    __module__ = "ipykernel.iostream"


@pytest.mark.parametrize(
    "stream, widgets, term, bars",
    [
        (Stream(True), True, "xterm", True),
        (Stream(True), True, "dumb", False),
        (Stream(False), True, "xterm", False),
        (KernelStream(False), False, "xterm", False),
    ],
    ids=["terminal", "dumb terminal", "pipe", "notebook without widgets"],
)
def test_bars_are_drawn_where_they_can_be_drawn_again(
    stream, widgets, term, bars, tmp_path, monkeypatch
):
    monkeypatch.delenv("RG_TICKETS_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", stream)
    if not widgets:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    runs = [replace(SMALL, seed=s) for s in (0, 1)]
    plan(tmp_path, runs)
    with watching(tmp_path, every=0.05):
        for run in runs:
            (tmp_path / run.id).mkdir()
            note(tmp_path / run.id, 1, 1, 2, run.rounds)
    shown = stream.getvalue()
    assert ("\x1b[A" in shown) == ("\r" in shown) == bars
    assert ("round 0 of 2 done" in shown) == (not bars)
