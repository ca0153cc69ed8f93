"Pascal VOC from a tiny folder: a backbone's ticket in a detector and in a segmenter, through the map"

import json
import numpy as np
import pytest
import torch
from PIL import Image
from rg_tickets.imp import imp
from rg_tickets.models.prunable import prunable
from rg_tickets.models.resnets import resnet
from rg_tickets.tasks.core import check_task, evaluate
from rg_tickets.tasks.images import image_task
from rg_tickets.tasks.voc import (
    CLASSES,
    VOC,
    boxes,
    detector,
    mean_average_precision,
    moved,
    segmenter,
    voc_task,
)
from rg_tickets.tickets import Ticket, TicketError, apply
from rg_tickets.train import Recipe, refine

LIGHT = dict(
    rpn_pre_nms_top_n_train=100,
    rpn_pre_nms_top_n_test=50,
    rpn_post_nms_top_n_train=20,
    rpn_post_nms_top_n_test=10,
    box_batch_size_per_image=8,
)
OPTIONS = {"voc_detection": LIGHT, "voc_segmentation": {}}
XML = "<annotation><size><width>40</width><height>30</height></size>{}</annotation>"
THING = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
both = pytest.mark.parametrize("name", VOC)


@pytest.fixture
def root(tmp_path):
    "Six training and four validation pictures of 40 by 30; the last of each part is empty"
    base, rng = tmp_path / "VOCdevkit/VOC2012", np.random.RandomState(0)
    for o in (
        "JPEGImages",
        "Annotations",
        "SegmentationClass",
        "ImageSets/Main",
        "ImageSets/Segmentation",
    ):
        (base / o).mkdir(parents=True)
    for part, n in (("train", 6), ("val", 4)):
        for i in range(n):
            Image.fromarray(rng.randint(0, 256, (30, 40, 3)).astype(np.uint8)).save(
                base / f"JPEGImages/{part}{i}.jpg"
            )
            mask = np.zeros((30, 40), np.uint8)
            mask[5:20, 10:30] = i + 1
            mask[4, 9:31] = 255
            Image.fromarray(mask).save(base / f"SegmentationClass/{part}{i}.png")
            (base / f"Annotations/{part}{i}.xml").write_text(
                XML.format(
                    ""
                    if i == n - 1
                    else THING.format(CLASSES[i], 0, 11, 6, 30, 20)
                    + THING.format("cat", 1, 1, 1, 40, 30)
                )
            )
        for o in ("Main", "Segmentation"):
            (base / f"ImageSets/{o}/{part}.txt").write_text(
                "\n".join(f"{part}{i}" for i in range(n))
            )
    return tmp_path


def make(name, root, size=32, **kwargs):
    return voc_task(name, size=size, root=root, **(dict(width=8) | OPTIONS[name] | kwargs))


@both
def test_detection_and_segmentation_are_tried_before_training_without_a_trace(name, root):
    task = make(name, root)
    net = task.network(resnet("cifar_resnet8", width=4))
    before = {k: t.clone() for k, t in net.state_dict().items()}
    modes, rng = [m.training for m in net.modules()], torch.get_rng_state()
    check_task(task, net, batch_size=2)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes and torch.equal(rng, torch.get_rng_state())
    told = task.fingerprint()
    assert json.loads(json.dumps(told)) == told == make(name, root).fingerprint()


def test_boxes_are_read_to_the_pixel(root):
    found = boxes(root / "VOCdevkit/VOC2012/Annotations/train0.xml") * torch.tensor(
        [1, 1, 40, 30, 40, 30]
    )
    assert torch.allclose(
        found, torch.tensor([[1.0, 0, 10, 5, 30, 20], [8, 1, 0, 0, 40, 30]])
    )  # classes aeroplane and cat; 1-based corners, the last one included


def test_map_against_a_slow_reference():
    "Every detection compared with every thing, in Python, on random boxes that often overlap"
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.rand(*s, generator=g)

    def some(n, score):
        corner, extent = 4 * rand(n, 2), 1 + 6 * rand(n, 2)
        return torch.cat(
            [torch.randint(1, 4, (n, 1), generator=g), score(n)[:, None], corner, corner + extent],
            1,
        )

    for _ in range(10):
        truths = [some(4, lambda n: (rand(n) < 0.2).float()) for _ in range(6)]
        found = [some(7, rand) for _ in range(6)]
        assert mean_average_precision(found, truths) == pytest.approx(slow(found, truths))


def slow(found, truths):
    "Average precision of each class, as the VOC development kit does it: all pictures together, best score first"

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        return (
            0
            if w <= 0 or h <= 0
            else w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)
        )

    table = {}
    for c in (1, 2, 3):
        things = [[(t[2:].tolist(), t[1] > 0) for t in picture if t[0] == c] for picture in truths]
        total = sum(not hard for o in things for _, hard in o)
        ranked = sorted(
            (
                (d[1].item(), n, d[2:].tolist())
                for n, picture in enumerate(found)
                for d in picture
                if d[0] == c
            ),
            key=lambda o: -o[0],
        )
        used, flags = set(), []
        for _, n, box in ranked:
            best = max(range(len(things[n])), key=lambda j: iou(box, things[n][j][0]), default=None)
            if best is None or iou(box, things[n][best][0]) < 0.5:
                flags.append(False)
            elif not things[n][best][1]:
                flags.append((n, best) not in used)
                used.add((n, best))
        if not total:
            continue
        precision = [sum(flags[: k + 1]) / (k + 1) for k in range(len(flags))]
        table[c] = sum(max(precision[k:]) for k in range(len(flags)) if flags[k]) / total
    return table


@both
def test_repeats_and_workers(name, root):
    task, other = make(name, root), make(name, root, workers=1)
    for (x, y), (u, v) in zip(task.data.batches(1, 0, 3), other.data.batches(1, 0, 3), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert json.loads(json.dumps(task.about)) == task.about and VOC[name].bytes == 1999639040
    nets = [task.network(resnet("cifar_resnet8", width=4)) for _ in range(2)]
    for net in nets:
        refine(task, net, Recipe(2, 3, lr=0.01), 0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values())
    )
    assert evaluate(task, nets[0]) == evaluate(other, nets[1])


@both
def test_a_ticket_of_the_backbone(name, root, tmp_path):
    "Found by naming digits, moved into the other network, followed there; the same as pruned by hand"
    folder, recipe = tmp_path / "source", Recipe(1, 32, lr=0.05)
    digits = image_task("digits8", n_train=64, n_test=20)
    digits.data.x, digits.data.x_test = (
        o.repeat(1, 3, 1, 1) for o in (digits.data.x, digits.data.x_test)
    )
    list(
        imp(digits, resnet("cifar_resnet8", width=4), 2, recipe=recipe, device="cpu", folder=folder)
    )
    ticket, task = Ticket.load(folder / "ticket.safetensors"), make(name, root)
    net = task.network(resnet("cifar_resnet8", width=4, seed=1))
    there = moved(ticket, net)
    apply(there, net, n=2, head=False)
    for k, w in prunable(net).items():
        plain = k.removeprefix(net.backbone_name + ".")
        assert torch.equal(w, ticket.weights[plain] * ticket.history.mask(2)[plain])
    rounds = list(
        imp(
            task,
            net,
            2,
            control="given",
            ticket=there,
            preset=list(there.history.died),
            recipe=Recipe(1, 3, lr=0.01),
            device="cpu",
            folder=tmp_path / "target",
        )
    )
    assert [r.density for r in rounds] == [
        ticket.history.density(n) for n in range(3)
    ] and task.metric in rounds[0].metrics
    dead = {k: ~m for k, m in there.history.mask(2).items()}
    assert (
        all((w[dead[k]] == 0).all() for k, w in prunable(net).items())
        and sum(d.sum() for d in dead.values()) > 0
    )
    there.save(tmp_path / "moved.safetensors")
    assert set(Ticket.load(tmp_path / "moved.safetensors").weights) == set(there.weights)


def test_a_ticket_of_another_backbone(root):
    net = make("voc_detection", root).network(resnet("cifar_resnet8", width=4))
    thin = resnet("cifar_resnet8", width=8)
    from rg_tickets.masks import MaskHistory

    wide = Ticket(thin.state_dict(), MaskHistory.dense(prunable(thin)), about=dict(model="wide"))
    with pytest.raises(TicketError, match="the shapes differ"):
        apply(moved(wide, net), net, head=False)
    deep = resnet("cifar_resnet14", width=4)
    with pytest.raises(ValueError, match="does not fit faster_rcnn"):
        moved(Ticket(deep.state_dict(), MaskHistory.dense(prunable(deep))), net)


@both
def test_imp_itself_on_the_task(name, root, tmp_path):
    "Pruning on the task: the head stays whole, a run taken up equals a run in one go"
    go = lambda rounds, folder: list(
        imp(
            make(name, root),
            make(name, root).network(resnet("cifar_resnet8", width=4)),
            rounds,
            recipe=Recipe(1, 3, lr=0.01),
            device="cpu",
            folder=folder,
        )
    )
    whole = go(2, tmp_path / "a")
    assert go(2, tmp_path / "a") == whole and whole[2].density == pytest.approx(0.64, abs=1e-3)
    assert all(
        t["tensor"].startswith("backbone.") and ".fpn." not in t["tensor"] for t in whole[0].tensors
    )


@both
def test_torchvisions_own_backbone(name, root):
    "A ResNet-18 of ImageNet's shape takes a step, and bf16 changes nothing but the last digits"
    task = make(name, root, size=64)
    net = task.network(resnet("resnet18"))
    refine(task, net, Recipe(1, 3, lr=1e-3, precision="bf16"), 0)
    assert all(t.isfinite().all() for t in net.state_dict().values())
    a, b = evaluate(task, net)["loss"], evaluate(task, net, "bf16")["loss"]
    assert np.isfinite(a) and b == pytest.approx(a, rel=0.05)


def _break(root, how):
    base = root / "VOCdevkit/VOC2012"
    path = base / "Annotations/val1.xml"
    if how == "class":
        path.write_text(path.read_text().replace("bicycle", "unicycle"))
    if how == "lost":
        path.unlink()
    if how == "picture":
        (base / "JPEGImages/val1.jpg").unlink()
    if how == "folder":
        base.rename(root / "elsewhere")
    if how == "xml":
        path.write_text(path.read_text()[:50])


@pytest.mark.parametrize(
    "how, error, words",
    [
        ("class", ValueError, r"unknown class in .*val1\.xml: 'unicycle'; did you mean 'bicycle'"),
        (
            "lost",
            FileNotFoundError,
            r"1 of 4 annotations of 2012/val are missing.*val1\.xml, for val1\.jpg",
        ),
        ("picture", FileNotFoundError, r"1 of 4 pictures of 2012/val are missing.*val1\.jpg"),
        ("xml", ValueError, r"val1\.xml is no annotation of Pascal VOC"),
        (
            "folder",
            FileNotFoundError,
            r"there is no .*VOC2012.*holds VOCdevkit.*VOCtrainval_11-May-2012\.tar: voc_task\('voc_detection', root=.*download=True\)",
        ),
    ],
)
def test_bad_data(how, error, words, root):
    _break(root, how)
    with pytest.raises(error, match=words):
        make("voc_detection", root)


def test_corrupt_files(root):
    base = root / "VOCdevkit/VOC2012"
    (base / "JPEGImages/train1.jpg").write_bytes(b"no picture")
    (base / "SegmentationClass/val0.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"train1\.jpg cannot be read as a picture"):
        list(make("voc_detection", root).data.batches(0, 0, 6))
    with pytest.raises(OSError, match=r"val0\.png cannot be read as a picture"):
        list(make("voc_segmentation", root).data.test())


def test_failed_download_says_what_to_do(tmp_path):
    with pytest.raises(
        OSError,
        match=r"could not be downloaded.*Without network, unpack VOCtrainval_11-May-2012\.tar",
    ):
        voc_task("voc_detection", root=tmp_path, download=True)


def test_options_of_the_other_task(root):
    with pytest.raises(ValueError, match="voc_segmentation takes no box_nms_thresh"):
        voc_task("voc_segmentation", root=root, box_nms_thresh=0.4)
    for build in (lambda o: detector(o, 32), segmenter):
        with pytest.raises(ValueError, match="is no ResNet"):
            build(torch.nn.Linear(3, 3))
