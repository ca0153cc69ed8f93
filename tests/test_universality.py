"Flow distances, prediction and critical densities: calibrations too slow for a notebook"

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import squareform
from rg_tickets.critical import collapse
from rg_tickets.prediction import fit, outcome_of, random_distance, trial
from rg_tickets.selection import smallest
from rg_tickets.statistics import rejection_rate
from rg_tickets.universality import distances, noise, null_distances, same_flow


def one_flow(i, systems=3, seeds=3, uneven=(0.03, 0.01, 0.01, 0.005)):
    "Systems that are one flow; seeds share part of their noise"
    rng = np.random.default_rng(i)
    x = 0.05 * rng.normal(size=(seeds, 4)) + rng.normal(size=(systems, seeds, 4)) * uneven
    return pd.DataFrame(
        x.reshape(-1, 4),
        pd.MultiIndex.from_product(
            [list("ABCDEF")[:systems], range(seeds)], names=["system", "seed"]
        ),
    )


def planted(seed, strength, tasks=5):
    rng = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(tasks)]
    x = rng.normal(size=(tasks, 2))
    hard = rng.normal(size=tasks)
    d = pd.DataFrame(np.linalg.norm(x[:, None] - x[None], axis=-1), names, names)
    g = pd.DataFrame(
        [
            dict(
                source=a, target=b, gap=strength * d.loc[a, b] + 0.5 * hard[j] + 0.2 * rng.normal()
            )
            for a in names
            for j, b in enumerate(names)
            if a != b
        ]
    )
    return outcome_of(g), {"flow": d, "random": random_distance(names, seed)}


def at_most(ps, u):
    assert (np.asarray(ps) <= u).mean() <= u + 3 * np.sqrt(u * (1 - u) / len(ps))


@pytest.mark.slow
@pytest.mark.parametrize("systems, seeds", [(2, 3), (3, 3), (5, 3), (3, 5)])
def test_distances_of_one_flow_are_not_called_different(systems, seeds):
    ps = []
    for i in range(200):
        v = one_flow(i, systems, seeds)
        z = squareform(distances(v).values, checks=False)
        null = null_distances(noise(v), 300)
        ps.append(((null[:, 0] >= z[0]).mean(), (null.max(1) >= z.max()).mean()))
    for u in (0.05, 0.25):
        at_most(np.array(ps)[:, 0], u)
        at_most(np.array(ps)[:, 1], u)


def test_permutation_without_shared_seeds():
    ps = []
    for i in range(150):
        v = one_flow(i).drop(index=("A", 0))
        assert not noise(v).paired
        ps.append(same_flow(v, 100).p)
    for u in (0.05, 0.25):
        at_most(ps, u)


def test_distances_do_not_know_the_order():
    v = one_flow(0)
    w = v.loc[["C", "A", "B"]]
    assert np.allclose(distances(v).loc[["C", "A", "B"], ["C", "A", "B"]], distances(w))
    assert np.allclose(
        distances(v), distances(v[v.columns[::-1]])
    )  # parts in another order: another basis of the same plane
    assert np.allclose(distances(v), distances(7 * v)) and same_flow(v) == same_flow(7 * v)


@pytest.mark.slow
def test_no_answer_is_found_where_there_is_none():
    rows = [trial(*planted(i, 0.0), draws=200).loc["flow"] for i in range(200)]
    for name in ("p", "p_within", "p_auc"):
        ps = np.array([o[name] for o in rows])
        for u in (0.05, 0.25, 0.5):
            assert (ps <= u).mean() - u <= 3 * np.sqrt(u * (1 - u) / 200)
    aucs = np.array([o.auc for o in rows])
    assert abs(np.nanmean(aucs) - 0.5) < 3 * np.nanstd(aucs) / 200**0.5


def test_a_planted_answer_is_found():
    results = [trial(*planted(i, 2.0), draws=200) for i in range(5)]
    aucs = [np.mean([o.auc[k] for o in results]) for k in ("flow", "random")]
    assert aucs[0] > 0.8 > aucs[1]
    assert np.median([o.p["flow"] for o in results]) < 0.05
    assert all(o.low["flow"] <= o.auc["flow"] <= o.high["flow"] for o in results)


def test_a_predictor_of_the_wrong_sign_is_not_pinned_at_chance():
    outcome, known = planted(0, 2.0)
    right = trial(outcome, {"flow": known["flow"]}).loc["flow"]
    wrong = trial(outcome, {"flow": -known["flow"]}).loc["flow"]
    assert right.auc > 0.8
    assert wrong.auc == pytest.approx(1 - right.auc)


def test_sources_that_are_no_targets_are_not_exchanged_with_the_others():
    outcome, known = planted(0, 0.0, tasks=7)
    outcome.iloc[:, 5:] = np.nan
    apart = {"source only": pd.DataFrame(np.zeros((7, 7)), outcome.index, outcome.columns)}
    apart["source only"].iloc[5:] = 10.0  # knows nothing but which tasks are sources only
    outcome.iloc[5:] += 100.0
    row = trial(outcome, apart | known).loc["source only"]
    assert row.orders == 240 and row.spearman == 0 and row.p == 1


def test_two_systems_with_three_seeds_cannot_be_told():
    found = same_flow(one_flow(0, systems=2))
    assert (found.smallest_p, found.verdict) == (0.25, "cannot tell")
    far = one_flow(0, systems=2)
    far.loc["B"] += 100.0 * np.eye(4)[0]
    assert same_flow(far).verdict == "cannot tell"


def test_selection_refuses_what_is_not_a_number():
    for bad in (float("nan"), float("inf")):
        scores = {"a": torch.tensor([0.1, bad])}
        with pytest.raises(ValueError, match="1 of 2 weights in 'a'"):
            smallest(scores, {"a": torch.tensor([True, True])}, 1)


def shared_curve(rng, bend, seeds=5, noise=0.05):
    "Scores of three sizes, the smallest stretched by `bend`"
    t, rows = 0.25 * np.arange(14), []
    for w in (4, 8, 16):
        y = -0.5 / (1 + np.exp(-(t - 1 - 0.6 * np.log(w / 4)) / 0.4)) * (1 + bend * (w == 4))
        for seed in range(seeds):
            scatter = noise * (0.5 * rng.normal() + 0.75**0.5 * rng.normal(size=14))
            rows.append(pd.DataFrame(dict(size=w, seed=seed, t=t, y=y + scatter)))
    return pd.concat(rows, ignore_index=True)


@pytest.mark.slow
@pytest.mark.parametrize("bend, least, most", [(0.0, 0.0, 0.12), (0.3, 0.8, 1.0)])
def test_a_collapse_is_refuted_where_there_is_none(bend, least, most):
    def refuted(rng):
        return collapse(shared_curve(rng, bend), (0, 1.2), 13, draws=4, studies=19).refuted

    rate, _ = rejection_rate(refuted, 80, name=f"collapse{bend}")
    assert least <= rate <= most


def test_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    d = rng.exponential(size=4000)
    table = pd.DataFrame(dict(flow=d, transferable=rng.random(4000) < 1 / (1 + np.exp(2 * d - 1))))
    p = fit(table).probability(table)
    for low in (0.1, 0.3, 0.5):
        m = (low <= p) & (p < low + 0.1)
        assert abs(table.transferable[m].mean() - p[m].mean()) < 0.06


@pytest.mark.slow
def test_collapse_finds_the_exponent():
    found = []
    for i in range(20):
        rng = np.random.default_rng(i)
        t = 0.25 * np.arange(16)
        found.append(
            collapse(
                pd.concat(
                    [
                        pd.DataFrame(
                            dict(
                                size=w,
                                t=t,
                                y=-0.5 / (1 + np.exp(-(t - 1 - 0.4 * np.log(w / 4)) / 0.4))
                                + 0.02 * rng.normal(size=16),
                                dy=0.02,
                            )
                        )
                        for w in (4, 8, 16)
                    ]
                ),
                span=(-1, 2),
                steps=31,
                draws=16,
            )
        )
    assert (
        abs(np.mean([o.a for o in found]) - 0.4) < 0.04
        and np.mean([o.low <= 0.4 <= o.high for o in found]) >= 0.7
    )
