"Our numbers against others': torch.nn.utils.prune, NumPy, and the loop of the textbook"

import copy, math
import numpy as np
import pytest
import torch
from torch.nn.utils import prune as torch_prune
from rg_tickets.basics import generator
from rg_tickets.flows import Flow, observable, slopes
from rg_tickets.imp import imp
from rg_tickets.masks import MaskHistory, Schedule, prune
from rg_tickets.models.prunable import prunable
from rg_tickets.models.resnets import resnet
from rg_tickets.tasks.images import image_task
from rg_tickets.tickets import Ticket
from rg_tickets.train import Masked, Recipe, optimizer, refine


def test_masks_are_those_of_torch():
    "Ten rounds of 20 % on a trained ResNet-20 that goes on training: every tensor of every round"
    task, network = (
        image_task("font_digits", n_train=640, n_test=100),
        resnet("cifar_resnet20", in_channels=1),
    )
    recipe = Recipe(epochs=40, lr=0.05, schedule="constant")
    opt = optimizer(network, recipe)
    done = 20
    refine(task, network, recipe, stop=done, opt=opt)
    params = prunable(network)
    history, schedule = MaskHistory.dense(params), Schedule(0.2)
    twin = copy.deepcopy(network)
    where = [(twin.get_submodule(k.rpartition(".")[0]), "weight") for k in params]
    for n in range(1, 11):
        before = history.mask()
        prune(history, params, schedule.remove(sum(history.alive().values()), history.total))
        scores = {w: p.detach().clone() for w, p in zip(where, params.values())}
        torch_prune.global_unstructured(
            where, torch_prune.L1Unstructured, importance_scores=scores, amount=0.2
        )
        mine, live = (
            history.mask(),
            lambda masks: torch.cat([p[masks[k]].detach().abs() for k, p in params.items()]),
        )
        gone = torch.cat([p[before[k] & ~mine[k]].detach().abs() for k, p in params.items()])
        assert gone.max() < live(mine).min(), "a tie at the threshold would leave the choice open"
        for (layer, _), (k, m) in zip(where, mine.items()):
            assert torch.equal(layer.weight_mask.bool(), m), (n, k)
        refine(
            task, network, recipe, masked=Masked(params, mine), start=done, stop=done + 4, opt=opt
        )
        done += 4
    assert history.density() == pytest.approx(0.8**10, abs=1e-4)


def test_flow_is_that_of_numpy(tmp_path):
    "A_i, M_i, t and sigma from copies of the weights taken after each round"
    task, network = (
        image_task("digits8", n_train=320, n_test=100),
        resnet("cifar_resnet8", in_channels=1, width=8),
    )
    rounds, kept = [], []
    for r in imp(task, network, rounds=6, recipe=Recipe(epochs=1), device="cpu", folder=tmp_path):
        rounds.append(r)
        kept.append({k: p.detach().clone().numpy() for k, p in prunable(network).items()})
    history = Ticket.load(tmp_path / "ticket.safetensors").history
    groups = {}
    for k in kept[0]:
        groups.setdefault(
            ".".join(k.split(".")[:2]) if k.startswith("layer") else "stem", []
        ).append(k)
    assert list(groups) == ["stem", "layer1.0", "layer2.0", "layer3.0"]
    masks = [{k: m.numpy() for k, m in history.mask(n).items()} for n in range(7)]
    for w, m in zip(kept, masks):
        assert all(
            np.array_equal(w[k] != 0, m[k]) for k in w
        )  # the mask in force is seen in the weights
    A = np.array(
        [
            [
                sum(np.abs(w[k].astype(np.float64))[m[k]].sum() for k in names)
                for names in groups.values()
            ]
            for w, m in zip(kept, masks)
        ]
    )
    M = A / A.sum(1, keepdims=True)
    t = np.array(
        [
            math.log(sum(o.size for o in m.values()) / sum(o.sum() for o in m.values()))
            for m in masks
        ]
    )
    sigma = np.polyfit(t, np.log(M), 1)[0]
    flow = Flow.of(rounds)
    table = lambda frame, value: (
        frame.pivot(index="n", columns="group", values=value)[list(groups)].values
    )
    assert np.allclose(table(observable(flow), "value"), M, rtol=1e-6, atol=0)
    assert np.allclose(table(observable(flow, "relative"), "value"), A / A[0], rtol=1e-6, atol=0)
    assert np.allclose(table(observable(flow), "t"), t[:, None], rtol=0, atol=1e-6)
    assert np.allclose(
        slopes(flow, window="all").set_index("group").sigma[list(groups)], sigma, rtol=0, atol=1e-6
    )
    assert np.ptp(sigma) > 0.01  # and they are not all nothing


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=3, lr=0.05, schedule="constant"),
        Recipe(epochs=3, lr=0.05, momentum=0.0, weight_decay=0.0, schedule="drops", drops=(1, 2)),
    ],
    ids=["momentum", "plain"],
)
def test_training_is_that_of_the_textbook(recipe):
    task, ours = (
        image_task("digits8", n_train=320, n_test=100),
        resnet("cifar_resnet8", in_channels=1, width=8),
    )
    book = copy.deepcopy(ours)
    refine(task, ours, recipe, seed=3)
    opt = torch.optim.SGD(
        book.parameters(),
        lr=0.05,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda epoch: 0.1**epoch if recipe.drops else 1.0
    )
    for epoch in range(3):
        order = torch.randperm(320, generator=generator(3, "order", epoch))
        for idx in order.split(64):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(book(task.data.x[idx]), task.data.y[idx]).backward()
            opt.step()
        schedule.step()
    a, b = ours.state_dict(), book.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
