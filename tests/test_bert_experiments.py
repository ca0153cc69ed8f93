"The BERT experiments as a user meets them, at the scale of their defaults: a tiny BERT with random weights, which needs no extra"
import json
import pandas as pd
import pytest
from rg_tickets import notebooks, runs
from rg_tickets.models import berts
from rg_tickets.tickets import Ticket

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def imp(tmp_path_factory):
    "bert_imp at smoke scale, with every variant that changes the protocol"
    folder = tmp_path_factory.mktemp("bert") / "imp"
    notebooks.run("bert_imp", folder, dict(jobs=1, variants=["hard", "head", "arithmetic"]))
    return folder


def test_imp_leaves_what_it_promises(imp):
    for name in ("notebook.ipynb", "flow.csv", "variants.csv", "exponents.csv", "distance.csv", "free.csv", "overlap.csv", "flow.png", "exponents.png", "verdict.txt"): assert (imp / name).stat().st_size, name
    flow, table, varied = (pd.read_csv(imp / f"{o}.csv") for o in ("flow", "exponents", "variants"))
    assert set(flow.task) == {"topic", "mlm"} and set(flow.control) == {"imp", "untrained"} and flow.groupby(["task", "control", "seed"]).n.nunique().eq(3).all()
    assert flow.tensor.nunique() == 2 * 6 + 1  # the matrices of two layers, and the pooler
    assert set(table.by) == {"layer", "role"} and {"query", "key", "value", "attention out", "up", "down", "pooler"} <= set(table.group)
    assert set(varied.task) == {"topic, hard", "topic, head", "topic, arithmetic"}
    assert flow[flow.control == "untrained"].groupby(["seed", "n", "tensor"]).l1.nunique().eq(1).all()  # the null does not know its task
    assert "topic" in (imp / "verdict.txt").read_text() and pd.read_csv(imp / "distance.csv").distance.ge(0).all()


def test_free_theory_of_equal_weights_is_a_fixed_point(imp):
    free = pd.read_csv(imp / "free.csv")
    assert free[free.law == "initial (all alike)"].sigma.abs().max() < 1e-9
    null = pd.read_csv(imp / "flow.csv").query("control == 'untrained' and seed == 0 and task == 'topic'")
    from rg_tickets.flows import Flow, slopes
    measured = slopes(Flow(null), by="layer", window="all").set_index("group").sigma
    exact = free[(free.by == "layer") & (free.law == "as they are")].set_index("group").sigma
    assert (measured - exact[measured.index]).abs().max() < 1e-3  # the empirical law is the null, up to how counts are rounded


def test_overlap_with_the_null(imp):
    o = pd.read_csv(imp / "overlap.csv")
    assert o.common.between(o.density, 1).all() and "topic, hard" in set(o.task) and "topic, arithmetic" not in set(o.task)
    common = o.groupby("task").common.mean()
    assert common["topic, hard"] < common["topic"]  # a larger rate moves the weights further


def test_the_head_that_stays(imp):
    "The quirk of the original: every part goes back but the head, so the rounds of its run differ from round 1 on"
    about = {json.loads((p.parent / "config.json").read_text())["seed"]: Ticket.load(p).about for p in imp.glob("topic-imp-*/ticket.safetensors") if isinstance(Ticket.load(p).about["rewind"], dict)}
    assert set(about) == {0, 1} and all("head" not in a["rewind"]["resets"] and "weights" in a["rewind"]["resets"] for a in about.values())
    flow, varied = pd.read_csv(imp / "flow.csv").query("task == 'topic' and control == 'imp'"), pd.read_csv(imp / "variants.csv").query("task == 'topic, head'")
    l1 = [f.groupby("n").l1.sum() for f in (flow, varied)]
    assert l1[0][0] == pytest.approx(l1[1][0], rel=1e-6) and l1[0][1] != l1[1][1]


def test_pretrain_as_coded(tmp_path):
    "Masked words pruned before training and never rewound: the first mask is the null's"
    notebooks.run("bert_pretrain", tmp_path, dict(jobs=1, legacy=True))
    flow = pd.read_csv(tmp_path / "flow.csv")
    assert set(flow.task) == {"mlm", "mlm, as coded"} and (tmp_path / "verdict.txt").stat().st_size
    part = lambda task, control, n: flow.query("task == @task and control == @control and n == @n").sort_values(["seed", "tensor"]).reset_index()
    coded, null, real = part("mlm, as coded", "imp", 1), part("mlm", "untrained", 1), part("mlm", "imp", 1)
    assert (coded.alive == null.alive).all() and (real.alive != null.alive).any() and coded.density.equals(real.density)
    assert (part("mlm, as coded", "imp", 0).l1 == part("mlm", "untrained", 0).l1).all()


def test_transfer(tmp_path):
    notebooks.run("bert_transfer", tmp_path, dict(jobs=1))
    for name in ("notebook.ipynb", "transfer.csv", "gaps.csv", "transfer.png", "verdict.txt"): assert (tmp_path / name).stat().st_size, name
    gaps = pd.read_csv(tmp_path / "gaps.csv")
    assert set(gaps.kind) == {"own", "transferred", "layerwise", "uniform", "dense"} and gaps.seeds.eq(2).all()
    assert gaps[gaps.kind == "own"].gap.eq(0).all() and gaps[gaps.kind != "dense"].density.nunique() == 1


WRONG = {"scale": (dict(scale="papers"), "did you mean 'paper'?"), "task": (dict(tasks=["topik"]), "did you mean 'topic'?"), "variant": (dict(variants=["haard"]), "did you mean 'hard'?"), "rounds": (dict(rounds=1), "too few for a slope")}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "task" else pytest.mark.slow) for c in WRONG])
def test_mistakes_are_told_before_anything_is_trained(case, tmp_path):
    given, says = WRONG[case]
    with pytest.raises(runs.RunsFailed) as e: notebooks.run("bert_imp", tmp_path, given)
    assert says in str(e.value) and not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.mark.slow
def test_only_masked_words_are_pretraining(tmp_path):
    with pytest.raises(runs.RunsFailed) as e: notebooks.run("bert_pretrain", tmp_path, dict(task="topic"))
    assert "bert_imp" in str(e.value)


def test_the_extra_is_asked_for(monkeypatch):
    "What the embedded scale says without MiniLM's package"
    monkeypatch.setattr(berts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as e: berts.minilm_folder()
    assert "pip install" in str(e.value) and "rg_tickets[bert]" in str(e.value)
