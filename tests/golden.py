"Small runs whose weights and masks are known to the bit, and plain torch beside them"

import hashlib
import sys
import tempfile
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from rg_tickets.basics import generator, seeded
from rg_tickets.imp import imp
from rg_tickets.models.berts import bert
from rg_tickets.models.resnets import resnet
from rg_tickets.replicas import imp_many
from rg_tickets.rewind import Policy
from rg_tickets.tasks.core import Resident, Task
from rg_tickets.tasks.images import image_task
from rg_tickets.tickets import Ticket
from rg_tickets.train import Recipe

SGD = Recipe(epochs=2, batch_size=32, lr=0.05)
STEADY = Recipe(epochs=2, batch_size=32, lr=0.02, schedule="constant")
ADAMW = Recipe(
    epochs=2, batch_size=16, optimizer="adamw", lr=1e-3, clip=1.0, decay="matrices", warmup=0.5
)
LARS = Recipe(epochs=2, batch_size=32, optimizer="lars", lr=1.0)

# taken with plain torch, and with the first version of `imp`, on one thread of an x86 CPU
PLAIN = "c1c7ac7deca65f48"
GOLDEN = {
    "init": "68dea8cb729636fd 543fc9b20ece4c9e 9082c4372ce74fa9 1e7b738e81c58daf",
    "step": "552291aab6940283 d1bccff10feabe12 91f4aee84ec78326 7c1d1f6769a44166",
    "lr": "5a6c91ac1aa097ea 543fc9b20ece4c9e 3233502154e51aec 8884c15720028443",
    "none": "9cff86a7b888476d 543fc9b20ece4c9e 7188f5c53a5eee00 7ffc82435f069c36",
    "going on": "795c9ae22fdf7d41 0a97aa6d6c6da698 5a316a682d09970c 702b39128c9d8892",
    "untrained": "ef6bd665847bb378 543fc9b20ece4c9e 6787e4d607d6290b 2f8601a401c50da8",
    "oneshot": "f22e51ecfa081fd4 543fc9b20ece4c9e f624bc3ffe683218 6878f6f327fcc009",
    "random": "764ba26fd3fe5e68 543fc9b20ece4c9e b6cf174dd3500c4d 9e0da3833069c63a",
    "shuffled": "9afc41b73b7c1b03 e9d4047eb22da631 8214c45d5067d542 cbab9001373b98bb",
    "reinit": "db2a28467d5bbd6a 9e60e6770ac77d57 9082c4372ce74fa9 6cfa1a5b1fbca455",
    "layer": "b221393302f3afab 543fc9b20ece4c9e dcaae232ca22e274 f6da7e7fe3fe56ad",
    "bf16": "1691eb4fea97230a 543fc9b20ece4c9e 1f349e36ea35cf39 85228ed59e61e36e",
    "linear": "9dea0f7a6cecb0ef 752ccd60f8b1db56 a672fe49abf0328b 749e4d8839fa7b90",
    "lars": "cb9d3c6034270989 752ccd60f8b1db56 a4c6696faa69c9a4 dc95775198548dbb",
    "bert": "42d81051bf48ae01 a27139193eaa3311 040f9c82527acaa7 ef2112197b08f92d",
    "tied": "deae8e50aea165d0 29d31bb8b7099b53 3e91be119e7ea028 d82b2c347a166a70",
    "replicas": "72ce5246f1a6e213 e5849e4b00a88ab6 b5175ca3eefffab4 51d5654e54e5df27",
}


def pictures():
    return image_task("digits8", n_train=128, n_test=50)


def texts():
    "Tokens at random, their mask and segments; the class is told by the second token"
    ids = torch.randint(5, 40, (64, 3, 12), generator=generator(0, "texts"))
    ids[:, 1] = 1
    ids[:, 2] = 0
    y = (ids[:, 0, 1] >= 22).long()
    return Task("texts", Resident(ids, y, ids[:32], y[:32]), classes=2)


def words():
    "The same tokens; every second one is to be found again"
    data = texts().data
    y = torch.where(torch.arange(12) % 2 == 1, data.x[:, 0], -100)
    loss = lambda output, target: F.cross_entropy(output.transpose(1, 2), target)
    score = {"minus_loss": lambda output, target: -float(loss(output, target))}
    return Task("words", Resident(data.x, y, data.x[:32], y[:32]), loss, score)


def convolutional(seed=0):
    return resnet("cifar_resnet8", width=8, in_channels=1, seed=seed)


def linear(seed=0):
    with seeded(seed, "golden"):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10)
        )


def transformer(head="classes", seed=0):
    return bert("tiny", head, seed=seed, vocab_size=40)


def case(task, network, recipe, rounds=2, **kwargs):
    "A run of `imp` in a folder: (network, rounds, ticket)"
    with tempfile.TemporaryDirectory() as folder:
        done = imp(task, network, rounds, 0.3, recipe=recipe, device="cpu", folder=folder, **kwargs)
        done = list(done)
        return network, done, Ticket.load(Path(folder) / "ticket.safetensors")


def followed(control):
    "A control that follows the masks of another run"
    ticket = case(pictures(), convolutional(), SGD)[2]
    return case(pictures(), convolutional(1), SGD, control=control, ticket=ticket)


def replicas():
    "Two networks trained as one: the last of them"
    nets, folder = [convolutional(0), convolutional(1)], tempfile.mkdtemp()
    folders = [Path(folder) / "a", Path(folder) / "b"]
    how = dict(recipe=SGD, device="cpu", folders=folders, how="joined", rewind="2it")
    rounds = [r[1] for r in imp_many(pictures(), nets, [0, 1], 2, 0.3, **how)]
    return nets[1], rounds, Ticket.load(folders[1] / "ticket.safetensors")


CASES = {
    "init": lambda: case(pictures(), convolutional(), SGD),
    "step": lambda: case(pictures(), convolutional(), SGD, rewind="3it", seed=1),
    "lr": lambda: case(pictures(), convolutional(), SGD, rewind="lr"),
    "none": lambda: case(pictures(), convolutional(), STEADY, rewind="none"),
    "going on": lambda: case(
        pictures(), convolutional(), SGD, rewind=Policy(("weights", "schedule"), step="2it")
    ),
    "untrained": lambda: case(pictures(), convolutional(), SGD, control="untrained"),
    "oneshot": lambda: case(pictures(), convolutional(), SGD, control="oneshot"),
    "random": lambda: case(pictures(), convolutional(), SGD, control="random"),
    "shuffled": lambda: followed("shuffled"),
    "reinit": lambda: followed("reinit"),
    "layer": lambda: case(pictures(), convolutional(), SGD, scope="layer", preset="all"),
    "bf16": lambda: case(
        pictures(), convolutional(), Recipe(epochs=1, batch_size=32, precision="bf16")
    ),
    "linear": lambda: case(pictures(), linear(), ADAMW),
    "lars": lambda: case(pictures(), linear(), LARS),
    "bert": lambda: case(texts(), transformer(), ADAMW, preset="encoder"),
    "tied": lambda: case(words(), transformer("mlm"), ADAMW),
    "replicas": replicas,
}


def short_digest(tensors):
    "Sixteen digits of the SHA-256 of named tensors: names, types, shapes, bytes"
    h = hashlib.sha256()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def facts(name):
    "What is compared: the trained weights, the weights to rewind to, the masks, plain numbers"
    network, rounds, ticket = CASES[name]()
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    params = dict(network.named_parameters())
    plain = [(r.n, r.time, r.density, r.loss, r.threshold, r.tensors) for r in rounds]
    return {
        "weights": short_digest(own),
        "rewind": short_digest({k: t for k, t in ticket.weights.items() if k in params}),
        "masks": short_digest(ticket.history.died),
        "numbers": hashlib.sha256(repr(plain).encode()).hexdigest()[:16],
    }


def plain_torch():
    "Digest of networks that torch alone has trained: what a machine's own arithmetic gives"
    found = {}
    for name, task, net, lr in (
        ("conv", pictures(), convolutional(), 0.05),
        ("linear", pictures(), linear(), 0.05),
        ("bert", texts(), transformer(), 1e-3),
    ):
        net = net.to(memory_format=torch.channels_last).train()
        kind = torch.optim.AdamW if name == "bert" else torch.optim.SGD
        opt = kind(net.parameters(), lr=lr, fused=True)
        with seeded(0, "plain"):
            for idx in torch.arange(len(task.data.x)).split(32) * 2:
                opt.zero_grad()
                F.cross_entropy(net(task.data.x[idx]), task.data.y[idx]).backward()
                opt.step()
            with torch.autocast("cpu", torch.bfloat16):
                net.eval()
                found |= {f"{name} bf16": net(task.data.x[:32]).float()}
        found |= {f"{name} {k}": p for k, p in net.named_parameters()}
    return short_digest(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f'PLAIN = "{plain_torch()}"')
    print("GOLDEN = {")
    for name in sys.argv[1:] or CASES:
        found = facts(name)
        print(f'    "{name}": "{" ".join(found.values())}",')
    print("}")
