"What training changes besides weights is rewound and resumed, or refused by name"

import functools
import itertools
import json
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from rg_tickets.basics import generator, seeded
from rg_tickets.imp import imp
from rg_tickets.models.names import state
from rg_tickets.tasks.core import Resident, Task
from rg_tickets.tasks.identity import describe
from rg_tickets.tasks.state import Unsaved, _same, decode, encode, put_back, values_read
from rg_tickets.tickets import Ticket, TicketError, digest
from rg_tickets.train import Recipe

RECIPE = Recipe(epochs=2, batch_size=16, lr=0.1)


def numbers(n=64):
    x = torch.randn(n, 8, generator=generator(0, "data"))
    return x, x[:, :3].argmax(1)


def toy(loss=F.cross_entropy, **kwargs):
    x, y = numbers()
    return Task("toy", Resident(x, y, x[:32], y[:32]), loss, **kwargs)


def mlp():
    with seeded(0, "mlp"):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def run(network, task, **kwargs):
    how = dict(rounds=2, prune=0.3, recipe=RECIPE, device="cpu") | kwargs
    return list(imp(task, network, **how))


class Killed(Exception):
    pass


def cut(make, folder, *places, **kwargs):
    "A run that is killed at each place (round, step), and begun anew with new objects each time"
    for place in places:

        def report(n, step, end):
            if (n, step) == place:
                raise Killed

        # the state of the epoch before the kill is on the disk
        with pytest.raises(Killed):
            run(*make(), folder=folder, report=report, checkpoint_every=0, **kwargs)
    net, task = make()
    return run(net, task, folder=folder, checkpoint_every=0, **kwargs), net


# Values


ODD = [
    dict(a=[1, 2.5, "x", None, True], b=(1, (2,))),
    deque([1, 2, 3], maxlen=3),
    {1, 2},
    frozenset({"a"}),
    Counter(a=2),
    OrderedDict(b=1, a=2),
    np.float64(0.1),
    np.arange(6.0).reshape(2, 3),
    np.array([], dtype=np.int8),
    {(0, 1): torch.eye(2), "n": [torch.tensor(3)]},
    [float("nan"), float("inf"), -0.0, 2**70, 1 + 2j, b"\x00\xff"],
]


@pytest.mark.parametrize("value", ODD, ids=lambda v: type(v).__name__)
def test_plain_values_survive_a_file(value):
    tensors = {}
    text = json.dumps(encode(value, tensors))
    assert _same(decode(json.loads(text), tensors), value)
    back = decode(encode(value, tensors), tensors)
    assert type(back) is type(value) and getattr(back, "maxlen", 0) == getattr(value, "maxlen", 0)


# Kinds of state, each in a network, a loss, and a sampler


class Tick:
    "A small object with an attribute"

    def __init__(self):
        self.n = 0


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


def _bump_attribute(o):
    o.n += 1


def _bump_item(o):
    o["n"] = o["n"] + 1


KINDS = {  # how it is made, how it counts, how the count is read
    "list": (list, lambda o: o.append(1), len),
    "deque": (lambda: deque(maxlen=50), lambda o: o.append(1), len),
    "dict": (lambda: dict(n=0), _bump_item, lambda o: o["n"]),
    "defaultdict": (lambda: defaultdict(int), _bump_item, lambda o: o["n"]),
    "Counter": (Counter, _bump_item, lambda o: o["n"]),
    "set": (set, lambda o: o.add(len(o)), len),
    "array": (lambda: np.zeros(2), lambda o: np.add(o, 1, out=o), lambda o: int(o[0])),
    "tensor": (lambda: torch.zeros(2), lambda o: o.add_(1), lambda o: int(o[0])),
    "namespace": (lambda: types.SimpleNamespace(n=0), _bump_attribute, lambda o: o.n),
    "own object": (Tick, _bump_attribute, lambda o: o.n),
    "slots": (Slotted, _bump_attribute, lambda o: o.n),
    "nested": (
        lambda: {"in": [Tick(), len]},
        lambda o: _bump_attribute(o["in"][0]),
        lambda o: o["in"][0].n,
    ),
}
REBOUND = {
    "number": (0, lambda n: n + 1, int),
    "text": ("", lambda s: s + "x", len),
    "np.float64": (np.float64(0), lambda a: a + 1, int),
    "tuple": ((), lambda t: (*t, 1), len),
}


class Counting:
    "Something that holds a state of one kind, and counts in it"

    def hold(self, kind):
        self.kind = kind
        self.held = KINDS[kind][0]() if kind in KINDS else REBOUND[kind][0]

    def count(self):
        if self.kind in KINDS:
            KINDS[self.kind][1](self.held)
        else:
            self.held = REBOUND[self.kind][1](self.held)
        return (
            KINDS[self.kind][2](self.held)
            if self.kind in KINDS
            else REBOUND[self.kind][2](self.held)
        )


class CountingLoss(Counting):
    def __call__(self, output, target):
        return F.cross_entropy(output, target) * (1 + 1 / self.count())


class CountingNetwork(nn.Module, Counting):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) * (1 + 1 / self.count()))


class CountingSampler(Sampler, Counting):
    "The order of samples depends on how often it was read"

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        first = 7 * self.count()
        return iter([(first + i) % self.n for i in range(self.n)])

    def __len__(self):
        return self.n


class CountingBatches(CountingSampler):
    def __iter__(self):
        order = list(super().__iter__())
        return iter([order[i : i + 16] for i in range(0, self.n, 16)])

    def __len__(self):
        return self.n // 16


class CountingData(Dataset, Counting):
    "Noise that falls with the number of samples read"

    def __init__(self):
        self.x, self.y = numbers()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 1 / self.count(), self.y[i]


def held_test():
    x, y = numbers()
    return DataLoader(TensorDataset(x[:32], y[:32]), batch_size=16)


def with_loss(kind):
    loss = CountingLoss()
    loss.hold(kind)
    return mlp(), toy(loss), loss


def with_network(kind):
    with seeded(0, "mlp"):
        net = CountingNetwork()
    net.hold(kind)
    return net, toy(), net


def with_sampler(kind):
    sampler = CountingSampler(64)
    sampler.hold(kind)
    train = DataLoader(TensorDataset(*numbers()), batch_size=16, sampler=sampler)
    return mlp(), Task.from_loaders(train, held_test()), sampler


def with_batch_sampler(kind):
    sampler = CountingBatches(64)
    sampler.hold(kind)
    train = DataLoader(TensorDataset(*numbers()), batch_sampler=sampler)
    return mlp(), Task.from_loaders(train, held_test()), sampler


def with_data(kind):
    data = CountingData()
    data.hold(kind)
    return mlp(), Task.from_loaders(DataLoader(data, batch_size=16), held_test()), data


PLACES = dict(
    loss=with_loss,
    network=with_network,
    sampler=with_sampler,
    batches=with_batch_sampler,
    data=with_data,
)
PAIRS = [
    *itertools.product(["loss", "network"], [*KINDS, *REBOUND]),
    *itertools.product(["sampler", "batches", "data"], ["list", "own object", "number", "array"]),
]


@pytest.mark.parametrize("place, kind", PAIRS, ids=lambda v: v)
def test_state_is_rewound_and_resumed(place, kind, tmp_path):
    make = lambda: PLACES[place](kind)[:2]
    net, task, o = PLACES[place](kind)
    whole = run(net, task, folder=tmp_path / "whole")
    again, other = cut(make, tmp_path / "cut", (0, 8), (1, 8), (2, 4))
    assert repr(again) == repr(whole)
    assert digest(state(net)) == digest(state(other))
    ticket = Ticket.load(tmp_path / "whole" / "ticket.safetensors")
    for d in ticket.history.died.values():
        d.fill_(255)  # the same mask in both rounds, so the rounds must be the same
    net, task, o = PLACES[place](kind)
    one, two = run(net, task, control="given", ticket=ticket, rounds=1)
    assert (one.loss, one.metrics, one.tensors) == (two.loss, two.metrics, two.tensors)


def test_data_that_count_are_rewound_to_ends_of_epochs_only(tmp_path):
    make = lambda: with_sampler("number")[:2]
    whole = run(*make(), rewind="1ep")
    again, _ = cut(make, tmp_path, (0, 8), (1, 8), rewind="1ep")
    assert repr(again) == repr(whole)
    with pytest.raises(ValueError, match="task's data.train.sampler.held counts while data are"):
        run(*make(), rewind="3it")


# What cannot be set back is refused before training


class Mode(Enum):
    WARM = 1
    COLD = 2


class Changing:
    "A loss that counts in something that cannot be copied"

    def __init__(self, kind):
        self.kind, self.held = kind, None
        self.begin()

    def begin(self):
        made = dict(iterator=lambda: iter(range(1000)), count=itertools.count, cycle=self.cycle)
        made |= dict(generator=self.draws, enum=lambda: Mode.WARM, objects=lambda: [Tick()])
        self.held = made.get(self.kind, Tick)()

    def cycle(self):
        return itertools.cycle([1, 2])

    def draws(self):
        yield from range(1000)

    def __call__(self, output, target):
        if self.kind == "enum":
            self.held = Mode.COLD
        elif self.kind == "objects":
            self.held.append(Tick())
        elif self.kind == "replaced":
            self.held = Tick()
        else:
            next(self.held)
        return F.cross_entropy(output, target)


@pytest.mark.parametrize(
    "kind", ["iterator", "count", "cycle", "generator", "enum", "objects", "replaced"]
)
def test_what_cannot_be_set_back_is_refused_by_name(kind):
    steps = []
    with pytest.raises(ValueError, match=r"task's loss\.held \(\w+\) changes during training"):
        run(mlp(), toy(Changing(kind)), report=lambda *a: steps.append(a))
    assert not steps


class Cached(nn.Module):
    "Harmless: memory of a function, a hook, a value that is computed once"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 3)
        self.a.register_forward_hook(lambda *args: None)

    @property
    def scale(self):
        if not hasattr(self, "_scale"):
            self._scale = 2.0
        return self._scale

    def forward(self, x):
        return self.a(x) * self.scale * remembered(1)


@functools.lru_cache(maxsize=None)
def remembered(n):
    return float(n)


def test_caches_and_hooks_are_not_accused(tmp_path):
    def made():
        with seeded(0, "cached"):
            return Cached(), toy()

    whole = run(*made(), preset="all")
    assert repr(cut(made, tmp_path, (0, 8), (1, 8), preset="all")[0]) == repr(whole)


def test_state_in_closures_globals_and_defaults_is_rewound(tmp_path):
    def make():
        count, seen = 0, []

        def loss(output, target, kept={"n": 0}):
            nonlocal count
            count, kept["n"] = count + 1, kept["n"] + 1
            seen.append(count)
            return F.cross_entropy(output, target) * (1 + 1 / count + 1 / kept["n"] + 1 / len(seen))

        return mlp(), toy(loss)

    whole = run(*make(), folder=tmp_path / "whole")
    assert repr(cut(make, tmp_path / "cut", (0, 8), (1, 8))[0]) == repr(whole)


class Buffered(nn.Module):
    "A loss with a buffer, one that is not saved, and a counter"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("last", torch.zeros(()), persistent=False)
        self.steps = 0

    def forward(self, output, target):
        self.steps += 1
        self.mean.mul_(0.9).add_(0.1 * output.detach().mean(0))
        self.last = output.detach().abs().max()
        return F.cross_entropy(output + self.mean, target) * (1 + self.last / self.steps)


@pytest.mark.parametrize("rewind", ["init", "3it", "lr"])
def test_a_loss_with_buffers_is_rewound_and_resumed(rewind, tmp_path):
    make = lambda: (mlp(), toy(Buffered()))
    whole = run(*make(), folder=tmp_path / "whole", rewind=rewind)
    again, _ = cut(make, tmp_path / "cut", (0, 8), (1, 8), (2, 4), rewind=rewind)
    assert repr(again) == repr(whole)


def test_data_that_a_loss_or_a_set_holds_is_not_copied_if_it_is_large(monkeypatch):
    monkeypatch.setattr("rg_tickets.tasks.state.LARGE", 100)
    loss = Buffered()
    loss.mean = torch.zeros(300)
    before = Unsaved.of(mlp(), dict(loss=loss))
    assert ("loss", "mean") in before.tokens and "loss.mean" not in before.tensors
    Unsaved.of(mlp(), dict(loss=loss)).check(before, mlp())
    loss.mean += 1
    with pytest.raises(ValueError, match=r"loss.mean \(Tensor\) changes"):
        Unsaved.of(mlp(), dict(loss=loss)).check(before, mlp())


def test_after_the_block_all_is_as_before():
    held = dict(a=[1, 2], b=dict(c=np.ones(2)), d=[Tick()])
    inner = held["a"]
    with put_back(nn.Identity(), thing=held):
        inner.append(3)
        held["b"]["c"] += 1
        held["d"][0].n = 5
        held["new"] = 1
    assert held["a"] is inner and inner == [1, 2] and held["d"][0].n == 0
    assert held["b"]["c"].tolist() == [1, 1] and list(held) == ["a", "b", "d"]


# Settings


SCALE, WEIGHTS = 2.0, dict(a=[1.0, 2.0])


def factor():
    return SCALE


def scaled(output, target):
    return F.cross_entropy(output, target) * factor() * WEIGHTS["a"][0]


class Configured(nn.Module):
    "Scales by a dictionary of settings, an object, and an attribute of the class"

    power = 1.0

    def __init__(self, kind="none"):
        super().__init__()
        self.a = nn.Linear(8, 3)
        self.config, self.other = {"scale": 2}, types.SimpleNamespace(scale=2)
        self.grid = torch.ones(3) * 2

    def forward(self, x):
        return self.a(x) * self.config["scale"] * self.other.scale * self.grid * self.power


def configured():
    with seeded(0, "configured"):
        return Configured()


def set_item(net):
    net.config["scale"] = 3


def set_attribute(net):
    net.other.scale = 3


def set_tensor(net):
    net.grid = torch.ones(3) * 3


@pytest.mark.parametrize(
    "change, said",
    [
        (set_item, "reads.config ({scale=2} there, {scale=3} here)"),
        (set_attribute, "reads.other.scale (2 there, 3 here)"),
        (set_tensor, "reads.grid (Tensor[3]"),
        (lambda net: setattr(Configured, "power", 2.0), "power (1.0 there, 2.0 here)"),
    ],
)
def test_settings_of_a_network_are_compared(change, said, tmp_path, monkeypatch):
    monkeypatch.setattr(Configured, "power", 1.0)
    how = dict(preset="all", rounds=1, folder=tmp_path)
    whole = run(configured(), toy(), **how)
    assert repr(run(configured(), toy(), **how)) == repr(whole)
    net = configured()
    change(net)
    with pytest.raises(TicketError) as e:
        run(net, toy(), **how)
    assert said in str(e.value)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("SCALE", 3.0, "reads.task's loss.factor.SCALE (2.0 there, 3.0 here)"),
        ("WEIGHTS", dict(a=[2.0]), "reads.task's loss.WEIGHTS"),
        ("factor", lambda: 2.0, "reads.task's loss.factor"),
    ],
)
def test_global_values_of_a_loss_are_compared(name, value, said, tmp_path, monkeypatch):
    whole = run(mlp(), toy(scaled), folder=tmp_path, rounds=1)
    assert repr(run(mlp(), toy(scaled), folder=tmp_path, rounds=1)) == repr(whole)
    monkeypatch.setitem(globals(), name, value)
    with pytest.raises(TicketError) as e:
        run(mlp(), toy(scaled), folder=tmp_path, rounds=1)
    assert said in str(e.value)


def test_closures_and_defaults_of_a_loss_are_compared(tmp_path):
    def make(a, b):
        return lambda o, y, c=b: F.cross_entropy(o, y) * a * c

    run(mlp(), toy(make(2.0, 1.0)), folder=tmp_path, rounds=1)
    for a, b in ((3.0, 1.0), (2.0, 2.0)):
        with pytest.raises(TicketError, match="fingerprint.loss"):
            run(mlp(), toy(make(a, b)), folder=tmp_path, rounds=1)


def test_values_of_an_own_module_are_read(monkeypatch):
    made = types.ModuleType("settings_of_a_test")
    made.RATE = 0.5
    monkeypatch.setitem(globals(), "settings", made)
    losses = lambda o, y: settings.RATE * F.cross_entropy(o, y), lambda o, y: made.RATE * o  # noqa: F821
    found = [values_read(mlp(), dict(loss=loss)) for loss in losses]
    assert found == [{"loss.settings.RATE": "0.5"}, {"loss.made.RATE": "0.5"}]


SOURCE = """
import torch
from torch import nn

class Base(nn.Module):
    def scale(self):
        return 2.0

class Net(Base):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 3)

    def forward(self, x):
        return self.a(x) * self.scale()

def loss(o, y):
    return torch.nn.functional.cross_entropy(o, y)
"""


def as_module(name, source=SOURCE):
    module = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    with seeded(0, "moved"):
        return module.Net(), toy(module.loss)


def test_a_class_that_moved_is_the_same_and_an_edited_one_is_not(tmp_path):
    how = dict(preset="all", rounds=1, folder=tmp_path)
    whole = run(*as_module("__main__"), **how)
    assert repr(run(*as_module("networks"), **how)) == repr(whole)
    for old, new in (("* self.scale()", "+ self.scale()"), ("return 2.0", "return 3.0")):
        with pytest.raises(TicketError) as e:
            run(*as_module("networks", SOURCE.replace(old, new)), **how)
        assert "the network was Net#" in str(e.value) and "there and is Net#" in str(e.value)
    assert "networks" not in describe(type(as_module("networks")[0]))


def test_other_initial_weights_point_to_the_seed(tmp_path):
    run(mlp(), toy(), folder=tmp_path, rounds=1)
    with seeded(1, "mlp"):
        other = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(TicketError, match="built without the seed of then.*torch.manual_seed"):
        run(other, toy(), folder=tmp_path, rounds=1)


def test_a_folder_whose_code_was_named_otherwise_is_taken_up_with_a_warning(tmp_path):
    whole = run(mlp(), toy(), folder=tmp_path, rounds=1)
    ticket = Ticket.load(tmp_path / "ticket.safetensors")
    del ticket.about["reads"]
    ticket.about["structure"]["digest"] = "other"
    ticket.save(tmp_path / "ticket.safetensors")
    with pytest.warns(UserWarning, match="not known whether .* structure"):
        assert repr(run(mlp(), toy(), folder=tmp_path, rounds=1)) == repr(whole)


# More rounds


@pytest.mark.parametrize(
    "how, prune",
    [
        ({}, 0.3),
        (dict(rewind="3it"), 0.3),
        (dict(control="random"), 0.3),
        (dict(keep="last"), 0.3),
        (dict(keep="best"), 0.3),
        ({}, [0.3, 0.2, 0.4, 0.1]),
        (dict(scope="layer"), lambda n: 0.1 * n),
    ],
)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_more_rounds_are_those_of_a_long_run(how, prune, first, tmp_path):
    make = lambda: (mlp(), toy(Buffered()))
    net, task = make()
    long = run(net, task, rounds=4, prune=prune, folder=tmp_path / "long", **how)
    run(*make(), rounds=first, prune=prune, folder=tmp_path / "short", **how)
    other, task = make()
    more = run(other, task, rounds=4, prune=prune, folder=tmp_path / "short", **how)
    assert repr(more) == repr(long) and digest(state(net)) == digest(state(other))
    a, b = (Ticket.load(tmp_path / k / "ticket.safetensors") for k in ("long", "short"))
    assert a.about == b.about and digest(a.history.died) == digest(b.history.died)


def test_a_longer_run_that_is_killed_goes_on(tmp_path):
    make = lambda: (mlp(), toy(Buffered()))
    long = run(*make(), rounds=4, rewind="3it")
    run(*make(), rounds=1, rewind="3it", folder=tmp_path)
    again = cut(make, tmp_path, (1, 8), (3, 8), rounds=4, rewind="3it")[0]
    assert repr(again) == repr(long)


def test_rounds_that_would_need_lost_weights_or_another_schedule_are_refused(tmp_path):
    for k, how in dict(a=dict(rewind="lr"), b=dict(control="oneshot")).items():
        run(mlp(), toy(), rounds=1, folder=tmp_path / k, **how)
        with pytest.raises(TicketError, match="run all 2 rounds in another folder"):
            run(mlp(), toy(), rounds=2, folder=tmp_path / k, **how)
    run(mlp(), toy(), rounds=2, folder=tmp_path / "d", prune=[0.2, 0.3])
    for rounds, prune in ((3, [0.2, 0.4, 0.3]), (1, [0.2]), (3, 0.2)):
        with pytest.raises(TicketError, match="more rounds may be asked for"):
            run(mlp(), toy(), rounds=rounds, prune=prune, folder=tmp_path / "d")


# Before training


def line_task(loss, target):
    x = torch.randn(32, 8, generator=generator(0, "x"))
    return Task("line", Resident(x, target(x), x, target(x)), loss)


SPREAD = {
    "minus": lambda o, y: ((o - y) ** 2).mean(),
    "mse_loss": lambda o, y: F.mse_loss(o, y),
    "module": lambda o, y: nn.L1Loss()(o, y),
}
FITS = {
    "squeezed": lambda o, y: ((o.squeeze(1) - y) ** 2).mean(),
    "unsqueezed": lambda o, y: F.mse_loss(o, y[:, None]),
    "viewed": lambda o, y: ((o.view_as(y) - y) ** 2).mean(),
}


@pytest.mark.parametrize("loss", SPREAD.values(), ids=SPREAD)
def test_a_loss_that_spreads_is_refused(loss):
    net, task = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1)), line_task(loss, lambda x: x[:, 0])
    with warnings.catch_warnings(), pytest.raises(ValueError) as e:
        warnings.simplefilter("ignore")
        run(net, task)
    assert "outputs [16, 1] and targets [16] differ in shape" in str(e.value)


@pytest.mark.parametrize("loss", FITS.values(), ids=FITS)
def test_a_loss_that_takes_care_of_shapes_is_not(loss):
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    assert run(net, line_task(loss, lambda x: x[:, 0]), rounds=0)


def normed():
    with seeded(0, "normed"):
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))


def test_a_last_batch_of_one_is_refused_where_it_cannot_be_normalised():
    x, y = numbers(33)
    loaders = lambda **how: Task.from_loaders(
        DataLoader(TensorDataset(x, y), batch_size=16, **how), held_test()
    )
    with pytest.raises(ValueError, match="leave one sample for batch 2.*drop_last=True"):
        run(normed(), loaders(), rounds=0)
    assert run(normed(), loaders(drop_last=True), rounds=0)
    assert run(mlp(), loaders(), rounds=0)


# Arguments of another kind


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: run(mlp(), toy(), recipe="adamw"), "recipe must be a Recipe, such as"),
        (lambda: run(toy(), mlp()), "task and network are swapped"),
        (lambda: run(mlp(), None), "task must be a Task"),
        (lambda: run("resnet", toy()), "network must be a network"),
        (lambda: run(mlp(), toy(), ticket="a"), "ticket must be a Ticket"),
        (lambda: Recipe(optimiser="sgd"), "unknown setting of a Recipe 'optimiser'; did you mean"),
        (lambda: run(mlp(), toy(), rewind="2epochs"), "write '500it' for 500 iterations, '2ep'"),
        (lambda: run(mlp(), toy(), rewind=None), "write '500it' for 500 iterations, '2ep'"),
        (lambda: Task("t", [1, 2]), "give Resident"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_one_sentence(call, said):
    with pytest.raises(ValueError) as e:
        call()
    assert said in str(e.value)


def test_two_runs_in_one_process_are_told_so(tmp_path):
    first = imp(toy(), mlp(), 1, recipe=RECIPE, device="cpu", folder=tmp_path)
    next(first)
    with pytest.raises(RuntimeError, match="another run in this process is working on"):
        run(mlp(), toy(), folder=tmp_path)
    first.close()


# Networks that a loss refers to


class Penalised(nn.Module):
    "A loss that looks at the weights of the network by one of its attributes"

    def __init__(self, network):
        super().__init__()
        self.of = [network]

    def forward(self, output, target):
        return F.cross_entropy(output, target) + self.of[0][0].weight.pow(2).sum()


def penalty(network, output, target):
    return F.cross_entropy(output, target) + network[0].weight.pow(2).sum()


REFERRING = {
    "closure": lambda net: lambda output, target: penalty(net, output, target),
    "partial": lambda net: functools.partial(penalty, net),
    "method": lambda net: Penalised(net).forward,
    "module": Penalised,
    "list of weights": lambda net: (lambda ws: lambda o, t: penalty([ws[0]], o, t))([net[0]]),
}


@pytest.mark.parametrize("how", REFERRING)
def test_a_loss_may_look_at_the_weights_of_the_network(how, tmp_path):
    def make():
        network = mlp()
        return network, toy(REFERRING[how](network))

    network, task = make()
    weights = dict(network.named_parameters())
    whole = run(network, task, folder=tmp_path / "whole")
    assert all(p is weights[k] for k, p in network.named_parameters())
    assert all(type(p) is nn.Parameter and p.requires_grad for p in network.parameters())
    plain = run(mlp(), toy())
    assert whole[-1].metrics["loss"] != plain[-1].metrics["loss"]  # the penalty was at work
    again, _ = cut(make, tmp_path / "cut", (0, 4), (1, 4))
    assert repr(again) == repr(whole)


class Distilled(nn.Module):
    "A loss with a frozen teacher, which follows the pupil if it is told to"

    def __init__(self, teacher, pupil=None):
        super().__init__()
        self.teacher, self.pupil = teacher.requires_grad_(False), [pupil]

    def forward(self, output, target):
        if self.pupil[0] is not None:
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.pupil[0].parameters()):
                    slow.lerp_(fast, 0.1)
        aim = sum(p.sum() for p in self.teacher.parameters())
        return F.cross_entropy(output, target) + (output.mean() - aim).pow(2)


@pytest.mark.parametrize("follows", [False, True])
def test_a_teacher_keeps_its_parameters_and_is_set_back(follows, tmp_path):
    def make():
        network, teacher = mlp(), mlp()
        return network, toy(Distilled(teacher, network if follows else None))

    network, task = make()
    held = dict(task.loss.teacher.named_parameters())
    before = digest(task.loss.teacher.state_dict())
    whole = run(network, task, folder=tmp_path / "whole")
    now = dict(task.loss.teacher.named_parameters())
    assert all(now[k] is held[k] and type(now[k]) is nn.Parameter for k in held)
    assert (digest(task.loss.teacher.state_dict()) == before) == (not follows)
    again, _ = cut(make, tmp_path / "cut", (0, 4), (1, 4))
    assert repr(again) == repr(whole)


def test_a_large_frozen_parameter_is_compared_and_not_copied(monkeypatch):
    monkeypatch.setattr("rg_tickets.tasks.state.LARGE", 100)
    loss = Distilled(mlp())
    before = Unsaved.of(mlp(), dict(loss=loss))
    assert ("loss.teacher.0", "weight") in before.tokens
    Unsaved.of(mlp(), dict(loss=loss)).check(before, mlp())
    with torch.no_grad():
        loss.teacher[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"loss.teacher.0.weight \(Parameter\) changes"):
        Unsaved.of(mlp(), dict(loss=loss)).check(before, mlp())


# Optimizers that a loss brings along


class Adversary:
    "A loss with a critic that is trained as it is called"

    def __init__(self):
        with seeded(0, "critic"):
            self.critic = nn.Linear(3, 1)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=0.05)

    def step(self, output):
        score = self.critic(output.detach())
        self.optimizer.zero_grad()
        (score.pow(2).mean() - score.mean()).backward()
        self.optimizer.step()

    def __call__(self, output, target):
        if output.requires_grad:
            self.step(output)
        return F.cross_entropy(output, target) + 0.1 * self.critic(output).mean()


class Scheduled:
    "A loss whose weight is a learning rate; the optimizer is held by the schedule only"

    def __init__(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)

    def __call__(self, output, target):
        optimizer = self.schedule.optimizer
        (group,) = optimizer.param_groups
        weight = group["params"][0]
        if output.requires_grad:
            weight.grad = torch.ones(1) / 100
            optimizer.step()
            self.schedule.step()
        return F.cross_entropy(output, target) * (1 + group["lr"]) * weight.detach().abs().sum()


@pytest.mark.parametrize("rewind", ["init", "3it"])
@pytest.mark.parametrize("loss", [Adversary, Scheduled])
def test_an_optimizer_in_a_loss_is_rewound_and_resumed(loss, rewind, tmp_path):
    make = lambda: (mlp(), toy(loss()))
    whole = run(*make(), folder=tmp_path / "whole", rewind=rewind)
    again, _ = cut(make, tmp_path / "cut", (0, 4), (1, 4), rewind=rewind)
    assert repr(again) == repr(whole)
    ticket = Ticket.load(tmp_path / "whole" / "ticket.safetensors")
    for d in ticket.history.died.values():
        d.fill_(255)  # the same mask in both rounds, so the rounds must be the same
    one, two = run(*make(), control="given", ticket=ticket, rounds=1, rewind=rewind)
    assert (one.loss, one.metrics, one.tensors) == (two.loss, two.metrics, two.tensors)
