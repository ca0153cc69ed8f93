"The map in the hands of a user: own criteria, own networks, own schedules, and what a run refuses before or after it trains"

import copy
import functools
import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from rg_tickets.basics import generator, seeded
from rg_tickets.imp import Control, check_arguments, imp, score_weights
from rg_tickets.masks import RoundSchedule, Schedule
from rg_tickets.models.names import state
from rg_tickets.models.prunable import describe, prunable
from rg_tickets.replicas import imp_many
from rg_tickets.rewind import Policy, Snapshot, Unsaved, check_network
from rg_tickets.tasks.core import Resident, Task, evaluate
from rg_tickets.tickets import Ticket, TicketError, apply, digest, load_trained
from rg_tickets.train import Masked, NotZero, Recipe, optimizer, place, refine, train_mode

RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05)


def data(n=64, seed=0):
    "Eight numbers each; the class is the largest of the first three"
    x = torch.randn(n, 8, generator=generator(seed, "data"))
    return Resident(x, x[:, :3].argmax(1), x[:32], x[:32, :3].argmax(1))


def toy(**kwargs):
    return Task("toy", data(), **kwargs)


def mlp(activation=nn.ReLU, seed=0):
    with seeded(seed, "mlp"):
        return nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 3))


def normed(seed=0):
    with seeded(seed, "mlp"):
        layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1)
        return nn.Sequential(*layers, nn.Linear(16, 3))


def run(network=None, task=None, **kwargs):
    "A short run to its end"
    how = dict(rounds=2, prune=0.3, recipe=RECIPE, device="cpu") | kwargs
    return list(imp(task or toy(), mlp() if network is None else network, **how))


def load(folder):
    return Ticket.load(folder / "ticket.safetensors")


class Stop(Exception):
    "The process ends here, so to speak"


def stop_at(n, step):
    "A report that ends a run in mid-round"

    def report(now, s, end):
        if (now, s) == (n, step):
            raise Stop

    return report


def cut(make, folder, *places, **kwargs):
    "The same run, stopped at each (round, step) and taken up by a new network; that network"
    for n, step in places:
        with pytest.raises(Stop):
            run(make(), folder=folder, checkpoint_every=0, report=stop_at(n, step), **kwargs)
    network = make()
    run(network, folder=folder, **kwargs)
    return network


# The same bits as before


@functools.cache
def same_machine():
    "Does torch alone give here what it gave where the digests were taken"
    return golden.plain_torch() == golden.PLAIN


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", golden.CASES)
def test_weights_and_masks_are_those_of_the_first_version(name, one_thread):
    if not same_machine():
        pytest.skip("torch alone gives other bits here than where the digests were taken")
    assert " ".join(golden.facts(name).values()) == golden.GOLDEN[name]


# A criterion of one's own


def gradient(network, task, params):
    task(network, next(task.data.batches(0, 0, 64))).backward()
    return {k: p * p.grad for k, p in params.items()}


def at_random(network, task, params):
    return {k: torch.rand_like(p) + np.random.rand() for k, p in params.items()}


def untidy(network, task, params):
    "The magnitudes; everything is left behind that one can leave behind"
    out = {k: p.detach().clone() for k, p in params.items()}
    torch.rand(7)
    task(network.eval(), next(task.data.batches(0, 0, 16))).backward()
    for m in network.modules():
        m.training = not m.training
        m.register_forward_hook(lambda m, args, out: out * 0)
        for b in filter(torch.is_tensor, m._buffers.values()):
            b.zero_()
    for p in network.parameters():
        p.data = torch.zeros_like(p)
        p.requires_grad_(False)
        p.grad = torch.ones_like(p)
    network.steps = 7
    return out


@pytest.mark.parametrize("control", ["imp", "oneshot", "untrained"])
@pytest.mark.parametrize("rewind", ["init", "lr", "3it"])
def test_a_score_leaves_no_trace(control, rewind, tmp_path):
    plain, own = normed(), normed()
    how = dict(control=control, rewind=rewind)
    expected = run(plain, folder=tmp_path / "a", **how)
    assert repr(run(own, folder=tmp_path / "b", score=untidy, **how)) == repr(expected)
    assert digest(state(plain)) == digest(state(own))
    assert digest(load(tmp_path / "a").history.died) == digest(load(tmp_path / "b").history.died)
    assert not hasattr(own, "steps") and all(p.requires_grad for p in own.parameters())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_the_smallest_scores_go(scope, tmp_path):
    "Against a full sort of what the score gave, over the weights that were left"
    seen = []

    def watched(network, task, params):
        found = gradient(network, task, params)
        seen.append({k: o.detach().clone() for k, o in found.items()})
        return found

    deep = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    rounds = run(deep, score=watched, scope=scope, folder=tmp_path, rounds=3)
    died = load(tmp_path).history.died
    assert len(seen) == 1 + 3  # once before anything is trained
    for n, scores in enumerate(seen[1:], 1):
        for names in [list(died)] if scope == "global" else [[k] for k in died]:
            size = torch.cat([scores[k].abs()[died[k] >= n] for k in names])
            gone = torch.cat([(died[k] == n)[died[k] >= n] for k in names])
            assert gone.sum() == round(0.3 * len(size))
            assert size[gone].max() <= size[~gone].min()
    largest = max(scores[k].abs()[died[k] == 3].max() for k in died)
    assert rounds[3].threshold == pytest.approx(largest.item())


def test_random_numbers_of_a_score_belong_to_the_run(tmp_path):
    whole = run(score=at_random, folder=tmp_path / "whole")
    cut(mlp, tmp_path / "cut", (0, 4), (1, 4), score=at_random)
    assert (
        load(tmp_path / "whole").history.died.keys() == load(tmp_path / "cut").history.died.keys()
    )
    assert digest(load(tmp_path / "whole").history.died) == digest(
        load(tmp_path / "cut").history.died
    )
    assert repr(run(score=at_random, seed=1)) != repr(whole)


BAD_SCORES = {
    "a list": (lambda n, t, p: list(p.values()), "gave a list: a score is a function"),
    "nothing": (lambda n, t, p: None, "gave a NoneType"),
    "a name left out": (lambda n, t, p: {}, "gave nothing for '0.weight'"),
    "a name too many": (lambda n, t, p: p | dict(x=0), "gave a tensor for 'x'"),
    "another shape": (lambda n, t, p: {k: w.flatten() for k, w in p.items()}, "gave shape (128,)"),
    "a number": (lambda n, t, p: {k: 1.0 for k in p}, "gave a float for '0.weight'"),
    "an array": (lambda n, t, p: {k: w.detach().numpy() for k, w in p.items()}, "gave a ndarray"),
    "complex": (lambda n, t, p: {k: w + 1j for k, w in p.items()}, "type torch.complex64"),
    "sparse": (lambda n, t, p: {k: w.to_sparse() for k, w in p.items()}, "a sparse tensor"),
    "bool": (lambda n, t, p: {k: w > 0 for k, w in p.items()}, "type torch.bool"),
    "NaN": (lambda n, t, p: {k: w / 0 - w / 0 for k, w in p.items()}, "128 of the 128 weights"),
}


@pytest.mark.parametrize("score, message", BAD_SCORES.values(), ids=BAD_SCORES)
@pytest.mark.parametrize("control", ["imp", "untrained"])
def test_a_wrong_score_is_refused_before_anything_is_trained(score, message, control, tmp_path):
    steps = []
    with pytest.raises(ValueError, match="score") as e:
        run(score=score, control=control, folder=tmp_path, report=lambda *a: steps.append(a))
    assert message in str(e.value)
    assert not steps and not (tmp_path / "ticket.safetensors").exists()


def test_scores_of_pruned_weights_do_not_matter():
    w = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]))
    net = nn.Module()
    net.weight = w
    mask = dict(w=torch.tensor([[True, False, True]]))
    nan = torch.tensor([[5.0, float("nan"), 6.0]])
    found = score_weights(lambda n, t, p: dict(w=nan), net, toy(), dict(w=w), mask)
    assert found["w"].tolist() == [[5.0, 0.0, 6.0]]
    assert torch.isnan(nan[0, 1])  # what the score gave is its own


def test_a_score_that_fails_later_loses_no_training(tmp_path):
    "Round 0 is trained once, although the score cannot rank its weights; a repaired one goes on"
    fails, steps = [True], []

    def score(network, task, params):
        factor = 0.0 if fails[0] else 1.0
        return {k: factor * p for k, p in params.items()}

    report = lambda *a: steps.append(a)
    with pytest.raises(ValueError, match="the same for all weights that are left"):
        run(score=score, folder=tmp_path, report=report)
    assert [n for n, step, end in steps] == [0, 0]
    fails[0] = False
    about = load(tmp_path).about
    steps.clear()
    with pytest.raises(TicketError, match="holds another run: score"):
        run(score=score, folder=tmp_path, report=report)  # `fails` is a value that it holds
    assert about["score"].startswith("test_a_score_that_fails") and not steps
    fails[0] = True
    with pytest.raises(ValueError, match="the same for all"):
        run(score=score, folder=tmp_path, report=report)
    assert not steps  # the training was put aside


def test_a_score_is_part_of_what_a_run_is(tmp_path):
    def scaled(by):
        return lambda network, task, params: {k: by * p for k, p in params.items()}

    run(score=scaled(1), folder=tmp_path, rounds=1)
    run(score=scaled(1), folder=tmp_path, rounds=1)
    for other in (scaled(2), gradient, None, functools.partial(gradient)):
        with pytest.raises(TicketError, match="holds another run: score"):
            run(score=other, folder=tmp_path, rounds=1)


@pytest.mark.parametrize("control", ["random", "given", "shuffled", "reinit"])
def test_controls_that_rank_otherwise_take_no_score(control):
    with pytest.raises(ValueError, match="takes no score: leave score out"):
        check_arguments(control=control, score=gradient)


def test_unknown_ways_to_rank_and_to_train_are_refused():
    with pytest.raises(ValueError, match="unknown way to rank 'snip'"):
        Control(rank="snip")
    with pytest.raises(ValueError, match="unknown way to train 'twice'"):
        Control(train="twice")
    with pytest.raises(ValueError, match="shuffle=True permutes a ticket's masks"):
        Control(shuffle=True)
    with pytest.raises(ValueError, match="score must be a function"):
        check_arguments(score="snip")


def test_replicas_take_a_score():
    nets = [normed(s) for s in (0, 1)]
    how = dict(rounds=2, prune=0.3, recipe=RECIPE, device="cpu", score=gradient)
    many = list(imp_many(toy(), nets, [0, 1], how="apart", **how))
    for k in (0, 1):
        alone = list(imp(toy(), normed(k), seed=k, **how))
        assert repr([r[k] for r in many]) == repr(alone)


# Schedules


def test_a_schedule_may_be_a_list_or_a_function(tmp_path):
    rates = [0.5, 0.25, 0.1]
    forms = [rates, tuple(rates), np.array(rates), torch.tensor(rates, dtype=torch.float64)]
    forms += [lambda n: rates[n - 1], RoundSchedule(tuple(rates)), [*rates, 0.9], iter(rates)]
    runs = [repr(run(prune=o, rounds=3)) for o in forms]
    assert len(set(runs)) == 1
    for o in (rates, lambda n: rates[n - 1]):
        kept = run(prune=o, rounds=3, folder=tmp_path)
    left = [128, 64, 48, 43]
    assert [r.tensors[0]["alive"] for r in kept] == left
    assert load(tmp_path).about["prune"] == dict(fractions=rates)
    with pytest.raises(TicketError, match=r"prune\.fractions"):
        run(prune=[0.5, 0.25, 0.2], rounds=3, folder=tmp_path)


@pytest.mark.parametrize(
    "prune, message",
    [
        ([0.5, 0.2], "lists 2 fractions and 3 rounds are asked for"),
        ([0.5, 1.0, 0.1], "round 2: prune rate 1.0 is not in"),
        (lambda n: 1 / n - 1, "round 1: prune rate 0.0 is not in"),
        ([0.5, "a", 0.1], "round 2: prune rate 'a' is not in"),
        ("0.2", "prune rate '0.2' is not in"),
        (True, "prune rate True is not in"),
        (float("nan"), "prune rate nan is not in"),
        (None, "prune rate None is not in"),
        ([0.5, 0.5, 0.999], "would leave none of the 128 weights in round 3"),
        (0.001, "would remove none"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_training(prune, message):
    steps = []
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(prune=prune, rounds=3, report=lambda *a: steps.append(a))
    assert not steps


# Arguments


def test_numbers_of_numpy_are_numbers():
    ours = run(prune=np.float64(0.3), seed=np.int64(3), rounds=np.int32(2))
    recipe = Recipe(epochs=np.int64(2), batch_size=np.int32(16), lr=np.float64(0.05))
    assert repr(ours) == repr(run(prune=0.3, seed=3, recipe=recipe))
    json.dumps(vars(Recipe(lr=np.float32(0.1), drops=(np.int64(1),))))
    assert Schedule(np.float32(0.25)).rate == 0.25


BAD_ARGUMENTS = [
    (dict(seed=1.2), "seed must be a whole number, not 1.2"),
    (dict(seed=True), "seed must be a whole number, not True"),
    (dict(seed="0"), "seed must be a whole number, not '0'"),
    (dict(seed=float("nan")), "seed must be a whole number, not nan"),
    (dict(rounds=2.0), "rounds must be a whole number, 0 or more, not 2.0"),
    (dict(rounds=-1), "rounds must be a whole number, 0 or more, not -1"),
    (dict(rounds=True), "rounds must be a whole number, 0 or more, not True"),
    (dict(rounds=255), "a history holds at most 254"),
    (dict(prune=0.9999, sizes=60_000), "12 rounds of geometric pruning at rate 0.9999"),
    (dict(control="imp2"), "did you mean 'imp'?"),
    (dict(scope="local"), "unknown scope 'local'"),
    (dict(preset="bacbone"), "did you mean 'backbone'?"),
    (dict(frozen="no"), "unknown choice for frozen parameters 'no'"),
    (dict(keep="first"), "unknown network to keep 'first'"),
    (dict(rewind="innit"), "did you mean 'init'?"),
    (dict(rewind="-5it"), "unknown rewind policy '-5it'"),
    (dict(rewind=5), "unknown rewind policy 5"),
    (dict(rewind="2ep", per_epoch=4, recipe=RECIPE), "the recipe ends at step 8"),
    (dict(rewind="none", per_epoch=100), "which trains nothing"),
    (dict(control="given", rounds=5, prunings=3), "the ticket knows 3 prunings, 5 were asked for"),
    (dict(min_density="half"), "min_density must be a number, not 'half'"),
    (dict(min_accuracy=float("nan")), "min_accuracy must be a number, not nan"),
    (dict(checkpoint_every=-1), "checkpoint_every must be 0 or more seconds"),
    (dict(checkpoint_every="1"), "checkpoint_every must be a number, not '1'"),
    (dict(per_epoch=0), "steps in an epoch must be a whole number, 1 or more, not 0"),
]


@pytest.mark.parametrize("kwargs, message", BAD_ARGUMENTS, ids=[m for _, m in BAD_ARGUMENTS])
def test_bad_arguments_are_refused_without_data_or_network(kwargs, message):
    with pytest.raises(ValueError) as e:
        check_arguments(**kwargs)
    assert message in str(e.value)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(epochs=2.5), "epochs must be a whole number, not 2.5"),
        (dict(batch_size=True), "batch_size must be a whole number, not True"),
        (dict(lr=float("nan")), "lr must be a number, not nan"),
        (dict(lr=float("inf")), "lr must be a number, not inf"),
        (dict(lr=0), "lr must be positive, not 0"),
        (dict(weight_decay=-1.0), "weight_decay must be 0 or more, not -1.0"),
        (dict(momentum=1.0), "momentum must be 0 or more and below 1, not 1.0"),
        (dict(clip=0), "clip must be positive, or None for no clipping, not 0"),
        (dict(drops=("1",)), "drops must be a number, not '1'"),
        (dict(precision="fp8"), "Known: bf16, fp32"),
        (dict(optimizer="sdg"), "did you mean 'sgd'?"),
        (dict(warmup=-1), "warmup must be 0 or more"),
    ],
)
def test_bad_recipes_are_refused(kwargs, message):
    with pytest.raises(ValueError) as e:
        Recipe(**kwargs)
    assert message in str(e.value)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(resets="wieghts"), "did you mean 'weights'?"),
        (dict(resets=("weights",), step="5 epochs"), "is no point of the training"),
        (dict(resets=("weights",), step=None), "is no point of the training"),
        (dict(resets=("weights",), rate="fast"), "rate must be a number, not 'fast'"),
    ],
)
def test_bad_policies_are_refused(kwargs, message):
    with pytest.raises(ValueError) as e:
        Policy(**kwargs)
    assert message in str(e.value)


def test_layer_by_layer_a_schedule_must_remove_something():
    "Each of ten tensors of four weights would keep all four"
    sizes = {str(i): 4 for i in range(10)}
    check_arguments(prune=0.1, rounds=1, sizes=sizes)
    with pytest.raises(ValueError, match="would remove none"):
        check_arguments(prune=0.1, rounds=1, sizes=sizes, scope="layer")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*file/run.*Choose a folder") as e:
        run(folder=tmp_path / "file" / "run")
    assert str(tmp_path) in str(e.value)


def test_facts_that_a_ticket_cannot_hold_are_refused_before_training(tmp_path):
    steps = []
    for about in (dict(size=np.float32(1)), dict(mean=float("nan"))):
        with pytest.raises(ValueError, match="cannot hold data=.*task.about first of all"):
            run(task=toy(about=about), folder=tmp_path, report=lambda *a: steps.append(a))
    assert not steps


# What is pruned is zero


class Rewrites(nn.Module):
    "Weights that are changed in each forward pass, in training or in test"

    def __init__(self, *args, when=True):
        super().__init__()
        self.linear, self.when = nn.Linear(*args), when

    def forward(self, x):
        if self.training == self.when:
            with torch.no_grad():
                self.linear.weight += 1e-3
        return self.linear(x)


@pytest.mark.parametrize(
    "when, said", [(True, "after training on 'toy'"), (False, "after round 1")]
)
def test_a_network_that_undoes_its_mask_is_stopped(when, said, tmp_path):
    net = nn.Sequential(Rewrites(8, 16, when=when), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(NotZero, match=f"pruned weights of '0.linear.weight' are not zero {said}"):
        run(net, folder=tmp_path)
    assert len(load(tmp_path).rounds) == 1  # the dense round is sound


class Noisy(torch.optim.SGD):
    "Adds noise to all weights, a subclass of an optimizer that keeps zeros"

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=1e-3)


def test_an_optimizer_that_brings_weights_back_is_masked_after_each_step():
    net = mlp()
    masks = {"0.weight": net[0].weight > 0}
    refine(toy(), net, RECIPE, masked=Masked(prunable(net), masks), opt=Noisy(net.parameters()))
    assert torch.equal(net[0].weight != 0, masks["0.weight"])


def test_not_a_number_is_not_zero():
    layer = nn.Linear(2, 1)
    masked = Masked(dict(w=layer.weight), dict(w=torch.tensor([[True, False]])))
    masked.weights()
    masked.check()
    layer.weight.data[0, 1] = float("nan")
    with pytest.raises(NotZero, match="1 of the 1 pruned weights of 'w'"):
        masked.check()


# Rates of one's own optimizer


def test_an_own_optimizer_keeps_its_rates():
    net, rates = mlp(), []
    groups = [dict(params=net[0].parameters(), lr=0.01), dict(params=net[2].parameters(), lr=0.5)]
    opt = torch.optim.SGD(groups)
    decay = torch.optim.lr_scheduler.ExponentialLR(opt, 0.1)

    def after(step, network, opt, loss):
        rates.append([g["lr"] for g in opt.param_groups])
        decay.step()

    refine(toy(), net, RECIPE, opt=opt, after_epoch=after)
    assert rates[0] == [0.01, 0.5] and rates[1] == pytest.approx([0.001, 0.05])
    refine(toy(), net, RECIPE, opt=opt, rate=lambda step: 0.3)
    assert [g["lr"] for g in opt.param_groups] == [0.3, 0.3]


def test_rates_by_hand():
    "One step of SGD with two groups: each weight moves by its own rate times its gradient"
    net, task = mlp(), toy()
    before = copy.deepcopy(net)
    with seeded(0, "train", 0):
        batch = next(task.data.batches(0, 0, 16))
    task(before, batch).backward()
    groups = [dict(params=net[0].parameters(), lr=0.01), dict(params=net[2].parameters(), lr=0.5)]
    refine(task, net, RECIPE, opt=torch.optim.SGD(groups), stop=1)
    for i, lr in ((0, 0.01), (2, 0.5)):
        expected = before[i].weight - lr * before[i].weight.grad
        assert torch.allclose(net[i].weight, expected, atol=1e-7)


# Modes and frozen parts


def test_frozen_norms_and_what_rests_stay_as_they_are():
    net = nn.Sequential(normed(), nn.BatchNorm1d(3), nn.Dropout(0.9), nn.BatchNorm1d(3))
    net[0][1].requires_grad_(False)  # frozen batch norm
    net[2].eval()  # dropout that rests
    net[3].eval()  # batch norm that rests, and is trained
    net.head_names = ("0.4",)
    still = {k: t.clone() for k, t in state(net).items() if k[:3] in ("0.1", "3.r", "3.n")}
    before = [m.training for m in net.modules()]
    assert before.count(False) == 2
    run(net, rewind="lr")
    now = state(net)
    assert all(torch.equal(now[k], t) for k, t in still.items()) and len(still) == 8
    assert not torch.equal(net[1].running_mean, torch.zeros(3))
    assert [m.training for m in net.modules()] == [
        b and m is not net[0][1] for b, m in zip(before, net.modules())
    ]


def test_single_samples_are_enough_where_norms_are_frozen():
    "Batch norm in training mode wants two samples, in the trial as in the training"
    single = replace(RECIPE, batch_size=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        run(normed(), recipe=single)
    for rest in (lambda norm: norm.requires_grad_(False), lambda norm: norm.eval()):
        net = normed()
        rest(net[1])
        assert len(run(net, recipe=single, rounds=1)) == 2 and not net[1].running_mean.any()


def test_a_network_in_test_mode_is_trained():
    "As transformers hand it out; a norm that is frozen stays"
    a, b = normed(), normed()
    assert repr(run(a.eval())) == repr(run(b))
    c = normed()
    c[1].requires_grad_(False)
    assert [m.training for m in train_mode(c.eval()).modules()] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]


def test_frozen_weights_are_left_out_unless_asked_for(tmp_path):
    def half_frozen():
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
        net[0].requires_grad_(False)
        return net

    with seeded(0, "frozen"):
        net = half_frozen()
    start = net[0].weight.clone()
    rounds = run(net, folder=tmp_path)
    assert [t["tensor"] for t in rounds[0].tensors] == ["2.weight"]
    assert torch.equal(net[0].weight, start)
    assert load(tmp_path).about["not_trained"] == ["0.weight", "0.bias"]
    assert "0.weight (frozen, 128 weights)" in load(tmp_path).about["prunes"]
    both = run(half_frozen(), frozen="prune")
    assert [t["tensor"] for t in both[2].tensors] == ["0.weight", "2.weight"]
    net = half_frozen()
    kept = net[0].weight.clone()
    run(net, frozen="prune")
    left = net[0].weight != 0
    assert 0 < (~left).sum() and torch.equal(net[0].weight, kept * left)  # pruned, not trained


def test_a_network_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="depend on any weight that is trained|nothing to train"):
        run(mlp().requires_grad_(False), frozen="prune")
    with pytest.raises(ValueError, match="are frozen .*so there is nothing to train"):
        optimizer(mlp().requires_grad_(False), RECIPE)


# What a run is


def labels_changed(at):
    changed = data()
    changed.y[at] = (changed.y[at] + 1) % 3
    return Task("toy", changed)


class Functional(nn.Module):
    "The same weights, and an activation that no module shows"

    def __init__(self, activation=F.relu):
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(8, 16), nn.Linear(16, 3), activation

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


class InForward(Functional):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def renamed(kind, name):
    "A class of another name, as an edited script would define it again"
    return type(name, kind.__bases__, dict(vars(kind)))


def seeded_network(make):
    with seeded(0, "mlp"):
        return make()


def frozen_bias():
    net = mlp()
    net[0].bias.requires_grad_(False)
    return net


weights = torch.tensor([1.0, 2.0, 3.0])
CHANGED = {
    "the loss": (mlp, toy, mlp, lambda: toy(loss=nn.CrossEntropyLoss(weights)), "loss"),
    "the loss's weights": (
        mlp,
        lambda: toy(loss=nn.CrossEntropyLoss(weights)),
        mlp,
        lambda: toy(loss=nn.CrossEntropyLoss(weights * 2)),
        "fingerprint.loss",
    ),
    "smoothing": (
        mlp,
        lambda: toy(loss=nn.CrossEntropyLoss()),
        mlp,
        lambda: toy(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
        "fingerprint.loss",
    ),
    "the last label": (mlp, toy, mlp, lambda: labels_changed(-1), "fingerprint.data.y"),
    "an activation": (
        mlp,
        toy,
        lambda: mlp(nn.GELU),
        toy,
        "module '1' was torch.nn.modules.activation.ReLU(",
    ),
    "a function": (Functional, toy, lambda: Functional(F.gelu), toy, "the network's structure"),
    "dropout": (
        normed,
        toy,
        lambda: normed_with(0.5),
        toy,
        "module '3' was torch.nn.modules.dropout.Dropout(p=0.1",
    ),
    "a frozen bias": (mlp, toy, frozen_bias, toy, "not_trained ([] there, ['0.bias'] here)"),
}


def normed_with(p):
    net = normed()
    net[3].p = p
    return net


@pytest.mark.parametrize("net, task, other, task2, said", CHANGED.values(), ids=CHANGED)
def test_a_run_that_was_changed_is_not_taken_up(net, task, other, task2, said, tmp_path):
    run(seeded_network(net), task(), folder=tmp_path, rounds=1)
    before = (tmp_path / "ticket.safetensors").read_bytes()
    assert repr(run(seeded_network(net), task(), folder=tmp_path, rounds=1))  # as it was
    with pytest.raises(TicketError, match="holds another run") as e:
        run(seeded_network(other), task2(), folder=tmp_path, rounds=1)
    assert said in str(e.value)
    assert (tmp_path / "ticket.safetensors").read_bytes() == before


def test_an_edited_forward_pass_is_another_network(tmp_path):
    "The same names, types and weights; only the code of `forward` differs"
    edited = type("Functional", (nn.Module,), dict(vars(Functional), forward=InForward.forward))
    edited.__module__, edited.__qualname__ = Functional.__module__, Functional.__qualname__
    make = lambda kind: seeded_network(lambda: functional_of(kind))
    run(make(Functional), folder=tmp_path, rounds=1)
    with pytest.raises(TicketError, match="the network's structure"):
        run(make(edited), folder=tmp_path, rounds=1)


def functional_of(kind):
    "An object of a class whose __init__ is that of `Functional`"
    net = kind.__new__(kind)
    nn.Module.__init__(net)
    net.a, net.b, net.activation = nn.Linear(8, 16), nn.Linear(16, 3), F.relu
    return net


NEW = "reads score frozen not_trained structure fingerprint prunes python tied head".split()


def test_a_folder_of_an_older_version_is_taken_up_with_a_warning(tmp_path):
    whole = run(folder=tmp_path / "whole", rounds=3)
    begun = imp(toy(), mlp(), 3, 0.3, recipe=RECIPE, device="cpu", folder=tmp_path / "old")
    next(begun)
    next(begun)
    begun.close()
    ticket = load(tmp_path / "old")
    ticket.about = {k: v for k, v in ticket.about.items() if k not in NEW}
    ticket.save(tmp_path / "old" / "ticket.safetensors")
    with pytest.warns(UserWarning, match="not known whether these are as they were: score, frozen"):
        rest = run(folder=tmp_path / "old", rounds=3)
    assert repr(rest) == repr(whole)
    assert digest(load(tmp_path / "old").history.died) == digest(
        load(tmp_path / "whole").history.died
    )


def test_a_state_of_an_older_version_is_taken_up(tmp_path):
    "A run whose weights go on cannot lose its state; its name must not depend on what is new"
    how = dict(rewind="lr", rounds=3)
    whole = run(folder=tmp_path / "whole", **how)
    begun = imp(
        toy(), mlp(), prune=0.3, recipe=RECIPE, device="cpu", folder=tmp_path / "old", **how
    )
    next(begun)
    begun.close()
    assert_old(tmp_path / "old", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert repr(run(folder=tmp_path / "old", **how)) == repr(whole)


def assert_old(folder, **how):
    "Make a folder one of an older version: facts that are new leave the ticket and the state's name"
    from rg_tickets.tickets import load_tensors, save_tensors

    ticket = load(folder)
    ticket.about = {k: v for k, v in ticket.about.items() if k not in NEW}
    ticket.save(folder / "ticket.safetensors")
    plain = {k: v for k, v in ticket.about.items() if k not in ("versions", "resumed")}
    mark = digest({}, json.dumps([plain, digest(ticket.weights)], sort_keys=True))
    tensors, header = load_tensors(folder / "state.safetensors", "state")
    header = {k: v for k, v in header.items() if k != "numbers"} | dict(run=mark)
    save_tensors(folder / "state.safetensors", tensors, header, "state")


def test_a_folder_in_which_other_tensors_are_pruned_is_not_taken_up(tmp_path):
    "As one of a version that took no recurrent weights"
    run(folder=tmp_path, rounds=1)
    ticket = load(tmp_path)
    ticket.about = {k: v for k, v in ticket.about.items() if k not in NEW}
    ticket.history.died["2.weight"] = torch.full((3, 16), 255, dtype=torch.uint8)
    ticket.save(tmp_path / "ticket.safetensors")
    with pytest.raises(TicketError, match=r"what is pruned \(2.weight there and not here\)"):
        run(folder=tmp_path, rounds=1)


def test_another_python_compiles_other_code(tmp_path):
    run(folder=tmp_path, rounds=1, score=gradient)
    ticket = load(tmp_path)
    ticket.about |= dict(python="3.0", score="other", fingerprint={}, structure={})
    ticket.save(tmp_path / "ticket.safetensors")
    with pytest.warns(UserWarning, match="fingerprint, structure, score"):
        run(folder=tmp_path, rounds=1, score=gradient)


def test_what_is_pruned_is_said_at_the_start(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="rg_tickets"):
        run(folder=tmp_path, rounds=0)
    said = str(describe(mlp()))
    assert said.startswith("prunes 128 of 176 matrix weights")
    assert [r.getMessage() for r in caplog.records] == [f"Sequential on toy: {said}"]
    assert load(tmp_path).about["prunes"] == said and load(tmp_path).about["head"] == ["2"]


# State outside of the state_dict


class Annealed(nn.Module):
    "Noise that falls with a count of steps, its last input in a buffer that is not saved, and a mean"

    def __init__(self, lazy=False):
        super().__init__()
        self.a, self.b, self.lazy = nn.Linear(8, 16), nn.Linear(16, 3), lazy
        self.register_buffer("last", torch.zeros(16), persistent=False)
        self.mean = torch.zeros(16)  # a tensor that is no buffer
        if not lazy:
            self.steps, self.temperature, self.begun = 0, None, False

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.steps = getattr(self, "steps", 0) + 1
            self.temperature = 1 / self.steps
            self.begun = True
            h = h + torch.randn_like(h) * self.temperature + self.last + self.mean
            self.last.copy_(h.detach().mean(0))
            self.mean = 0.5 * self.mean + 0.1 * h.detach().mean(0)
        return self.b(torch.relu(h))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "rewind", ["init", "3it", "lr", Policy(("weights", "schedule"), step="5it")]
)
def test_counters_and_unsaved_buffers_are_rewound_and_resumed(lazy, rewind, tmp_path):
    make = lambda: seeded_network(lambda: Annealed(lazy))
    net, late = make(), isinstance(rewind, Policy)  # whose rounds begin in the second epoch
    run(net, folder=tmp_path / "whole", rewind=rewind)
    places = [(0, 8), (1, 8)] if late else [(0, 4), (0, 8), (1, 4), (2, 4)]
    other = cut(make, tmp_path / "cut", *places, rewind=rewind)
    assert digest(state(net)) == digest(state(other))
    assert repr(load(tmp_path / "whole").rounds) == repr(load(tmp_path / "cut").rounds)
    assert net.steps == other.steps == (24 if rewind == "lr" else 8)  # 8 in each round
    assert torch.equal(net.last, other.last) and torch.equal(net.mean, other.mean)


def test_two_rounds_of_equal_masks_are_equal(tmp_path):
    "Without pruning in between, a round that is rewound is the same round"
    ticket = run(folder=tmp_path, rounds=1) and load(tmp_path)
    for d in ticket.history.died.values():
        d.fill_(255)
    names = {"0.weight": "a.weight"}
    ticket.history.died = {names[k]: d for k, d in ticket.history.died.items()}
    net = seeded_network(Annealed)
    one, two = run(net, control="given", ticket=ticket, rounds=1)
    assert (one.loss, one.metrics, one.tensors) == (two.loss, two.metrics, two.tensors)


class Drawing(nn.Module):
    "Dropout from a generator of its own"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.g = torch.Generator().manual_seed(1)

    def forward(self, x):
        h = self.a(x)
        if self.training:
            h = h * (torch.rand(h.shape, generator=self.g) < 0.9)
        return self.b(h)


def test_generators_of_a_network_are_seeded(tmp_path):
    make = lambda: seeded_network(Drawing)
    net = make()
    run(net, folder=tmp_path / "whole")
    other = cut(make, tmp_path / "cut", (0, 4), (1, 4))
    assert digest(state(net)) == digest(state(other))
    for seed in (0, 1):  # whether seed 0 ran before does not matter
        run(net := make() if seed == 0 else net_again(net), seed=seed)
    assert digest(state(net)) == digest(state(trained_with(make(), 1)))


def net_again(net):
    "The same object at its initial weights; its generator is wherever it is"
    net.load_state_dict(seeded_network(Drawing).state_dict())
    return net


def trained_with(net, seed):
    run(net, seed=seed)
    return net


class Extra(nn.Linear):
    def get_extra_state(self):
        return dict(calls=1)

    def set_extra_state(self, found):
        pass


def two_names():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    net[2].weight = nn.Parameter(net[0].weight.data)
    return net


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Sequential(Extra(8, 4), nn.Linear(4, 3)), "Extra '0' keeps extra state"),
        (
            lambda: nn.Embedding(9, 3, sparse=True),
            "makes sparse gradients, which are not supported",
        ),
        (two_names, "'0.weight' and '2.weight' share their memory and are two parameters"),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)), "has no shape yet"),
    ],
)
def test_networks_that_cannot_be_set_back_are_refused(make, message):
    net = make()
    with pytest.raises(ValueError) as e:
        check_network(net)
    assert message in str(e.value)
    with pytest.raises(ValueError) as e:
        run(net)
    assert message in str(e.value)


def test_snapshot_restores_only_what_it_should():
    net = seeded_network(Annealed)
    start = Snapshot(net)
    refine(toy(), net, RECIPE)
    assert net.steps == 8 and Unsaved.of(net).beyond(start.unsaved).numbers[("", "steps")] == 8
    start.restore(net, ("bn_stats",))
    assert net.steps == 8  # weights were not asked for
    start.restore(net)
    assert (net.steps, net.temperature, net.begun) == (0, None, False)
    assert not net.last.any() and not Unsaved.of(net).beyond(start.unsaved)


# The trained network


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("folder", [True, False])
def test_the_trained_network_is_kept(keep, folder, tmp_path):
    net, where = normed(), tmp_path if folder else None
    rounds = run(net, toy(), keep=keep, folder=where, rounds=4, recipe=replace(RECIPE, lr=0.3))
    best = max(rounds[1:], key=lambda r: (r.metrics["accuracy"], r.n)).n if keep == "best" else 4
    assert evaluate(toy(), net) == rounds[best].metrics
    zeros = int((net[0].weight == 0).sum())
    assert zeros == 128 - rounds[best].tensors[0]["alive"]
    if not folder:
        return
    kept = load_trained(tmp_path / "trained.safetensors")
    assert kept.about["round"] == best
    fresh = apply(kept, normed(1))
    assert evaluate(toy(), fresh) == rounds[best].metrics
    again = normed()
    run(again, toy(), keep=keep, folder=where, rounds=4, recipe=replace(RECIPE, lr=0.3))
    assert evaluate(toy(), again) == rounds[best].metrics  # taken up at its end


def test_best_is_not_the_last_here():
    "The premise of the test above"
    rounds = run(normed(), toy(), rounds=4, recipe=replace(RECIPE, lr=0.3))
    scores = [r.metrics["accuracy"] for r in rounds[1:]]
    assert scores[-1] < max(scores)


def test_a_kept_network_survives_a_kill_between_two_files(tmp_path):
    how = dict(keep="best", rounds=3, recipe=replace(RECIPE, lr=0.3))
    whole = run(normed(), folder=tmp_path / "whole", **how)
    begun = imp(toy(), normed(), prune=0.3, device="cpu", folder=tmp_path / "cut", **how)
    next(begun)
    next(begun)
    old = (tmp_path / "cut/ticket.safetensors").read_bytes()
    next(begun)
    begun.close()
    (tmp_path / "cut/ticket.safetensors").write_bytes(old)  # the ticket of round 2 was not written
    assert repr(run(normed(), folder=tmp_path / "cut", **how)) == repr(whole)
    a, b = (load_trained(tmp_path / o / "trained.safetensors") for o in ("whole", "cut"))
    assert a.about["round"] == b.about["round"] and digest(a.weights) == digest(b.weights)


def test_replicas_keep_their_networks(tmp_path):
    nets = [normed(s) for s in (0, 1)]
    folders = [tmp_path / str(s) for s in (0, 1)]
    how = dict(rounds=3, prune=0.3, recipe=replace(RECIPE, lr=0.3), device="cpu", keep="best")
    for where in (None, folders):
        nets = [normed(s) for s in (0, 1)]
        rounds = list(imp_many(toy(), nets, [0, 1], folders=where, how="apart", **how))
        for k, net in enumerate(nets):
            own = [r[k] for r in rounds]
            best = max(own[1:], key=lambda r: (r.metrics["accuracy"], r.n))
            assert evaluate(toy(), net) == best.metrics
    kept = load_trained(folders[1] / "trained.safetensors")
    assert kept.about["round"] == best.n and digest(kept.weights) == digest(state(nets[1]))


def test_what_was_not_kept_is_said(tmp_path):
    run(folder=tmp_path)
    for keep in ("last", "best"):
        with pytest.raises(TicketError, match="trained without keep="):
            run(folder=tmp_path, keep=keep)
    run(folder=tmp_path)


# Wrapped and tied networks


class Tower(nn.Module):
    "An embedding whose matrix also makes the output, and a layer that is used twice"

    def __init__(self):
        super().__init__()
        self.words, self.body = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.again, self.out = self.body, nn.Linear(8, 9, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(torch.relu(self.again(torch.relu(self.body(self.words(x))))))


def next_word():
    x = torch.randint(9, (64,), generator=generator(0, "words"))
    return Task("words", Resident(x, (x + 1) % 9, x[:32], (x[:32] + 1) % 9))


def test_tied_tensors_are_counted_once_and_stay_pruned(tmp_path):
    net = seeded_network(Tower)
    rounds = run(net, next_word(), preset="all", folder=tmp_path)
    ticket = load(tmp_path)
    assert [t["count"] for t in rounds[0].tensors] == [72, 64]
    assert ticket.about["tied"] == {
        "again.weight": "body.weight",
        "again.bias": "body.bias",
        "out.weight": "words.weight",
    }
    fresh = apply(ticket, Tower())
    for net in (net, fresh):
        assert net.out.weight is net.words.weight
        gone = ~ticket.history.mask()["words.weight"]
        assert gone.any() and not net.out.weight[gone].any()


@pytest.mark.parametrize("kind", ["compiled", "parallel", "inside"])
def test_a_wrapped_network_makes_the_ticket_of_the_plain_one(kind, tmp_path):
    compiled = functools.partial(torch.compile, backend="eager")
    wrap = {
        "compiled": compiled,
        "parallel": nn.DataParallel,
        "inside": lambda net: nn.Sequential(*map(compiled, net)),
    }[kind]
    plain, inner = mlp(), mlp()
    run(plain, folder=tmp_path / "plain")
    run(wrap(inner), folder=tmp_path / "wrapped")
    a, b = load(tmp_path / "plain"), load(tmp_path / "wrapped")
    assert list(a.weights) == list(b.weights) and digest(a.history.died) == digest(b.history.died)
    assert digest(state(plain)) == digest(state(inner))
    assert a.about["head"] == b.about["head"] == ["2"]
    run(mlp(), folder=tmp_path / "wrapped")  # and may be taken up by the plain network
    apply(a, wrap(mlp(seed=1)))


def test_a_compiled_run_goes_on_as_a_plain_one(tmp_path):
    make = lambda: torch.compile(mlp(), backend="eager")
    how = dict(folder=tmp_path / "cut", checkpoint_every=0, rewind="lr")
    with pytest.raises(Stop):
        run(make(), report=stop_at(1, 4), **how)
    net, whole = mlp(), mlp()
    run(net, **how)
    run(whole, rewind="lr")
    assert digest(state(net)) == digest(state(whole))


# Batches of other forms


class Pair(nn.Module):
    "Two inputs, two heads, a dictionary of outputs"

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)
        self.kind, self.size = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, a, b):
        h = torch.relu(self.left(a) + self.right(b))
        return dict(kind=self.kind(h), size=self.size(h)[:, 0])


def pair_loss(output, target):
    kind = F.cross_entropy(output["kind"], target["kind"], ignore_index=-100)
    return kind + F.mse_loss(output["size"], target["size"])


def accuracy(output, target):
    return (output["kind"].argmax(1) == target["kind"]).float().mean()


def pairs(form):
    d = data()
    y = [dict(kind=k, size=s) for k, s in zip(d.y, d.x.sum(1))]
    rows = {
        "tuple": [(x, -x, t) for x, t in zip(d.x, y)],
        "dict": [dict(a=x, b=-x, labels=t) for x, t in zip(d.x, y)],
    }[form]
    make = lambda: torch.utils.data.DataLoader(rows, batch_size=16)
    return Task.from_loaders(make(), make(), pair_loss, metrics=dict(accuracy=accuracy))


@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_of_any_form(form, precision, tmp_path):
    make = lambda: seeded_network(Pair)
    recipe, net = replace(RECIPE, precision=precision), make()
    rounds = run(net, pairs(form), recipe=recipe, folder=tmp_path / "a")
    assert [t["tensor"] for t in rounds[0].tensors] == ["left.weight", "right.weight"]
    assert load(tmp_path / "a").about["head"] == ["kind", "size"]
    other = cut(make, tmp_path / "b", (1, 4), task=pairs(form), recipe=recipe)
    assert digest(state(net)) == digest(state(other))


def test_the_loss_of_a_transformer(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    ids = torch.randint(5, 40, (32, 12), generator=generator(0, "ids"))
    rows = [dict(input_ids=i, attention_mask=torch.ones(12).long(), labels=i[1] % 2) for i in ids]
    loader = lambda: torch.utils.data.DataLoader(rows, batch_size=8)
    task = Task.from_loaders(loader(), loader(), loss="model")
    make = lambda: seeded_network(lambda: transformers.BertForSequenceClassification(config))
    net = make()
    rounds = run(net, task, folder=tmp_path / "a", score=gradient)
    assert load(tmp_path / "a").about["head"] == ["classifier"] and len(rounds[0].tensors) == 7
    other = cut(make, tmp_path / "b", (1, 4), task=task, score=gradient)
    assert digest(state(net)) == digest(state(other))


# Places and devices


@pytest.mark.parametrize(
    "where, network, last",
    [
        ("cpu", nn.Conv2d(4, 8, 3), True),
        ("cpu", nn.Conv2d(4, 8, 1, stride=2), False),
        ("cpu", nn.Conv3d(4, 8, 3), False),
        ("mps", nn.Conv2d(4, 8, 3), False),
        ("cuda", nn.Conv2d(4, 8, 3), True),
        ("cuda", nn.Conv2d(4, 8, 1, stride=2), True),
    ],
)
def test_one_order_of_memory_for_each_place(where, network, last, monkeypatch):
    asked = {}
    monkeypatch.setattr(nn.Module, "to", lambda self, *a, **k: asked.update(k) or self)
    place(network, torch.device(where))
    assert (asked["memory_format"] == torch.channels_last) == last


SETTINGS = [
    'torch.backends.fp32_precision = "ieee"',
    "torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True",
    'torch.backends.cudnn.fp32_precision = "ieee"',
    'torch.backends.cudnn.conv.fp32_precision = "ieee"',
    'torch.backends.cuda.matmul.fp32_precision = "tf32"',
]
SCRIPT = """
import torch
{settings}
from test_imp import *
def settings():
    b = torch.backends
    kinds = b, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul
    return [k.fp32_precision for k in kinds], b.cudnn.benchmark, b.cudnn.deterministic
before = settings()
run(normed(), score=gradient)
list(imp_many(toy(), [normed(0), normed(1)], [0, 1], 1, recipe=RECIPE, device="cpu", how="apart"))
list(imp_many(toy(), [mlp(seed=s) for s in (0, 1)], [0, 1], 1, recipe=RECIPE, device="cpu"))
assert settings() == before, (before, settings())
"""


slow = lambda o: pytest.param(o, marks=pytest.mark.slow)


@pytest.mark.parametrize("settings", [*SETTINGS[:2], *map(slow, SETTINGS[2:])])
def test_settings_of_tf32_are_left_alone(settings, request):
    "In a process of its own, because some settings cannot be read back once they disagree"
    here = request.path.parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(settings=settings)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
