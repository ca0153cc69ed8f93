"The GPU against the CPU. Reductions run in another order there, so trained weights agree to a tolerance; choices made from the same weights agree to the bit"

import copy
import pytest
import torch
from rg_tickets.imp import imp
from rg_tickets.masks import MaskHistory, prune
from rg_tickets.selection import smallest
from rg_tickets.models.resnets import resnet
from rg_tickets.tasks.images import image_task
from rg_tickets.train import Recipe, optimizer, refine

pytestmark = pytest.mark.cuda
STEPS, TOLERANCE = 8, 1e-3  # relative, of a tensor's norm, after so many steps in fp32 without TF32


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    "No TF32, so that products are those of fp32"
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def parts():
    return image_task("digits8", n_train=512, n_test=200), resnet(
        "cifar_resnet8", in_channels=1, width=8
    )


def test_refine():
    ends = {}
    for device in ("cpu", "cuda"):
        task, network = parts()
        network.to(device)
        refine(task, network, Recipe(epochs=1, lr=0.01, schedule="constant"), stop=STEPS)
        ends[device] = {k: t.cpu() for k, t in network.state_dict().items()}
    for k, a in ends["cpu"].items():
        if a.is_floating_point():
            assert (ends["cuda"][k] - a).norm() <= TOLERANCE * a.norm() + 1e-5, k
        else:
            assert torch.equal(ends["cuda"][k], a), k


def test_imp():
    "Counts and times are the same numbers; shares of the magnitude agree to 1 %, test loss to 10 %"
    got = {}
    for device in ("cpu", "cuda"):
        task, network = parts()
        got[device] = list(
            imp(
                task,
                network,
                rounds=3,
                recipe=Recipe(epochs=1, lr=0.01, schedule="constant"),
                device=device,
            )
        )
    for a, b in zip(got["cpu"], got["cuda"], strict=True):
        assert (a.n, a.time, a.density) == (b.n, b.time, b.density)
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=0.1)
        share = lambda r: (
            torch.tensor([o["l1"] for o in r.tensors]) / sum(o["l1"] for o in r.tensors)
        )
        assert torch.allclose(share(a), share(b), rtol=0.01)


def test_untrained_flow_is_the_same_to_the_bit():
    "No training: masks come from selection alone"
    masks = {}
    for device in ("cpu", "cuda"):
        task, network = parts()
        masks[device] = [
            (r.threshold, [o["alive"] for o in r.tensors])
            for r in imp(task, network, rounds=6, control="untrained", device=device)
        ]
    assert masks["cpu"] == masks["cuda"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_selection(dtype):
    g = torch.Generator().manual_seed(0)
    scores = {
        k: torch.randn(s, generator=g).to(dtype)
        for k, s in {"a": (300, 400), "b": (64, 32, 3, 3), "c": (7,)}.items()
    }
    scores["d"] = scores["a"][:100].clone()  # ties
    for n in (1, 1000, 100_000):
        alive = {k: torch.ones_like(s, dtype=torch.bool) for k, s in scores.items()}
        here, at = smallest(scores, alive, n)
        there, at_there = smallest(
            {k: s.cuda() for k, s in scores.items()}, {k: m.cuda() for k, m in alive.items()}, n
        )
        assert at == at_there and all(torch.equal(here[k], there[k].cpu()) for k in here)


def test_history():
    w = {k: p.detach() for k, p in resnet("cifar_resnet20").named_parameters() if p.dim() > 1}
    here, there = MaskHistory.dense(w), MaskHistory.dense({k: t.cuda() for k, t in w.items()})
    for _ in range(8):
        n = round(0.2 * sum(here.alive().values()))
        assert prune(here, w, n) == prune(there, {k: t.cuda() for k, t in w.items()}, n)
    assert all(torch.equal(here.died[k], there.died[k].cpu()) for k in w)


def test_a_run_is_repeatable_on_the_gpu():
    "Selection aside, a GPU's training is repeatable only with deterministic kernels"

    def once():
        task, network = parts()
        list(imp(task, network, rounds=1, recipe=Recipe(epochs=1), device="cuda"))
        return {k: t.cpu() for k, t in network.state_dict().items()}

    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        a, b = once(), once()
    finally:
        torch.backends.cudnn.deterministic = deterministic
    assert all(torch.equal(a[k], b[k]) for k in a)
