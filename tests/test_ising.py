"The simulated magnet at full length, and on the GPU"

import warnings

import numpy as np
import pytest
import torch
from rg_tickets.ising import K_C, clusters, energy, energy_torus, jackknife, mcrg, measure, sample

EXACT = {"even": 1.0, "odd": 15 / 8}


def headline(table, step, operators=7):
    "y and its error, for both families"
    o = table[(table.step == step) & (table.operators == operators)].set_index("family")
    return {f: (o.y[f], o.error[f]) for f in EXACT}


@pytest.mark.slow
def test_another_seed():
    "The exponents of `02_ising`'s long run, from a run half as long that shares no random number with it"
    for f, (y, error) in headline(
        mcrg(measure(64, sweeps=500, replicas=64, seed=65, burn=200)), step=3
    ).items():
        assert abs(y - EXACT[f]) < 3 * error and error < 0.02, (f, y, error)


@pytest.mark.slow
@pytest.mark.parametrize("L", [8, 16])
@pytest.mark.parametrize("algorithm", ["cluster", "heat bath", "metropolis"])
def test_energy_at_criticality(L, algorithm):
    x = torch.stack(
        [energy(s) for s in sample(L, K_C, 2000, 64, seed=9, burn=400, algorithm=algorithm)]
    ).mean(0)
    value, error = jackknife(x.numpy(), bins=64)
    assert abs(value - energy_torus(K_C, L)) < 4 * error


def test_clusters_of_a_spiral():
    "The worst case of label propagation: one long winding path"
    joined = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    joined[0, 0, ::2, :-1] = True
    joined[1, 0, 0::4, -2] = True
    joined[0, 0, 1::2] = False
    joined[1, 0, 1::4, -2] = True
    joined[1, 0, 2::4, 0] = True
    joined[1, 0, 3:-1:4, 0] = True
    a, b = (clusters(joined, method).flatten() for method in ("scipy", "torch"))
    assert len(torch.stack([a, b], 1).unique(dim=0)) == len(a.unique()) == len(b.unique())
    assert a.bincount().max() > 64 * 32


@pytest.mark.cuda
def test_large_lattice():
    "L = 256 on the GPU: within three errors once two blockings have passed"
    table = mcrg(measure(256, sweeps=300, replicas=64, seed=0, burn=300, device="cuda"))
    for step in (3, 4):
        for f, (y, error) in headline(table, step).items():
            assert abs(y - EXACT[f]) < 3 * error + 0.002, (f, step, y, error)


def remembering(rng, n, phi=0.9):
    "A series whose autocorrelation time is (1 + phi) / (1 - phi) / 2"
    x = np.empty(n)
    x[0] = rng.normal() / np.sqrt(1 - phi**2)
    for i in range(1, n):
        x[i] = phi * x[i - 1] + rng.normal()
    return x


def test_bins_shorter_than_the_memory_give_a_warning_and_too_small_an_error():
    rng, inside = np.random.default_rng(0), {20: 0, 200: 0}
    for _ in range(60):
        for length in inside:
            series = remembering(rng, 20 * length)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                mean, error = jackknife(series, bins=20)
            inside[length] += abs(mean) < 2.09 * error
            assert bool(said) == (length == 20)
    assert inside[20] / 60 < 0.9 < inside[200] / 60


def test_independent_replicas_give_no_warning():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            jackknife(rng.normal(size=(64, 3)), bins=64)
