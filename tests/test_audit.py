"Honest runs of every layout and rounding are accused of nothing, and dishonest ones are found"

import copy, itertools, math
import numpy as np
import pytest, torch
from torch import nn
from torch.nn.utils import prune
from rg_tickets.archives import ArchiveError, read_run
from rg_tickets.audit import audit, findings
from rg_tickets.basics import generator
from rg_tickets.masks import Schedule

# Runs, made as other programs make them


class Net(nn.Module):
    "Convolutions and linear layers; `tied`: two layers of one matrix, `shared`: a layer used twice"

    def __init__(self, tied=False, shared=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.fc1 = nn.Linear(40, 30)
        self.fc2 = nn.Linear(40, 30)
        self.fc = nn.Linear(30, 4)
        if tied:
            self.fc2.weight = self.fc1.weight
        if shared:
            self.again = self.conv2


def names_of(net):
    return [k for k, p in net.named_parameters() if p.dim() > 1]  # each tensor once


ROUNDINGS = {  # how many go, of so many kept
    "round": lambda x: round(x),
    "ceil": lambda x: math.ceil(x),
    "floor": lambda x: math.floor(x),
    "int and one more": lambda x: math.ceil(x) + 1,  # open_lth
}


def edge_of(values, number):
    "The magnitude of the last weight that goes"
    return values.sort().values[number - 1] if number > 0 else torch.tensor(-1.0)


def next_masks(weights, masks, rule):
    "One pruning by magnitude"
    free = [k for k in masks if k not in rule["dense"]]
    kept = lambda names: sum(int(masks[k].sum()) for k in names)
    size = lambda names: sum(masks[k].numel() for k in names)
    base = kept if rule["schedule"] == "geometric" else size
    groups = [[k] for k in free] if rule["scope"] == "layer" else [free]
    out = {k: m.clone() for k, m in masks.items()}
    for names in groups:
        counted = list(masks) if rule["count_all"] and rule["scope"] == "global" else names
        number = ROUNDINGS[rule["rounding"]](rule["rate"] * base(counted))
        number = min(number, kept(names) - 1)
        left = torch.cat([weights[k][masks[k]].abs().float() for k in names])
        edge = edge_of(left, number)
        for k in names:
            small = (
                weights[k].abs().float() <= edge
                if rule["ties"] == "go"
                else weights[k].abs().float() < edge
            )
            out[k] = masks[k] & ~small
    return out


def trained(start, masks, seed, n, rule):
    "Weights after training: from the start, moved a little, and coarse or with zeros if so asked"
    out = {}
    for k, t in start.items():
        w = t + 0.4 * t.std() * torch.randn(t.shape, generator=generator(seed, "train", n, k))
        if rule["numbers"] == "coarse":
            w = (w * 200).round() / 200
        if rule["numbers"] == "half":
            w = w.half().float()
        if rule["numbers"] == "zeros":
            w = w * (torch.rand(t.shape, generator=generator(seed, "zero", n, k)) > 0.05)
        out[k] = w * masks[k]
    return out


def honest(seed, rounds=5, tied=False, shared=False, **rule):
    "(network, start, rounds of (weights, masks), the mask made of the last) of an honest run"
    given = dict(rate=0.2, schedule="geometric", scope="global", rounding="round", ties="go")
    given |= dict(dense=(), count_all=True, numbers="plain")
    rule = given | rule
    torch.manual_seed(seed)
    net = Net(tied, shared)
    start = {k: net.get_parameter(k).detach().clone() for k in names_of(net)}
    masks, held = {k: torch.ones_like(t, dtype=torch.bool) for k, t in start.items()}, []
    for n in range(rounds):
        w = trained(start, masks, seed, n, rule)
        held.append((w, masks))
        masks = next_masks(w, masks, rule)
    return net, start, held, masks


def full_state(net, tensors):
    "The state_dict of a network with these weights, every name of every tensor"
    net = copy.deepcopy(net)
    with torch.no_grad():
        for k, t in tensors.items():
            net.get_parameter(k).copy_(t)
    return net.state_dict()


def pruned_network(net, weights, masks):
    "The network as torch.nn.utils.prune leaves it; under the masks lies what decayed there"
    net = copy.deepcopy(net)
    for k, m in masks.items():
        layer = net.get_submodule(k.rpartition(".")[0])
        with torch.no_grad():
            layer.weight.copy_(weights[k] + 0.01 * ~m)
        if not all(o.all() for o in masks.values()):
            prune.custom_from_mask(layer, "weight", m.float())
    return net


# Layouts


def write_open_lth(at, net, start, held, last):
    for n, (w, m) in enumerate(held):
        level = at / f"lottery_1/replicate_1/level_{n}/main"
        level.mkdir(parents=True)
        torch.save({k: o.int() for k, o in m.items()}, level / "mask.pth")
        masked = {k: t * m[k] for k, t in start.items()}
        torch.save(full_state(net, masked), level / "model_ep0_it0.pth")
        torch.save(full_state(net, w), level / "model_ep9_it0.pth")


def write_cv_lth(at, net, start, held, last):
    init = full_state(net, start)
    for n, (w, m) in enumerate(held):
        state = {f"module.{k}": t for k, t in pruned_network(net, w, m).state_dict().items()}
        saved = dict(state=n, state_dict=state, init_weight=init, result=dict(test_ta=[90.0]))
        torch.save(saved, at / f"{n}checkpoint.pth.tar")


def write_bert(at, net, start, held, last):
    masks = [m for _, m in held] + [last]
    for n, (w, m) in enumerate(held):
        folder = at / f"checkpoint-{50 * (n + 1)}"
        folder.mkdir()
        torch.save(pruned_network(net, w, m), folder / "model.pt")
        made = {f"{k}_mask": o.float() for k, o in masks[n + 1].items()}
        torch.save(made, folder / "mask.pt")


def write_prune(at, net, start, held, last):
    for n, (w, m) in enumerate(held):
        state = pruned_network(net, w, m).state_dict()
        torch.save(
            {"net": state}, at / f"{100 * sum(int(o.sum()) for o in m.values())}_model.pth.tar"
        )


def write_zeros(at, net, start, held, last):
    for n, (w, m) in enumerate(held):
        saved = {"state_dict": {f"model.{k}": t for k, t in full_state(net, w).items()}}
        torch.save(saved | {"pytorch-lightning_version": "2.5"}, at / f"epoch={n}.ckpt")


def write_pairs(at, net, start, held, last):
    kinds = (torch.int64, torch.float32, torch.uint8, torch.bool, torch.float16)
    for (n, (w, m)), kind in zip(enumerate(held), itertools.cycle(kinds)):
        torch.save(full_state(net, w), at / f"weights_{n}.pt")
        torch.save({k: o.to(kind) for k, o in m.items()}, at / f"mask_{n}.pt")


LAYOUTS = dict(
    open_lth=write_open_lth,
    cv_lth=write_cv_lth,
    bert_tickets=write_bert,
    torch_prune=write_prune,
    zeros=write_zeros,
    pairs=write_pairs,
)
WAYS = {
    "plain": {},
    "open_lth's count": dict(rounding="int and one more"),
    "rounded down": dict(rounding="floor"),
    "rounded up": dict(rounding="ceil"),
    "arithmetic": dict(schedule="arithmetic", rate=0.1),
    "a third": dict(rate=1 / 3, rounds=4),
    "one layer dense": dict(dense=("fc.weight",), rounding="int and one more"),
    "one layer dense, count of the others": dict(dense=("fc.weight",), count_all=False),
    "three layers dense": dict(dense=("conv1.weight", "fc1.weight", "fc.weight")),
    "three dense, count of the others": dict(
        dense=("conv1.weight", "fc1.weight", "fc.weight"), count_all=False
    ),
    "arithmetic, one dense": dict(
        schedule="arithmetic", rate=0.1, dense=("fc.weight",), count_all=False
    ),
    "each layer by itself": dict(scope="layer"),
    "each layer, one more": dict(scope="layer", rounding="int and one more"),
    "each layer, one dense": dict(scope="layer", dense=("fc.weight",), rounding="floor"),
    "ties go": dict(numbers="coarse"),
    "ties stay": dict(numbers="coarse", ties="stay"),
    "half precision": dict(numbers="half"),
    "zeros among the weights": dict(numbers="zeros"),
    "tied": dict(tied=True),
    "shared": dict(shared=True),
    "tied and shared, one dense": dict(
        tied=True, shared=True, dense=("fc1.weight",), rounding="int and one more"
    ),
}
NOT_HERE = {("zeros", "zeros among the weights")}  # see test_passing_zeros


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_honest_run_is_accused(layout, way, tmp_path):
    if (layout, way) in NOT_HERE:
        pytest.skip("zeros of kept weights are another test")
    net, start, held, last = honest(3, **WAYS[way])
    LAYOUTS[layout](tmp_path, net, start, held, last)
    run = read_run(tmp_path)
    assert run.n == list(range(len(held)))
    assert findings(audit(run)) == []
    assert findings(audit(run, start)) == []
    if layout == "zeros" and "numbers" in WAYS[way]:
        return  # some kept weights are zero, which such files cannot tell
    for (w, m), (w2, m2) in zip(held, run.rounds):
        left_out = [k for k in m if k not in m2]
        assert left_out == [] or (layout == "zeros" and all(held[-1][1][k].all() for k in left_out))
        assert all(torch.equal(m2[k], m[k]) and torch.equal(w2[k] * m2[k], w[k]) for k in m2)
    counted = {t["tensor"]: t["count"] for t in run.measured()[0]["tensors"]}
    assert counted == {k: start[k].numel() for k in counted}


@pytest.mark.parametrize(
    "seed", [0, 2, 5, *(pytest.param(o, marks=pytest.mark.slow) for o in range(6, 30))]
)
def test_no_honest_run_is_accused_whatever_is_combined(seed, tmp_path):
    "Rules drawn at random, in all layouts"
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]
    names = ["conv1.weight", "conv2.weight", "fc1.weight", "fc.weight"]
    schedule = pick("geometric", "arithmetic")
    way = dict(
        rounds=5,
        schedule=schedule,
        rate=float(rng.uniform(0.05, 0.12 if schedule == "arithmetic" else 0.4)),
        scope=pick("global", "layer"),
        rounding=pick(*ROUNDINGS),
        ties=pick("go", "stay"),
        numbers=pick("plain", "coarse", "half"),
        dense=tuple(rng.permutation(names)[: rng.integers(0, 3)]),
        count_all=bool(rng.integers(2)),
        tied=bool(rng.integers(2)),
        shared=bool(rng.integers(2)),
    )
    run = honest(seed, **way)
    for layout, write in LAYOUTS.items():
        (tmp_path / layout).mkdir()
        write(tmp_path / layout, *run)
        assert findings(audit(read_run(tmp_path / layout))) == [], (layout, way)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_the_initial_weights_are_found(layout, tmp_path):
    "Nested, counted and in force, but ranked by weights that no training has touched"
    net, start, held, _ = honest(5, rounds=1)
    masks, look = held[0][1], []
    for n in range(5):
        w = trained(start, masks, 5, n, dict(numbers="plain"))
        look.append((w, masks))
        rule = dict(rate=0.2, schedule="geometric", scope="global", rounding="round", ties="go")
        masks = next_masks(start, masks, rule | dict(dense=("fc.weight",), count_all=True))
    LAYOUTS[layout](tmp_path, net, start, look, masks)
    found = findings(audit(read_run(tmp_path), start))
    assert len(found) == 4 and all("one-shot look-alike" in o for o in found)


def replaced(run, i, change):
    "The rounds of a run with one mask, and its weights, changed"
    rounds = [(dict(w), {k: m.clone() for k, m in masks.items()}) for w, masks in run]
    change(*rounds[i])
    return rounds


DISHONEST = {
    "NOT NESTED": lambda w, m: m.update({"conv2.weight": torch.ones_like(m["conv2.weight"])}),
    "MASK NOT IN FORCE": lambda w, m: w.update({k: t + 0.1 * ~m[k] for k, t in w.items()}),
    "RANKED": lambda w, m: w.update(
        {k: torch.randn(t.shape, generator=generator(1, k)) * m[k] for k, t in w.items()}
    ),
}


@pytest.mark.parametrize("what", DISHONEST)
@pytest.mark.parametrize("way", ["plain", "three layers dense", "each layer by itself", "tied"])
def test_a_change_in_an_honest_run_is_found(way, what):
    _, start, held, _ = honest(4, **WAYS[way])
    assert findings(audit(held, start)) == []
    assert any(what in o for o in findings(audit(replaced(held, 2, DISHONEST[what]), start)))


def test_a_count_is_compared_with_what_is_claimed_only():
    _, start, held, _ = honest(6, rate=0.25)
    assert findings(audit(held)) == [] and findings(audit(held, schedule=0.25)) == []
    assert all("REMOVED THAN" in o for o in findings(audit(held, schedule=Schedule(0.2))))
    own = [0.1, 0.3, 0.2, 0.4]
    masks, rounds = held[0][1], []
    rule = dict(schedule="geometric", scope="global", rounding="round", ties="go", dense=())
    for n, rate in enumerate([*own, 0.5]):
        w = trained(start, masks, 6, n, dict(numbers="plain"))
        rounds.append((w, masks))
        masks = next_masks(w, masks, rule | dict(rate=rate, count_all=True))
    assert findings(audit(rounds)) == [] and findings(audit(rounds, schedule=own)) == []
    assert len(findings(audit(rounds, schedule=own[::-1]))) >= 2


def test_a_claim_of_scope_is_held_to():
    _, _, by_layer, _ = honest(7, scope="layer")
    _, _, together, _ = honest(7)
    assert (
        findings(audit(by_layer, scope="layer")) == findings(audit(together, scope="global")) == []
    )
    assert all("not all together" in o for o in findings(audit(by_layer, scope="global")))
    assert all("not as claimed" in o for o in findings(audit(together, scope="layer")))


def test_passing_zeros(tmp_path):
    "Kept weights that are zero for a while, in files without masks, prune nothing"
    net, start, held, last = honest(8, rounds=6)
    for n, (w, m) in enumerate(held[:-1]):
        alive = held[-1][1]["fc1.weight"].nonzero()[:5]
        w["fc1.weight"][alive[:, 0], alive[:, 1]] = 0
    write_zeros(tmp_path, net, start, held, last)
    run = read_run(tmp_path)
    assert all(torch.equal(m2[k], m[k]) for (_, m), (_, m2) in zip(held, run.rounds) for k in m2)
    assert any("25 weights are zero in one round and not in a later one" in o for o in run.notes)
    assert findings(audit(run)) == []


def test_best_epochs_are_not_those_that_were_ranked(tmp_path):
    "CV_LTH keeps the weights of the best epoch: near those that were ranked, and no complaint"
    net, start, held, last = honest(9)
    for n, (w, m) in list(enumerate(held))[1:]:
        best = {
            k: t * (1 + 0.1 * torch.randn(t.shape, generator=generator(9, n, k)))
            for k, t in w.items()
        }
        state = pruned_network(net, best, m).state_dict()
        init = full_state(net, held[0][0])
        torch.save(dict(state_dict=state, init_weight=init), tmp_path / f"{n}model_best.pth.tar")
    run = read_run(tmp_path)
    table = audit(run)
    assert findings(table) == [] and "weights of another epoch?" in table.verdict.iloc[-1]
    assert "not trained: the weights are the initial ones" in table.verdict[0]


def test_hparams_of_open_lth_are_read(tmp_path):
    net, start, held, last = honest(10, dense=("fc.weight",), rounding="int and one more")
    write_open_lth(tmp_path, net, start, held, last)
    log = tmp_path / "lottery_1/replicate_1/level_0/main/hparams.log"
    text = """Dataset Hyperparameters
    * dataset_name => mnist
Model Hyperparameters
    * model_name => mnist_lenet_300_100
Hyperparameters for Sparse Global Pruning
    * pruning_strategy => sparse_global
    * pruning_fraction => {}
    * pruning_layers_to_ignore => {}
Pretraining Dataset Hyperparameters
    * dataset_name => cifar10"""
    log.write_text(text.format(0.2, "fc.weight"))
    run = read_run(tmp_path)
    assert run.claims == dict(rate=0.2, scope="global", dense=["fc.weight"])
    assert run.about["task"] == "mnist"
    table = audit(run)
    assert findings(table) == [] and table.attrs["dense"] == ["fc.weight"]
    assert not table.attrs["guessed"]
    log.write_text(text.format(0.3, "fc.weight,fc1.weight"))
    found = findings(audit(read_run(tmp_path)))
    assert any("LOST WEIGHTS: fc1.weight" in o for o in found)
    assert any("FEWER REMOVED THAN" in o for o in found)
    log.write_text(text.format(0.2, "None"))
    assert read_run(tmp_path).claims == dict(rate=0.2, scope="global")


def test_rounds_that_do_not_fit_are_named():
    _, start, held, _ = honest(11, rounds=3)
    w, m = held[1]
    for change, says in (
        ((w, {k: o for k, o in m.items() if k != "fc.weight"}), "fc.weight (absent here"),
        (
            ({k: t for k, t in w.items() if k != "fc.weight"}, m),
            "a mask but no weight for fc.weight",
        ),
        ((w | {"fc.weight": w["fc.weight"] / 0}, m), "NaN or infinite"),
        ((w | {"fc.weight": w["fc.weight"].to(torch.complex64)}, m), "complex"),
        ((w, m | {"fc.weight": m["fc.weight"] / 2}), "other numbers than 0 and 1"),
    ):
        with pytest.raises(ArchiveError) as e:
            audit([held[0], change, held[2]])
        assert says in str(e.value) and "round 1" in str(e.value)
