"What must hold for any input: selection, histories, schedules, tickets, random streams"

import pickle, random, tempfile
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from damage import damaged, sound
from rg_tickets.basics import generator, seeded, stream
from rg_tickets.elastic import (
    STRATEGIES,
    BlockMap,
    _size,
    at_density,
    block_map,
    every_map,
    fitted,
    parse,
    stretch,
)
from rg_tickets.flows import Flow, observable
from rg_tickets.imp import check_schedule, counts
from rg_tickets.masks import ALIVE, MaskHistory, Schedule, prune, random_scores, shuffled
from rg_tickets.models.prunable import GROUPINGS, groups
from rg_tickets.selection import smallest
from rg_tickets.tickets import Ticket, TicketError, digest, load_tensors
from rg_tickets.train import SHAPES, Recipe

bounded = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)


@st.composite
def weights(draw, dtypes=st.sampled_from(FLOATS)):
    "A few tensors of any shape, with ties: values from a small set, signs, zeros"
    g, dtype = torch.Generator().manual_seed(draw(seeds)), draw(dtypes)
    levels = draw(st.sampled_from([2, 5, 50, None]))
    make = lambda shape: (
        torch.randn(shape, generator=g, dtype=torch.float64)
        if levels is None
        else (torch.randint(-levels, levels + 1, shape, generator=g) / 7).double()
    )
    return {
        f"w{i}": make(s).to(dtype)
        for i, s in enumerate(draw(st.lists(shapes, min_size=1, max_size=4)))
    }


def in_order(scores, alive):
    "The slow way: every survivor by (magnitude, tensor, index)"
    rows = [
        (abs(x), i, j, k)
        for i, (k, s) in enumerate(scores.items())
        for j, (x, live) in enumerate(
            zip(s.double().flatten().tolist(), alive[k].flatten().tolist())
        )
        if live
    ]
    return sorted(rows)


@bounded
@given(weights(), seeds, st.floats(0, 1))
def test_smallest_is_the_start_of_the_total_order(scores, seed, share):
    g = torch.Generator().manual_seed(seed)
    alive = {k: torch.rand(s.shape, generator=g) < 0.7 for k, s in scores.items()}
    order = in_order(scores, alive)
    n = round(share * len(order))
    picked, at = smallest(scores, alive, n)
    want = {(k, j) for _, _, j, k in order[:n]}
    assert {(k, int(j)) for k, m in picked.items() for j in m.flatten().nonzero().flatten()} == want
    assert at == (order[n - 1][0] if n else 0.0)


@bounded
@given(weights(), seeds)
def test_order_of_memory_decides_nothing(scores, seed):
    "A tensor that is a view with other strides is the same tensor"
    turned = {k: s.T.contiguous().T if s.dim() == 2 else s for k, s in scores.items()}
    alive = {k: torch.ones_like(s, dtype=torch.bool) for k, s in scores.items()}
    n = sum(s.numel() for s in scores.values()) // 2
    a, b = (
        smallest(scores, alive, n)[0],
        smallest(
            turned, {k: m.T.contiguous().T if m.dim() == 2 else m for k, m in alive.items()}, n
        )[0],
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


@bounded
@given(weights(), st.lists(st.floats(0.05, 0.6), min_size=1, max_size=6), st.booleans(), seeds)
def test_histories_are_nested_and_count_exactly(scores, rates, anew, seed):
    history = MaskHistory.dense(scores)
    counts, now, thresholds = [history.total], scores, []
    for r, rate in enumerate(rates, 1):
        n = Schedule(rate).remove(counts[-1], history.total)
        if n >= counts[-1]:
            continue
        if anew:
            now = random_scores(scores, seed, r)
        thresholds.append(prune(history, now, n))
        counts.append(counts[-1] - n)
    assert [sum(history.alive(n).values()) for n in range(history.rounds + 1)] == counts
    assert history.density() == counts[-1] / counts[0]
    for n in range(history.rounds):
        a, b = history.mask(n), history.mask(n + 1)
        assert all((b[k] <= a[k]).all() for k in a)
    if not anew:
        assert all(
            x <= y for x, y in zip(thresholds[:-1], thresholds[1:]) if y
        )  # the same scores: thresholds only rise
    mixed = shuffled(history, seed)
    assert all(mixed.alive(n) == history.alive(n) for n in range(history.rounds + 1))


@bounded
@given(weights(st.just(torch.float32)), seeds)
def test_refused_pruning_changes_nothing(scores, seed):
    history = MaskHistory.dense(scores)
    total = history.total
    for n in (total, total + 3, -1):
        with pytest.raises(ValueError, match="at least one must stay"):
            prune(history, scores, n)
    first = next(iter(scores))
    bad = scores | {
        first: torch.full_like(
            scores[first], random.Random(seed).choice([float("nan"), float("inf")])
        )
    }
    if total > 1:
        with pytest.raises(ValueError, match=f"'{first}' are NaN or infinite"):
            prune(history, bad, 1)
    assert history.rounds == 0 and all((d == ALIVE).all() for d in history.died.values())


@bounded
@given(st.floats(0.01, 0.99), st.integers(1, 10**9))
def test_schedules(rate, total):
    geometric, arithmetic = Schedule(rate), Schedule(rate, "arithmetic")
    assert geometric.remove(total, total) == arithmetic.remove(total, total) == round(rate * total)
    assert (
        0 <= geometric.remove(total // 2, total) <= total // 2
        and abs(geometric.remove(total // 2, total) - rate * (total // 2)) <= 0.5
    )
    assert arithmetic.remove(total // 2, total) == arithmetic.remove(total, total)


@pytest.mark.parametrize("rate", [0, 1, 1.5, -0.1, float("nan"), float("inf"), True, "0.2", None])
def test_impossible_rates(rate):
    with pytest.raises(ValueError, match="not in"):
        Schedule(rate)


@bounded
@given(weights(), st.integers(0, 40), st.integers(0, 40))
def test_two_prunings_of_unchanged_weights_are_one(scores, a, b):
    "The semigroup: removing a and then b is removing a + b, if nothing is refined between"
    total = sum(s.numel() for s in scores.values())
    assume(a + b < total)
    twice, once = MaskHistory.dense(scores), MaskHistory.dense(scores)
    prune(twice, scores, a)
    prune(twice, scores, b)
    prune(once, scores, a + b)
    x, y = twice.mask(), once.mask()
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert twice.time() == once.time()


@bounded
@given(
    st.floats(0.01, 0.99),
    st.sampled_from(["geometric", "arithmetic"]),
    st.integers(1, 5000),
    st.integers(0, 60),
)
def test_a_schedule_is_refused_exactly_where_it_would_leave_nothing(rate, rule, total, rounds):
    "Before the run what pruning would say in it: counts fall in each round, and something stays"
    schedule, counts = Schedule(rate, rule), [total]
    while len(counts) <= rounds and 0 < (n := schedule.remove(counts[-1], total)) < counts[-1]:
        counts.append(counts[-1] - n)
    try:
        check_schedule(schedule, total, rounds)
        fine = True
    except ValueError as e:
        fine = False
        assert f"in round {len(counts)}" in str(e)
    assert fine == (len(counts) > rounds) and counts == sorted(set(counts), reverse=True)


@bounded
@given(
    weights(),
    st.lists(st.floats(0.05, 0.9), min_size=1, max_size=5),
    st.sampled_from(["geometric", "arithmetic"]),
)
def test_layer_by_layer_every_tensor_keeps_its_share(scores, rates, rule):
    history = MaskHistory.dense(scores)
    for rate in rates:
        before, asked = history.alive(), counts(Schedule(rate, rule), history, "layer")
        prune(history, scores, asked)
        after = history.alive()
        assert all(after[k] == before[k] - asked[k] >= 1 for k in scores) and all(
            abs(asked[k] - rate * (before[k] if rule == "geometric" else scores[k].numel())) <= 0.5
            or after[k] == 1
            for k in scores
        )


@bounded
@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 40),
    st.integers(1, 50),
    st.floats(1e-6, 10),
    st.floats(0, 5),
    st.lists(st.integers(0, 40), max_size=3),
)
def test_rates_stay_between_nothing_and_the_peak(shape, epochs, steps, lr, warmup, drops):
    recipe = Recipe(epochs=epochs, lr=lr, schedule=shape, warmup=warmup, drops=tuple(sorted(drops)))
    rates = [recipe.rate(i, steps) for i in range(epochs * steps)]
    assert all(0 <= r <= lr * (1 + 1e-12) for r in rates)
    if shape not in ("onecycle",) and not warmup:
        assert all(a >= b for a, b in zip(rates, rates[1:]))


resnets = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def names_of(stages):
    return [
        "conv1.weight",
        *(
            f"layer{i + 1}.{j}.conv{k}.weight"
            for i, n in enumerate(stages)
            for j in range(n)
            for k in (1, 2)
        ),
        "fc.weight",
    ]


@bounded
@given(
    st.one_of(
        resnets.map(names_of),
        st.lists(
            st.text(st.sampled_from("ab.01"), min_size=1, max_size=12), unique=True, max_size=6
        ),
    ),
    st.sampled_from(sorted(GROUPINGS)),
    seeds,
)
def test_groups_are_a_partition(names, by, seed):
    "Each tensor is in one group, whatever stands beside it; observables of groups add up to the whole"
    found = groups(names, by)
    assert list(found) == names and all(isinstance(g, str) and g for g in found.values())
    assert all(groups([k], by)[k] == g for k, g in found.items())
    if by == "tensor":
        assert len(set(found.values())) == len(names)
    if not names:
        return
    g = random.Random(seed)
    row = lambda k: dict(
        tensor=k,
        count=9,
        alive=g.randrange(1, 9),
        l1=g.random() + 0.1,
        l2=1.0,
        largest=1.0,
        smallest=0.0,
    )
    flow = Flow.of(
        [
            dict(
                n=n,
                time=0.2 * n,
                density=0.8**n,
                loss=1.0,
                metrics=dict(loss=1.0, accuracy=0.5),
                tensors=[row(k) for k in names],
            )
            for n in range(3)
        ]
    )
    table = observable(flow, "share", by)
    assert table.groupby("n").value.sum().values == pytest.approx([1.0] * 3) and len(
        table
    ) == 3 * len(set(found.values()))


@bounded
@given(resnets, resnets, st.sampled_from(sorted(STRATEGIES)))
def test_a_strategy_makes_a_map_that_fits_or_says_why_not(source, target, strategy):
    target = target[: len(source)] + source[len(target) :]
    try:
        m = block_map(strategy, source, target)
    except ValueError as e:
        assert str(e)
        return
    assert parse(str(m)) == m
    for s, n, t in zip(fitted(m, source, target), source, target):
        assert len(s) == t and s[0] == 0 and 0 not in s[1:] and max(s) < n
        if strategy in ("interpolate", "interval", "drop-tail", "drop-head"):
            assert list(s) == sorted(s)
        if STRATEGIES[strategy][1]:
            assert (
                set(s) == set(range(n))
                and max(map(s[1:].count, s[1:]), default=0)
                - min(map(s[1:].count, s[1:]), default=0)
                <= 1
            )
        else:
            assert len(set(s)) == len(s)


@bounded
@given(
    st.one_of(
        st.text(st.sampled_from("0123:;,| "), max_size=24),
        st.text(max_size=12),
        st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=3).map(
            lambda o: "|".join(";".join(f"{i}:{j}" for j, i in enumerate(s)) for s in o)
        ),
    )
)
def test_any_text_is_a_map_or_a_sentence(text):
    try:
        m = parse(text)
    except ValueError as e:
        assert "block map" in str(e)
        return
    assert parse(str(m)) == m and all(s[0] == 0 and 0 not in s[1:] for s in m.stages)


@bounded
@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_the_space_of_maps_is_what_it_is_said_to_be(source, target, ordered):
    try:
        found = every_map((source,), (target,), ordered)
    except ValueError:
        assert source == 1 and target > 1
        return
    assert len(set(found)) == len(found) == _size(source - 1, target - 1, ordered) and all(
        fitted(BlockMap(m), (source,), (target,)) == m for m in found
    )


@bounded
@given(
    resnets,
    resnets,
    st.sampled_from(sorted(STRATEGIES)),
    st.lists(st.floats(0.1, 0.5), min_size=1, max_size=3),
    seeds,
    st.floats(0, 1),
)
def test_a_stretched_ticket_has_copies_and_nothing_else(
    source, target, strategy, rates, seed, share
):
    target = target[: len(source)] + source[len(target) :]
    g = torch.Generator().manual_seed(seed)
    w = {k: torch.randn(3, 2, generator=g) for k in names_of(source)}
    history = MaskHistory.dense({k: t for k, t in w.items() if k != "fc.weight"})
    for rate in rates:
        prune(history, w, Schedule(rate).remove(sum(history.alive().values()), history.total))
    try:
        stages = fitted(block_map(strategy, source, target), source, target)
    except ValueError:
        assume(False)
    t = stretch(Ticket(w, history), strategy, target)
    comes = {
        f"layer{i + 1}.{j}.conv{k}.weight": f"layer{i + 1}.{o}.conv{k}.weight"
        for i, s in enumerate(stages)
        for j, o in enumerate(s)
        for k in (1, 2)
    }
    assert set(t.weights) == set(names_of(target)) and all(
        torch.equal(t.weights[k], w[comes.get(k, k)]) for k in t.weights
    )
    for n in range(history.rounds + 1):
        assert all(
            torch.equal(m, history.mask(n)[comes.get(k, k)]) for k, m in t.history.mask(n).items()
        )
    assert len({o.data_ptr() for o in t.weights.values()}) == len(
        t.weights
    )  # no copy shares memory with another
    density = t.history.density() + share * (1 - t.history.density())
    exact = at_density(t, density, seed)
    assert sum(exact.history.alive().values()) == round(density * t.history.total) and all(
        (t.history.mask()[k] <= m).all() for k, m in exact.history.mask().items()
    )


@bounded
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12),
        st.tuples(
            st.sampled_from([*FLOATS, torch.int64, torch.int8, torch.bool, torch.uint8]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        min_size=1,
        max_size=4,
    ),
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(max_size=5),
        ),
    ),
    seeds,
)
def test_tickets_come_back_as_they_were(named, about, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = {k: (torch.randn(s, generator=g) * 3).to(dtype) for k, (dtype, s) in named.items()}
    floats = {k: t for k, t in tensors.items() if t.dtype in FLOATS}
    when = {k: torch.randint(1, 256, t.shape, generator=g) for k, t in floats.items()}
    died = {k: d.masked_fill(d > 200, ALIVE).to(torch.uint8) for k, d in when.items()}
    t = Ticket(tensors, MaskHistory(died, 200), [dict(n=0, metrics={"loss": 0.1})], about)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket.safetensors"
        t.save(path)
        back = Ticket.load(path)
        first = path.read_bytes()
        back.save(path)
        assert path.read_bytes() == first  # and what was read is written as the same bytes
    assert digest(back.weights) == digest(tensors) and digest(back.history.died) == digest(died)
    assert (back.history.rounds, back.rounds, back.about) == (200, t.rounds, about)
    assert all(
        back.weights[k].dtype == v.dtype and back.weights[k].shape == v.shape
        for k, v in tensors.items()
    )


@pytest.fixture(scope="module")
def whole():
    return sound("ticket")


def test_a_damaged_file_is_always_a_ticket_error(whole, tmp_path):
    draw, path = random.Random(0), tmp_path / "t"
    for case in range(300):
        kind, data = damaged(whole, draw)
        path.write_bytes(data)
        assert data != whole
        with pytest.raises(TicketError):
            Ticket.load(path)
            pytest.fail(f"case {case} ({kind}) was loaded")
    path.write_bytes(whole)
    assert Ticket.load(path).history.total == 36  # the undamaged file is read


def test_every_bit_of_the_file_counts(whole, tmp_path):
    "Every byte of it, one flipped bit at a time"
    path, draw = tmp_path / "t", random.Random(1)
    for i in range(len(whole)):
        data = bytearray(whole)
        data[i] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(TicketError):
            Ticket.load(path)
            pytest.fail(
                f"bit flipped in byte {i} of {len(whole)}: {whole[max(0, i - 20) : i + 20]}"
            )


class Evil:
    "Unpickled, it writes a file"

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return exec, (f"open({self.mark!r}, 'w').close()",)


@pytest.mark.parametrize("form", ["pickle", "old pickle", "torch", "old torch", "tail"])
def test_code_in_a_file_is_never_run(form, tmp_path, whole):
    mark, path = tmp_path / "mark", tmp_path / "ticket.safetensors"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()
    mark.unlink()  # it would
    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil(mark)))
    if form == "old pickle":
        path.write_bytes(pickle.dumps(Evil(mark), protocol=0))
    if form == "torch":
        torch.save({"weights": Evil(mark)}, path)
    if form == "old torch":
        torch.save({"weights": Evil(mark)}, path, _use_new_zipfile_serialization=False)
    if form == "tail":
        path.write_bytes(whole + pickle.dumps(Evil(mark)))
    for load in (Ticket.load, lambda p: load_tensors(p, "state")):
        with pytest.raises(TicketError) as e:
            load(path)
        assert not mark.exists()
    if form in ("pickle", "torch", "old torch"):
        assert "can run code, so it is not opened" in str(e.value)


names = st.lists(
    st.one_of(
        st.text(st.sampled_from("ab/\\ é0"), max_size=4), st.text(max_size=8), st.integers(0, 999)
    ),
    max_size=3,
).map(tuple)


@bounded
@given(st.tuples(seeds, names), st.tuples(seeds, names))
def test_streams_differ(a, b):
    key = lambda o: (o[0], tuple(map(str, o[1])))
    assert (stream(a[0], *a[1]) == stream(b[0], *b[1])) == (key(a) == key(b))
    assert 0 <= stream(a[0], *a[1]) < 2**63


@bounded
@given(
    st.lists(st.text("ab/\\", max_size=3), min_size=2, max_size=4),
    st.sampled_from(["/", "\\/", "\\\\/"]),
)
def test_names_do_not_run_together(parts, between):
    "A name that holds the separator is not two names"
    assert stream(0, *parts) != stream(0, between.join(parts))


@bounded
@given(seeds, st.integers(0, 50), st.integers(0, 50))
def test_streams_do_not_disturb_each_other(seed, used, epoch):
    "What is drawn from one stream is the same whatever was drawn from another, or from the global generators"
    want = torch.rand(5, generator=generator(seed, "order", epoch))
    torch.manual_seed(used)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with seeded(seed, "augment", epoch):
        torch.rand(used)
        np.random.rand(used)
        [random.random() for _ in range(used)]
    assert torch.equal(torch.rand(5, generator=generator(seed, "order", epoch)), want)
    assert (
        torch.equal(torch.get_rng_state(), state[0])
        and np.random.get_state()[1].tolist() == state[1]
        and random.getstate() == state[2]
    )


def test_streams_are_uncorrelated():
    "Neighbouring seeds, epochs and names: 400 streams of 400 draws, correlations as chance makes them"
    keys = [
        (s, n, e)
        for s in range(10)
        for n in ("order", "augment", "mask", "init")
        for e in range(10)
    ]
    x = torch.stack([torch.randn(400, generator=generator(*k)) for k in keys])
    r = torch.corrcoef(x)[~torch.eye(400, dtype=torch.bool)]
    assert r.std().item() == pytest.approx(1 / 400**0.5, rel=0.03) and r.abs().max() < 6 / 400**0.5
