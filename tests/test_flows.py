"Flows from memory and from tables: what is accepted, and what is refused by name"

import math, os
import numpy as np
import pandas as pd
import pytest, torch
from torch import nn
from torch.nn.utils import prune
from rg_tickets.basics import generator
from rg_tickets.flows import (
    Flow,
    check_round,
    contrast,
    difference,
    exponents,
    in_words,
    local_exponents,
    matching,
    path_test,
    plot_local,
    plot_slice,
    read_table,
    shared_window,
    slopes,
    trajectory,
)
from rg_tickets.reports import flow_at
from rg_tickets.statistics import rejection_rate
from rg_tickets.universality import vectors


def a_run(seed=0, rounds=5, kind=torch.float32):
    "Weights and masks, lists of dictionaries, pruned by magnitude"
    g = generator(seed, "flow")
    w = {k: torch.randn(s, generator=g) for k, s in dict(a=(20, 30), b=(600,)).items()}
    m, weights, masks = {k: torch.ones_like(t) for k, t in w.items()}, [], []
    for _ in range(rounds):
        w = {k: (t + 0.1 * torch.randn(t.shape, generator=g)) * m[k] for k, t in w.items()}
        weights.append(w), masks.append({k: o.to(kind) for k, o in m.items()})
        kept = torch.cat([w[k][m[k] == 1].abs() for k in w])
        edge = kept.kthvalue(len(kept) // 5).values
        m = {k: ((w[k].abs() > edge) & (m[k] == 1)).float() for k in w}
    return weights, masks


def same(a, b):
    pd.testing.assert_frame_equal(a.frame, b.frame)


# In memory


def test_a_flow_is_computed_from_its_definition():
    weights, masks = a_run()
    f = Flow.from_masks(weights, masks, task="mine", model="net").frame
    for n, (w, m) in enumerate(zip(weights, masks)):
        part = f[f.n == n].set_index("tensor")
        kept, total = sum(int(o.sum()) for o in m.values()), sum(o.numel() for o in m.values())
        assert np.allclose(part.t, math.log(total / kept)) and np.allclose(
            part.density, kept / total
        )
        for k in w:
            live = w[k][m[k] == 1].double().abs()
            assert part.l1[k] == pytest.approx(live.sum().item(), rel=1e-12)
            assert (part.alive[k], part["count"][k]) == (len(live), w[k].numel())
            assert part.smallest[k] == live.min() and part.largest[k] == live.max()
    assert set(f.control) == {"imp"} and f.metric.isna().all()


@pytest.mark.parametrize(
    "kind", [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16]
)
def test_masks_of_any_type(kind):
    same(Flow.from_masks(*a_run(kind=kind)), Flow.from_masks(*a_run()))


def test_every_form_is_one_flow():
    runs = {s: a_run(s) for s in range(3)}
    by_seed = Flow.from_masks(
        {s: w for s, (w, _) in runs.items()}, {s: m for s, (_, m) in runs.items()}
    )
    same(by_seed, Flow.from_masks([w for w, _ in runs.values()], [m for _, m in runs.values()]))
    same(by_seed, Flow.from_masks({s: list(zip(*run)) for s, run in runs.items()}))
    numpy = lambda ds: [{k: t.numpy() for k, t in d.items()} for d in ds]
    same(
        by_seed,
        Flow.from_masks(
            {s: numpy(w) for s, (w, _) in runs.items()}, {s: numpy(m) for s, (_, m) in runs.items()}
        ),
    )
    e = exponents(by_seed, by="tensor", window="all")
    assert (e.seeds == 3).all() and (e.error == "seeds").all() and e.low.notna().all()
    assert (e.low < e.sigma).all() and (e.sigma < e.high).all()


def test_scores_make_the_matching_window():
    runs = {s: a_run(s) for s in range(2)}
    scores = {0: [0.90, 0.91, 0.90, 0.85, 0.5], 1: np.array([0.92, 0.91, 0.92, 0.86, 0.5])}
    weights, masks = ({s: r[i] for s, r in runs.items()} for i in (0, 1))
    assert matching(Flow.from_masks(weights, masks, scores)) == [0, 1, 2]
    with pytest.raises(ValueError, match="those of the dense network are not known"):
        exponents(Flow.from_masks(weights, masks), window="matching")
    with pytest.raises(ValueError, match="seed 0: 2 metrics for 5 rounds"):
        Flow.from_masks(weights, masks, {0: [0.9, 0.9]})
    begun = Flow.from_masks(
        {s: w[1:] for s, w in weights.items()},
        {s: m[1:] for s, m in masks.items()},
        {s: v[1:] for s, v in scores.items()},
    )
    assert begun.frame.n.min() == 1
    with pytest.raises(ValueError, match="first round here is 1: take window='all'"):
        exponents(begun, window="matching")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 20)
        self.body = nn.Linear(20, 20)
        self.decoder = nn.Linear(20, 30, bias=False)
        self.decoder.weight = self.embed.weight


@pytest.mark.parametrize(
    "wrap", [lambda o: o, torch.compile, nn.DataParallel], ids=["plain", "compiled", "parallel"]
)
def test_networks_and_state_dicts_with_two_names(wrap):
    net = Tied()
    masks = {"decoder.weight": net.embed.weight.abs() > 0.3, "body.weight": torch.ones(20, 20)}
    both = masks | {"embed.weight": masks["decoder.weight"].int()}
    for given in (wrap(net), wrap(net).state_dict()):
        for m in (masks, both):
            f = Flow.from_masks([given], [m]).frame
            assert f.tensor.tolist() == (
                ["embed.weight", "body.weight"] if m is masks else f.tensor.tolist()
            )
            assert sorted(f.tensor) == ["body.weight", "embed.weight"] and f["count"].sum() == 1000
    both["embed.weight"] = ~masks["decoder.weight"]
    with pytest.raises(
        ValueError, match="embed.weight and decoder.weight are one tensor, and there are two"
    ):
        Flow.from_masks([net], [dict(reversed(both.items()))])


def test_what_torch_prune_leaves_needs_no_masks():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    for layer in (net[0], net[2]):
        prune.identity(layer, "weight")
    states = []
    for _ in range(3):
        states.append({k: t.clone() for k, t in net.state_dict().items()})
        prune.global_unstructured(
            [(net[0], "weight"), (net[2], "weight")], prune.L1Unstructured, amount=0.2
        )
    f = Flow.from_masks(states)
    alive = f.frame.groupby("n").alive.sum().tolist()
    assert (
        alive[0] == 36
        and alive == sorted(alive, reverse=True)
        and f.frame.n.unique().tolist() == [0, 1, 2]
    )
    assert f.frame.tensor.unique().tolist() == ["0.weight", "2.weight"]


REFUSED = {
    "rounds backwards": (lambda w, m: (w[::-1], m[::-1]), "in order, the densest first"),
    "not nested": (
        lambda w, m: (w, [*m[:2], {k: o.flip(0) for k, o in m[2].items()}]),
        "the round before it had pruned",
    ),
    "another shape": (
        lambda w, m: ([w[0] | {"a": torch.ones(3, 3)}], m[:1]),
        r"a \(\(3, 3\) and its mask",
    ),
    "no weight": (lambda w, m: ([{"a": w[0]["a"]}], m[:1]), "a mask but no weight for b"),
    "another network": (
        lambda w, m: (w[:2], [m[0], {"a": m[1]["a"]}]),
        "does not belong to the rounds before",
    ),
    "no mask": (lambda w, m: (w, [{}] * 3), "the masks are no dictionary"),
    "a number": (lambda w, m: (w, [{"a": 1.0, "b": m[0]["b"]}] * 3), "the mask of a is a float"),
    "weights as masks": (lambda w, m: (w, w), "other numbers than 0 and 1"),
    "nan": (lambda w, m: ([{k: t / 0 for k, t in w[0].items()}], m[:1]), "NaN or infinite"),
    "complex": (
        lambda w, m: ([{k: t.to(torch.complex64) for k, t in w[0].items()}], m[:1]),
        "complex",
    ),
    "whole numbers": (
        lambda w, m: ([{k: t.long() for k, t in w[0].items()}], m[:1]),
        "of whole numbers",
    ),
    "nothing kept": (
        lambda w, m: (w[:1], [{k: 0 * o for k, o in m[0].items()}]),
        "no weight is kept",
    ),
    "fewer masks": (lambda w, m: (w, m[:2]), "3 rounds of weights and 2 of masks"),
    "one dictionary": (lambda w, m: (w[0], m[0]), "a list with one entry per round"),
    "nothing": (lambda w, m: ([], []), "a list with one entry per round"),
    "words": (lambda w, m: (["a"], ["b"]), "the weights are no dictionary"),
    "seeds that differ": (
        lambda w, m: ([w, [{"a": o["a"]} for o in w]], [m, [{"a": o["a"]} for o in m]]),
        "seed 1 prunes other tensors",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named(what):
    change, says = REFUSED[what]
    with pytest.raises(ValueError, match=says):
        Flow.from_masks(*change(*a_run(rounds=3)))


# Tables


def table(**columns):
    rows = [
        dict(
            task="t",
            model="m",
            control="imp",
            seed=s,
            n=n,
            t=0.2 * n,
            density=0.8**n,
            metric=0.9,
            loss=0.1,
            tensor=k,
            count=10,
            alive=9 - n,
            l1=5.0 - n,
        )
        for s in range(2)
        for n in range(4)
        for k in ("layer1.0.conv1.weight", "layer2.0.conv1.weight")
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_a_table_without_accuracy_is_read_back(tmp_path):
    f = Flow.from_masks(
        {s: a_run(s)[0] for s in range(2)}, {s: a_run(s)[1] for s in range(2)}, task="a"
    )
    f.frame.to_csv(tmp_path / "a.csv", index=False)
    back = Flow.read(tmp_path / "a.csv")
    assert back.frame.metric.dtype == float and back.frame.metric.isna().all()
    pd.testing.assert_frame_equal(back.frame, f.frame, check_dtype=False)
    assert len(exponents(back, by="tensor", window="all"))
    other = Flow(back.frame.assign(task="b"))
    for ask in (
        lambda: exponents(back, window="matching"),
        lambda: shared_window(Flow.join(back, other)),
    ):
        with pytest.raises(ValueError, match="those of the dense network are not known"):
            ask()


def test_committed_tables_are_read_as_before():
    from pathlib import Path

    for path in (Path(__file__).parents[1] / "nbs/results").glob("*_flow.csv"):
        plain = pd.read_csv(
            path,
            keep_default_na=False,
            na_values={"loss": ["", "nan"]},
            dtype=dict.fromkeys(("task", "model", "control"), str),
        )
        if "epochs" in plain:  # runs of different lengths, told apart by a column of their own
            with pytest.raises(ValueError, match="say so in their `model` label"):
                Flow.read(path)
            continue
        pd.testing.assert_frame_equal(Flow.read(path).frame, plain)


ODD = {
    "empty": (b"", "no table of flows"),
    "binary": (b"\xff\x00\x01", "no table of flows"),
    "nul": (b"\x00" * 100, "no table of flows"),
    "heading only": (table().head(0), "a heading and no rows"),
    "no tensor": (table().drop(columns="tensor"), "no column tensor"),
    "two missing": (table().drop(columns=["t", "l1"]), "no column t, l1"),
    "text for a number": (table(l1="many"), "line 2: l1 is 'many', and has to be a number"),
    "one bad number": (
        table(metric=["0.9"] * 5 + ["good"] + ["0.9"] * 10),
        "line 7: metric is 'good'",
    ),
    "infinite": (table(l1=[1.0] * 3 + [math.inf] + [1.0] * 12), "line 5: l1 is inf"),
    "negative": (table(t=[0.1] * 4 + [-1.0] + [0.1] * 11), "line 6: t is -1.0, not 0 or more"),
    "half a round": (table(n=[0.5] * 16, seed=range(16)), "line 2: .* no whole round"),
    "more kept than there are": (table(alive=11), "line 2: 11 of 10 weights"),
    "empty count": (table(count=""), "line 2: count is nan"),
    "rows twice": (pd.concat([table(), table().head(1)]), "task t, .* twice"),
    "ragged": (
        table().to_csv(index=False).encode() + b"1,2,3\n" * 2 + b",".join([b"x"] * 40),
        "no table of flows",
    ),
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("reader", [Flow.read, flow_at], ids=["Flow.read", "flow_at"])
def test_odd_tables_are_refused_by_name(what, reader, tmp_path):
    content, says = ODD[what]
    path = tmp_path / "odd.csv"
    path.write_bytes(content) if isinstance(content, bytes) else content.to_csv(path, index=False)
    with pytest.raises(ValueError, match=says) as e:
        reader(path)
    assert "odd.csv" in str(e.value) and "\n" not in str(e.value)


def test_several_files_joined(tmp_path):
    table().query("seed == 0").to_csv(tmp_path / "a.csv", index=False)
    table().query("seed == 1").to_csv(tmp_path / "b.csv", index=False)
    both = Flow.read(tmp_path / "a.csv", tmp_path / "b.csv")
    assert len(both.frame) == 16
    table().query("seed == 0 and n > 1").to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(ValueError, match=r"c.csv has task t, .* and in .*a.csv too"):
        Flow.read(tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv")
    with pytest.raises(ValueError, match="no table was given"):
        Flow.read()
    for path in (tmp_path, tmp_path / "nowhere.csv"):
        with pytest.raises(FileNotFoundError, match=path.name):
            Flow.read(path)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(FileNotFoundError, match="pipe.csv"):
        Flow.read(tmp_path / "pipe.csv")


def test_other_tables(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,\n2,nan\n")
    frame = read_table(tmp_path / "a.csv", ["x"], ["y"], ["x"])
    assert frame.x.tolist() == ["1", "2"] and frame.y.isna().all()


def test_one_round_checked_by_itself():
    weights, masks = a_run(rounds=1)
    w, m, alias = check_round(weights[0] | {"c": torch.ones(2)}, masks[0])
    assert (
        list(w) == list(m) == ["a", "b"]
        and alias == {}
        and all(o.dtype == torch.bool for o in m.values())
    )
    with pytest.raises(KeyError, match="over there"):
        check_round(weights[0], {"a": masks[0]["b"]}, where="over there", error=KeyError)


# Windows, and what may be subtracted


def fading(task, last, seeds=range(3), control="imp", rounds=10, seed=0):
    "A flow of two parts whose accuracy falls after round `last`"
    rng = np.random.default_rng([seed, last, len(control)])
    t = 0.22 * np.arange(rounds)
    z = 0.3 * t + 0.1 * t**2 + 0.01 * rng.normal(size=(len(seeds), rounds))
    x = np.stack([np.exp(z), np.ones_like(z)], -1)
    f = Flow.from_couplings(x, t, ["a", "b"], task=task, model="net", control=control).frame
    scores = 0.9 - 0.1 * (np.arange(rounds) > last)
    f["metric"] = scores[f.n] + 0.001 * f.seed
    return Flow(f.assign(seed=np.array(seeds)[f.seed]))


def test_all_rounds_are_the_default_window():
    flow = fading("one", 5)
    for table in (slopes(flow, by="tensor"), exponents(flow, by="tensor")):
        assert set(table.window) == {"0-9 (10)"}
    assert set(exponents(flow, by="tensor", window="matching").window) == {"0-5 (6)"}
    assert set(slopes(flow, by="tensor", window=[0, 2, 3]).window) == {"0,2,3 (3)"}


def test_slopes_of_different_windows_are_not_subtracted():
    a, b = fading("one", 5), fading("two", 8)
    both = Flow.join(a, b)
    own = [slopes(o, by="tensor", window="matching") for o in (a, b)]
    says = r"rounds 0-5 \(6\), t = 0.00 to 1.10; rounds 0-8 \(9\).*window='shared'"
    for ask in (lambda: contrast(*own), lambda: vectors(both, by="tensor", window="matching")):
        with pytest.raises(ValueError, match=says):
            ask()
    shared = slopes(both, by="tensor", window="shared")
    assert set(shared.window) == {"0-5 (6)"}
    assert len(contrast(shared[shared.task == "one"], shared[shared.task == "two"])) == 2
    assert len(vectors(both, by="tensor", window="shared")) == 6
    text = in_words(both, by="tensor", window="matching")
    assert "one (rounds 0-5 (6)) and two (rounds 0-8 (9)) are not compared" in text
    assert "one and two differ in" in in_words(both, by="tensor", window="shared")


def test_a_null_with_fewer_rounds_is_not_subtracted():
    short = fading("one", 9, control="untrained", rounds=6)
    with pytest.raises(ValueError, match="different windows cannot be subtracted"):
        difference(Flow.join(fading("one", 9), short), by="tensor")
    named = difference(Flow.join(fading("one", 9), short), by="tensor", window=range(6))
    assert len(named) == 2


def test_rounds_of_another_rate_are_one_window_if_they_span_the_same_time():
    t = 0.4 * np.arange(6)
    slow, fast = np.exp(0.3 * np.linspace(0, 2, 11)), np.exp(0.3 * t)
    flows = [
        Flow.from_couplings(np.stack([[x, 1 + 0 * x]] * 3).swapaxes(1, 2), u, ["a", "b"])
        for x, u in ((slow, np.linspace(0, 2, 11)), (fast, t))
    ]
    found = contrast(*(slopes(f, "relative", "tensor") for f in flows))
    assert found.dsigma.to_numpy() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seeds", [3, 5])
def test_exponents_of_a_fixed_window_cover_as_they_say(seeds):
    def misses(rng):
        own = 0.3 + 0.02 * rng.normal(size=(seeds, 1))
        x = np.exp(own * (t := 0.25 * np.arange(6)))[..., None]
        e = exponents(Flow.from_couplings(x, t, ["a"]), "relative", "tensor")
        return not e.low[0] < 0.3 < e.high[0]

    missed, error = rejection_rate(misses, 150, name=f"flows {seeds}")
    assert abs(missed - 0.05) < 4 * error


# Trajectories


def test_a_flow_is_a_stack_of_trajectories():
    flow = fading("one", 9)
    x, t, names = trajectory(flow, "relative", "tensor")
    assert x.shape == (3, 10, 2) and names == ["a", "b"] and t.shape == (3, 10)
    local = local_exponents(flow, "relative", "tensor")
    a = local[local.group == "a"]
    steps = np.diff(np.log(x[..., 0]), axis=1) / 0.22
    np.testing.assert_allclose(a.sigma, steps.mean(0))
    assert (a.low < a.sigma).all() and a.sigma.iloc[-1] > a.sigma.iloc[0]  # it bends
    with pytest.raises(ValueError, match="choose one with Flow.where"):
        trajectory(Flow.join(flow, fading("two", 9)))


def test_paths_are_compared_by_seed():
    a = fading("one", 9, seeds=range(6))
    same, other = fading("two", 9, seeds=range(6), seed=1), fading("two", 9, seeds=range(6))
    other.frame["l1"] *= np.exp(np.where(other.frame.tensor == "a", 0.2 * other.frame.t, 0))
    found = path_test(a, other, "tensor")
    assert (found.labellings, found.verdict) == (64, "apart")
    assert path_test(a, same, "tensor").p > 0.05
    few = path_test(fading("one", 9), fading("two", 9, seed=1), "tensor")
    assert few.verdict == "cannot tell"


def test_a_slice_and_bands_are_drawn():
    flow = Flow.join(fading("one", 9), fading("two", 9, seed=2))
    ax = plot_slice(flow, "a", "b", by="tensor")
    x, y = trajectory(flow.where(task="one"), by="tensor")[0].mean(0).T
    line = next(o for o in ax.lines if o.get_label() == "one")
    np.testing.assert_allclose(np.transpose(line.get_data()), np.c_[x, y])
    with pytest.raises(ValueError, match="unknown group"):
        plot_slice(flow, "a", "c", by="tensor")
    assert len(plot_local(flow.where(task="one"), by="tensor").collections) == 2
