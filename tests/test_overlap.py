"Learned overlap beside its definition, chance listed and drawn, and what is refused"

import itertools
import math
import numpy as np
import pytest
import torch
from rg_tickets.masks import MaskHistory
from rg_tickets.overlap import learned_overlap, learned_overlaps, null_of, overlap_matrix
from rg_tickets.tickets import Ticket


def drawn(seed, shapes=dict(a=(7, 11), b=(40,), c=(5, 3, 2, 2))):
    "A mask of three tensors"
    g = torch.Generator().manual_seed(seed)
    return {
        k: torch.rand(s, generator=g) < 0.2 + 0.2 * i for i, (k, s) in enumerate(shapes.items())
    }


def slowly(a, b, strata):
    "The definition, weight by weight"
    cat = lambda m: np.concatenate([t.flatten().numpy() for t in m.values()])
    u, v, s = cat(a).astype(float), cat(b).astype(float), cat(strata)
    for o in np.unique(s):
        u[s == o] -= u[s == o].mean()
        v[s == o] -= v[s == o].mean()
    return (u * v).sum() / math.sqrt((u * u).sum() * (v * v).sum())


@pytest.mark.parametrize("seed", range(5))
def test_counts_give_the_definition(seed):
    a, b, z = (drawn(3 * seed + i) for i in range(3))
    group = dict(a="x", b="y", c="x")
    place = {k: {"x": 0, "y": 2}[group[k]] for k in a}
    tensor = {k: 2 * i for i, k in enumerate(a)}
    for by, offset in ((None, dict.fromkeys(a, 0)), ("tensor", tensor), (group, place)):
        strata = {k: z[k].long() + offset[k] for k in a}
        assert learned_overlap(a, b, z, by).value == pytest.approx(slowly(a, b, strata))
    assert learned_overlap(a, b, z, group.get).value == learned_overlap(a, b, z, group).value


def test_halves_by_hand():
    bits = lambda text: {"w": torch.tensor([c == "1" for c in text])}
    o = learned_overlap(bits("1100 1110".replace(" ", "")), bits("10101101"), bits("00001111"))
    # outside: both keep 2 of 4 and share 1, as chance; inside: 3 of 4 each, 2 shared
    assert (o.outside, o.inside) == (0.0, pytest.approx(-1 / 3))
    assert o.value == pytest.approx(-0.25 / 1.75) and o.jaccard == 3 / 7


def test_extremes():
    a, z = drawn(0), drawn(1)
    opposite = {k: ~m for k, m in a.items()}
    assert learned_overlap(a, a, z).value == pytest.approx(1)
    assert learned_overlap(a, opposite, z).value == pytest.approx(-1)
    assert math.isnan(learned_overlap(z, a, z).value)
    everything = {k: torch.ones_like(m) for k, m in a.items()}
    o = learned_overlap(a, drawn(2), everything)  # one stratum: the plain correlation
    cat = lambda m: np.concatenate([t.flatten().numpy() for t in m.values()])
    assert o.value == pytest.approx(np.corrcoef(cat(a), cat(drawn(2)))[0, 1])
    assert (
        o.strata == 1 and math.isnan(o.outside) and o.sd == pytest.approx((o.weights - 1) ** -0.5)
    )


@pytest.mark.parametrize("kept", [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_chance_by_listing_all_arrangements(kept):
    "Mean zero and the formula's variance, for masks of unequal strata"
    sizes, rng = (5, 4), np.random.default_rng(sum(kept))
    a = np.concatenate([rng.permutation(k) < m for k, m in zip(sizes, (2, 3))])
    z = {"w": torch.arange(9) >= 5}
    part = lambda k, m: [np.isin(range(k), c) for c in itertools.combinations(range(k), m)]
    found = [
        learned_overlap({"w": torch.from_numpy(a)}, {"w": torch.from_numpy(np.concatenate(b))}, z)
        for b in itertools.product(*map(part, sizes, kept))
    ]
    values = np.array([o.value for o in found])
    assert len(found) == math.comb(5, kept[0]) * math.comb(4, kept[1])
    if np.isfinite(values).all():
        assert abs(values.mean()) < 1e-12 and values.var() == pytest.approx(found[0].sd ** 2)


def history(seed):
    g = torch.Generator().manual_seed(seed)
    died = torch.randint(1, 5, (50, 9), generator=g)
    return MaskHistory({"w": torch.where(died == 4, 255, died).byte()}, 3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_histories_tickets_and_fine_strata(n):
    a, b, z = (history(s) for s in range(3))
    at = [o.mask(n) for o in (a, b, z)]
    assert learned_overlap(a, b, z, n=n) == learned_overlap(*at)
    ticket = Ticket(history=a, weights={}, about={}, rounds=[])
    assert learned_overlap(ticket, b, z, n=n) == learned_overlap(*at)
    fine = learned_overlap(a, b, z, n=n, fine=True)
    assert fine.value == pytest.approx(slowly(at[0], at[1], z.died)) and fine.strata == 4
    if n == 3:  # inside the null there is one stratum in both forms
        assert fine.inside == pytest.approx(learned_overlap(*at).inside)
    with pytest.raises(ValueError, match="the rounds of the null"):
        learned_overlap(a, b, at[2], n=n, fine=True)


def test_what_is_no_pair_of_masks_is_refused():
    a, z = drawn(0), drawn(1)
    ask = lambda b, **kwargs: learned_overlap(a, b, z, **kwargs)
    for b, says in (
        ({k: m for k, m in a.items() if k != "b"}, "'b' is in the first mask"),
        (a | {"c": a["c"].flatten()}, r"'c' is .* \(5, 3, 2, 2\) and \(60,\)"),
        ({k: m.float() for k, m in a.items()}, "'a' is not"),
    ):
        with pytest.raises(ValueError, match=says):
            ask(b)
    with pytest.raises(ValueError, match="strata are None, 'tensor'"):
        ask(a, by="layer")
    with pytest.raises(ValueError, match="share a seed"):
        learned_overlaps({("A", 0): a, ("B", 1): a}, {0: z, 1: z})


def test_overlaps_are_averaged_over_seeds_and_symmetric():
    masks = {(t, s): drawn(10 * s + i) for s in range(3) for i, t in enumerate("AB")}
    table = learned_overlaps(masks, {s: drawn(99 + s) for s in range(3)})
    m = overlap_matrix(table)
    assert len(table) == 3 and m.loc["A", "B"] == m.loc["B", "A"]
    assert m.loc["A", "B"] == pytest.approx(table.value.mean())


def test_null_of_tickets_needs_common_weights():
    w = {"w": torch.randn(50, 9, generator=torch.Generator().manual_seed(0))}
    a, b = (Ticket(history=history(s), weights=w, about={}, rounds=[]) for s in (0, 1))
    z = null_of([a, b], 3)["w"]
    assert int(z.sum()) == a.history.alive(3)["w"]
    assert w["w"][z].abs().min() > w["w"][~z].abs().max()
    other = Ticket(history=b.history, weights={"w": w["w"] + 1}, about={}, rounds=[])
    with pytest.raises(ValueError, match="align the networks first"):
        null_of([a, other])


@pytest.mark.slow
def test_85_million_weights_are_no_work(ends):
    g = torch.Generator().manual_seed(0)
    masks = [{"w": torch.randint(0, 2, (10000, 8500), generator=g) > 0} for _ in range(3)]
    with ends():
        assert abs(learned_overlap(*masks)) < 1e-3
