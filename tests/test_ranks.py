"Several processes hold the masks and the weights of one; run as a script this file is what a rank does"

import math, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from rg_tickets.basics import seeded
from rg_tickets.imp import imp
from rg_tickets.models.names import state
from rg_tickets.models.resnets import resnet
from rg_tickets.ranks import RanksDiffer, world
from rg_tickets.tasks.core import Resident, Task
from rg_tickets.tickets import Ticket, digest, load_trained
from rg_tickets.train import Recipe, refine

ROOT = Path(__file__).parents[1]
RECIPES = {
    "sgd": Recipe(epochs=2, batch_size=30, lr=0.05, clip=1.0),
    "adamw": Recipe(epochs=2, batch_size=31, optimizer="adamw", lr=0.003),
}  # 31 samples make shares of 15 and 16


def task(dtype=torch.float64, **kwargs):
    "96 pictures of noise in four classes; double precision, so that rounding cannot decide who is pruned"
    with seeded(0, "data"):
        x, y = torch.randn(96, 1, 16, 16, dtype=dtype), torch.randint(4, (96,))
    flip = lambda x, g: torch.where(
        (torch.rand(len(x), generator=g) < 0.5)[:, None, None, None], x.flip(3), x
    )
    return Task("noise", Resident(x, y, x[:40], y[:40], augment=flip), **kwargs)


def network(dtype=torch.float64, seed=0):
    return resnet("cifar_resnet8", width=4, in_channels=1, classes=4, seed=seed).to(dtype)


def contrast(network, batch):
    "A loss that is no mean over samples: two passes, each sample against all others; and a part on every rank in full"
    with torch.no_grad():
        noise = torch.randn_like(batch[0]) / 10
    a, b = (torch.nn.functional.normalize(network(x), dim=1) for x in (batch[0], batch[0] + noise))
    return (
        torch.nn.functional.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))
        + network.fc(torch.ones(8, 16, dtype=a.dtype)).square().mean()
    )


def run(recipe, net=None, t=None, **kwargs):
    net = network() if net is None else net
    rounds = list(
        imp(t or task(), net, recipe=recipe, device="cpu", **{"rounds": 2, "prune": 0.3, **kwargs})
    )
    return net, rounds


def short(recipe, n=1):
    return Recipe(**{**recipe.__dict__, "epochs": n})


# What a rank does. Each case gives what is compared: a dict of tensors, and plain facts


def trained(name, folder):
    net, rounds = run(RECIPES[name], folder=folder / name, rewind="2it")
    return net.state_dict() | {
        f"died/{k}": d
        for k, d in Ticket.load(folder / name / "ticket.safetensors").history.died.items()
    }, [r.metrics["loss"] for r in rounds]


def contrastive(folder):
    net = network()
    loss = run_spread(net, task(objective=contrast), RECIPES["sgd"])
    return net.state_dict(), [loss]


def run_spread(net, t, recipe):
    with world().spread(net):
        return refine(t, net, recipe)


def single(folder):
    net = network(torch.float32)
    loss = run_spread(net, task(torch.float32), Recipe(epochs=1, batch_size=32, lr=0.02))
    return net.state_dict(), [loss]


def bf16(folder):
    net = network(torch.float32)
    loss = run_spread(
        net, task(torch.float32), Recipe(epochs=1, batch_size=32, lr=0.02, precision="bf16")
    )
    return net.state_dict(), [loss]


def resumed(folder):
    "Left between two rounds and taken up: the same bits as a run that was not"
    for name in ("a", "b"):
        if name == "b":
            left = imp(
                task(),
                network(),
                rounds=2,
                prune=0.3,
                rewind="2it",
                recipe=RECIPES["sgd"],
                device="cpu",
                folder=folder / "b",
            )
            next(left)
            left.close()
        net, rounds = run(RECIPES["sgd"], folder=folder / name, rewind="2it")
        if name == "a":
            whole = digest(net.state_dict())
    same = (folder / "a/ticket.safetensors").read_bytes() == (
        folder / "b/ticket.safetensors"
    ).read_bytes()
    return {}, [same, digest(net.state_dict()) == whole]


def planted(folder):
    "What is said when one rank's weights are another's no more: at the start, and after a nudge in mid-round"
    said, net, count = [], network(), [0]

    def nudge(output, target):
        count[0] += 1
        if world().rank == 1 and count[0] == 4:
            net.layer1[0].conv1.weight.data.view(-1)[0] += 1e-12
        return torch.nn.functional.cross_entropy(output, target)

    for net_, t in (
        (network(seed=world().rank), None),
        (net, task(loss=nudge, metrics={"zero": lambda o, t: 0.0})),
    ):
        try:
            run(short(RECIPES["sgd"]), net_, t)
        except RanksDiffer as e:
            said.append(str(e))
    return {}, said


def refused(folder):
    "Rank 0's errors are everybody's; a network whose outputs are no samples is refused"
    (folder / "file").write_text("")

    class Scalar(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).mean() if self.training else super().forward(x)

    said = []
    for f in (
        lambda: run(RECIPES["sgd"], folder=folder / "file" / "x"),
        lambda: run_spread(
            Scalar(4, 2),
            Task("s", Resident(*[torch.ones(8, 4), torch.zeros(8).long()] * 2)),
            Recipe(epochs=1, batch_size=8),
        ),
    ):
        try:
            f()
        except Exception as e:
            said.append(f"{type(e).__name__}: {e}")
    return {}, said


def dropout(folder):
    "Ranks draw different dropout masks, and the same ones again"
    net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Dropout(0.5))
    with world().spread(net), seeded(0, "step"):
        a, b, after = net(torch.ones(4, 1)), net(torch.ones(4, 1)), torch.rand(1).item()
    with seeded(0, "step"):
        clean = torch.rand(1).item()
    dropped = lambda y: y.detach() == 0
    return {}, [
        torch.equal(dropped(a)[:2], dropped(a)[2:]),
        torch.equal(dropped(a), dropped(b)),
        after == clean,
    ]


class Rows:
    "Data as dictionaries: 48 rows of tokens, of which some have no label"

    def __init__(self):
        with seeded(0, "rows"):
            ids = torch.randint(9, (48, 6))
        self.rows = dict(ids=ids, mask=(ids > 0).double(), labels=torch.where(ids > 2, ids, -100))

    def to(self, device):
        return self

    def steps(self, batch_size):
        return len(self.rows["ids"]) // batch_size

    def batches(self, seed, epoch, batch_size):
        for i in torch.arange(48).split(batch_size):
            yield {k: t[i] for k, t in self.rows.items()}

    def test(self, batch_size=None):
        yield self.rows


class Words(torch.nn.Module):
    "Words guessed by a network with a tied matrix, a frozen norm, and two outputs"

    def __init__(self):
        super().__init__()
        self.words, self.norm = torch.nn.Embedding(9, 8), torch.nn.BatchNorm1d(8)
        self.body, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 9, bias=False)
        self.out.weight = self.words.weight
        self.norm.requires_grad_(False)
        self.head_names = ("out",)

    def forward(self, ids, mask):
        h = self.words(ids) * mask[..., None]
        h = torch.relu(self.body(self.norm(h.flatten(0, 1)).view(h.shape)))
        return dict(word=self.out(h), size=h.sum((1, 2)))


def guess(output, target):
    fill = torch.nn.functional.cross_entropy(
        output["word"].transpose(1, 2), target, ignore_index=-100
    )
    return fill + 0.01 * output["size"].square().mean()


def by_gradient(network, task, params):
    task(network, next(task.data.batches(0, 0, 48))).backward()
    return {k: p * p.grad for k, p in params.items()}


def words_task():
    return Task("words", Rows(), guess, metrics={"minus_loss": lambda o, t: -float(guess(o, t))})


def words_net():
    with seeded(0, "words"):
        return Words().double()


def words(folder):
    "Dictionaries, labels that do not count, a tied and a frozen part, a criterion of one's own"
    net, rounds = run(
        Recipe(epochs=2, batch_size=15, lr=0.5),
        words_net(),
        words_task(),
        preset="all",
        score=by_gradient,
        keep="last",
        folder=folder / "words",
    )
    ticket = Ticket.load(folder / "words/ticket.safetensors")
    died = {f"died/{k}": d for k, d in ticket.history.died.items()}
    kept = load_trained(folder / "words/trained.safetensors").weights
    assert digest(kept) == digest(state(net)) and not net.norm.num_batches_tracked
    return state(net) | died, [r.metrics["loss"] for r in rounds]


class OwnLoss(Words):
    def forward(self, ids, mask, labels):
        output = super().forward(ids, mask)
        return dict(loss=guess(output, labels), logits=output["word"])


def inside(folder):
    "Where ranks cannot give the loss of one process, they are refused"
    said = []
    data, net = Rows(), OwnLoss().double()
    for f in (
        lambda: run(RECIPES["sgd"], net, Task("own", data, loss="model", metrics={"x": len})),
        lambda: run_spread(
            torch.nn.parallel.DistributedDataParallel(words_net()), words_task(), RECIPES["sgd"]
        ),
    ):
        try:
            f()
        except ValueError as e:
            said.append(str(e))
    return {}, said


CASES = {
    "words": words,
    "inside": inside,
    "sgd": lambda f: trained("sgd", f),
    "adamw": lambda f: trained("adamw", f),
    "contrastive": contrastive,
    "single": single,
    "bf16": bf16,
    "resumed": resumed,
    "planted": planted,
    "refused": refused,
    "dropout": dropout,
}


def main(folder, *cases):
    torch.set_num_threads(1)
    folder = Path(folder)
    me = world()
    for name in cases:
        (folder / f"f{me.size}{name}").mkdir(exist_ok=True)
        tensors, facts = CASES[name](folder / f"f{me.size}{name}")
        torch.save((tensors, facts), folder / f"{name}-{me.size}-{me.rank}.pt")


# The tests


def launched(
    *args, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), **env
):
    env = (
        {k: v for k, v in os.environ.items() if k != "RANK"}
        | dict(
            PYTHONPATH=str(ROOT),
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",
            TORCHELASTIC_ERROR_FILE="",
        )
        | env
    )
    return subprocess.Popen(
        [sys.executable, *launcher, __file__, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Every case on two ranks, in one start"
    folder = tmp_path_factory.mktemp("ranks")
    process = launched(folder, *CASES)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out[-4000:]
    return folder


def told(home, name):
    return [torch.load(home / f"{name}-2-{r}.pt") for r in (0, 1)]


def alone(name, folder):
    (folder / name).mkdir()
    return CASES[name](folder / name)


@pytest.mark.parametrize("name", ["sgd", "adamw", "contrastive", "words"])
def test_two_ranks_are_one_process(home, tmp_path, name):
    (a, losses), (b, others) = told(home, name)
    one, mine = alone(name, tmp_path)
    assert digest(a) == digest(b) and losses == others
    for k, t in one.items():
        if k.startswith("died/"):
            assert torch.equal(t, a[k]), k
        else:
            assert torch.allclose(t.double(), a[k].double(), rtol=1e-6, atol=1e-8), (
                k,
                (t.double() - a[k].double()).abs().max(),
            )
    assert all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(mine, losses, strict=True))


@pytest.mark.parametrize("name, eps", [("single", 1e-4), ("bf16", 3e-2)])
def test_other_precisions(home, tmp_path, name, eps):
    (a, _), (b, _) = told(home, name)
    one, _ = alone(name, tmp_path)
    assert digest(a) == digest(b)
    flat = lambda state: torch.cat(
        [
            t.double().flatten()
            for k, t in state.items()
            if "running" not in k and "num_batches" not in k
        ]
    )
    assert (flat(a) - flat(one)).norm() / flat(one).norm() < eps


def test_resume(home):
    for _, facts in told(home, "resumed"):
        assert facts == [True, True]


def test_planted_faults_are_found(home):
    for _, (start, later) in told(home, "planted"):
        assert (
            "before the run" in start and "'initial'" in start and "same task and network" in start
        )
        assert (
            "after round 0" in later
            and "'weights layer1.0.conv1.weight'" in later
            and "on rank 1" in later
        )


def test_errors_are_everybodys(home):
    (_, zero), (_, one) = told(home, "refused")
    assert (
        "rank 0 could not go on" not in zero[0]
        and "rank 0 could not go on, so rank 1 stops as well" in one[0]
    )
    assert all("one row per sample" in said[1] for said in (zero, one))


def test_what_ranks_cannot_share_is_refused(home):
    for _, (own, wrapped) in told(home, "inside"):
        assert "on 2 ranks each would see a part of the batch: let the task compute it" in own
        assert "inside a DistributedDataParallel" in wrapped and "network.module" in wrapped


def test_dropout(home):
    for _, facts in told(home, "dropout"):
        assert facts == [False, False, True]


def stopped(folder):
    "Rank 1 fails in mid-round while rank 0 waits for its gradients"

    def fail(output, target):
        if world().rank == 1:
            raise KeyError("out of luck")
        return torch.nn.functional.cross_entropy(output, target)

    run(
        RECIPES["sgd"],
        t=task(loss=fail, metrics={"zero": lambda o, t: 0.0}, about=dict(known="yes")),
        control="imp",
        folder=folder,
    )


@pytest.mark.slow
def test_one_rank_that_fails_ends_all(tmp_path):
    process, begun = launched(tmp_path, "stopped"), time.monotonic()
    out = process.communicate(timeout=120)[0]
    assert process.returncode and "out of luck" in out and time.monotonic() - begun < 100


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_and_started_again(home, tmp_path):
    (tmp_path / "f2sgd").mkdir()
    ticket = tmp_path / "f2sgd/sgd/ticket.safetensors"
    process = launched(tmp_path, "sgd")
    end = time.monotonic() + 120
    while not ticket.exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = launched(tmp_path, "sgd")
    out = again.communicate(timeout=200)[0]
    assert again.returncode == 0, out[-4000:]
    assert ticket.read_bytes() == (home / "f2sgd/sgd/ticket.safetensors").read_bytes()


@pytest.mark.slow
def test_accelerate_launch(home, tmp_path):
    "Without GPUs `--multi_gpu` starts two processes that work on the CPU; `--cpu` would start one"
    process = launched(
        tmp_path,
        "sgd",
        launcher=(
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
        ),
    )
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out[-4000:]
    assert digest(told(tmp_path, "sgd")[0][0]) == digest(told(home, "sgd")[0][0])


if __name__ == "__main__":
    CASES["stopped"] = stopped
    main(*sys.argv[1:])
