"The experiments across depths, at the scale of their defaults, and stretchings that only a whole study meets"

import json
from dataclasses import replace
import pandas as pd
import pytest
from rg_tickets import notebooks
from rg_tickets.elastic import every_map, stretch
from rg_tickets.plans import work_of
from rg_tickets.runs import RunsFailed, Spec, grid, trajectories
from rg_tickets.stretching import (
    WAYS,
    Bridge,
    Stretching,
    beside,
    ranking,
    solved,
    stretched,
    stretchings,
)
from rg_tickets.tickets import Ticket

SPEC = Spec(
    width=4,
    rounds=3,
    prune=0.4,
    rewind="1it",
    n_train=64,
    n_test=100,
    options=dict(size=8),
    recipe=dict(epochs=1, batch_size=32, lr=0.1),
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "Both experiments in one folder, as the embedded study is made"
    folder = tmp_path_factory.mktemp("smoke") / "elastic"
    for name in ("elastic_imp", "elastic_transfer"):
        notebooks.run(name, folder, dict(jobs=1))
    return folder


@pytest.mark.slow
def test_leave_what_they_promise(smoke):
    for name in (
        "slopes",
        "spread",
        "trend",
        "accuracy",
        "stretched",
        "gaps",
        "all_maps",
        "ranking",
        "lines",
        "time_imp",
        "time_transfer",
    ):
        assert len(pd.read_csv(smoke / f"{name}.csv")), name
    for name in ("spread.png", "matrix.png", "verdict.txt", "notebook.ipynb"):
        assert (smoke / name).stat().st_size, name
    spread = pd.read_csv(smoke / "spread.csv")
    assert (
        set(spread.control) == {"imp", "untrained", "random"}
        and spread.query("control == 'untrained'").depth.tolist() == [8, 14, 20]
        and (spread.seeds == 3).all()
    )
    null = spread[spread.control == "untrained"]
    assert (abs(null.spread - null.free) < 0.1).all(), (
        "the untrained null is what the free theory says, but for the fluctuations of a narrow network"
    )
    frame = pd.read_csv(smoke / "stretched.csv")
    assert (
        set(frame.kind) == set(WAYS)
        and abs(frame[frame.kind != "dense"].density - 0.4).max() < 1e-3
    )
    table = pd.read_csv(smoke / "gaps.csv")
    assert (table[table.kind == "own"].gap == 0).all() and (table.low <= table.gap).all()
    every, ranked = (pd.read_csv(smoke / f"{name}.csv") for name in ("all_maps", "ranking"))
    assert every["map"].nunique() == 2 and {
        "uniform",
        "near",
        "uniform cheap",
        "near cheap",
    } <= set(ranked.criterion)
    means = every.groupby(["target", "map"]).metric.mean()
    assert [means[t, m] for t, m in zip(ranked.target, ranked["map"])] == pytest.approx(
        ranked.accuracy.tolist(), abs=1e-4
    ), "accuracies stand beside the scores they belong to"


@pytest.mark.slow
def test_the_second_uses_what_the_first_found(smoke):
    plan = json.loads((smoke / "plan.json").read_text())
    assert plan and len(list(smoke.glob("*/ticket.safetensors"))) == 3 * 3 + 9 + 3 + 2 * 2, (
        "no ticket was made twice, under another name"
    )


@pytest.mark.slow
def test_a_second_call_runs_nothing_anew(smoke):
    stamps = lambda: {
        p: p.stat().st_mtime_ns
        for n in ("ticket.safetensors", "stretched.csv", "line.csv")
        for p in smoke.glob(f"*/{n}")
    }
    before = stamps()
    text = (smoke / "stretched.csv").read_bytes()
    notebooks.run("elastic_transfer", smoke, dict(jobs=1))
    assert stamps() == before and (smoke / "stretched.csv").read_bytes() == text


@pytest.mark.parametrize(
    "name, given, says",
    [
        ("elastic_imp", dict(seeds=2), "seeds=2 is too few"),
        ("elastic_imp", dict(depths=[8, 14]), "too few for a slope"),
        ("elastic_imp", dict(rounds=1), "rounds=1 is too few"),
        ("elastic_imp", dict(scale="smok"), "did you mean 'smoke'"),
        ("elastic_transfer", dict(bridges=[14]), "come in pairs"),
        ("elastic_transfer", dict(every=[14, 32]), "depth 32 of `every`"),
        ("elastic_transfer", dict(seeds=1), "seeds=1 is too few"),
        ("elastic_transfer", dict(maps=["interpolat"]), "did you mean 'interpolate'"),
    ],
    ids=lambda o: str(o)[:20],
)
def test_wrong_values_are_refused_with_the_reason(name, given, says):
    with pytest.raises(ValueError, match=says):
        work_of(name, given)


@pytest.mark.slow
def test_wrong_values_start_nothing(tmp_path):
    with pytest.raises(RunsFailed, match="come in pairs"):
        notebooks.run("elastic_transfer", tmp_path / "f", dict(bridges=[14]))
    assert not [p for p in (tmp_path / "f").iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    "scale, runs, stretchings, lines", [("smoke", 4 + 4, 34, 2), ("embedded", 30 + 20, 715, 20)]
)
def test_a_plan_has_every_part(scale, runs, stretchings, lines):
    "Runs of all depths and the one-shot runs; the matrix and all maps; the lines. Nothing of it depends on results"
    work = work_of("elastic_transfer", dict(scale=scale))
    kinds = [type(o) for o in [*work.crossings, *work.others]]
    assert (len(work.runs), kinds.count(Stretching), kinds.count(Bridge), len(kinds)) == (
        runs,
        stretchings,
        lines,
        stretchings + lines,
    ) and not work.remarks
    assert {s.control for s in work.runs} == {"imp", "oneshot"} and {
        o.kind for o in work.crossings
    } - {"line"} == set(WAYS)


def test_the_paper_plan_is_the_original_protocol():
    work = work_of("elastic_imp", dict(scale="paper"))
    depths = lambda **kw: {
        int(s.model[12:]) for s in work.runs if all(getattr(s, k) == v for k, v in kw.items())
    }
    assert {14, 20, 32, 44, 56} < depths(control="imp", width=16) == depths(
        control="untrained", width=16
    ) and {s.seed for s in work.runs} == {0, 1, 2}
    for s in work.runs:
        assert (s.task, s.prune, s.rounds, s.rewind, s.n_train) == (
            "cifar10",
            0.2,
            10,
            "1000it",
            None,
        )
        assert s.recipe == dict(
            epochs=160,
            batch_size=128,
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="drops",
            drops=(80, 120),
        )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    specs = grid(SPEC, model=["cifar_resnet14", "cifar_resnet20"], seed=[0, 1])
    trajectories(specs, folder, jobs=1, device="cpu")
    return folder, specs


def test_stretched_weights_are_trained_not_the_targets(study):
    "A stretched ticket is begun at the source's weights, a re-initialised one at the target's, both with one mask"
    folder, specs = study
    a, b = specs[0], specs[2]
    _, net = solved(Stretching(a, b, density=0.4), folder, device="cpu")
    _, other = solved(Stretching(a, b, density=0.4, kind="reinit"), folder, device="cpu")
    dead = lambda n: {k: (p == 0) for k, p in n.named_parameters() if p.dim() == 4}
    assert all((d == dead(other)[k]).all() for k, d in dead(net).items()) and not all(
        (p == q).all() for p, q in zip(net.parameters(), other.parameters())
    )
    ticket = stretch(Ticket.load(folder / a.id / "ticket.safetensors"), "interpolate", 20)
    assert sum(int(d.sum()) for d in dead(net).values()) >= ticket.history.total - round(
        0.4 * ticket.history.total
    )


def test_guided_averages_over_seeds(study):
    folder, specs = study
    tickets = [Ticket.load(folder / s.id / "ticket.safetensors") for s in specs[2:]]
    both, one = (
        ranking(tickets, 32, ordered=False),
        [ranking([t], 32, ordered=False).set_index("map").score for t in tickets],
    )
    assert len(both) == len(every_map(20, 32, ordered=False)) and both.score.is_monotonic_increasing
    assert both.set_index("map").score.values == pytest.approx(
        sum(o[both["map"]].values for o in one) / 2
    )
    todo = stretchings(
        specs,
        [0.4],
        [("cifar_resnet20", "cifar_resnet14")],
        maps=("guided",),
        kinds=("stretched", "own"),
    )
    frame = stretched(todo, folder, jobs=1, device="cpu")
    assert (
        set(frame[frame.kind == "stretched"]["map"]) == {ranking(tickets, 14)["map"][0]}
        and len(beside(frame)) == 3
    )


def test_failures_name_the_way_out(study):
    folder, specs = study
    a, b = specs[0], specs[2]
    with pytest.raises(RunsFailed, match="reaches densities from"):
        stretched([Stretching(a, b, density=0.01)], folder, jobs=1, device="cpu")
    with pytest.raises(ValueError, match="drop-tail drops blocks, and 2 are to become 3"):
        stretched([Bridge(Stretching(a, b, "drop-tail"))], folder, jobs=1, device="cpu")
    with pytest.raises(ValueError, match="differ in task or seed"):
        stretched([Stretching(a, replace(b, task="mnist5k"))], folder, jobs=1, device="cpu")
