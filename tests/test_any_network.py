"Networks with habits of their own: hooks, flags, skipped layers, changed heads, weights that are transformed"

import copy
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

from rg_tickets.basics import generator, seeded
from rg_tickets.imp import imp
from rg_tickets.models.prunable import declare_head, describe, heads
from rg_tickets.tasks.core import Task
from rg_tickets.tickets import Ticket, TicketError, apply, hold
from rg_tickets.train import Recipe
from rg_tickets.transfer import transfer

x = torch.randn(96, 8, generator=generator(0, "any network"))
data = TensorDataset(x, (x[:, 0] > 0).long())
BRIEF = Recipe(epochs=1, lr=0.05)


def task(data=data):
    return Task.from_loaders(DataLoader(data, 16, shuffle=True), DataLoader(data, 32))


def run(network, task=task, **how):
    return list(imp(task(), network, 2, 0.3, **{"recipe": BRIEF, "device": "cpu"} | how))


class Body(nn.Module):
    "A network whose forward pass can be changed by a subclass"

    def __init__(self):
        super().__init__()
        with seeded(0, "init"):
            self.a, self.b, self.fc = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def hidden(self, x):
        return self.b(self.a(x).relu()).relu()

    def forward(self, x):
        return self.fc(self.hidden(x))


class Hooked(Body):
    "Installs a hook in its first forward pass, and a flag says so, as transformers' output capture does"

    def forward(self, x):
        if not getattr(self, "_ready", False):
            self.b.register_forward_hook(lambda m, args, out: out + 1)
            self._ready = True
        return super().forward(x)


def test_hooks_that_a_network_installs_are_there_once():
    network = Hooked()
    rounds = run(network)
    assert len(network.b._forward_hooks) == 1
    fresh = Hooked()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(x), network.eval()(x)) and len(rounds) == 3


def test_hidden_states_of_transformers_are_counted_once():
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
    )

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.fc = BertModel(config, add_pooling_layer=False), nn.Linear(16, 2)
            self.counts = []

        def forward(self, ids):
            states = self.bert(ids, output_hidden_states=True).hidden_states
            self.last_count = len(states)
            return self.fc(torch.stack(states[1:]).mean(0)[:, 0])

    ids = torch.randint(0, 20, (96, 5), generator=generator(0, "ids"))
    network = Reader()
    run(network, lambda: task(TensorDataset(ids, (ids[:, 0] > 9).long())))
    assert network.last_count == 3


class Skipping(Body):
    "Leaves a layer out of every other step, as LayerDrop does"

    def hidden(self, x):
        h = self.a(x).relu()
        return h + self.b(h) if not self.training or torch.rand(()) < 0.5 else h


def test_layers_that_a_step_leaves_out_train_with_the_default_optimizer():
    run(Skipping(), recipe=Recipe(epochs=3, lr=0.05))


def test_a_head_that_was_found_is_looked_for_again():
    network = Body()
    run(network)
    assert heads(network) == ("fc",)
    network.proj, network.fc = nn.Linear(16, 2), nn.Identity()
    network.forward = lambda x: network.proj(network.hidden(x))
    run(network)
    assert heads(network) == ("proj",) and describe(network).head == ("proj",)


def test_a_head_that_the_user_named_stays():
    network = Body()
    network.head_names = ("b", "fc")
    declare_head(network, lambda: network(x).sum())
    assert declare_head(network, lambda: network(x).sum()) == ("b", "fc")


def test_finding_the_head_changes_no_weight():
    network = nn.Sequential(nn.Embedding(20, 8, max_norm=0.1), nn.Flatten(), nn.Linear(16, 2))
    before = copy.deepcopy(network.state_dict())
    declare_head(network, lambda: network(torch.tensor([[1, 2]])).sum())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, w - w.mean((1, 2, 3), keepdim=True), self.bias)


class Exponential(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.exp(), self.bias)


class Shifted(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight + 1, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 0.5 * self.weight, self.bias)


@pytest.mark.parametrize("kind", [Exponential, Shifted])
def test_a_layer_that_transforms_its_weight_is_refused(kind):
    network = Body()
    network.b = kind(16, 16)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=f"{kind.__name__} 'b' changes its weight before"):
        run(network)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_weight_standardisation_is_refused():
    network = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), Standardized(2, 4, 2), nn.Flatten(), nn.ReLU(), nn.Linear(4, 2)
    )
    with pytest.raises(ValueError, match="Standardized '1' changes its weight"):
        run(network)


def test_a_layer_that_scales_its_weight_is_pruned():
    network = Body()
    network.b = Scaled(16, 16)
    assert run(network)[-1].density == pytest.approx(0.49, abs=0.002)


def test_a_trained_network_on_an_old_folder_is_told_so(tmp_path):
    network = Body()
    run(network, folder=tmp_path)
    with pytest.raises(TicketError, match="is the network trained already"):
        run(network, folder=tmp_path)


def test_gradients_that_are_switched_off_are_named():
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are switched off"):
        run(Body())


def test_hold_refuses_masks_of_other_numbers():
    with pytest.raises(TicketError, match="other numbers than 0 and 1"):
        hold(Body(), {"a.weight": torch.rand(16, 8)})


def test_a_ticket_of_a_hooked_network_resumes_to_the_bit(tmp_path):
    whole, part = Hooked(), Hooked()
    run(whole, folder=tmp_path / "whole")
    rounds = imp(task(), part, 2, 0.3, recipe=BRIEF, device="cpu", folder=tmp_path / "part")
    next(rounds)
    rounds.close()
    run(Hooked(), folder=tmp_path / "part")
    one, other = (Ticket.load(tmp_path / o / "ticket.safetensors") for o in ("whole", "part"))
    assert all(torch.equal(d, other.history.died[k]) for k, d in one.history.died.items())


SAYS = """
import logging, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from rg_tickets.imp import imp
from rg_tickets.tasks.core import Task
from rg_tickets.train import Recipe

if sys.argv[1] == "logged":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="LOG %(message)s")
data = TensorDataset(torch.randn(32, 8), torch.arange(32) % 2)
task = Task.from_loaders(DataLoader(data, 16), DataLoader(data, 16))
for seed in range(2):
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    report = (lambda *step: None) if sys.argv[1] == "reported" else None
    list(imp(task, network, 0, 0.3, recipe=Recipe(epochs=1), seed=seed, report=report))
"""


@pytest.mark.parametrize("how, lines", [("plain", 1), ("logged", 2), ("reported", 0), ("off", 0)])
def test_a_script_says_what_it_prunes(how, lines, tmp_path):
    "On stderr, once; in a log if there is one; not beside a reporter"
    (tmp_path / "script.py").write_text(SAYS)
    env = {k: v for k, v in os.environ.items() if k != "RG_TICKETS_PROGRESS"}
    env |= {"RG_TICKETS_PROGRESS": "off"} if how == "off" else {}
    command = [sys.executable, "script.py", how]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "prunes 32 of 40 matrix weights (80.0%) in 1 tensor; head = 2;"
    shown = " ".join(done.stderr.split())
    assert shown.count(said) == lines and ("LOG" in shown) == (how == "logged"), done.stderr
    assert not done.stdout and max(map(len, done.stderr.splitlines()), default=0) <= 180


def test_following_the_message_about_a_penalty_trains():
    "A loss that multiplies a weight by numbers of its own hides the head; naming it helps"
    network, vector = Body(), torch.ones(16)
    penalised = lambda output, target: (
        nn.functional.cross_entropy(output, target) + (network.b.weight @ vector).pow(2).sum()
    )
    loaders = DataLoader(data, 16, shuffle=True), DataLoader(data, 32)
    with pytest.raises(ValueError, match=r"Say which .* network.head_names = \('fc',\)"):
        run(network, lambda: Task.from_loaders(*loaders, penalised))
    network.head_names = ("fc",)
    rounds = run(network, lambda: Task.from_loaders(*loaders, penalised))
    assert describe(network).head == ("fc",) and rounds[-1].density < 0.5


def test_head_names_are_checked_before_anything_else():
    network, calls = Body(), []
    network.head_names = ("fcc",)
    network.register_forward_pre_hook(lambda *o: calls.append(o))
    with pytest.raises(ValueError, match="head_names of Body has 'fcc', .* did you mean 'fc'"):
        run(network)
    assert not calls


def test_a_network_with_a_raw_head_travels_without_it(tmp_path):
    "The head of the ticket is one parameter; another task keeps its own"

    class Raw(Body):
        def __init__(self):
            super().__init__()
            del self.fc
            self.proj = nn.Parameter(self.b.weight.detach()[:, :2].clone())

        def forward(self, x):
            return self.hidden(x) @ self.proj

    run(Raw(), folder=tmp_path)
    ticket = Ticket.load(tmp_path)
    assert ticket.about["head"] == ["proj"] and set(ticket.history.died) == {"a.weight", "b.weight"}
    other = Raw()
    with torch.no_grad():
        other.proj.fill_(7)
    declare_head(other, lambda: other(x).sum())
    apply(ticket, other, head=False)
    assert (other.proj == 7).all() and torch.equal(
        other.b.weight != 0, ticket.history.mask()["b.weight"]
    )
    found = transfer(task(), other, ticket, 1, recipe=BRIEF, device="cpu")
    assert found["t"] == pytest.approx(ticket.history.time(1), abs=1e-6)


BESIDE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from rg_tickets.basics import package_version
from rg_tickets.imp import imp
from rg_tickets.notebooks import experiments
from rg_tickets.tasks.core import Task

x = torch.randn(32, 4)
loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
task = Task.from_loaders(loader, loader)
rounds = list(imp(task, nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), rounds=1, device="cpu"))
print(package_version(), len(rounds), "resnet_imp" in experiments())
"""


def test_a_script_runs_in_the_folder_that_holds_a_clone(tmp_path):
    "There the clone's outer folder is imported under the package's name, and holds no version"
    (tmp_path / "rg_tickets").mkdir()
    (tmp_path / "script.py").write_text(BESIDE)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [version("rg_tickets"), "2", "True"]
