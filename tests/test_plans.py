"Plans: what an experiment would do, told without doing it"

import math, sys
from pathlib import Path
import nbformat
import pandas as pd
import pytest
from rg_tickets import notebooks, plans
from rg_tickets.runs import Spec
from rg_tickets.tasks import images
from test_experiments import command

PARAMETERS = 'scale: str = "smoke"  # how much\nfolder: str = "runs/two"  # where everything goes\nseeds: int = 2  # repetitions\ndata: str = "data"  # folder of data sets\n'
SETUP = """from pathlib import Path
from rg_tickets.notebooks import declared
given = declared("two", globals())
from rg_tickets.basics import lookup
from rg_tickets.runs import Spec, grid, trajectories, writable
from rg_tickets.studies import crossings, transfers
base = lookup(scale, {"smoke": Spec(width=4, rounds=3, rewind="4it", n_train=320, n_test=100, recipe=dict(epochs=2, batch_size=32))}, "scale")
specs = grid(base, task=["digits8", "mnist5k"], seed=range(seeds))
todo = crossings(specs, n=[1, 3])
"""


@pytest.fixture
def two(monkeypatch, tmp_path):
    "An experiment of several stages, given by its cells after the set-up; run in an empty folder"
    monkeypatch.chdir(tmp_path)

    def make(*cells):
        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(o) for o in (PARAMETERS, SETUP, *cells)]
        )
        book.cells[0].metadata["tags"] = ["parameters"]
        monkeypatch.setattr(notebooks, "notebook", lambda name: book)
        return lambda **given: plans.work_of("two", given)

    yield make
    assert not any(tmp_path.iterdir()), "something was written"


def test_two_stages(two):
    work = two(
        'folder = writable(folder)\nflow = trajectories(specs, folder)\nflow.frame.to_csv(folder / "flow.csv")\nframe = transfers(todo, folder, root=data)\nframe.to_csv(folder / "all.csv")',
        'import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot(flow.frame.t)\nfig.savefig(folder / "flow.png")',
        '(folder / "verdict.txt").write_text("nothing")',
    )()
    assert len(work.runs) == 4 and len(work.crossings) == 2 * 2 * (1 + 2 * 4) and not work.remarks
    rows = pd.DataFrame([plans._row(o, {}, {}) for o in [*work.runs, *work.crossings]])
    assert set(rows.per_epoch) == {10} and set(rows[rows.kind == "run"].steps) == {4 + 4 * 16}
    assert rows.groupby("kind").steps.first().to_dict() == dict(
        dense=0, layerwise=16, own=0, run=68, transferred=16, uniform=16
    )


def test_transfers_alone_bring_their_runs(two):
    work = two("frame = transfers(todo, writable(folder))")(seeds=1)
    assert len(work.runs) == 2 and len(work.crossings) == 18


def test_loops_and_helpers(two):
    work = two(
        "flows = {}\nfor s in specs: flows[s.id] = trajectories([s], folder)",
        "def again(o): return transfers(o, folder)\nrest = [again([c]) for c in todo[:3]]\nprint(rest[0].metric)",
    )()
    assert len(work.runs) == 4 and len(work.crossings) == 3


def test_runs_that_depend_on_results(two):
    work = two(
        "flow = trajectories(specs, folder)",
        "best = int(flow.frame.n.max())\nmore = transfers(crossings(specs, n=[best]), folder)",
    )()
    assert len(work.runs) == 4 and not work.crossings
    assert [o.partition(": ")[2] for o in work.remarks] == [
        "best = int(flow.frame.n.max())",
        "more = transfers(crossings(specs, n=[best]), folder)",
    ]


def test_a_mistake_is_told_as_when_it_is_run(two):
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        two("trajectories(specs, folder)")(scale="smok")
    with pytest.raises(plans.CannotPlan, match="name 'spex' is not defined"):
        two("trajectories(spex, folder)")()
    with pytest.raises(ValueError, match="prunes 3 times"):
        two("trajectories(specs, folder)", "transfers(crossings(specs, n=[4]), folder)")()


def test_no_runs_at_all(two):
    work = two("x = 1")()
    assert not work.runs and "No run of it is known" in str(plans.plan_of("two", seconds=0))


def hand(n, batch, epochs, rounds):
    return (rounds + 1) * epochs * (n // batch)


@pytest.mark.parametrize(
    "scale, expected",
    [
        ("smoke", hand(1297, 64, 2, 3)),
        # 18 of the 19 trainings begin at epoch 9, where rewind_lt goes back to
        ("paper", hand(45000, 256, 182, 18) - 18 * 9 * (45000 // 256)),
    ],
)
def test_resnet_imp_by_hand(scale, expected, tmp_path, monkeypatch):
    "Steps, weights and bytes as counted by hand; no file is opened for reading data, none is written"
    monkeypatch.chdir(tmp_path)
    for name in ("embedded", "_from_folder", "_from_folders"):
        monkeypatch.setattr(images, name, lambda *a, **k: pytest.fail("data were read"))
    plan = plans.plan_of("resnet_imp", dict(scale=scale), seconds=2)
    frame = plan.frame.set_index(["control", "seed"])
    before = 9 * (45000 // 256) if scale == "paper" else 0  # to the weights that rewind_lt prunes
    assert frame.loc[("imp", 0), "steps"] == expected
    assert frame.loc[("untrained", 1), "steps"] == before
    if scale == "paper":
        assert len(frame) == 12 and frame.loc[("oneshot", 2), "steps"] == 182 * (45000 // 256)
        assert set(frame.prunable) == {23_445_504} and set(frame.weights) == {
            23_445_504 + 3 * 64 * 9 + 2 * 26_560 + 2048 * 10 + 10
        }  # convolutions, the first apart; scale and shift of 26,560 channels; classifier
        flops = plan.measured[next(iter(plan.measured))][1].flops
        assert flops == pytest.approx(
            3 * 2 * 1.2977e9, rel=0.01
        )  # 1.30 GMAC forward, twice that backward
    for line in str(plan).splitlines():
        assert len(line) <= 100, line
    assert not any(tmp_path.iterdir())


def test_cv_lth_counts():
    assert (
        plans.size(Spec(task="cifar10", model="resnet50", stem="cifar", preset="cv_lth")).prunable
        == 23_445_504
    )
    assert (
        plans.size(
            Spec(task="imagenet/moco", model="resnet50", preset="cv_lth", options=dict(queue=65536))
        ).prunable
        == 23_445_504
    )
    assert (
        plans.size(Spec(task="squad", model="bert-base-uncased", preset="bert_tickets")).prunable
        == 85_524_480
    )


def test_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        "rg-tickets run resnet_imp --scale smoke --dry-run --tflops 50 -o plan.csv".split(),
    )
    from rg_tickets import cli

    with pytest.raises(SystemExit) as e:
        cli.main()
    out = capsys.readouterr().out
    assert (
        not e.value.code
        and "GPU-hours at 50 TFLOP/s" in out
        and [p.name for p in tmp_path.iterdir()] == ["plan.csv"]
    )
    assert pd.read_csv("plan.csv").steps.tolist() == [hand(1297, 64, 2, 3)] * 2 + [0, 0]


@pytest.mark.parametrize(
    "words, says",
    [
        ("run resnet_inp --dry-run", "did you mean 'resnet_imp'?"),
        ("run resnet_imp --scale papre --dry-run", "did you mean 'paper'?"),
        ("run resnet_imp --dry-run --tflops 0", "above 0"),
        ("run resnet_imp -o plan.csv", "add --dry-run"),
    ],
)
def test_command_refuses(words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines = command(words.split(), capsys, monkeypatch)
    assert code == 2 and len(lines) == 1 and says in lines[0] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", notebooks.experiments())
@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_every_experiment_has_a_plan(name, scale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plans.plan_of(name, dict(scale=scale), seconds=0)
    assert len(plan.frame) and not plan.work.others and max(map(len, str(plan).splitlines())) <= 100
    assert not any(tmp_path.iterdir())
