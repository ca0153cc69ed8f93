"Elastic tickets against slow or foreign peers: real ResNets, rebuilt predictions, many draws"

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from rg_tickets import free
from rg_tickets.basics import generator, seeded
from rg_tickets.connect import connectivity, reestimate
from rg_tickets.elastic import (
    BLOCKS,
    STRATEGIES,
    block_map,
    blocks,
    drift,
    every_map,
    fitted,
    guided,
    parse,
    stretch,
)
from rg_tickets.masks import MaskHistory, prune
from rg_tickets.models.prunable import prunable
from rg_tickets.models.resnets import resnet
from rg_tickets.tasks.core import Task, evaluate
from rg_tickets.tickets import Ticket, TicketError, apply, digest
from rg_tickets.uniformity import spread, trend

LISTED = [  # strategy, source, target, the original authors' map
    ("interpolate", 20, 32, "0:0;1:1,2;2:3,4"),
    ("append", 20, 32, "0:0;1:1,3;2:2,4"),
    ("interpolate", 32, 56, "0:0;1:1,2;2:3,4;3:5,6;4:7,8"),
    ("append", 32, 56, "0:0;1:1,5;2:2,6;3:3,7;4:4,8"),
    ("interpolate", 14, 20, "0:0;1:1,2"),
    ("interpolate", 14, 44, "0:0;1:1,2,3,4,5,6"),
    ("append", 14, 56, "0:0;1:1,2,3,4,5,6,7,8"),
    ("partial-head", 32, 44, "0:0;1:1,3;2:2,4;3:5;4:6"),
    ("interpolate", 44, 56, "0:0;1:1,2;2:3,4;3:5;4:6;5:7;6:8"),
    ("interval", 56, 32, "0:0;1:1;3:2;5:3;7:4"),
    ("drop-tail", 56, 32, "0:0;1:1;2:2;3:3;4:4"),
    ("drop-head", 56, 32, "0:0;5:1;6:2;7:3;8:4"),
    ("reorder", 44, 44, "0:0;1:2;2:1;3:4;4:3;5:6;6:5"),
    ("interpolate", "resnet18", "resnet34", "0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2,3,4,5|0:0;1:1,2"),
    ("drop-tail", "resnet34", "resnet18", "0:0;1:1|0:0;1:1|0:0;1:1|0:0;1:1"),
]


def pruned(network, rounds=3, scales=False):
    "A ticket of a network that is pruned and never trained; with `scales` every tensor gets a scale of its own"
    g, p = generator(0, "scales"), prunable(network)
    with torch.no_grad():
        for w in p.values():
            w.mul_(1 + scales * 0.5 * torch.rand(1, generator=g))
    history = MaskHistory.dense(p)
    for _ in range(rounds):
        prune(history, {k: w.detach() for k, w in p.items()}, sum(history.alive().values()) // 5)
    return Ticket(
        {k: t.clone() for k, t in network.state_dict().items()},
        history,
        about=dict(model=network.name, task="none"),
    )


def cifar(depth, **kw):
    return resnet(f"cifar_resnet{depth}", **dict(width=4, in_channels=1) | kw)


@pytest.mark.parametrize("strategy, source, target, text", LISTED, ids=lambda o: str(o)[:24])
def test_listed_maps(strategy, source, target, text):
    assert str(block_map(strategy, source, target)) == str(parse(text)) == text
    assert (
        fitted(text, source, target) in every_map(source, target, ordered=False, limit=10**8)
        if isinstance(source, int) and target < 44
        else True
    )


@pytest.mark.parametrize(
    "strategy, source, target, text",
    [o for o in LISTED if isinstance(o[1], int)],
    ids=lambda o: str(o)[:24],
)
def test_listed_maps_carry_tickets(strategy, source, target, text):
    ticket = pruned(cifar(source))
    there = stretch(ticket, text, target)
    network = apply(there, cifar(target, seed=5))
    state, mask = network.state_dict(), ticket.history.mask()
    assert there.about["model"] == f"cifar_resnet{target}" and list(there.weights) == list(state)
    for part in text.split(";"):
        i, js = part.split(":")
        for s in (1, 2, 3):
            for j in js.split(","):
                for rest in [
                    k.split(".", 2)[2] for k in ticket.weights if k.startswith(f"layer{s}.{i}.")
                ]:
                    a, b = f"layer{s}.{i}.{rest}", f"layer{s}.{j}.{rest}"
                    assert torch.equal(
                        state[b], ticket.weights[a] * mask[a] if a in mask else ticket.weights[a]
                    )
    counts = {
        k: sum(
            sum(b == int(k.split(".")[1]) for b in stage) if k.startswith(f"layer{n + 1}.") else 0
            for n, stage in enumerate(fitted(text, source))
        )
        or 1
        for k in mask
        if k.split(".")[1] in {p.split(":")[0] for p in text.split(";")} or k.startswith("conv1")
    }
    assert drift(there).realised.iloc[-1] == pytest.approx(
        sum(c * mask[k].sum().item() for k, c in counts.items())
        / sum(c * mask[k].numel() for k, c in counts.items())
    )
    assert network(torch.zeros(1, 1, 8, 8)).isfinite().all()


def test_a_map_of_maps():
    ticket = pruned(cifar(32))
    there = stretch(stretch(ticket, "reorder", 32), "reorder", 32)
    assert digest(there.weights) == digest(ticket.weights) and digest(there.history.died) == digest(
        ticket.history.died
    )
    with pytest.raises(TicketError, match="does not fit"):
        apply(stretch(ticket, "interpolate", 44), cifar(56))


def imagenet(name, classes=10):
    "torchvision's own module; ResNet-26 is the original authors'"
    return (
        ResNet(BasicBlock, [2, 3, 4, 3], num_classes=classes)
        if name == "resnet26"
        else getattr(torchvision.models, name)(num_classes=classes)
    )


@pytest.mark.parametrize(
    "source, target, strategy",
    [
        ("resnet18", "resnet34", "append"),
        ("resnet18", "resnet26", "interpolate"),
        ("resnet26", "resnet18", "drop-tail"),
        ("resnet26", "resnet34", "interpolate"),
        ("resnet34", "resnet26", "interval"),
    ],
)
def test_torchvision_networks(source, target, strategy):
    net = imagenet(source)
    state = net.state_dict()
    ticket = Ticket(state, MaskHistory.dense(prunable(net)), about=dict(model=source))
    there = stretch(ticket, strategy, target)
    network = imagenet(target)
    network.load_state_dict(there.weights, strict=True)
    assert (
        blocks(network) == BLOCKS[target]
        and there.about["model"] == target
        and network.eval()(torch.zeros(1, 3, 32, 32)).isfinite().all()
    )
    for k in (
        "conv1.weight",
        "bn1.running_var",
        "fc.weight",
        "layer2.0.downsample.0.weight",
        "layer4.0.conv1.weight",
    ):
        assert torch.equal(there.weights[k], state[k])
    for n, sources in enumerate(fitted(there.about["stretched"]["map"], source, target)):
        for j, i in enumerate(sources):
            assert torch.equal(
                there.weights[f"layer{n + 1}.{j}.conv2.weight"],
                state[f"layer{n + 1}.{i}.conv2.weight"],
            ), (n, j, i)
    other = resnet(target, classes=10)
    apply(there, other)
    assert all(torch.equal(t, there.weights[k]) for k, t in other.state_dict().items())


def test_bottlenecks_have_another_name():
    with torch.device("meta"):
        net = resnet("resnet50")
    ticket = Ticket(
        {k: torch.zeros(2) for k in net.state_dict()},
        MaskHistory.dense({k: torch.zeros(2) for k in prunable(net)}),
    )
    assert (
        blocks(net) == (3, 4, 6, 3)
        and stretch(ticket, "0:0;1:1").about["model"] == "resnet[2, 2, 2, 2]"
    )


@pytest.mark.parametrize("n", [0, 3])
def test_guided_by_the_free_theory_is_a_rebuild(n):
    ticket = pruned(cifar(20, width=16), scales=True)
    table = guided(ticket, 32, predict="free", n=n, rounds=8, together=False)
    assert len(table) == 125
    for o in table.iloc[::31].itertuples():
        there = stretch(ticket, o.map, 32)
        e = free.exponents(
            free.empirical({k: there.weights[k][m] for k, m in there.history.mask(n).items()}),
            free.times(8),
        )
        assert o.score == pytest.approx(
            e.sigma[e.group.str.startswith("layer")].std(ddof=0), abs=2e-4
        )
        assert o.density == pytest.approx(there.history.density(n))


def test_guided_towards_a_flow_is_a_rebuild():
    ticket = pruned(cifar(20, width=16), scales=True)
    wanted = free.exponents(free.initial(cifar(32, width=16)))
    table = guided(ticket, 32, wanted, predict="free", n=0, ordered=False)
    for o in table.iloc[::5].itertuples():
        e = free.exponents(
            free.empirical(
                {k: stretch(ticket, o.map).weights[k] for k in wanted_names(ticket, o.map)}
            )
        )
        on = e.group.str.startswith("layer")
        assert o.score == pytest.approx(
            np.sqrt(((e.sigma - wanted.set_index("group").sigma[e.group].values)[on] ** 2).mean()),
            abs=2e-4,
        )


def wanted_names(ticket, text):
    return stretch(ticket, text).history.died


def test_squeezing_and_dropping_everywhere():
    ticket = pruned(cifar(32))
    for ordered in (True, False):
        table = guided(ticket, 20, predict="free", n=0, rounds=4, ordered=ordered)
        assert {"interval", "drop-tail", "drop-head"} <= set(
            ", ".join(table.strategy).split(", ")
        ) and table.forward.all() == ordered
    assert set(STRATEGIES) == {
        "interpolate",
        "append",
        "partial-head",
        "interval",
        "drop-tail",
        "drop-head",
        "reorder",
    }


def test_spread_is_unbiased_though_errors_are_correlated():
    rng = np.random.default_rng(0)
    true = rng.standard_normal(6) * 0.2
    mix = np.eye(6) - 0.3 * np.ones((6, 6))
    V, inside = [], 0
    for _ in range(600):
        s = true + 0.2 * rng.standard_normal((4, 6)) @ mix.T
        o = spread(
            pd.DataFrame(
                [
                    dict(seed=k, group=f"layer1.{i}", sigma=v)
                    for k, row in enumerate(s)
                    for i, v in enumerate(row)
                ]
            )
        ).iloc[0]
        V.append(o.variance)
        inside += o.low <= true.std() <= o.high
    assert abs(np.mean(V) - true.var()) < 3 * np.std(V) / 600**0.5
    assert 0.85 < inside / 600 <= 1


def test_trend_finds_a_known_slope():
    rng, x, hits, p = np.random.default_rng(1), np.array([8, 14, 20, 26, 32, 44, 56]), 0, []
    for _ in range(500):
        noise = 0.01 * rng.standard_normal(7)
        o = trend(x, 0.1 + 0.002 * x + noise)
        hits += o["low"] < 0.002 < o["high"]
        p.append(trend(x, noise)["p"])
    assert 0.92 < hits / 500 < 0.98 and abs(np.mean(np.array(p) < 0.05) - 0.05) < 0.03
    assert trend(x, 0.1 + 0.002 * x, se=0.01 * np.ones(7))["se"] == pytest.approx(
        0.01 / np.sqrt(((x - x.mean()) ** 2).sum())
    )


class Normed(nn.Module):
    "Two batch norms, a tied pair of layers, inputs by keyword"

    def __init__(self, seed=0):
        super().__init__()
        with seeded(seed, "init"):
            self.a = nn.Linear(4, 4)
            self.one = nn.BatchNorm1d(4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.two = nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.5)
            self.out = nn.Linear(4, 2)

    def forward(self, features, scale=None):
        h = self.one(self.a(features * scale))
        return self.out(self.drop(self.two(torch.relu(self.b(h)))))


def rows(seed=0):
    "A task whose batches are dictionaries"
    g = generator(seed, "rows")
    x = torch.randn(96, 4, generator=g) + 1
    data = [dict(features=o, scale=torch.tensor([2.0]), labels=int(o.sum() > 4)) for o in x]
    loader = lambda part: torch.utils.data.DataLoader(part, batch_size=16)
    return Task.from_loaders(loader(data[:64]), loader(data[64:]), name="rows")


@pytest.mark.parametrize("how", ["not trained", "in evaluation mode", "neither"])
def test_frozen_batch_norms_are_not_estimated_anew(how):
    net = Normed().train()
    net.drop.eval()
    net.two.running_mean += 3
    if how == "not trained":
        for p in net.two.parameters():
            p.requires_grad_(False)
    if how == "in evaluation mode":
        net.two.eval()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    reestimate(net, rows())
    after = net.state_dict()
    assert [m.training for m in net.modules()] == modes and net.two.momentum == 0.1
    assert not torch.equal(after["one.running_mean"], before["one.running_mean"])
    same = [torch.equal(after[k], before[k]) for k in before if k.startswith("two.running")]
    assert same == [how != "neither"] * 2
    assert all(
        torch.equal(after[k], t) for k, t in before.items() if "running" not in k and "num" not in k
    )


def test_statistics_are_those_of_torch_for_batches_of_any_form():
    net, twin = Normed().eval(), Normed()
    reestimate(net, rows())
    batches = list(rows().data.batches(0, 0, 16))
    for m in (twin.one, twin.two):
        m.reset_running_stats()
        m.momentum = None
    twin.train()
    twin.drop.eval()
    with torch.no_grad():
        for b in batches:
            twin(features=b["features"], scale=b["scale"])
    for k, t in net.state_dict().items():
        torch.testing.assert_close(t, twin.state_dict()[k])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        lambda net: torch.compile(net, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["plain", "compiled", "DataParallel", "AveragedModel"],
)
def test_lines_between_tied_and_wrapped_networks(wrap):
    a, b = Normed(1), Normed(2)
    line = connectivity(Normed(), a.state_dict(), b.state_dict(), rows(), points=3)
    net = wrap(Normed().train())
    before = digest(net.state_dict())
    other = connectivity(net, wrap(a).state_dict(), b.state_dict(), rows(), points=3)
    pd.testing.assert_frame_equal(line, other)
    assert digest(net.state_dict()) == before and net.training
    first = evaluate(rows(), reestimate(Normed(1), rows()))
    assert line.loss.iloc[0] == pytest.approx(first["loss"], abs=1e-6)
    torn = a.state_dict() | {"b.weight": torch.zeros(4, 4)}  # two values for one tensor
    with pytest.raises(
        ValueError, match="weights_b is no state of this network, 1 tensors differ, b"
    ):
        connectivity(Normed(), a.state_dict(), torn, rows(), points=2)
    with pytest.raises(
        ValueError, match="weights_a is no state of this network, 1 tensors .* out.bias"
    ):
        less = {k: t for k, t in a.state_dict().items() if k != "out.bias"}
        connectivity(Normed(), less, a.state_dict(), rows(), points=2)


def test_shared_blocks_are_stretched_as_blocks_of_their_own():
    "A recurrent stage: block 2 is block 1; its stretched ticket fits networks that share or do not"
    shared = cifar(20)
    shared.layer2[2] = shared.layer2[1]
    ticket, plain = pruned(shared), cifar(20)
    ticket = Ticket.of(shared, ticket.history)
    assert "layer2.2.conv1.weight" in ticket.about["tied"] and blocks(ticket) == (3, 3, 3)
    assert blocks(shared) == blocks(torch.compile(shared)) == (3, 3, 3)
    same = stretch(ticket, "0:0;1:1;2:2")
    k = "layer2.{}.conv1.weight"
    assert same.about["tied"] == {} and list(same.weights) == list(plain.state_dict())
    mask = ticket.history.mask()[k.format(1)]
    for net in (plain, shared, torch.compile(cifar(20))):
        apply(same, net)
        live = dict(net.named_parameters(remove_duplicate=False))
        for i in (1, 2):
            w = next(p for name, p in live.items() if name.endswith(k.format(i)))
            assert torch.equal(w != 0, mask)
    longer = apply(stretch(ticket, "append", 32), cifar(32))
    assert torch.equal(longer.layer2[4].conv1.weight != 0, mask)
