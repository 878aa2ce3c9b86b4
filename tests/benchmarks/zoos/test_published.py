"""Loaders of published zoos, on files of their layout."""

import csv
import gzip

import numpy as np
import pytest
import safetensors.torch
import torch

from fleetgym.benchmarks.zoos import inr_zoo, small_cnn_zoo
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator
from fleetgym.envs.fields.siren import Siren

LAYOUT = [  # as Keras orders them: bias before kernel
    ("sequential/conv2d/bias:0", (4,)),
    ("sequential/conv2d/kernel:0", (3, 3, 1, 4)),
    ("sequential/conv2d_1/bias:0", (5,)),
    ("sequential/conv2d_1/kernel:0", (3, 3, 4, 5)),
    ("sequential/dense/bias:0", (10,)),
    ("sequential/dense/kernel:0", (5, 10)),
]


def write_cnn_zoo(folder, runs=12, epochs=(0, 86), columns=(), layout=LAYOUT, rows=None):
    """A data set of the Small CNN Zoo with smaller networks."""
    folder.mkdir(exist_ok=True)
    sizes = [int(np.prod(shape)) for _, shape in layout]
    rng = generator("test_published")
    table = rng.normal(size=(runs * len(epochs), sum(sizes))).astype(np.float32)
    np.save(folder / "weights.npy", table[:rows])
    with open(folder / "layout.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "varname", "start_idx", "end_idx", "size", "shape"])
        start = 0
        for k, ((name, shape), size) in enumerate(zip(layout, sizes)):
            writer.writerow([k, name, start, start + size, size, str(shape)])
            start += size
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
        names = ["config.activation", "config.dataset", "config.learning_rate", "config.init_std", "step"]
        names += ["test_accuracy", "test_loss", "train_accuracy", "train_loss"]
        writer = csv.writer(file)
        writer.writerow(["", *(name for name in names if name not in columns)])
        for k in range(len(table)):
            row = dict(
                zip(names, ["relu" if k // len(epochs) % 2 else "tanh", "mnist", 0.01, "", epochs[k % len(epochs)]])
            )
            row |= {"test_accuracy": k / 100, "test_loss": 1, "train_accuracy": 0.5, "train_loss": 2}
            writer.writerow([k, *(row[name] for name in names if name not in columns)])
    return table


def keras(row, images):
    """The network of a row as Keras runs it, in plain loops: [B, h, w] -> [B, 10]."""
    parts, start = {}, 0
    for name, shape in LAYOUT:
        size = int(np.prod(shape))
        parts[name.split("/", 1)[1]] = row[start : start + size].reshape(shape)
        start += size
    x = images[..., None]
    for layer in ("conv2d", "conv2d_1"):
        kernel, bias = parts[f"{layer}/kernel:0"], parts[f"{layer}/bias:0"]
        size = (x.shape[1] - 3) // 2 + 1
        y = np.zeros((len(x), size, size, kernel.shape[-1]))
        for i in range(size):
            for j in range(size):
                window = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                y[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel) + bias
        x = np.maximum(y, 0)
    return x.mean((1, 2)) @ parts["dense/kernel:0"] + parts["dense/bias:0"]


def test_the_small_cnn_zoo(tmp_path):
    table = write_cnn_zoo(tmp_path)
    zoo = small_cnn_zoo(tmp_path)
    rows = [k for k in range(24) if k % 2 and k // 2 % 2]  # relu, at epoch 86
    assert zoo.targets["test_accuracy"].tolist() == pytest.approx([k / 100 for k in rows])
    assert zoo.network["channels"] == [4, 5] and zoo.network["size"] == [28, 28] and zoo.name == "small_cnn_zoo/mnist"
    assert torch.isnan(zoo.targets["init_std"]).all() and zoo.targets["learning_rate"][0] == pytest.approx(0.01)
    images = generator("test_images").random((2, 28, 28)).astype(np.float32)
    for n in (0, 5):
        found = zoo.module(n)(torch.from_numpy(images)[:, None]).detach().numpy()
        assert np.allclose(found, keras(table[rows[n]].astype(np.float64), images), atol=1e-4)
    assert sorted(zoo.spec.groups.values()) == [4, 5]
    assert sorted(torch.cat(list(zoo.splits.values())).tolist()) == list(range(6)) and len(zoo.splits["test"]) == 3


def test_choices_of_the_small_cnn_zoo(tmp_path):
    table = write_cnn_zoo(tmp_path)
    assert len(small_cnn_zoo(tmp_path, activation=None)) == 12
    early = small_cnn_zoo(tmp_path, activation="tanh", epoch=0)
    assert early.network["activation"] == "tanh" and early.targets["test_accuracy"].tolist()[1] == pytest.approx(0.04)
    some = small_cnn_zoo(tmp_path, activation=None, limit=5)
    assert len(some) == 5 and torch.equal(
        some.weights["head.bias"], small_cnn_zoo(tmp_path, activation=None, limit=5).weights["head.bias"]
    )
    table[3, 7] = np.inf  # relu at epoch 86
    np.save(tmp_path / "weights.npy", table)
    assert small_cnn_zoo(tmp_path).info["left_out"] == 1 and len(small_cnn_zoo(tmp_path)) == 5


def test_bad_files_of_the_small_cnn_zoo(tmp_path):
    with pytest.raises(UserError, match=r"lacks weights\.npy, metrics\.csv\.gz, layout\.csv"):
        small_cnn_zoo(tmp_path)
    write_cnn_zoo(tmp_path)
    for change, words in (
        ({"activation": "sigmoid"}, "activation='sigmoid' at epoch=86; it has relu, tanh and the epochs 0, 86"),
        ({"activation": "elu"}, "'elu'"),
        ({"epoch": 50}, "epoch=50"),
        ({"limit": 0}, "limit=0"),
    ):
        with pytest.raises(UserError, match=words):
            small_cnn_zoo(tmp_path, **change)
    for change, words in (
        ({"columns": ("step",)}, r"metrics\.csv\.gz lacks the columns step"),
        ({"rows": 20}, "24 rows, weights.npy has 20"),
        ({"layout": LAYOUT[1:]}, "conv2d.*does not fit"),
        ({"layout": [*LAYOUT[:4], ("dense/gamma:0", (2,)), *LAYOUT[4:]]}, "'dense/gamma:0' is neither"),
    ):
        write_cnn_zoo(tmp_path, **change)
        with pytest.raises(UserError, match=words):
            small_cnn_zoo(tmp_path)
    write_cnn_zoo(tmp_path)
    (tmp_path / "weights.npy").write_bytes(b"\x80\x04.")  # the beginning of a pickle
    with pytest.raises(UserError, match=r"weights\.npy is not a plain NumPy array"):
        small_cnn_zoo(tmp_path)


def inrs(number=6):
    modules = [Siren(2, (5, 4), 1) for _ in range(number)]
    return modules, {
        f"seq.{i}.{kind}": torch.stack([getattr(m.layers[i], kind).detach() for m in modules])
        for i in range(3)
        for kind in ("weight", "bias")
    }


def test_sets_of_sirens(tmp_path):
    modules, tensors = inrs()
    tensors["labels"] = torch.arange(6)
    tensors["image"] = torch.tensor([0, 0, 1, 1, 2, 2])
    safetensors.torch.save_file(tensors, tmp_path / "set.safetensors")
    zoo = inr_zoo(tmp_path / "set.safetensors")
    x = torch.rand(7, 2)
    assert zoo.network == {"inputs": 2, "hidden": [5, 4], "outputs": 1, "omega": 30.0} and zoo.name == "set"
    assert torch.allclose(zoo.module(4)(x), modules[4](x), atol=1e-6)
    assert zoo.targets["label"].tolist() == list(range(6)) and all(len(rows) == 2 for rows in zoo.splits.values())
    # NFN's names, NumPy's format, a split of its own, and an output that is shifted outside of the weights.
    renamed = {key.replace("seq", "net").replace(".weight", ".linear.weight"): value for key, value in tensors.items()}
    renamed = {key.replace("0.bias", "0.linear.bias"): value for key, value in renamed.items() if key != "image"}
    renamed["split"] = torch.tensor([0, 0, 0, 1, 2, 2])
    np.savez(tmp_path / "set.npz", **{key: value.numpy() for key, value in renamed.items()})
    zoo = inr_zoo(tmp_path / "set.npz", output_shift=0.5)
    assert torch.allclose(zoo.module(4)(x), modules[4](x) + 0.5, atol=1e-6)
    assert [rows.tolist() for rows in zoo.splits.values()] == [[0, 1, 2], [3], [4, 5]]


def test_pickles_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "model_final.pth").write_bytes(b"\x80\x04.")
    for path in (tmp_path / "model_final.pth", tmp_path):
        with pytest.raises(UserError, match="weights_only=True.*save_file"):
            inr_zoo(path)
    np.savez(tmp_path / "set.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="set.npz does not read as plain"):
        inr_zoo(tmp_path / "set.npz")


def test_bad_sets_of_sirens(tmp_path):
    _, tensors = inrs()
    tensors["labels"] = torch.arange(6)
    file = tmp_path / "set.safetensors"
    for change, words in (
        ({"labels": None}, "'labels' is missing"),
        ({"labels": torch.arange(5)}, r"'labels' has shape \[5\]"),
        ({"seq.1.bias": None}, r"a \.weight and a \.bias"),
        ({"seq.1.weight": torch.zeros(6, 4, 6)}, "layer 1 .*in=5"),
        ({"split": torch.tensor([0, 0, 0, 1, 1, 2]), "image": torch.tensor([0, 1, 2, 2, 3, 4])}, "one group"),
    ):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        safetensors.torch.save_file(changed, file)
        with pytest.raises(UserError, match=words):
            inr_zoo(file)
    with pytest.raises(UserError, match="safetensors or .npz"):
        inr_zoo(tmp_path / "set.h5")
