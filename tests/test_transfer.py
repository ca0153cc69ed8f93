"Transfer beside slow or foreign ways to the same numbers: every rewind policy, heads that are pruned, text, self-supervised sources, worker processes"

import os, signal
import pandas as pd
import pytest
import torch
from torch import nn
from rg_tickets import runs, studies
from rg_tickets.basics import generator, seeded
from rg_tickets.imp import imp
from rg_tickets.masks import MaskHistory
from rg_tickets.models.resnets import resnet
from rg_tickets.rewind import Policy
from rg_tickets.tasks.core import Resident, Task
from rg_tickets.tasks.images import image_task
from rg_tickets.tickets import Ticket, TicketError, digest
from rg_tickets.train import Recipe
from rg_tickets.transfer import MASKS, gaps, recorded, transfer

RECIPE = Recipe(epochs=2, batch_size=32)
SPEC = runs.Spec(
    width=4, rounds=2, prune=0.6, n_train=128, n_test=100, recipe=dict(epochs=2, batch_size=32)
)


def digits(name="digits8"):
    return image_task(name, n_train=128, n_test=100)


def small(seed=0, **kwargs):
    return resnet("cifar_resnet8", **dict(width=4, in_channels=1, seed=seed) | kwargs)


def found(task, network, folder, recipe=RECIPE, **kwargs):
    "The ticket of a run of two rounds; the network is left as the last round trained it"
    for _ in imp(
        task, network, rounds=2, prune=0.5, recipe=recipe, device="cpu", folder=folder, **kwargs
    ):
        pass
    return Ticket.load(folder / "ticket.safetensors")


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(rewind="init"),
        dict(rewind="3it"),
        dict(rewind="1ep"),
        dict(
            rewind=Policy(
                resets=("weights", "bn_affine", "bn_stats", "head", "optimizer", "schedule"),
                step="2it",
            )
        ),
        dict(preset="open_lth"),
        dict(preset="cv_lth", scope="layer"),
        dict(
            recipe=Recipe(epochs=2, batch_size=32, optimizer="adamw", lr=1e-3, warmup=1.0, clip=1.0)
        ),
        dict(seed=3),
    ],
    ids=str,
)
def test_own_ticket_gives_the_round_itself(kwargs, tmp_path):
    net, again = small(), small()
    ticket = found(digits(), net, tmp_path, **kwargs)
    row = transfer(
        digits(),
        again,
        ticket,
        2,
        "own",
        recipe=kwargs.get("recipe", RECIPE),
        seed=kwargs.get("seed", 0),
        device="cpu",
    )
    assert digest(again.state_dict()) == digest(net.state_dict()) and row == recorded(ticket, 2)
    first = transfer(
        digits(),
        small(9),
        ticket,
        1,
        "own",
        recipe=kwargs.get("recipe", RECIPE),
        seed=kwargs.get("seed", 0),
        device="cpu",
    )
    assert first == recorded(
        ticket, 1
    )  # and so does an earlier mask, whatever the network held before


def test_masks_stay_in_force_and_counts_are_exact(tmp_path):
    ticket = found(digits(), small(), tmp_path)
    for kind in ("transferred", "layerwise", "uniform"):
        net = small(1)
        transfer(digits("mnist5k"), net, ticket, 2, kind, recipe=RECIPE, seed=1, device="cpu")
        dead = MASKS["ticket" if kind == "transferred" else kind](ticket.history, 2, 1)
        assert sum(int(m.sum()) for m in dead.values()) == sum(ticket.history.alive(2).values())
        assert not any(net.get_parameter(k).detach()[~m].any() for k, m in dead.items())


def test_random_masks_do_not_look_at_signs():
    "A hundred seeds: the share of negative initial weights that are kept is half, within the error of so many coins"
    negative = kept = 0
    for seed in range(100):
        net = small(seed)
        params = {k: p.detach() for k, p in net.named_parameters() if p.dim() == 4}
        history = MaskHistory.dense(params)
        for k, d in history.died.items():
            d.view(-1)[
                torch.randperm(d.numel(), generator=generator(seed, "test", k))[
                    : int(0.8 * d.numel())
                ]
            ] = 1
        history.rounds = 1
        for kind in ("layerwise", "uniform"):
            w = torch.cat([params[k][m] for k, m in MASKS[kind](history, 1, seed).items()])
            negative += int((w < 0).sum())
            kept += len(w)
    assert abs(negative / kept - 0.5) < 4 * 0.5 / kept**0.5


def test_same_seed_and_rewind_to_init_make_both_ways_one(tmp_path):
    "Rewound to the initial weights of the same seed, the source's weights are the target's"
    ticket = found(digits(), small(), tmp_path)
    a, b = (
        transfer(digits("mnist5k"), small(), ticket, 2, weights=w, recipe=RECIPE, device="cpu")
        for w in ("source", "target")
    )
    assert {k: v for k, v in a.items() if k != "weights"} == {
        k: v for k, v in b.items() if k != "weights"
    }
    other = transfer(
        digits("mnist5k"), small(5), ticket, 2, weights="target", recipe=RECIPE, device="cpu"
    )
    assert other["loss"] != a["loss"]


class Reader(nn.Module):
    "The smallest network that reads what our BERTs read: x int64 [n, 3, L]"

    base_model_prefix = "bert"

    def __init__(self, classes, seed=0):
        super().__init__()
        with seeded(seed, "init"):
            self.bert = nn.ModuleDict(dict(embeddings=nn.Embedding(20, 8), dense=nn.Linear(8, 8)))
            self.classifier = nn.Linear(8, classes)

    def forward(self, x):
        h = (self.bert["embeddings"](x[:, 0]) * x[:, 1, :, None]).mean(1)
        return self.classifier(torch.tanh(self.bert["dense"](h)))


def words(name, classes, seed):
    g = generator(seed, "words")
    x = torch.randint(0, 20, (96, 3, 6), generator=g)
    x[:, 1] = 1
    y = x[:, 0].sum(1) % classes
    return Task(name, Resident(x[:64], y[:64], x[64:], y[64:]), classes=classes)


def test_text_goes_the_same_way(tmp_path):
    ticket = found(words("two", 2, 0), Reader(2), tmp_path)
    assert list(ticket.history.died) == ["bert.dense.weight"]
    net = Reader(5, seed=1)
    head = net.classifier.weight.detach().clone()
    row = transfer(
        words("five", 5, 1),
        net,
        ticket,
        2,
        recipe=Recipe(epochs=1, batch_size=64, lr=1e-9),
        device="cpu",
    )
    assert row["target"] == "five" and torch.allclose(
        net.classifier.weight, head, atol=1e-6
    )  # the head is the target's own
    alive = ticket.history.mask(2)["bert.dense.weight"]
    assert torch.allclose(
        net.bert["dense"].weight.detach(), ticket.weights["bert.dense.weight"] * alive, atol=1e-6
    )
    with pytest.raises(TicketError, match="does not fit"):
        transfer(digits(), small(), ticket, 2, device="cpu", recipe=RECIPE)


@pytest.mark.parametrize("way", ["simclr", "moco"])
def test_self_supervised_source(way, tmp_path):
    pytest.importorskip("rg_tickets.tasks.selfsup")
    source = runs.replace(
        SPEC,
        task=f"digits8/{way}",
        n_train=1024,
        rounds=1,
        recipe=dict(epochs=1, batch_size=128, lr=0.01),
    )
    target = runs.replace(SPEC, task="mnist5k", rounds=1)
    frame = studies.transfers(
        studies.crossings([source], [1], targets=[target]), tmp_path, jobs=1, device="cpu"
    )
    assert set(frame.kind) == {"own", "transferred", "layerwise", "uniform", "dense"} and set(
        frame.query("kind == 'transferred'").source
    ) == {f"digits8/{way}"}
    assert frame[frame.n == 1].density.nunique() == 1 and gaps(frame).gap.notna().all()


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path):
    specs = runs.grid(SPEC, task=["digits8", "mnist5k"])
    todo = studies.crossings(specs, [1, 2], kinds=("own", "transferred", "uniform"))
    one, two = (
        studies.transfers(todo, tmp_path / str(jobs), jobs, device="cpu") for jobs in (1, 2)
    )
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_in_a_crossing(tmp_path):
    "A study that was killed within a crossing makes only what is missing, and the same"
    import multiprocessing, time

    source, target = (
        runs.replace(SPEC, task=t, recipe=dict(epochs=8, batch_size=32))
        for t in ("digits8", "mnist5k")
    )
    c = studies.Crossing(source, target, 2)
    go = lambda folder: studies.transfers([c], folder, jobs=1, device="cpu")
    runs.trajectories([source, target], tmp_path, jobs=1, device="cpu")
    process = multiprocessing.get_context("spawn").Process(
        target=studies.cross, args=(c, tmp_path, "cpu"), daemon=True
    )
    process.start()
    end = time.monotonic() + 120
    while not (tmp_path / c.id / "progress.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    frame = go(tmp_path)
    (tmp_path / c.id / "transfer.csv").rename(tmp_path / "killed.csv")
    again = go(tmp_path)
    pd.testing.assert_frame_equal(frame, again)
