"Experiments as a user meets them: through `notebooks.run`, plain papermill and the command line; and the user's own network and data"

import json, os, subprocess, sys
from importlib.resources import files
from pathlib import Path
import nbformat
import numpy as np
import papermill
import pandas as pd
import pytest
import torch
from PIL import Image
from test_voc import OPTIONS, root as voc
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from rg_tickets import cli, notebooks, runs
from rg_tickets.imp import imp
from rg_tickets.studies import crossings, transfers
from rg_tickets.tasks.core import Task
from rg_tickets.tickets import Ticket
from rg_tickets.train import Recipe
from rg_tickets.transfer import gaps


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "The first experiment, at the scale of its defaults"
    folder = tmp_path_factory.mktemp("smoke") / "resnet_imp"
    notebooks.run("resnet_imp", folder, dict(jobs=1))
    return folder


def test_leaves_what_it_promises(smoke):
    for name in (
        "notebook.ipynb",
        "flow.csv",
        "exponents.csv",
        "flow.png",
        "exponents.png",
        "verdict.txt",
    ):
        assert (smoke / name).stat().st_size, name
    plan = json.loads((smoke / "plan.json").read_text())
    assert len(plan) == 4 and {p.parent.name for p in smoke.glob("*/ticket.safetensors")} == {
        r["id"] for r in plan
    }
    for r in plan:
        ticket = Ticket.load(smoke / r["id"] / "ticket.safetensors")
        assert (
            ticket.history.rounds == r["rounds"] == 3
            and len(ticket.rounds) == 4
            and not (smoke / r["id"] / "state.safetensors").exists()
        )
    table = pd.read_csv(smoke / "exponents.csv")
    assert (
        set(table.control) == {"imp", "untrained"}
        and (table.seeds == 2).all()
        and table[["sigma", "low", "high"]].notna().all(axis=None)
    )
    assert (table.low <= table.sigma).all() and (table.sigma <= table.high).all()
    assert (
        pd.read_csv(smoke / "flow.csv").groupby(["control", "seed"]).n.nunique().tolist() == [4] * 4
    )
    assert "digits8" in (smoke / "verdict.txt").read_text()
    done = nbformat.read(smoke / "notebook.ipynb", 4)
    assert not [
        o
        for c in done.cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "error"
    ]
    assert "injected-parameters" in [t for c in done.cells for t in c.metadata.get("tags", [])]
    nbformat.validate(done)
    noted = done.metadata["rg_tickets"]
    assert (
        noted["experiment"] == "resnet_imp"
        and noted["parameters"]
        == dict(jobs=1, folder=str(smoke))
        == done.metadata["papermill"]["parameters"]
    )
    assert (
        noted["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        and noted["hardware"]["cpu"]
        and noted["hardware"]["cores"]
        and noted["commit"] == notebooks.commit()
    )


def test_a_second_call_runs_nothing_anew(smoke):
    tickets = {p: p.stat().st_mtime_ns for p in smoke.glob("*/ticket.safetensors")}
    tables = {
        p: p.read_bytes()
        for p in (*smoke.glob("*.csv"), *smoke.glob("*/*.csv"), smoke / "verdict.txt")
    }
    assert tickets and tables
    notebooks.run("resnet_imp", smoke, dict(jobs=1))
    assert {p: p.stat().st_mtime_ns for p in smoke.glob("*/ticket.safetensors")} == tickets
    assert {p: p.read_bytes() for p in tables} == tables


LEAVES = {
    "resnet_pretrain": ("exponents.csv", "exponents.png"),
    "resnet_transfer": (
        "exponents.csv",
        "transfers.csv",
        "gaps.csv",
        "distances.csv",
        "transfer.png",
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_the_other_studies_at_the_scale_of_their_defaults(name, tmp_path):
    notebooks.run(name, tmp_path, dict(jobs=1))
    for o in ("notebook.ipynb", "flow.csv", "verdict.txt", *LEAVES[name]):
        assert (tmp_path / o).stat().st_size, o
    flow = pd.read_csv(tmp_path / "flow.csv")
    assert {"digits8", "digits8/simclr"} <= set(flow.task) and set(flow.seed) == {0, 1}
    if name == "resnet_pretrain":
        assert {
            json.loads(p.read_text())["prune_type"] for p in tmp_path.glob("*/config.json")
        } == {"pt"} and len(list(tmp_path.glob("*/dense.safetensors"))) == 12
    else:
        table = pd.read_csv(tmp_path / "gaps.csv")
        assert set(table.kind) == {"own", "transferred", "layerwise", "uniform", "dense"} and set(
            zip(table.source, table.target)
        ) >= {("digits8/simclr", "digits8"), ("mnist5k", "digits8"), ("digits8", "mnist5k")}
        assert (table.seeds == 2).all() and table[["score", "gap", "se"]].notna().all(axis=None)


@pytest.mark.parametrize(
    "name, words, says",
    [
        ("resnet_imp", ("rewind=1ep", "prune_type=lt"), "both say what to go back to"),
        ("resnet_imp", ("prune_type=pt_tran",), "did you mean 'pt_trans'?"),
        ("resnet_imp", ("scale=paper", "tasks=cifar11"), "did you mean 'cifar10'?"),
        ("resnet_imp", ("prune_type=rewind_lt",), "the recipe ends at step"),
        ("resnet_imp", ("prune_type=pt_trans",), "say which, source="),
        ("resnet_pretrain", ("tasks=digits8/simcrl",), "did you mean 'simclr'?"),
        ("resnet_pretrain", ("pretrained={'digit8':'w.pth'}",), "did you mean 'digits8'?"),
        ("resnet_transfer", ("at=3",), "prunes 2 times"),
        ("resnet_transfer", ("kinds=ovn,dense",), "lack 'own'"),
    ],
    ids=lambda o: str(o)[:40],
)
def test_what_a_study_refuses(name, words, says, tmp_path, capsys, monkeypatch):
    code, lines = command(["run", name, *words, "-f", str(tmp_path / "f")], capsys, monkeypatch)
    assert code == 2 and len(lines) == 1 and says in lines[0]
    assert not any(tmp_path.iterdir())


def test_a_classifiers_ticket_in_a_segmenter_and_a_detector(voc, tmp_path):
    "The whole way: runs on pictures in folders and on scenes, then every kind of crossing"
    rng = np.random.RandomState(0)
    for part, n in (("train", 2), ("validation", 1)):
        for i in range(12):
            (home := voc / "visda2017" / part / f"c{i:02}").mkdir(parents=True)
            for j in range(n):
                Image.fromarray(rng.randint(0, 256, (36, 34, 3)).astype(np.uint8)).save(
                    home / f"{j}.png"
                )
    base = dict(
        model="cifar_resnet8",
        width=4,
        rounds=1,
        prune=0.5,
        recipe=dict(epochs=1, batch_size=6, lr=0.01),
    )
    source = runs.Spec("visda2017", options=dict(size=32), **base)
    for name, options in OPTIONS.items():
        target = runs.Spec(
            name,
            options=dict(size=32, **({"width": 8} if name == "voc_detection" else {}), **options),
            **base,
        )
        table = gaps(
            transfers(
                crossings([source], [1], [target]),
                tmp_path / "study",
                jobs=1,
                device="cpu",
                root=str(voc),
            )
        )
        assert (
            table.kind.tolist() == ["own", "transferred", "layerwise", "uniform", "dense"]
            and table.score.between(0, 1).all()
            and set(table.target) == {name}
        )
        assert table.density[:4].tolist() == pytest.approx([0.5] * 4, abs=0.01)


@pytest.mark.parametrize(
    "given, says",
    [(dict(sedes=3), "did you mean 'seeds'?"), (dict(rounds="many"), "should be int, not str")],
    ids=["name", "type"],
)
def test_plain_papermill_refuses_too(given, says, tmp_path):
    "papermill itself only warns; the notebook's own check is in its first cell of code"
    source, out = str(files("rg_tickets.experiments") / "resnet_imp.ipynb"), tmp_path / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(
            source,
            str(out),
            dict(given, folder=str(tmp_path / "f")),
            kernel_name="python3",
            progress_bar=False,
        )
    assert says in str(e.value) and says in out.read_text()
    assert not (tmp_path / "f").exists()


def command(words, capsys, monkeypatch):
    "(exit status, lines of stderr) of `rg-tickets words...`, in this process"
    monkeypatch.setattr(sys, "argv", ["rg-tickets", *words])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return e.value.code, [o for o in capsys.readouterr().err.splitlines() if o.strip()]


BEFORE = {  # refused before anything is started
    "parameter": (
        "run resnet_imp sedes=3",
        "unknown parameter of resnet_imp: 'sedes'; did you mean 'seeds'?",
    ),
    "experiment": ("run resnet_inp", "did you mean 'resnet_imp'?"),
    "type": ("run resnet_imp rounds=many", "rounds='many' of resnet_imp should be int"),
    "form": ("run resnet_imp rounds", "not of the form parameter=value"),
    "list": ("list resnet_inp", "did you mean 'resnet_imp'?"),
}
WITHIN = {  # refused by the notebook, before anything is trained
    "task": ("tasks=digit8", "did you mean 'digits8'?"),
    "model": ("model=cifar_resnet9", "did you mean 'cifar_resnet"),
    "rate": ("prune=1.5", "prune rate 1.5 is not in (0, 1)"),
    "no rate": ("prune=0", "prune rate 0 is not in (0, 1)"),
    "seeds": ("seeds=1", "seeds=1 is too few for an interval"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_mistake_is_told_in_one_line(case, capsys, monkeypatch, tmp_path):
    words, says = BEFORE[case]
    monkeypatch.chdir(tmp_path)
    code, lines = command(words.split(), capsys, monkeypatch)
    assert (
        code == 2 and len(lines) == 1 and lines[0].startswith("rg-tickets: ") and says in lines[0]
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[] if c in ("task", "rate", "seeds") else pytest.mark.slow)
        for c in WITHIN
    ],
)
def test_a_wrong_value_is_told_in_one_line(case, capsys, monkeypatch, tmp_path):
    word, says = WITHIN[case]
    code, lines = command(
        ["run", "resnet_imp", word, "-f", str(tmp_path / "f")], capsys, monkeypatch
    )
    assert (
        code == 2 and len(lines) == 1 and lines[0].startswith("rg-tickets: ") and says in lines[0]
    )
    assert not any(tmp_path.iterdir()), "something was begun"


@pytest.mark.parametrize("words", [["run", "resnet_imp"], ["demo"]])
def test_a_folder_that_cannot_be_written(words, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, lines = command([*words, "-f", str(tmp_path / "file" / "runs")], capsys, monkeypatch)
    assert (
        code == 1
        and len(lines) == 1
        and "cannot write to" in lines[0]
        and "Choose a folder you may write to" in lines[0]
    )


def test_the_command_itself():
    "The installed script, in a process of its own"
    script = Path(sys.executable).with_name("rg-tickets")
    done = subprocess.run([script, "run", "resnet_imp", "sedes=3"], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "did you mean 'seeds'?" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
        and not done.stdout
    )


def test_listing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rg-tickets", "list"])
    with pytest.raises(SystemExit) as e:
        cli.main()
    out = capsys.readouterr().out
    assert not e.value.code and all(
        o in out
        for o in (
            "experiments: ",
            "resnet_imp, resnet_pretrain, resnet_transfer",
            "font_greek",
            "cifar_resnet20",
            "untrained",
        )
    )


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(prune=0), "not in"),
        (dict(prune=1.5), "not in"),
        (dict(model="cifar_resnet9"), "unknown model"),
        (dict(rewind="5its"), "unknown rewind policy"),
        (dict(recipe=dict(lr=0)), "lr must be positive"),
    ],
)
def test_impossible_specs_start_nothing(wrong, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        runs.trajectories([runs.Spec(**wrong)], tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_more_rounds_than_a_history_holds(tmp_path):
    "Refused before the first step, not after the 254th round"
    spec = runs.Spec(rounds=300, width=8, n_train=100, n_test=50)
    with pytest.raises(ValueError, match="rounds=300: a history holds at most 254"):
        runs.execute(spec, tmp_path, device="cpu")
    assert not (tmp_path / spec.id / "ticket.safetensors").exists()


def test_density_zero(tmp_path):
    "Five fifths of the weights are all of them"
    spec = runs.Spec(schedule="arithmetic", prune=0.2, rounds=5, width=8, n_train=100, n_test=50)
    with pytest.raises(
        ValueError,
        match="would leave none of the .* weights in round 5: a density of 0 is no network",
    ):
        runs.execute(spec, tmp_path, device="cpu")
    assert not (tmp_path / spec.id / "ticket.safetensors").exists()


class Own(nn.Module):
    "A user's network, which knows nothing of this package"

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.out = (
            nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 16)),
            nn.Dropout(0.1),
            nn.Linear(16, 1),
        )

    def forward(self, x):
        return self.out(self.drop(self.body(x).relu()))[:, 0]


def own_run(noise, **kwargs):
    "Pruning the user's network on the user's loaders; `noise` is what else happened to the global generators"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 10, generator=g)
    y = x[:, 0] - x[:, 1] ** 2
    train = DataLoader(TensorDataset(x[:200], y[:200]), batch_size=20, shuffle=True, num_workers=0)
    test = DataLoader(TensorDataset(x[200:], y[200:]), batch_size=50, num_workers=0)
    torch.manual_seed(7)
    network = Own()
    torch.manual_seed(noise)
    task = Task.from_loaders(
        train,
        test,
        loss=nn.functional.mse_loss,
        metrics={"fit": lambda o, t: 1 - ((o - t) ** 2).mean().item() / t.var().item()},
    )
    rounds = list(
        imp(task, network, rounds=4, recipe=Recipe(epochs=5, lr=0.02), device="cpu", **kwargs)
    )
    return rounds, network


def test_bring_your_own_network_and_data(tmp_path):
    (a, net), (b, again) = own_run(1, folder=tmp_path), own_run(2)
    assert a == b and all(
        torch.equal(x, y) for x, y in zip(net.state_dict().values(), again.state_dict().values())
    )
    assert a[0].metrics["fit"] > 0.3 and [r.n for r in a] == list(range(5))
    assert {o["tensor"] for o in a[0].tensors} == {
        "body.0.weight",
        "body.2.weight",
    }  # the last linear layer is the head
    assert a[-1].density == pytest.approx(0.8**4, abs=2e-3)
    masks = Ticket.load(tmp_path / "ticket.safetensors").history.mask()
    for k, m in masks.items():
        assert torch.equal(net.state_dict()[k] != 0, m)
