"Batches of any form, metrics that stream, a check before training, and the identity of a task"

import copy, functools, itertools, json, os, random, subprocess, sys, weakref
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler
from rg_tickets.basics import generator, seeded
from rg_tickets.tasks import images, selfsup
from rg_tickets.tasks.core import Loaders, Resident, Task, check_task, evaluate, to_device
from rg_tickets.tasks.forms import batch_tensors, describe_batch, own_loss, prediction
from rg_tickets.tasks.identity import describe, hash_values, own_generators, unchanged
from rg_tickets.tasks.metrics import Accuracy, accuracy, start_metric
from rg_tickets.tasks.text import Part

N, D, C = 12, 4, 3  # samples, inputs, classes


def drawn(*shape, name="x"):
    return torch.randn(*shape, generator=generator(0, name))


X, Y = drawn(N, D), torch.arange(N) % C
DATA = TensorDataset(X, Y)


def linear(d=D, c=C, seed=0):
    with seeded(seed, "linear"):
        return nn.Linear(d, c)


def task_of(train, test=None, **kwargs):
    return Task.from_loaders(train, train if test is None else test, **kwargs)


def loader(data=DATA, n=4, **kwargs):
    return DataLoader(data, n, **kwargs)


def collating(form):
    "A collate function that gives x and y to `form`"
    return lambda samples: form(*(torch.stack(o) for o in zip(*samples)))


# ---------------------------------------------------------------- forms of a batch

Named = namedtuple("Named", "label image")


class ByName(nn.Module):
    "A network that takes its input by name"

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, pixels):
        return self.layer(pixels)


class Summed(nn.Module):
    "A network with several inputs"

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, *inputs, **more):
        return self.layer(sum([*inputs, *more.values()]))


def _encoding(**values):
    return pytest.importorskip("transformers").BatchEncoding(values)


FORMS = {
    "a tuple": (lambda x, y: (x, y), linear),
    "a list": (lambda x, y: [x, y], linear),
    "three things": (lambda x, y: (x / 2, x / 2, y), Summed),
    "five things": (lambda x, y: (x / 4, x / 4, x / 4, x / 4, y), Summed),
    "a dict": (lambda x, y: dict(pixels=x, labels=y), ByName),
    "another key": (lambda x, y: dict(y=y, pixels=x), ByName),
    "a UserDict": (lambda x, y: UserDict(pixels=x, target=y), ByName),
    "an OrderedDict": (lambda x, y: OrderedDict(targets=y, pixels=x), ByName),
    "a read-only mapping": (lambda x, y: MappingProxyType(dict(pixels=x, label=y)), ByName),
    "a BatchEncoding": (lambda x, y: _encoding(pixels=x, labels=y), ByName),
    "a mapping with targets beside it": (lambda x, y: (dict(pixels=x), y), ByName),
    "a tensor and a mapping": (lambda x, y: (x / 2, dict(more=x / 2), y), Summed),
    "a named tuple that names its targets": (lambda x, y: Named(y, x), linear),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda k: k.replace(" ", "_"))
def test_every_form_of_batch_gives_the_same_loss_scores_and_gradient(form):
    make, network = FORMS[form]
    task, net = task_of(loader(collate_fn=collating(make))), network()
    check_task(task, net)
    plain, reference = task_of(loader()), linear()
    batch, expected = next(task.data.batches(0, 0)), next(plain.data.batches(0, 0))
    assert torch.allclose(task(net, batch), plain(reference, expected))
    assert torch.equal(task.target(batch), expected[1])
    scores, wanted = evaluate(task, net), evaluate(plain, reference)
    assert scores["accuracy"] == wanted["accuracy"]
    assert scores["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    task(net, batch).backward()
    plain(reference, expected).backward()
    layer = getattr(net, "layer", net)
    assert torch.allclose(layer.weight.grad, reference.weight.grad, atol=1e-6)


def test_a_split_of_ones_own_serves_any_other_form():
    @dataclass
    class Sample:
        image: torch.Tensor
        kind: torch.Tensor

    rows = DataLoader(DATA, 4, collate_fn=collating(Sample))
    task = task_of(rows, split=lambda b: ((b.image,), {}, b.kind))
    check_task(task, linear())
    assert evaluate(task, linear()) == evaluate(task_of(loader()), linear())
    wrong = task_of(rows, split=lambda b: (b.image, b.kind))
    with pytest.raises(ValueError, match=r"must give \(args, kwargs, targets\)"):
        wrong.inputs(next(wrong.data.batches(0, 0)))


def test_an_autoencoder_reads_its_targets_from_its_inputs():
    task = task_of(DataLoader(X, 4), split=lambda x: ((x,), {}, x), loss=F.mse_loss)
    net = linear(D, D)
    assert evaluate(task, net)["loss"] == pytest.approx(F.mse_loss(net(X), X).item(), rel=1e-6)


UNKNOWN = {
    "inputs only, two rows": DataLoader(X, 2),
    "a list of one tensor": DataLoader(TensorDataset(X), 2),
    "no key for targets": loader(collate_fn=collating(lambda x, y: dict(pixels=x, kind=y))),
    "two keys for targets": loader(collate_fn=collating(lambda x, y: dict(label=y, labels=y, x=x))),
    "samples that nobody put together": loader(collate_fn=list),
    "samples that are dicts": DataLoader([dict(x=x, y=y) for x, y in DATA], 4, collate_fn=list),
    "an input named twice": loader(collate_fn=collating(lambda x, y: (dict(x=x), dict(x=x), y))),
}


@pytest.mark.parametrize("what", UNKNOWN, ids=lambda k: k.replace(" ", "_"))
def test_a_batch_of_no_known_form_is_refused_and_the_forms_are_named(what):
    with pytest.raises(ValueError) as e:
        check_task(task_of(UNKNOWN[what]), linear())
    for part in ("the batch is", "(inputs, targets)", "labels", "split=", "objective", "judge"):
        assert part in str(e.value)


def test_a_network_that_wants_other_arguments_is_told_how_it_was_called():
    task = task_of(loader(collate_fn=collating(lambda x, y: dict(idx=x, labels=y))))
    with pytest.raises(ValueError, match=r"called as network\(idx=Tensor \[4, 4\] float32\)"):
        check_task(task, ByName())


def test_to_device_moves_every_form_and_changes_no_batch():
    nest = {
        "a": [X, (Y, "text", None)],
        "b": Named(Y, X),
        "c": UserDict(x=X),
        "d": nn.utils.rnn.pack_sequence([X[:3], X[:2]]),
        "e": _encoding(ids=Y),
    }
    before = copy.copy(nest["c"].data)
    moved = to_device(nest, "meta")
    assert (
        moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1:] == ("text", None)
    )
    assert type(moved["b"]) is Named and moved["b"].image.is_meta
    assert type(moved["c"]) is UserDict and moved["c"]["x"].is_meta and nest["c"].data == before
    assert moved["d"].data.is_meta and type(moved["e"]) is type(nest["e"])
    assert moved["e"]["ids"].is_meta and not nest["e"]["ids"].is_meta


def test_the_bits_of_a_batch_cover_everything_in_it():
    batch = dict(a=X, b=[1, 2.5], c="text", d=np.arange(3))
    assert list(batch_tensors(batch)) == ["a", "b.0", "b.1", "c", "d"]
    others = dict(a=X + 1e-6), dict(b=[1, 2.4]), dict(c="texts"), dict(d=np.arange(3.0))
    assert len({hash_values(batch | o) for o in ({}, *others)}) == 5
    assert list(batch_tensors((X, Y))) == ["0", "1"]


def test_last_batches_may_be_shorter_and_padded_lengths_may_differ():
    lengths = [3, 5, 2, 7, 7, 4, 6]
    data = [(drawn(n, D, name=n), torch.tensor(n % C)) for n in lengths]

    def pad(samples):
        x = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
        mask = torch.tensor([[1.0] * len(o) + [0.0] * (x.shape[1] - len(o)) for o, _ in samples])
        return dict(x=x, mask=mask, labels=torch.stack([y for _, y in samples]))

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x, mask):
            return self.layer((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    parts, whole = (task_of(DataLoader(data, n, collate_fn=pad)) for n in (3, 7))
    net = Pooled()
    check_task(parts, net)
    assert evaluate(parts, net) == pytest.approx(evaluate(whole, net), rel=1e-6)


# ---------------------------------------------------------------- lengths of loaders


class Endless(IterableDataset):
    def __init__(self, n=10**6):
        self.n = n

    def __iter__(self):
        return ((X[i % N], Y[i % N]) for i in range(self.n))


def test_an_iterable_data_set_trains_for_the_stated_number_of_batches():
    task = task_of(loader(Endless()), loader(), steps=5)
    assert task.data.steps() == 5 and len(list(task.data.batches(0, 0))) == 5
    check_task(task, linear())
    assert set(task.fingerprint()["data"]["train"]) >= {"first_batches", "length"}


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="does not say how many batches .* steps=100"):
        task_of(loader(Endless()), loader())
    with pytest.raises(ValueError, match="steps=9, but the training loader yields 3 batches"):
        task_of(loader(), steps=9)
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="whole number, 1 or more"):
            task_of(loader(), steps=bad)
    with pytest.raises(ValueError, match="cannot be read twice"):
        task_of(iter([(X, Y)]))
    with pytest.raises(ValueError, match="in_order=False"):
        task_of(loader(num_workers=1, in_order=False))


def test_a_loader_shorter_than_it_said_ends_with_its_own_error():
    class Boastful(Endless):
        def __len__(self):
            return 40

    short = [task_of(loader(Endless(8)), steps=4), task_of(loader(Boastful(8)))]
    for task, said in zip(short, (4, 10)):
        with pytest.raises(ValueError, match=f"ended after 2 batches of epoch 3, and {said} were"):
            list(task.data.batches(0, 3))


def test_an_empty_test_set_is_named():
    with pytest.raises(ValueError, match="test data yield no batch"):
        check_task(task_of(loader(), loader(Endless(0))), linear())
    with pytest.raises(ValueError, match="test set of 'custom' yields no batch"):
        evaluate(task_of(loader(), loader(Endless(0))), linear())


# ---------------------------------------------------------------- accuracy


def test_accuracy_of_maps_and_sequences_counts_every_target_once():
    "These once gave 41.75 and 1.9"
    logits, y = drawn(2, C, 5, 6), torch.randint(C, (2, 5, 6), generator=generator(1))
    right = (logits.argmax(1) == y).double().mean().item()
    assert accuracy(logits, y) == pytest.approx(right)
    assert accuracy(logits.permute(0, 2, 3, 1), y) == pytest.approx(right)
    assert (
        accuracy(logits[..., 0], y[..., 0])
        == (logits[..., 0].argmax(1) == y[..., 0]).float().mean()
    )


def test_targets_that_are_ignored_do_not_count():
    logits = torch.eye(3)
    assert accuracy(logits, torch.tensor([0, -100, 1])) == 0.5
    assert accuracy(logits, torch.tensor([0, 255, 1]), ignore_index=255) == 0.5
    assert np.isnan(accuracy(logits, torch.full((3,), -100)))


def test_a_square_batch_is_not_guessed_at_but_others_may_decide():
    logits, y = drawn(2, 3, 3), torch.randint(3, (2, 3), generator=generator(2))
    with pytest.raises(ValueError, match=r"Accuracy\(axis=1\) or Accuracy\(axis=-1\)"):
        accuracy(logits, y)
    assert accuracy(logits, y, axis=1) == (logits.argmax(1) == y).float().mean()
    assert accuracy(logits, y, axis=-1) == (logits.argmax(-1) == y).float().mean()
    told = Accuracy()
    more, z = drawn(2, 4, 3, name="more"), torch.randint(3, (2, 4), generator=generator(3))
    told.update(logits, y)
    told.update(more, z)  # [n, tokens, C]
    hits = (logits.argmax(-1) == y).sum() + (more.argmax(-1) == z).sum()
    assert told.compute() == pytest.approx(hits.item() / 14)
    with pytest.raises(ValueError, match="the batches before"):
        told.update(drawn(2, 3, 4), z)


def test_probabilities_as_targets_stand_for_their_largest_class():
    logits, y = drawn(6, C), torch.arange(6) % C
    assert accuracy(logits, F.one_hot(y, C).float()) == accuracy(logits, y)
    soft = 0.8 * F.one_hot(y, C) + 0.2 / C
    assert accuracy(logits, soft) == accuracy(logits, y)


@pytest.mark.parametrize(
    ["output", "target", "why"],
    [
        [torch.zeros(4, 3), torch.zeros(4, 1).long(), "no axis"],
        [torch.zeros(4), torch.zeros(4).long(), "no axis"],
        [torch.zeros(4, 1), torch.zeros(4).long(), "one output is no choice"],
        [torch.zeros(4, 3), torch.full((4,), 3), "target 3 is none of the 3 classes"],
        [torch.zeros(4, 3), torch.full((4,), 255), "ignore_index=255"],
        [torch.zeros(4, 3), torch.full((4,), 0.5), "no whole numbers"],
        [torch.zeros(4, 3), torch.ones(4, 3), "probabilities that sum to 1"],
        [torch.zeros(4, 3), torch.ones(4, 3).long(), "probabilities that sum to 1"],
        [torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8).long(), "no axis"],
        [(torch.zeros(4, 3),), torch.zeros(4).long(), "two tensors"],
    ],
)
def test_accuracy_refuses_what_it_cannot_count(output, target, why):
    with pytest.raises(ValueError, match=why):
        accuracy(output, target)


def test_the_default_accuracy_leaves_out_what_the_loss_leaves_out():
    y = torch.where(Y == 2, 255, Y)
    for loss in (
        nn.CrossEntropyLoss(ignore_index=255),
        functools.partial(F.cross_entropy, ignore_index=255),
    ):
        task = task_of(loader(TensorDataset(X, y)), loss=loss)
        hits = (linear()(X).argmax(1) == y)[y != 255]
        assert evaluate(task, linear())["accuracy"] == pytest.approx(hits.double().mean().item())


# ---------------------------------------------------------------- the loss of a whole set


class PerPixel(nn.Module):
    "[n, D] -> [n, C, 5]"

    def __init__(self):
        super().__init__()
        self.layer = linear(D, C * 5)

    def forward(self, x):
        return self.layer(x).view(-1, C, 5)


W = torch.tensor([1.0, 2.0, 7.0])
DENSE = torch.randint(C, (N, 5), generator=generator(5)).where(
    drawn(N, 5, name="hole") > -0.5, -100
)
SOFT = drawn(N, C, name="soft").softmax(1)
LOSSES = {
    "cross entropy": (F.cross_entropy, linear, Y),
    "class weights": (nn.CrossEntropyLoss(weight=W), linear, Y),
    "smoothing and weights": (nn.CrossEntropyLoss(weight=W, label_smoothing=0.1), linear, Y),
    "a partial": (functools.partial(F.cross_entropy, weight=W), linear, Y),
    "ignored": (F.cross_entropy, linear, torch.where(torch.arange(N) < 6, Y, -100)),
    "a batch without any target": (F.cross_entropy, linear, Y.where(torch.arange(N) >= 5, -100)),
    "dense, ignored, weights": (nn.CrossEntropyLoss(weight=W), PerPixel, DENSE),
    "probabilities": (nn.CrossEntropyLoss(), linear, SOFT),
    "likelihood": (lambda o, y: F.nll_loss(o.log_softmax(1), y), linear, Y),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), linear, Y),
    "squares": (nn.MSELoss(), linear, SOFT),
    "logits of many labels": (nn.BCEWithLogitsLoss(), linear, (SOFT > 0.3).float()),
    "divergence": (nn.KLDivLoss(reduction="batchmean"), linear, SOFT),
    "own, dense, ignored": (lambda o, y: F.cross_entropy(o, y), PerPixel, DENSE),
    "own, of numbers": (lambda o, y: (o - y).abs().mean(), linear, SOFT),
}


@pytest.mark.parametrize("what", LOSSES, ids=lambda k: k.replace(" ", "_"))
def test_the_streamed_loss_is_the_loss_of_the_whole_set(what):
    loss, network, y = LOSSES[what]
    task, net = task_of(loader(TensorDataset(X, y), 5), loss=loss), network()
    with torch.no_grad():
        whole = loss(net(X), y).item()
    assert evaluate(task, net)["loss"] == pytest.approx(whole, rel=1e-5)


def test_one_batch_gives_the_bits_of_the_whole_loss():
    task = Task("one", Resident(X, Y, X, Y))
    assert evaluate(task, linear())["loss"] == F.cross_entropy(linear()(X), Y).item()


def test_outputs_and_targets_of_two_shapes_are_not_broadcast():
    task = task_of(loader(TensorDataset(X, X[:, 0])), loss=F.mse_loss)
    with pytest.raises(ValueError, match=r"outputs \[4, 1\] and targets \[4\] differ in shape"):
        check_task(task, linear(D, 1))


def test_outputs_in_half_precision_are_scored_in_single():
    seen = []

    def record(output, target):
        seen.append(output.dtype)
        return 0.0

    task = task_of(loader(), metrics={"m": record})
    evaluate(task, linear(), precision="bf16")
    evaluate(
        task_of(loader(TensorDataset(X.double(), Y)), metrics={"m": record}), linear().double()
    )
    assert seen == [torch.float32, torch.float64]


# ---------------------------------------------------------------- metrics


class Counting:
    "The mean largest logit, counted"

    def __init__(self):
        self.total, self.n = 0.0, 0

    def update(self, output, target):
        self.total, self.n = self.total + output.amax(1).sum().item(), self.n + len(output)

    def compute(self):
        return self.total / self.n


def test_objects_and_functions_agree_and_no_object_is_touched():
    counting = Counting()
    both = {"counted": counting, "kept": lambda o, y: o.amax(1).mean()}
    scores = evaluate(task_of(loader(n=5), metrics=both), linear())
    assert scores["counted"] == pytest.approx(scores["kept"], rel=1e-6) and counting.n == 0
    assert evaluate(task_of(loader(n=5), metrics=both), linear()) == scores


def test_metrics_of_torchmetrics_fit_without_an_adapter():
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics = {
        "f1": torchmetrics.classification.MulticlassF1Score(C, average="macro"),
        "auc": torchmetrics.classification.MulticlassAUROC(C),
        "accuracy": accuracy,
    }
    task, net = task_of(loader(n=5), metrics=metrics), linear()
    check_task(task, net)
    scores = evaluate(task, net)
    assert scores["f1"] == pytest.approx(metrics["f1"](net(X), Y).item())
    assert json.loads(json.dumps(scores)) == scores
    assert task.fingerprint() == task_of(loader(n=5), metrics=metrics).fingerprint()


class Watched(nn.Module):
    "Keeps count of its outputs that are still in memory"

    def __init__(self):
        super().__init__()
        self.layer, self.outputs, self.most = linear(), [], 0

    def forward(self, x):
        output = self.layer(x)
        self.outputs.append(weakref.ref(output))
        self.most = max(self.most, sum(o() is not None for o in self.outputs))
        return output


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda o, y: F.cross_entropy(o, y)])
def test_memory_does_not_grow_with_the_test_set(loss):
    "Outputs are let go one by one"
    net = Watched()
    evaluate(task_of(loader(n=1), loss=loss, metrics={"a": accuracy, "c": Counting()}), net)
    assert net.most <= 2


VALUES = [torch.tensor(0.5), torch.tensor([[0.5]]), np.float32(0.5), np.array(0.5), 0.5]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_whatever_is_one_number_becomes_a_plain_float(value):
    task = task_of(loader(), metrics={"m": lambda o, y: value})
    check_task(task, linear())
    assert type(evaluate(task, linear())["m"]) is float and evaluate(task, linear())["m"] == 0.5


@pytest.mark.parametrize("value", [torch.zeros(3), np.zeros(2), None, "0.5", {"a": 1}, 1j, [0.5]])
def test_what_is_not_one_number_is_refused_before_training(value):
    with pytest.raises(ValueError, match="metric 'm' gave .* one real number"):
        check_task(task_of(loader(), metrics={"m": lambda o, y: value}), linear())


def test_metrics_that_are_none_are_refused():
    for bad in ({}, [accuracy], accuracy, {"loss": accuracy}, {1: accuracy}):
        with pytest.raises(ValueError, match="a task needs at least one metric"):
            task_of(loader(), metrics=bad)
    for bad in (Counting, 3, None):
        with pytest.raises(ValueError, match="metric 'm' is .* update"):
            check_task(task_of(loader(), metrics={"m": bad}), linear())


def test_a_metric_that_needs_a_rare_class_is_tried_on_the_whole_test_set():
    sklearn = pytest.importorskip("sklearn.metrics")
    y = (torch.arange(N) == N - 1).long()

    def auc(output, target):
        if len(target.unique()) < 2:
            raise ValueError("Only one class present in y_true")
        return sklearn.roc_auc_score(target, output[:, 1])

    rare = TensorDataset(X, y)
    task = task_of(loader(rare), metrics={"auc": auc})
    check_task(task, linear(D, 2))
    assert 0 <= evaluate(task, linear(D, 2))["auc"] <= 1
    never = task_of(loader(rare), loader(TensorDataset(X, 0 * y)), metrics={"auc": auc})
    with pytest.raises(ValueError, match="testing failed .* metric 'auc' failed .* one class"):
        check_task(never, linear(D, 2))


def test_outputs_of_several_lengths_are_refused_for_a_function_before_training():
    "The test batches that differ come late, and the check sees them all the same"

    class PerStep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(1, C)

        def forward(self, x):
            return self.layer(x[..., None])

    def batch(n):
        return dict(x=drawn(4, n), labels=torch.randint(C, (4, n), generator=generator(n)))

    flat = lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten())
    late = [batch(6)] * 5 + [batch(7)]
    task = task_of([batch(6)], late, loss=flat, metrics={"m": lambda o, y: 0.0})
    with pytest.raises(ValueError, match=r"cannot be put together: there are \[n, 6.* and \[n, 7"):
        check_task(task, PerStep())
    check_task(task_of([batch(6)], late, loss=flat, metrics={"m": accuracy}), PerStep())


def test_a_part_of_the_test_set_is_counted_as_it_passes():
    halves = {
        "first": Part(accuracy, 0, 7),
        "second": Part(accuracy, 7, N),
        "none": Part(accuracy, N, N),
    }
    scores = evaluate(task_of(loader(n=5), metrics=halves), linear())
    hits = linear()(X).argmax(1) == Y
    assert (
        scores["first"] == hits[:7].double().mean() and scores["second"] == hits[7:].double().mean()
    )
    assert np.isnan(scores["none"])
    function = Part(lambda o, y: (o.argmax(1) == y).double().mean(), 7, N)
    assert (
        evaluate(task_of(loader(n=5), metrics={"m": function}), linear())["m"] == scores["second"]
    )


def test_a_network_that_changes_its_inputs_in_place_changes_no_data():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x):
            return self.layer(x.sub_(1))

    x = X.clone()
    kinds = (
        Task("held", Resident(x, Y, x, Y)),
        task_of([(x, Y)]),
        task_of(loader(TensorDataset(x, Y))),
    )
    for task in kinds:
        check_task(task, InPlace())
        assert evaluate(task, InPlace()) == evaluate(task, InPlace())
        assert torch.equal(x, X)


# ---------------------------------------------------------------- modes, and data that are NaN


def test_every_module_is_left_in_its_own_mode():
    net = nn.Sequential(linear(D, D), nn.BatchNorm1d(D), nn.Sequential(nn.Dropout(), linear()))
    net.train()
    net[1].eval()
    net[2].eval()
    net[2][0].train()
    before = [m.training for m in net.modules()]
    task, rng = task_of(loader()), torch.get_rng_state()
    first = evaluate(task, net)
    assert [m.training for m in net.modules()] == before and evaluate(task, net) == first
    check_task(task, net)
    broken = task_of(loader(), metrics={"m": lambda o, y: 1 / 0})
    with pytest.raises(ValueError, match="metric 'm' failed with ZeroDivisionError"):
        evaluate(broken, net)
    assert [m.training for m in net.modules()] == before
    assert torch.equal(rng, torch.get_rng_state())


def test_a_module_that_merges_weights_in_test_mode_takes_them_apart_again():
    "As layers with low-rank additions do: they act in `train`, not only in `forward`"

    class Merging(nn.Linear):
        extra = 1.0

        def train(self, mode=True):
            if mode != self.training:
                self.weight.data += self.extra if not mode else -self.extra
            return super().train(mode)

    with seeded(0, "merging"):
        net = nn.Sequential(Merging(D, C))
    before = net[0].weight.detach().clone()
    evaluate(task_of(loader()), net)
    assert net.training and torch.allclose(net[0].weight, before)


def _with_nan(where, tensor):
    tensor = tensor.clone()
    tensor[where] = float("nan")
    return tensor


def test_test_data_that_are_not_numbers_are_reported_as_that():
    bad = loader(TensorDataset(_with_nan(9, X), Y))
    for run in (evaluate, check_task):
        with pytest.raises(ValueError, match=r"test batch 2 of 'custom' holds NaN \(0;"):
            run(task_of(bad if run is check_task else loader(), bad), linear())
            evaluate(task_of(loader(), bad), linear())
    numbers = TensorDataset(X, _with_nan(1, X[:, :1]))
    with pytest.raises(ValueError, match=r"test batch 0 of 'custom' holds NaN \(1;"):
        evaluate(task_of(loader(numbers), loss=F.mse_loss), linear(D, 1))
    with pytest.raises(ValueError, match=r"loss of one training batch .* NaN in the batch \(0\)"):
        check_task(task_of(loader(TensorDataset(_with_nan(0, X), Y)), loader()), linear())


def test_a_network_that_is_not_a_number_is_not_blamed_on_the_data():
    net = linear()
    nn.init.constant_(net.weight, float("nan"))
    assert np.isnan(evaluate(task_of(loader()), net)["loss"])
    with pytest.raises(ValueError, match="it is nan before any training"):
        check_task(task_of(loader()), net)


# ---------------------------------------------------------------- the check


def everything(net):
    "All that a network holds, as plain values"
    tensors = {k: v.clone() for k, v in {**net.state_dict(), **dict(net.named_buffers())}.items()}
    grads = {k: p.grad for k, p in net.named_parameters()}
    return hash_values(tensors), grads, [m.training for m in net.modules()]


class Remembering(nn.Module):
    "Holds state in every way there is"

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(D), linear()
        self.calls, self.seen, self.own = 0, [], torch.zeros(3)
        self.register_buffer("hidden", torch.zeros(1), persistent=False)
        self.register_buffer("queue", torch.zeros(2))
        self.rng = np.random.default_rng(0)

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.own += 1
        self.hidden.add_(1)
        self.queue = self.queue + 1  # another tensor
        self.rng.random()
        self.layer.weight.data.mul_(0.9)
        return self.layer(self.norm(x)) + torch.rand(())


def test_the_check_leaves_no_trace_on_a_network_that_holds_state_in_every_way():
    net = Remembering()
    net.layer.weight.grad = torch.ones_like(net.layer.weight)
    grad, queue = net.layer.weight.grad, net.queue
    before, draws = (
        everything(net),
        [torch.get_rng_state(), random.getstate(), np.random.get_state()],
    )
    check_task(task_of(loader(shuffle=True)), net)
    assert everything(net)[::2] == before[::2] and net.layer.weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert (net.calls, net.seen, net.own.tolist()) == (0, [], [0, 0, 0]) and net.queue is queue
    assert net.rng.random() == np.random.default_rng(0).random()
    assert torch.equal(draws[0], torch.get_rng_state()) and draws[1] == random.getstate()
    assert np.array_equal(draws[2][1], np.random.get_state()[1])


def test_the_check_leaves_no_trace_on_losses_objectives_and_judges():
    total, batches = torch.zeros(1), []

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, output, target):
            self.mean.add_(1)
            return F.cross_entropy(output, target)

    def objective(network, batch):
        nonlocal total
        total = total + 1
        batches.append(batch)
        loss = F.cross_entropy(network(batch[0]), batch[1])
        loss.backward(retain_graph=True)
        return loss

    loss, net = Loss(), linear()
    judge = lambda task, network: {"loss": len(batches), "m": 0.0}
    check_task(task_of(loader(), loss=loss, metrics={"a": accuracy}), net)
    check_task(task_of(loader(), objective=objective, judge=judge, metrics={"m": None}), net)
    assert loss.mean.item() == 0 and total.item() == 0 and batches == []
    assert net.weight.grad is None


@pytest.mark.parametrize("method", [selfsup.moco, selfsup.simclr])
def test_self_supervision_is_tried_without_a_trace(method):
    "Queue, key encoder and statistics are as before"
    base = images.image_task("font_digits", n_train=64, n_test=32)
    task = method(base, **({"queue": 64} if method is selfsup.moco else {}))
    with seeded(0, "backbone"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
        net = task.network(nn.Sequential(*net, nn.Flatten(), nn.Linear(4, 10)))
    before = everything(net)
    check_task(task, net, batch_size=32)
    assert everything(net) == before


def test_views_are_made_of_pictures_in_any_batch():
    pictures = TensorDataset(drawn(16, 1, 8, 8).sigmoid(), torch.arange(16) % 3)
    about = dict(mean=[0.0], std=[1.0])
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    forms = (lambda x, y: (x, y), lambda x, y: dict(pixel_values=x, labels=y))
    scores = []
    for form, split in [
        *((o, None) for o in forms),
        (forms[1], lambda b: ((b["pixel_values"],), {}, b["labels"])),
    ]:
        rows = loader(pictures, 8, collate_fn=collating(form))
        task = selfsup.simclr(Task("own", Loaders(rows, rows), about=about, split=split))
        network = task.network(copy.deepcopy(net))
        check_task(task, network)
        with seeded(0, "views"):
            scores.append(
                (task(network, next(task.data.batches(0, 0))).item(), evaluate(task, network))
            )
    assert scores[0] == scores[1] == scores[2]


def test_a_compiled_network_is_tried_and_left_as_it_was():
    net = nn.Sequential(linear(D, D), nn.BatchNorm1d(D), linear())
    compiled = torch.compile(net, backend="eager")
    before = everything(net)
    check_task(task_of(loader()), compiled)
    assert everything(net) == before
    assert evaluate(task_of(loader()), compiled) == evaluate(task_of(loader()), net)


@pytest.mark.parametrize(
    ["kwargs", "why"],
    [
        [dict(loss=lambda o, y: F.cross_entropy(o, y, reduction="none")), "one number"],
        [dict(loss=lambda o, y: 0.5), "must be a tensor with one number"],
        [dict(loss=lambda o, y: o.detach().sum()), "does not depend on any weight"],
        [dict(loss=lambda o, y: o.sum() / 0), "before any training"],
        [dict(objective=lambda network, batch: network(batch["x"])), "TypeError"],
        [dict(judge=lambda task, network: {"accuracy": 0.5}), r"left out \['loss'\]"],
        [dict(judge=lambda task, network: {"loss": 0.5}), r"left out \['accuracy'\]"],
        [dict(judge=lambda task, network: {"loss": "x", "accuracy": 1}), "metric 'loss' gave"],
    ],
)
def test_a_loss_or_judge_that_does_not_fit_is_refused_before_training(kwargs, why):
    with pytest.raises(ValueError, match=why) as e:
        check_task(task_of(loader(), **kwargs), linear())
    assert "'custom'" in str(e.value) and "The batch is list(Tensor [4, 4] float32" in str(e.value)


def test_losses_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="unknown loss 'mse'"):
        task_of(loader(), loss="mse")
    with pytest.raises(ValueError, match="give a function"):
        task_of(loader(), loss=None)
    learned = nn.CrossEntropyLoss()
    learned.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="only parameters of the network are trained"):
        task_of(loader(), loss=learned)
    task_of(loader(), loss=learned.requires_grad_(False))


def test_lazy_modules_are_refused_by_name():
    with pytest.raises(ValueError, match="0.weight has no shape yet"):
        check_task(task_of(loader()), nn.Sequential(nn.LazyLinear(C)))


# ---------------------------------------------------------------- random state of one's own


class Shuffling(Sampler):
    def __init__(self, rng):
        self.rng = rng

    def __len__(self):
        return N

    def __iter__(self):
        order = list(range(N))
        if isinstance(self.rng, torch.Generator):
            return iter(torch.randperm(N, generator=self.rng).tolist())
        self.rng.shuffle(order)
        return iter(order)


class Pairs(Sampler):
    "A batch sampler of one's own"

    def __init__(self, rng):
        self.inner = Shuffling(rng)

    def __len__(self):
        return N // 4

    def __iter__(self):
        order = list(self.inner)
        return (order[i : i + 4] for i in range(0, N, 4))


class Noisy(Dataset):
    def __init__(self, rng):
        self.rng = rng

    def __len__(self):
        return N

    def __getitem__(self, i):
        draw = (
            torch.rand((), generator=self.rng)
            if isinstance(self.rng, torch.Generator)
            else self.rng.random()
        )
        return X[i] + draw, Y[i]


class Epochs(Sampler):
    "Counts epochs by itself unless it is told"

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return N

    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(N, generator=generator(self.epoch)).tolist())


GLOBAL = np.random.default_rng()


def _noisy_collate(samples):
    x, y = (torch.stack(o) for o in zip(*samples))
    return x + float(GLOBAL.random()), y


def _closed_over(rng):
    def collate(samples):
        x, y = (torch.stack(o) for o in zip(*samples))
        return x + rng.random(), y

    return collate


SOURCES = {
    "sampler, numpy": lambda: loader(sampler=Shuffling(np.random.default_rng())),
    "sampler, RandomState": lambda: loader(sampler=Shuffling(np.random.RandomState())),
    "sampler, Python": lambda: loader(sampler=Shuffling(random.Random())),
    "sampler, torch": lambda: loader(sampler=Shuffling(torch.Generator())),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=Pairs(np.random.default_rng())),
    "sampler in a batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=torch.Generator()), 4, False)
    ),
    "weighted": lambda: loader(
        sampler=WeightedRandomSampler(torch.ones(N), N, generator=torch.Generator())
    ),
    "data set": lambda: loader(Noisy(torch.Generator()), shuffle=True),
    "data sets inside of data sets": lambda: loader(
        Subset(
            ConcatDataset([Noisy(random.Random()), Noisy(np.random.default_rng())]), range(2 * N)
        ),
        shuffle=True,
    ),
    "data set in workers": lambda: loader(
        Noisy(np.random.default_rng()), num_workers=2, shuffle=True
    ),
    "a global variable": lambda: loader(collate_fn=_noisy_collate, shuffle=True),
    "an outer variable": lambda: loader(collate_fn=_closed_over(random.Random()), shuffle=True),
    "epochs of its own": lambda: loader(sampler=Epochs()),
    "distributed": lambda: loader(sampler=DistributedSampler(DATA, 1, 0)),
    "torch's own": lambda: loader(shuffle=True),
}


def bits(task, seed, epoch):
    "The batches of an epoch as training draws them"
    with seeded(seed, "train", epoch):
        return [hash_values(o) for o in task.data.batches(seed, epoch)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda k: k.replace(" ", "_"))
def test_batches_depend_on_seed_and_epoch_and_on_nothing_before(source):
    "Resumed equals uninterrupted, and seed 1 does not depend on whether seed 0 ran before"
    alone, second, resumed = (task_of(SOURCES[source](), loader()) for _ in range(3))
    wanted = [bits(alone, 1, e) for e in range(3)]
    for e in range(3):
        bits(second, 0, e)
    assert [bits(second, 1, e) for e in range(3)] == wanted
    assert bits(resumed, 1, 2) == wanted[2] and wanted[0] != wanted[1]
    check_task(second, linear())
    assert (
        second.fingerprint()
        == resumed.fingerprint()
        == task_of(SOURCES[source](), loader()).fingerprint()
    )


def test_what_cannot_be_seeded_is_refused_by_name():
    with pytest.raises(ValueError, match="loader.sampler.rng draws from the operating system"):
        check_task(task_of(loader(sampler=Shuffling(random.SystemRandom())), loader()), linear())


class Secret(Noisy):
    def __getitem__(self, i):
        return X[i] + os.urandom(1)[0] / 256, Y[i]


class GoesOn(IterableDataset):
    def __init__(self):
        self.count = itertools.count()  # nobody can set it back

    def __iter__(self):
        for i in self.count:
            yield X[i % N], Y[i % N]


@pytest.mark.parametrize("what", ["training", "test"])
def test_data_that_differ_each_time_are_refused(what):
    "Wherever the draws come from: two readings of the first batch are compared"
    odd = loader(Secret(None))
    task = task_of(odd, loader()) if what == "training" else task_of(loader(), odd)
    with pytest.raises(ValueError, match=f"first {what} batch of 'custom' differs each time"):
        check_task(task, linear())
    if what == "training":
        with pytest.raises(ValueError, match="goes on where it stopped"):
            check_task(task_of(loader(GoesOn()), loader(), steps=2), linear())


def test_samples_of_streamed_data_do_not_depend_on_workers_or_on_the_past():
    def read(workers, warm):
        data = images.Streamed(
            Noisy(np.random.default_rng()), Noisy(random.Random()), workers=workers
        )
        for _ in range(warm):
            list(data.batches(0, 0, 4))
        return [hash_values(o) for o in (*data.batches(1, 1, 4), *data.test(4))]

    assert read(0, 0) == read(2, 0) == read(0, 2)


def test_an_augmentation_of_resident_data_may_hold_a_generator():
    def batches(warm):
        rng = np.random.default_rng()
        data = Resident(X, Y, X, Y, augment=lambda x, draws: x + rng.random())
        for _ in range(warm):
            list(data.batches(0, 0, 4))
        return [hash_values(o) for o in data.batches(1, 1, 4)]

    assert batches(0) == batches(3)


def test_generators_are_found_wherever_they_are_kept():
    class Slotted:
        __slots__ = ("rng",)

        def __init__(self):
            self.rng = random.Random()

    method = Noisy(np.random.RandomState()).__getitem__
    found = own_generators(
        slots=Slotted(),
        method=method,
        partial=functools.partial(F.mse_loss, {"deep": [torch.Generator()]}),
        nothing=[torch.default_generator, np.random.mtrand._rand, random._inst],
    )
    kinds = {k.split(".")[0] for k in found}
    assert kinds == {"slots", "method", "partial"}


# ---------------------------------------------------------------- identity

SCRIPT = """
import functools, torch, numpy as np
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, Dataset
from rg_tickets.tasks.core import Task

class Own(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.names = names
        self.f = functools.partial(np.clip, a_min=0)

    def forward(self, output, target):
        return ((output - target) ** 2).mean() if 'mean' in {'sum', 'mean', 'none'} else 0

class Rows(Dataset):
    transform = staticmethod(lambda x: x + torch.rand(()))

    def __len__(self):
        return 300

    def __getitem__(self, i):
        return self.transform(torch.full((2,), float(i))), torch.full((2,), float(i))

rows = Rows()
collate = lambda b: torch.utils.data.default_collate(b)
loaders = DataLoader(rows, 4, shuffle=True), DataLoader(rows, 4, collate_fn=collate)
task = Task.from_loaders(*loaders, loss=Own({'a', 'b', 'c'}), metrics={'m': lambda o, y: 0.0})
import json
print(json.dumps(task.fingerprint(), sort_keys=True))
"""


def test_a_fingerprint_is_the_same_in_every_process():
    told = set()
    for number in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": number}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1 and "0x" not in told.pop()


def relabelled(i):
    y = Y.clone()
    y[i] = (y[i] + 1) % C
    return y


class Listed(Dataset):
    "A map-style set whose labels are an attribute"

    def __init__(self, y, noise=None):
        self.targets, self.transform = y.tolist(), noise

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        x = X[i % N]
        return x if self.transform is None else self.transform(x), self.targets[i]


def _first_loss(o, y):
    return F.cross_entropy(o, y)


def _second_loss(o, y):
    return F.cross_entropy(o, y) * 2


_second_loss.__qualname__ = _second_loss.__name__ = "_first_loss"

CHANGES = {
    "class weights": [dict(loss=nn.CrossEntropyLoss(weight=w)) for w in (W, W + 1)],
    "smoothing": [dict(loss=nn.CrossEntropyLoss(label_smoothing=s)) for s in (0.0, 0.1)],
    "a partial": [dict(loss=functools.partial(F.cross_entropy, ignore_index=i)) for i in (0, 1)],
    "the code of a loss": [dict(loss=_first_loss), dict(loss=_second_loss)],
    "what a loss closes over": [dict(loss=lambda o, y, k=k: k * o.sum()) for k in (1, 2)],
    "a metric": [dict(metrics={"a": Accuracy(ignore_index=i)}) for i in (-100, 0)],
    "an objective": [dict(objective=f) for f in (lambda n, b: 0, lambda n, b: 1)],
    "a judge": [dict(judge=functools.partial(dict, loss=i), metrics={"m": None}) for i in (1, 2)],
    "the last label": [dict(train=loader(TensorDataset(X, y))) for y in (Y, relabelled(N - 1))],
    "a listed label": [
        dict(train=loader(Listed(y))) for y in (Y.repeat(99), relabelled(5).repeat(99))
    ],
    "a subset": [dict(train=loader(Subset(DATA, o))) for o in (range(6), range(6, N))],
    "a sample": [
        dict(train=loader(TensorDataset(x, Y)))
        for x in (X, X.clone().index_fill(0, torch.tensor([7]), 0))
    ],
    "the test set": [dict(test=loader(TensorDataset(X, y))) for y in (Y, relabelled(3))],
    "the order": [dict(train=loader(shuffle=o)) for o in (True, False)],
    "weights of samples": [
        dict(train=loader(sampler=WeightedRandomSampler(torch.arange(N) + o, N))) for o in (1, 2)
    ],
    "the batch size": [dict(train=loader(n=o)) for o in (4, 6)],
    "what puts samples together": [
        dict(train=loader(collate_fn=collating(f)))
        for f in (lambda x, y: (x, y), lambda x, y: (-x, y))
    ],
    "a stream": [dict(train=loader(Endless()), steps=k) for k in (2, 3)],
}


@pytest.mark.parametrize("what", CHANGES, ids=lambda k: k.replace(" ", "_"))
def test_a_fingerprint_tells_what_changed(what):
    told = []
    for change in CHANGES[what]:
        made = [dict(train=loader(), test=loader()) | change for _ in range(2)]
        one, two = (json.dumps(Task.from_loaders(**o).fingerprint()) for o in made)
        assert one == two
        told.append(one)
    assert told[0] != told[1]


def test_a_fingerprint_does_not_change_while_a_task_is_used():
    transform = lambda x: x + torch.rand(())
    rows = loader(Listed(Y, transform), shuffle=True, num_workers=1)
    weights = nn.CrossEntropyLoss(weight=W)
    task = task_of(rows, loss=weights, metrics={"a": Counting(), "b": accuracy})
    before = task.fingerprint()
    check_task(task, linear())
    bits(task, 3, 1)
    evaluate(task, linear())
    assert task.fingerprint() == before


def test_resident_data_are_hashed_whole_whatever_about_says():
    about = dict(fingerprint="of long ago")
    told = [Task("t", Resident(X, y, X, Y), about=about).fingerprint() for y in (Y, relabelled(11))]
    assert told[0]["data"]["y"] != told[1]["data"]["y"] and told[0]["about"] == about


def test_a_data_set_with_keys_of_its_own_is_told_by_its_batches():
    class Keyed(Dataset):
        def __init__(self, y):
            self.y = y

        def __len__(self):
            return N

        def __getitem__(self, key):
            if not isinstance(key, tuple):
                raise KeyError(key)
            return X[key[0]], self.y[key[0]]

    def task(y):
        return task_of(DataLoader(Keyed(y), 4, sampler=[(i, 0) for i in range(N)]), loader())

    check_task(task(Y), linear())
    assert task(Y).fingerprint() == task(Y).fingerprint() != task(relabelled(9)).fingerprint()


def test_descriptions_hold_no_addresses():
    class Callable:
        def __init__(self):
            self.me, self.f = self, lambda x: x

        def __call__(self, o, y):
            return o

    things = [
        Callable(),
        Callable().__call__,
        functools.partial(Callable(), 1),
        nn.Sequential(linear()),
    ]
    things += [
        {"a": Callable},
        object(),
        torch.Generator(),
        np.random.default_rng(),
        torch.add,
        np.add,
    ]
    for o in things:
        assert "0x" not in describe(o) and describe(o) == describe(o)
    one, two = describe(Callable()), describe(Callable())
    assert one == two


def test_wrapped_losses_are_told_by_what_they_wrap_and_packages_only_by_name():
    @functools.lru_cache
    def one(o, y):
        return o

    @functools.lru_cache
    def two(o, y):
        return y

    assert describe(one) != describe(two)
    assert describe(torch.compile(_first_loss, backend="eager")) == describe(_first_loss)
    assert describe(F.cross_entropy) == "torch.nn.functional.cross_entropy"
    torchvision = pytest.importorskip("torchvision")
    crop = torchvision.transforms.RandomCrop(8)
    assert "#" not in describe(crop) and "size=tuple[8, 8]" in describe(crop)
    assert "#" in describe(Plain())


class Plain:
    def __call__(self, o, y):
        return o


def test_a_collator_with_a_tokenizer_is_told_the_same_after_it_was_used():
    from rg_tickets.tasks.pieces import tokenizer

    transformers = pytest.importorskip("transformers")
    tok = tokenizer("auto")
    collator = transformers.DataCollatorWithPadding(tok)
    before = describe(collator)
    collator([tok("one"), tok("one two three")])
    assert describe(collator) == before


def test_unchanged_gives_back_what_outer_variables_were():
    count, seen = 0, {"a": 1}

    def f():
        nonlocal count
        count += 1
        seen["b"] = 2
        seen.pop("a", None)

    with unchanged(f):
        f()
    assert count == 0 and seen == {"a": 1}


# ---------------------------------------------------------------- networks with a loss of their own


def hf(name, config, **options):
    transformers = pytest.importorskip("transformers")
    small = dict(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with seeded(0, "hf"):
        return getattr(transformers, name)(getattr(transformers, config)(**small | options)).eval()


BERT = dict(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=32,
)


def sentence(i):
    "Token ids of sample i: 3 to 9 of them"
    n = 3 + i % 7
    return torch.randint(3, 40, (n,), generator=generator(i, "sentence"))


def encoded(labels, length=0):
    "A loader of BatchEncodings, padded per batch, with `labels(ids, mask, i)`"

    def collate(numbers):
        ids = nn.utils.rnn.pad_sequence([sentence(i) for i in numbers], batch_first=True)
        ids = F.pad(ids, (0, max(0, length - ids.shape[1])))
        mask = (ids > 0).long()
        return _encoding(input_ids=ids, attention_mask=mask) | labels(
            ids, mask, torch.tensor(numbers)
        )

    def whole():
        return collate(list(range(10)))

    return [DataLoader(list(range(10)), n, collate_fn=collate) for n in (3, 4)], whole


def tokens(ids, mask, i):
    return dict(labels=torch.where(mask == 1, ids % 5, -100))


def kept_ids(ids, mask, i):
    return dict(labels=ids.masked_fill(mask == 0, -100))


def some_ids(ids, mask, i):
    return dict(labels=torch.where(ids % 3 == 1, ids, -100))


GPT2 = dict(n_positions=32, n_embd=8, n_layer=1, n_head=2)
T5 = dict(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
CLASSIFIER = "BertForSequenceClassification"
MODELS = {
    "classes": (
        CLASSIFIER,
        "BertConfig",
        BERT | dict(num_labels=3),
        lambda *o: dict(labels=o[2] % 3),
    ),
    "value": (
        CLASSIFIER,
        "BertConfig",
        BERT | dict(num_labels=1),
        lambda *o: dict(labels=o[2] / 3),
    ),
    "tokens": ("BertForTokenClassification", "BertConfig", BERT | dict(num_labels=5), tokens),
    "masked": ("BertForMaskedLM", "BertConfig", BERT, some_ids),
    "causal": ("GPT2LMHeadModel", "GPT2Config", GPT2, kept_ids),
    "sequences": ("T5ForConditionalGeneration", "T5Config", T5, kept_ids),
    "spans": (
        "BertForQuestionAnswering",
        "BertConfig",
        BERT,
        lambda *o: dict(start_positions=o[2] % 3, end_positions=o[2] % 3),
    ),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_network_with_its_own_loss_needs_no_adapter(what):
    "The streamed loss is the network's for the whole set; the metric is what its user expects"
    name, config, options, labels = MODELS[what]
    pad = 9 if what == "spans" else 0  # where the length of a batch changes the loss
    net, ((train, test), whole) = hf(name, config, **options), encoded(labels, pad)
    task = Task.from_loaders(train, test, loss="model")
    assert task.metric == ("accuracy" if what == "classes" else "minus_loss")
    check_task(task, net)
    scores, batch = evaluate(task, net), whole()
    with torch.no_grad():
        output = net(**batch)
    assert scores["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    wanted = (
        (output.logits.argmax(1) == batch["labels"]).float().mean().item()
        if what == "classes"
        else -scores["loss"]
    )
    assert scores[task.metric] == pytest.approx(wanted)
    loss = task(net.train(), next(task.data.batches(0, 0)))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_accuracy_of_tokens_ignores_padding_and_looks_ahead_in_causal_models():
    for what in ("tokens", "causal"):
        name, config, options, labels = MODELS[what]
        net, ((train, test), whole) = hf(name, config, **options), encoded(labels)
        task = Task.from_loaders(train, test, loss="model", metrics={"accuracy": accuracy})
        check_task(task, net)
        batch = whole()
        with torch.no_grad():
            logits, y = net(**batch).logits, batch["labels"]
        if what == "causal":
            logits, y = logits[:, :-1], y[:, 1:]
        right = (logits.argmax(-1) == y)[y != -100].double().mean().item()
        assert evaluate(task, net)["accuracy"] == pytest.approx(right)


def test_a_loss_of_ones_own_is_given_the_logits_of_a_model_output():
    name, config, options, labels = MODELS["classes"]
    net, ((train, test), whole) = hf(name, config, **options), encoded(labels)
    own, models = (Task.from_loaders(train, test, loss=o) for o in (F.cross_entropy, "model"))
    check_task(own, net)
    assert evaluate(own, net) == pytest.approx(evaluate(models, net), rel=1e-5)


def test_networks_that_return_their_loss_in_other_ways():
    class Both(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.layer, self.form = linear(), form

        def forward(self, x, y):
            logits = self.layer(x)
            return self.form(F.cross_entropy(logits, y), logits)

    Output = namedtuple("Output", "loss logits")
    forms = [
        lambda l, o: (o, l),
        lambda l, o: (l, o),
        lambda l, o: l,
        lambda l, o: {"loss": l},
        Output,
    ]
    wanted = evaluate(task_of(loader()), linear())["loss"]
    for form in forms:
        task = task_of(loader(), loss="model", metrics={"m": Silent()})
        check_task(task, Both(form))
        assert evaluate(task, Both(form))["loss"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="no one number called loss"):
        check_task(task_of(loader(), loss="model", metrics={"m": Silent()}), Both(lambda l, o: o))


class Silent:
    def update(self, output, target):
        pass

    def compute(self):
        return 0.0


def test_prediction_takes_logits_where_an_output_names_them():
    Aux = namedtuple("Aux", "logits aux_logits")
    assert prediction(Aux(X, Y)) is X and prediction({"logits": X}) is X
    assert prediction({"out": X})["out"] is X and prediction((X, Y)) == (X, Y)
    categorical = torch.distributions.Categorical(logits=X)
    assert prediction(categorical) is categorical
    assert own_loss(torch.tensor(2.0)) == 2 and describe_batch(X) == "Tensor [12, 4] float32"


def test_images_and_outputs_with_logits_of_inception_are_scored():
    Output = namedtuple("Output", "logits aux_logits")

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x):
            return Output(self.layer(x), self.layer(x)) if self.training else self.layer(x)

    check_task(task_of(loader()), TwoHeads())


def test_a_metric_with_two_outputs_is_given_both():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear(D, 1)

        def forward(self, x):
            return {"class": self.a(x), "size": self.b(x)}

    rows = loader(collate_fn=collating(lambda x, y: (x, {"class": y, "size": x[:, :1]})))
    loss = lambda o, y: F.cross_entropy(o["class"], y["class"]) + F.mse_loss(o["size"], y["size"])
    metrics = {"accuracy": lambda o, y: accuracy(o["class"], y["class"])}
    task, net = task_of(rows, loss=loss, metrics=metrics), Heads()
    check_task(task, net)
    assert evaluate(task, net)["accuracy"] == accuracy(net.a(X), Y)
    whole = loss(net(X), {"class": Y, "size": X[:, :1]}).item()
    assert evaluate(task, net)["loss"] == pytest.approx(whole, rel=1e-5)


def test_counters_are_fresh_even_if_they_were_used():
    class Resetting(Counting):
        def reset(self):
            self.total, self.n = 0.0, 0

    used = Resetting()
    used.update(drawn(3, C), Y[:3])
    assert start_metric("m", used).n == 0 and used.n == 3
