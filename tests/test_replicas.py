"Replicas of larger networks, of other widths and numbers, beside companions that overflow, and on a GPU"

import copy
from dataclasses import replace
import pytest
import torch
from rg_tickets.imp import imp
from rg_tickets.masks import MaskHistory, prune
from rg_tickets.models.prunable import prunable
from rg_tickets.models.resnets import resnet
from rg_tickets.replicas import _step, imp_many, joined, refine_many, way
from rg_tickets.tasks.images import image_task
from rg_tickets.tickets import digest
from rg_tickets.train import Recipe, optimizer, refine


def cifar(width, depth=8):
    return lambda seed: resnet(f"cifar_resnet{depth}", in_channels=1, width=width, seed=seed)


def imagenet(name):
    return lambda seed: resnet(name, in_channels=1, stem="cifar", seed=seed)


NETWORKS = {
    "width 4": cifar(4),
    "width 8": cifar(8),
    "width 16": cifar(16),
    "width 5": cifar(5),
    "resnet20": pytest.param(cifar(16, 20), marks=pytest.mark.slow),
    "resnet18": pytest.param(imagenet("resnet18"), marks=pytest.mark.slow),
}
each_network = pytest.mark.parametrize("make", list(NETWORKS.values()), ids=list(NETWORKS))


@pytest.fixture(scope="module")
def task():
    return image_task("digits8", n_train=64, n_test=100, size=8)


def half(net):
    history = MaskHistory.dense(prunable(net))
    prune(history, prunable(net), history.total // 2)
    return history.mask()


def trained(
    task,
    make,
    seeds,
    how="joined",
    recipe=Recipe(epochs=1, batch_size=16),
    dtype=torch.float32,
    device="cpu",
):
    nets = [make(s).to(dtype).to(device) for s in seeds]
    refine_many(task, nets, seeds, recipe, [half(net) for net in nets], how=how)
    return nets


def distance(a, b):
    flat = lambda net: torch.cat([p.detach().double().flatten() for p in net.parameters()])
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


@each_network
def test_weights_of_a_single_run_to_rounding(task, make):
    "In double precision, where a mistake cannot hide behind rounding"
    task = copy.deepcopy(task)
    task.data.x = task.data.x.double()
    for a, b in zip(
        trained(task, make, [0, 1, 2], dtype=torch.float64),
        trained(task, make, [0, 1, 2], "apart", dtype=torch.float64),
    ):
        assert distance(a, b) < 1e-9
        assert all(
            torch.equal(p == 0, q == 0) for p, q in zip(prunable(a).values(), prunable(b).values())
        )
        for x, y in zip(a.buffers(), b.buffers()):
            assert torch.allclose(x, y, rtol=1e-9)


@each_network
def test_companions_do_not_matter(task, make):
    for replica in (0, 2):
        bits = set()
        for others in ((1, 2), (8, 9)):
            seeds = list(others)
            seeds.insert(replica, 0)
            bits.add(digest(trained(task, make, seeds)[replica].state_dict()))
        assert len(bits) == 1


@each_network
@pytest.mark.parametrize("evil", [float("nan"), float("inf")])
def test_an_overflow_stays_at_home(task, make, evil):
    "One step beside a companion whose weights are not numbers: a kernel that pads channels with a neighbour's would pass them on"
    bits, batch = set(), next(task.data.batches(0, 0, 16))
    for poison in (False, True):
        nets = [make(s) for s in range(3)]
        if poison:
            for p in nets[1].parameters():
                p.data.fill_(evil)
        with joined(nets) as many:
            losses = _step(task, many, [batch] * 3, optimizer(many, Recipe()), None, Recipe())
        assert torch.isfinite(losses).tolist() == [True, not poison, True]
        bits.add((digest(nets[0].state_dict()), digest(nets[2].state_dict())))
    assert len(bits) == 1


@pytest.mark.slow
def test_bottlenecks(task):
    "One step of a torchvision ResNet-50, in double precision: BatchNorm over eight pixels magnifies rounding"
    task, ends = copy.deepcopy(task), []
    task.data.x = task.data.x.double()
    for how in ("joined", "apart"):
        nets = [imagenet("resnet50")(s).double() for s in range(2)]
        refine_many(
            task, nets, [0, 1], Recipe(batch_size=8, lr=0.01, schedule="constant"), stop=1, how=how
        )
        ends.append(nets)
    for a, b in zip(*ends):
        assert distance(a, b) < 1e-9


@pytest.mark.parametrize("K", [2, 5, 8])
def test_any_number(task, K):
    "How many companions there are may change the kernel, and so the last bits, and no more"
    assert (
        distance(
            trained(task, cifar(4), list(range(K)))[0], trained(task, cifar(4), [0], "apart")[0]
        )
        < 1e-3
    )


def test_bf16(task):
    recipe = Recipe(epochs=1, batch_size=16, precision="bf16", lr=0.01)
    for a, b in zip(
        trained(task, cifar(4), [0, 1], recipe=recipe),
        trained(task, cifar(4), [0, 1], "apart", recipe),
    ):
        assert distance(a, b) < 0.05


def test_frozen_norms_and_what_rests_stay_as_they_are(task):
    "One norm is frozen, one rests; joined and apart they are the same, and their statistics stay"
    task, ends = copy.deepcopy(task), []
    task.data.x = task.data.x.double()
    for how in ("joined", "apart"):
        nets = [cifar(4)(s).double() for s in range(2)]
        for net in nets:
            net.bn1.requires_grad_(False)
            net.layer1[0].bn1.eval()
        refine_many(task, nets, [0, 1], Recipe(epochs=1, batch_size=16), how=how)
        ends.append(nets)
    for a, b in zip(*ends):
        assert distance(a, b) < 1e-9
        for net in (a, b):
            assert not net.bn1.num_batches_tracked and not net.layer1[0].bn1.num_batches_tracked
            assert net.layer1[0].bn2.num_batches_tracked == 4


class Counting(torch.nn.Module):
    "Counts its passes"

    def __init__(self, net):
        super().__init__()
        self.net, self.steps = net, 0

    def forward(self, x):
        self.steps += 1
        return self.net(x)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda task, nets: (dict(loss="model"), nets), "a loss of the network's own"),
        (lambda task, nets: (dict(split=lambda b: (b[:1], {}, b[1])), nets), "a split or a loss"),
        (
            lambda task, nets: ({}, [torch.compile(net, backend="eager") for net in nets]),
            "networks that are compiled or wrapped",
        ),
        (lambda task, nets: ({}, [nets[0], nets[1].eval()]), "frozen layers or modes"),
        (
            lambda task, nets: ({}, [Counting(net) for net in nets]),
            "counts in a plain attribute (steps)",
        ),
    ],
)
def test_what_cannot_be_joined_is_trained_apart(task, change, message):
    kwargs, nets = change(task, [cifar(4)(s) for s in range(2)])
    how, why = way(replace(task, **kwargs), nets)
    assert how == "apart" and message in why
    with pytest.raises(ValueError, match="these networks cannot be joined"):
        way(replace(task, **kwargs), nets, how="joined")


def test_networks_are_free_after_an_error(task):
    nets = [cifar(4)(s) for s in range(2)]
    with pytest.raises(KeyError):
        with joined(nets):
            raise KeyError
    assert len({p.untyped_storage().data_ptr() for net in nets for p in net.parameters()}) == sum(
        len(list(net.parameters())) for net in nets
    )
    refine(task, nets[0], Recipe(epochs=1, batch_size=16))


@pytest.mark.slow
def test_imp_many_keeps_the_first_mask(task):
    "Ten weights in ten thousand may differ in the first mask, and counts never do"
    seeds = [0, 1, 2, 3]
    many = list(
        imp_many(
            task,
            [cifar(8)(s) for s in seeds],
            seeds,
            4,
            recipe=Recipe(epochs=2),
            device="cpu",
            how="joined",
        )
    )
    for k, s in enumerate(seeds):
        for r, o in zip(
            (rs[k] for rs in many),
            imp(task, cifar(8)(s), 4, recipe=Recipe(epochs=2), seed=s, device="cpu"),
            strict=True,
        ):
            assert (r.n, r.time, r.density) == (o.n, o.time, o.density)
            assert sum(abs(a["alive"] - b["alive"]) for a, b in zip(r.tensors, o.tensors)) <= (
                0.001 if r.n < 2 else 0.05
            ) * sum(a["count"] for a in o.tensors)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "make",
    [cifar(4), cifar(16), cifar(16, 20), imagenet("resnet18")],
    ids=["width 4", "width 16", "resnet20", "resnet18"],
)
def test_cuda(make, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    task, recipe = (
        image_task("digits8", n_train=128, n_test=100, size=16),
        Recipe(epochs=1, batch_size=16, lr=0.01),
    )
    nets = trained(task, make, [0, 1, 2], recipe=recipe, device="cuda")
    for a, b in zip(nets, trained(task, make, [0, 1, 2], "apart", recipe, device="cuda")):
        assert distance(a, b) < 1e-2
    assert digest(nets[0].state_dict()) == digest(
        trained(task, make, [0, 8, 9], recipe=recipe, device="cuda")[0].state_dict()
    )
    assert way(task, nets, recipe)[0] == "joined"
