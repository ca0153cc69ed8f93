"Scale independence: exponents at several rates of pruning, exact without retraining and alike with it; the stored table is what the code gives"

import itertools
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from rg_tickets.basics import seeded
from rg_tickets.flows import Flow, observable
from rg_tickets.imp import imp
from rg_tickets.models.prunable import prunable
from rg_tickets.models.resnets import resnet
from rg_tickets.tasks.images import image_task
from rg_tickets.tickets import Ticket
from rg_tickets.train import Recipe
from rg_tickets.trajectories import run_slopes

RESULTS = Path(__file__).parents[1] / "nbs" / "results"
torch.set_num_threads(1)


def perceptron(seed):
    sizes = [64, 40, 40, 40, 40, 10]
    with seeded(seed, "init"):
        layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *itertools.chain(*layers))[:-1]


def small_resnet(seed):
    return resnet("cifar_resnet8", width=4, in_channels=1, seed=seed)


def rates(network, rounds, over=12):
    "Rates that lead through the counts N 0.8^(over n / rounds), rounded"
    total = sum(w.numel() for w in prunable(network).values())
    left = [round(total * 0.8 ** (over * n / rounds)) for n in range(rounds + 1)]
    return [1 - b / a for a, b in zip(left, left[1:])]


def shares(build, rounds, seed=0, over=12, prune=None, folder=None, **kwargs):
    "Times [rounds + 1] and shares of the prunable tensors [rounds + 1, tensors] of one run"
    network = build(seed)
    run = imp(
        image_task("digits8", n_train=400, size=8),
        network,
        rounds=rounds,
        prune=prune or rates(network, rounds, over),
        seed=seed,
        device="cpu",
        folder=folder,
        recipe=Recipe(epochs=3, batch_size=32),
        **kwargs,
    )
    table = observable(Flow.of(list(run), seed), by="tensor")
    wide = table.pivot_table(index=["n", "t"], columns="group", values="value", sort=False)
    return wide.reset_index().t.to_numpy(), wide.to_numpy()


@pytest.mark.parametrize("build", [perceptron, small_resnet])
@pytest.mark.parametrize("control", ["untrained", "oneshot"])
def test_without_retraining_shares_at_a_time_are_the_same_at_every_rate(build, control):
    t, fine = shares(build, 12, control=control)
    for rounds in (6, 4, 3, 2, 1):
        s, coarse = shares(build, rounds, control=control)
        assert np.array_equal(s, t[:: 12 // rounds])
        assert np.array_equal(coarse, fine[:: 12 // rounds])


def test_plain_rates_differ_by_the_rounding_of_counts_alone():
    t, fine = shares(perceptron, 6, prune=0.2, control="untrained")
    s, coarse = shares(perceptron, 3, prune=0.36, control="untrained")
    assert abs(s - t[::2]).max() < 1e-3 and abs(coarse - fine[::2]).max() < 1e-3
    assert np.ptp(fine, axis=0).max() > 0.01  # there is a flow that could have differed


def test_trained_networks_have_other_masks_and_nearly_the_same_exponents(tmp_path):
    "Four rounds of 20 % and two of 36 %: masks differ in more than a tenth, slopes by less than .1"
    found, overlap = [], []
    for seed in range(2):
        folders = {rounds: tmp_path / f"{seed}-{rounds}" for rounds in (4, 2)}
        t, fine = shares(perceptron, 4, seed, over=4, folder=folders[4])
        _, coarse = shares(perceptron, 2, seed, over=4, folder=folders[2])
        assert np.array_equal(fine[0], coarse[0])  # the dense network is one and the same
        found.append(np.subtract(*run_slopes(np.stack([fine[::2], coarse]), t[::2])["sigma"]))
        a, b = (Ticket.load(f / "ticket.safetensors").history for f in folders.values())
        masks = zip(a.mask(4).values(), b.mask(2).values())
        both, either = np.sum([[(x & y).sum(), (x | y).sum()] for x, y in masks], axis=0)
        overlap.append(both / either)
    assert 0.3 < min(overlap) and max(overlap) < 0.9
    assert 0 < abs(np.mean(found, axis=0)).max() < 0.1


@pytest.mark.parametrize("scheme, rounds", [("36 %", 6), ("93.1 %", 1)])
def test_the_stored_null_is_what_is_computed_now(scheme, rounds):
    table = pd.read_csv(RESULTS / "scale.csv")
    kept = table.query(
        "network == 'perceptron' and control == 'untrained' and scheme == @scheme and seed == 3"
    )
    t, now = shares(perceptron, rounds, seed=3, control="untrained")
    assert np.allclose(kept.t, t, atol=1e-6)
    assert np.allclose(kept[["m1", "m2", "m3", "m4"]], now, atol=1e-6)
