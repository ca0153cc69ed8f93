"ResNet-50 itself, all 25.6 million weights, pruned on pictures of ImageNet's kind by all three ways to pre-train; slow"

import resource, time
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from rg_tickets.imp import imp
from rg_tickets.models.prunable import prunable
from rg_tickets.models.resnets import resnet
from rg_tickets.studies import original
from rg_tickets.tasks.core import Task
from rg_tickets.tasks.images import folder_task
from rg_tickets.tasks.selfsup import METHODS
from rg_tickets.tickets import Ticket
from rg_tickets.train import Recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Class folders of random pictures, no two of one size"
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for part, n in (("train", 12), ("val", 4)):
        for name in ("n01440764", "n01443537"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.randint(0, 256, (60 + i, 80 - i, 3)).astype(np.uint8)).save(
                    root / part / name / f"{i}.JPEG"
                )
    return root


def labelled():
    "Random pictures with labels of a thousand classes"
    g = torch.Generator().manual_seed(0)
    some = lambda n: DataLoader(
        TensorDataset(
            torch.randn(n, 3, 64, 64, generator=g), torch.randint(1000, (n,), generator=g)
        ),
        batch_size=8,
        shuffle=n > 8,
    )
    return Task.from_loaders(
        some(24),
        some(8),
        metrics={"accuracy": lambda output, y: (output.argmax(1) == y).double().mean().item()},
    )


@pytest.mark.parametrize("name", ["imagenet", "imagenet/simclr", "imagenet/moco"])
def test_three_rounds(name, pictures, tmp_path, record_property):
    "The recipe is the original's, but for the size of a batch and the length of a round"
    spec, way = original(name), name.partition("/")[2]
    task = folder_task(pictures / "train", pictures / "val", size=64) if way else labelled()
    if way:
        task = METHODS[way](task, **(spec.options | (dict(queue=64) if way == "moco" else {})))
    backbone = resnet(spec.model, classes=1000)
    assert sum(p.numel() for p in backbone.parameters()) == 25_557_032
    network, began = task.network(backbone), time.monotonic()
    rounds = list(
        imp(
            task,
            network,
            rounds=3,
            prune=spec.prune,
            rewind="pretrained",
            recipe=Recipe(**spec.recipe | dict(epochs=1, batch_size=8)),
            preset=spec.preset,
            folder=tmp_path,
        )
    )
    params, history = (
        prunable(network, spec.preset),
        Ticket.load(tmp_path / "ticket.safetensors").history,
    )
    total = sum(p.numel() for p in params.values())
    assert len(params) == 52 and total == 23_445_504  # all convolutions but the first
    assert [r.n for r in rounds] == [0, 1, 2, 3] and rounds[-1].density == pytest.approx(
        0.8**3, abs=1e-6
    )
    for k, p in params.items():
        assert (
            torch.equal(p.detach().cpu() != 0, history.mask(3)[k])
            and not (history.mask(3)[k] & ~history.mask(2)[k]).any()
        ), k
    assert all(np.isfinite([r.loss, *r.metrics.values()]).all() for r in rounds)
    assert all({o["tensor"] for o in r.tensors} == set(params) for r in rounds)
    if way == "moco":
        key = network.fc.key.state_dict()
        assert all(not key[k][~history.mask(3)[k]].any() for k in params), (
            "the key encoder is pruned as well"
        )
    record_property("seconds", round(time.monotonic() - began))
    record_property("peak_MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    print(
        f"{name}: {time.monotonic() - began:.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB"
    )
