"The free theory against slow or foreign peers: exact pruning in other precisions, many draws, the figures of `flows`"

import math
import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D
from rg_tickets import free
from rg_tickets.basics import generator, seeded
from rg_tickets.flows import plot_exponents
from rg_tickets.masks import MaskHistory, prune
from rg_tickets.models.prunable import prunable
from rg_tickets.models.resnets import resnet
from rg_tickets.trajectories import run_slopes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empirical_is_exact_pruning(dtype):
    g = generator(0, "free")
    w = {
        "a.weight": torch.randn(40, 9, generator=g, dtype=dtype),
        "b.weight": 3 * torch.rand(500, generator=g, dtype=dtype),
    }
    for remove in (1, 100, 430, 858, 859):
        history = MaskHistory.dense(w)
        prune(history, w, remove)
        A = [w[k][m].abs().double().sum().item() for k, m in history.mask().items()]
        np.testing.assert_allclose(
            free.magnitudes(free.empirical(w), history.time(), "tensor").values[0], A, rtol=1e-12
        )


def test_bf16_ties_go_together():
    w = {"a": torch.tensor([1.0, 1.0, 1.0, 2.0]).bfloat16()}
    assert free.magnitudes(free.empirical(w), math.log(2)).values.item() == 2.0


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_covariance_of_many_draws(law):
    layers = {
        "a": free.Layer(400, 1.0, law),
        "b": free.Layer(900, 0.7, law),
        "c": free.Layer(2000, 0.5, "gaussian"),
    }
    t, rng, rows = free.times(6), np.random.default_rng(0), []
    for _ in range(3000):
        w = {
            k: torch.from_numpy(
                np.abs(
                    rng.standard_normal(l.count)
                    if l.law is free.LAWS["gaussian"]
                    else rng.random(l.count)
                )
                * l.scale
            )
            for k, l in layers.items()
        }
        values, owner = (
            torch.cat(list(w.values())),
            torch.cat([torch.full((l.count,), i) for i, l in enumerate(layers.values())]),
        )
        order = values.argsort(descending=True)
        kept = np.round(len(values) * np.exp(-t)).astype(int)
        rows.append(
            np.log([torch.bincount(owner[order[:n]], values[order[:n]], 3).numpy() for n in kept])
        )
    seen, said = (
        np.cov(np.reshape(rows, (3000, -1)).T),
        free.covariance(layers, t, kind="magnitude").transpose(0, 2, 1, 3).reshape(21, 21),
    )
    sd = np.sqrt(np.diag(said))
    assert np.abs((seen - said) / np.outer(sd, sd)).max() < 0.12


def test_exponents_agree_with_flows_and_feed_its_figure():
    layers = free.initial(resnet("cifar_resnet14"))
    e, M = free.exponents(layers), free.shares(layers, free.times())
    np.testing.assert_allclose(
        e.sigma, run_slopes(M[e.group].values, M.index.values)["sigma"][0], atol=1e-10
    )
    assert plot_exponents(e.assign(kind="relevant"), null=e) is not None
    assert free.exponents(layers, by="stage").group.tolist() == [
        "stem",
        "layer1",
        "layer2",
        "layer3",
    ]


def test_laws_of_attention_recurrent_and_bilinear_layers():
    "As torch draws them: the root mean square of each matrix, on a wrapped network"
    with seeded(0, "init"):
        net = torch.nn.ModuleDict(
            dict(
                mix=torch.nn.MultiheadAttention(64, 2),
                apart=torch.nn.MultiheadAttention(64, 2, kdim=32, vdim=48),
                rnn=torch.nn.LSTM(32, 48),
                cell=torch.nn.GRUCell(32, 48),
                pair=torch.nn.Bilinear(16, 32, 8),
                flat=Conv1D(96, 32),
            )
        )
    tensors = {k: p.detach() for k, p in prunable(net, "all").items()}
    layers = free.initial(torch.nn.DataParallel(net), "default", "all")
    assert list(layers) == list(tensors)
    for k, layer in layers.items():
        square = layer.scale**2 * float(layer.law.second(0.0))
        assert abs(tensors[k].square().mean().item() / square - 1) < 7 / layer.count**0.5, k
    net.own = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="how the matrices of a ModuleDict are drawn"):
        free.initial(net, "default", ["own"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, init", [("resnet18", "default"), ("resnet101", "he"), ("cifar_resnet56", "open_lth")]
)
def test_drawn_networks(name, init):
    net = resnet(name, init=init, seed=3)
    theory = free.exponents(free.initial(net, init))
    M = free.shares(free.empirical(prunable(net)), free.times())
    z = (run_slopes(M[theory.group].values, M.index.values)["sigma"][0] - theory.sigma) / theory.se
    assert (z**2).mean() < 2.5 and z.abs().max() < 4.5


@pytest.mark.slow
def test_bert_base_is_a_fixed_point():
    from transformers import BertConfig, BertModel

    with seeded(0, "init"):
        net = BertModel(BertConfig())
    M = free.shares(free.empirical(prunable(net)), free.times(6))
    se = free.errors(free.initial(net, "bert"), free.times(6))
    drift = np.log(M / M.iloc[0])
    assert (drift.abs() < 6 * se + 1e-9).values.all()
