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
from rg_tickets.transfer import MASKS, gaps, recorded, transfer, travelling

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


class Dropped(nn.Module):
    "A convolutional network with dropout; its output depends on the order of tensors in memory"

    def __init__(self, seed=0, classes=10):
        super().__init__()
        with seeded(seed, "init"):
            self.body = nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Conv2d(6, 6, 3, padding=1),
                nn.Dropout2d(0.2),
                nn.ReLU(),
            )
            self.out = nn.Linear(6, classes)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.seen = 0

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.calls += 1
        h = self.body(x).mean((2, 3))
        return self.out(h) * (1 + 0.01 * self.calls / (1 + self.seen))


def test_own_ticket_of_a_network_with_dropout_is_the_round_to_the_bit(tmp_path):
    net, again = Dropped(), Dropped()
    ticket = found(digits(), net, tmp_path)
    row = transfer(digits(), again, ticket, 2, "own", recipe=RECIPE, device="cpu")
    assert digest(again.state_dict()) == digest(net.state_dict()) and row == recorded(ticket, 2)
    assert (
        all(a.stride() == b.stride() for a, b in zip(again.parameters(), net.parameters()))
        and not again.body[4].weight.is_contiguous()
    )  # placed as the run placed it


class Stop(Exception):
    pass


def stopped(task, network, ticket, folder, recipe=RECIPE):
    "A transfer that is killed after its first epoch"

    def stop(step, end):
        raise Stop

    with pytest.raises(Stop):
        transfer(
            task,
            network,
            ticket,
            2,
            recipe=recipe,
            device="cpu",
            folder=folder,
            checkpoint_every=0,
            report=stop,
        )
    assert (folder / "state.safetensors").exists()


def test_a_killed_transfer_goes_on_with_counters_that_no_state_dict_has(tmp_path):
    ticket = found(digits(), Dropped(), tmp_path / "run")
    target = digits("mnist5k")
    stopped(target, Dropped(1), ticket, tmp_path / "t")
    rows, steps = [], []
    for folder, net in ((tmp_path / "t", Dropped(1)), (None, Dropped(1))):
        at = []
        rows.append(
            transfer(
                target,
                net,
                ticket,
                2,
                recipe=RECIPE,
                device="cpu",
                folder=folder,
                report=lambda step, end: at.append(step),
            )
        )
        steps.append(at)
    assert rows[0] == rows[1] and steps == [[8], [4, 8]]


def smoothed(smoothing):
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


@pytest.mark.parametrize("change", ["loss", "labels", "frozen", "activation", "nothing"])
def test_a_state_of_another_transfer_is_left_alone(change, tmp_path):
    "Loss settings, labels beyond the first batch, frozen layers, activations: all are its identity"
    ticket = found(digits(), small(), tmp_path / "run")

    def target(smoothing=0.1, labels=0):
        task = digits("mnist5k")
        task.data.y[-1] = labels
        return Task("t", task.data, smoothed(smoothing), classes=10)

    first, other = small(1), small(1)
    task = target()
    if change == "loss":
        task = target(smoothing=0.2)
    elif change == "labels":
        task = target(labels=1)
    elif change == "frozen":
        other.layer1[0].conv1.weight.requires_grad_(False)
    elif change == "activation":
        other.relu = nn.GELU()
    stopped(target(), first, ticket, tmp_path / "t")
    at = []
    transfer(
        task,
        other,
        ticket,
        2,
        recipe=RECIPE,
        device="cpu",
        folder=tmp_path / "t",
        report=lambda step, end: at.append(step),
    )
    assert at == ([8] if change == "nothing" else [4, 8])


class Words(nn.Module):
    "A language model in small, called with keywords; its head is tied to its embedding"

    def __init__(self, seed=0, tie=True):
        super().__init__()
        with seeded(seed, "init"):
            self.embed = nn.Embedding(20, 8)
            self.mix = nn.Linear(8, 8)
            self.decoder = nn.Linear(8, 20, bias=False)
        if tie:
            self.decoder.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids) * attention_mask[..., None]
        return self.decoder(torch.tanh(self.mix(h)))


def sentences(name, seed):
    "Batches that are dictionaries; each token is to be followed by the next number"
    g = generator(seed, "sentences")
    ids = torch.randint(0, 20, (96, 6), generator=g)
    rows = [
        dict(input_ids=x, attention_mask=torch.ones(6), labels=(x + 1 + seed) % 20) for x in ids
    ]
    loader = lambda part: torch.utils.data.DataLoader(part, batch_size=16)
    score = lambda output, target: nn.functional.cross_entropy(output.transpose(1, 2), target)
    return Task.from_loaders(loader(rows[:64]), loader(rows[64:]), loss=score, name=name)


def test_batches_of_any_form_and_tied_tensors_go_the_same_way(tmp_path):
    net, again = Words(), Words()
    ticket = found(sentences("a", 0), net, tmp_path, preset="all")
    assert "embed.weight" in ticket.history.died and ticket.about["tied"]
    row = transfer(sentences("a", 0), again, ticket, 2, "own", recipe=RECIPE, device="cpu")
    assert digest(again.state_dict()) == digest(net.state_dict()) and row == recorded(ticket, 2)
    mask = ticket.history.mask(2)["embed.weight"]
    assert (
        not again.decoder.weight.detach()[~mask].any()
        and again.decoder.weight is again.embed.weight
    )
    other = Words(1)
    row = transfer(sentences("b", 1), other, ticket, 2, recipe=RECIPE, device="cpu")
    went = list(travelling(ticket, Words(1)).history.died)
    assert not other.mix.weight.detach()[~ticket.history.mask(2)["mix.weight"]].any()
    assert row["source"] == "a" and "mix.weight" in went


def test_wrapped_targets(tmp_path):
    ticket = found(digits(), small(), tmp_path)
    rows = [
        transfer(digits("mnist5k"), net, ticket, 2, recipe=RECIPE, device="cpu")
        for net in (small(1), torch.compile(small(1), backend="eager"))
    ]
    assert rows[0] == rows[1] and rows[0]["model"] == "cifar_resnet8"


def test_what_is_refused_before_training(tmp_path):
    from rg_tickets.tickets import apply, hold

    ticket = found(digits(), small(), tmp_path)
    go = lambda net, **kw: transfer(
        digits("mnist5k"), net, **dict(ticket=ticket, n=2, recipe=RECIPE, device="cpu") | kw
    )
    with pytest.raises(ValueError, match=r"call release\(network\) first"):
        go(hold(apply(ticket, small()), ticket))
    with pytest.raises(ValueError, match="seed"):
        go(small(), seed=1.2)
    odd = Ticket(**(vars(ticket) | dict(about=ticket.about | dict(rewind={"resets": 3}))))
    with pytest.raises(TicketError, match="which is no policy"):
        go(small(), ticket=odd)
    task = Task("t", digits("mnist5k").data, metrics={"broken": lambda output, target: output})
    with pytest.raises(ValueError, match="'broken'"):
        transfer(task, small(), ticket, 2, recipe=RECIPE, device="cpu")
    bare = Ticket(**(vars(ticket) | dict(rounds=[{}] * 3)))
    with pytest.raises(TicketError, match="round 2 of this ticket has no metrics and no loss"):
        recorded(bare, 2)


def test_frozen_batch_norm_and_modes_stay(tmp_path):
    ticket = found(digits(), small(), tmp_path)
    net = small(1)
    for p in net.bn1.parameters():
        p.requires_grad_(False)
    before = {k: t.clone() for k, t in net.bn1.state_dict().items()}
    ticket.weights |= {f"bn1.{k}": t.clone() for k, t in before.items()}
    transfer(digits("mnist5k"), net, ticket, 2, recipe=RECIPE, device="cpu")
    assert digest(net.bn1.state_dict()) == digest(before) and net.layer1.training
    assert digest(net.layer1.state_dict()) != digest(small(1).layer1.state_dict())
