"""Zoos that others published, read from the user's files. Nothing is downloaded and nothing is unpickled."""

from __future__ import annotations

import ast
import csv
import gzip
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetgym.benchmarks.zoos.networks import ACTIVATIONS, SmallCNN
from fleetgym.benchmarks.zoos.zoo import SPLITS, Zoo, split_groups
from fleetgym.core.checkpoint import load_tensors
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.seeding import generator
from fleetgym.envs.fields.siren import Siren

_METRICS = ("test_accuracy", "train_accuracy", "test_loss", "train_loss")
_SETTINGS = ("learning_rate", "l2reg", "dropout", "train_fraction", "init_std")
_SIZES = {"mnist": 28, "fashion_mnist": 28, "cifar10": 32, "svhn_cropped": 32}
_PICKLES = (".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".bin", ".tar")


def small_cnn_zoo(
    folder: str | os.PathLike,
    *,
    activation: str | None = "relu",
    epoch: int = 86,
    limit: int | None = None,
    seed: int = 0,
    shares: Sequence[float] = (0.4, 0.1, 0.5),
) -> Zoo:
    """Reads a data set of the Small CNN Zoo (Unterthiner et al. 2020, arXiv 2002.11448; CC BY 4.0).

    The folder of a data set, unpacked from its archive (``cifar10.tar.xz`` and so on), holds

    - ``weights.npy``: float32 [M, 4970], one row a checkpoint;
    - ``metrics.csv.gz``: a row each, with columns ``step`` (the epoch: 0, 1, 2, 3, 20, 40, 60, 80 or 86),
      ``test_accuracy``, ``train_accuracy``, ``test_loss``, ``train_loss`` and ``config.*`` (``config.activation``,
      ``config.dataset``, ``config.learning_rate``, ...);
    - ``layout.csv``: ``varname``, ``start_idx``, ``end_idx``, ``size``, ``shape`` of each variable in a row, named as
      Keras does (``.../kernel:0``, ``.../bias:0``); kernels are [3, 3, in, out] and [in, out] and become torch's.

    Args:
        folder: Of the data set.
        activation: The networks to read; None reads all. A zoo has one architecture, so with None its module is but a
            mould (with ReLU), not the networks' function.
        epoch: Which checkpoint of each network.
        limit: How many networks, drawn at random; None for all.
        seed: Of the draw and the splits.
        shares: Of train, val and test; those of Zhou et al. 2023 (in a shuffled order of their own).

    Returns:
        The zoo; targets are the metrics and the numeric settings (NaN where one is not given). Networks with weights
        that are not finite are left out, and counted in ``info["left_out"]``.

    Raises:
        UserError: A file is missing or has another layout, or no network is left.
    """
    folder = Path(folder)
    files = [folder / name for name in ("weights.npy", "metrics.csv.gz", "layout.csv")]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{folder} lacks {', '.join(absent)}; it must be the unpacked folder of a Small CNN Zoo data set"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    layout = _layout(files[2])
    try:
        table = np.load(files[0], mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{files[0]} is not a plain NumPy array ({error})") from error
    width = max(end for *_, end in layout)
    if table.ndim != 2 or table.shape[1] != width:
        raise UserError(f"{files[0]} has shape {list(table.shape)}; {files[2].name} tells of {width} columns")
    rows, metrics, dataset = _metrics(files[1], len(table), activation, epoch)
    if limit is not None:
        if limit < 1:
            raise UserError(f"limit={limit}: it must be at least 1")
        kept = np.sort(generator("zoo", "small_cnn", seed).permutation(len(rows))[:limit])
        rows, metrics = rows[kept], {key: value[kept] for key, value in metrics.items()}
    values = np.asarray(table[rows], dtype=np.float32)
    finite = np.isfinite(values).all(1)
    values, metrics = values[finite], {key: value[finite] for key, value in metrics.items()}
    if not len(values):
        raise UserError(f"{files[0]}: none of the {len(finite)} networks has finite weights")
    weights, network = _torch_weights(torch.from_numpy(values), layout)
    network["size"] = [_SIZES.get(dataset, 32)] * 2
    network["activation"] = activation or "relu"
    groups = torch.arange(len(values))
    return Zoo(
        name=f"small_cnn_zoo/{dataset}",
        architecture="small_cnn",
        network=SmallCNN(**network).config,
        weights=weights,
        targets={key: torch.from_numpy(value) for key, value in metrics.items()},
        splits=split_groups(groups, shares, seed),
        groups=groups,
        config={"activation": activation, "epoch": epoch, "limit": limit, "seed": seed, "shares": tuple(shares)},
        info={"left_out": int((~finite).sum())},
    )


def _layout(file: Path) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, first column and end of each variable."""
    with open(file, newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    out = []
    for row in table:
        try:
            shape = tuple(int(n) for n in ast.literal_eval(row["shape"]))
            start, end = int(row["start_idx"]), int(row["end_idx"])
            name = row["varname"]
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise UserError(
                f"{file}: row {row} lacks varname, start_idx, end_idx or shape ({type(error).__name__})"
            ) from error
        if int(np.prod(shape)) != end - start:
            raise UserError(f"{file}: {name!r} of shape {shape} does not fill columns {start} to {end}")
        out.append((name, shape, start, end))
    if not out:
        raise UserError(f"{file} holds no variables")
    return out


def _metrics(
    file: Path, number: int, activation: str | None, epoch: int
) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
    """Rows of the wanted checkpoints, their metrics and numeric settings, and the data set's name."""
    rows, found, datasets, epochs, activations = [], [], set(), set(), set()
    try:
        with gzip.open(file, "rt", newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            wanted = ["step", *_METRICS, "config.activation", "config.dataset"]
            if absent := [name for name in wanted if name not in (reader.fieldnames or ())]:
                raise UserError(f"{file} lacks the columns {', '.join(absent)}")
            for k, row in enumerate(reader):
                step = round(float(row["step"]))
                epochs.add(step)
                activations.add(row["config.activation"])
                if step == epoch and (activation is None or row["config.activation"] == activation):
                    rows.append(k)
                    datasets.add(row["config.dataset"])
                    settings = {name: row.get(f"config.{name}") for name in _SETTINGS}
                    found.append([float(row[name]) for name in _METRICS] + [_number(v) for v in settings.values()])
            count = k + 1 if epochs else 0
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} does not read as a gzipped table of numbers ({error})") from error
    if count != number:
        raise UserError(f"{file} has {count} rows, weights.npy has {number}; they are not of one data set")
    if not rows:
        raise UserError(
            f"{file} has no network with activation={activation!r} at epoch={epoch}; "
            f"it has {', '.join(sorted(activations))} and the epochs {', '.join(map(str, sorted(epochs)))}"
        )
    values = np.asarray(found, dtype=np.float32)
    names = (*_METRICS, *_SETTINGS)
    return np.asarray(rows), {name: values[:, i].copy() for i, name in enumerate(names)}, "+".join(sorted(datasets))


def _number(text: str | None) -> float:
    try:
        return float(text) if text else float("nan")
    except ValueError:
        return float("nan")


def _torch_weights(
    values: Tensor, layout: Sequence[tuple[str, tuple[int, ...], int, int]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Keras's flat weights [N, P] as a stacked state dict of :class:`SmallCNN`, and its keyword arguments."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, shape, start, end in layout:
        layer, _, kind = name.rpartition("/")
        kind = kind.partition(":")[0]
        if kind not in ("kernel", "bias"):
            raise UserError(f"layout.csv: variable {name!r} is neither a kernel nor a bias")
        layers.setdefault(layer, {})[kind] = values[:, start:end].unflatten(1, shape)
    weights, channels, inputs = {}, [], 0
    for k, (layer, parts) in enumerate(layers.items()):
        last = k == len(layers) - 1
        kernel, bias = parts.get("kernel"), parts.get("bias")
        if kernel is None or bias is None or kernel.dim() != (3 if last else 5):
            raise UserError(f"layout.csv: layer {layer!r} does not fit convolutions with bias and one dense layer")
        name = "head" if last else f"convs.{k}"
        order = (0, 2, 1) if last else (0, 4, 3, 1, 2)
        weights[f"{name}.weight"] = kernel.permute(order).contiguous()
        weights[f"{name}.bias"] = bias.contiguous()
        if not last:
            channels.append(bias.shape[1])
            inputs = inputs or kernel.shape[3]
    return weights, {
        "inputs": inputs,
        "channels": channels,
        "outputs": weights["head.bias"].shape[1],
        "stride": 2,
        "padding": 0,
    }


def inr_zoo(
    file: str | os.PathLike,
    *,
    omega: float = 30.0,
    output_shift: float = 0.0,
    name: str = "",
    seed: int = 0,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
) -> Zoo:
    """Reads a set of SIRENs of labelled images, such as those that DWSNets and NFN were trained on.

    These sets are published as a pickle for each network. Convert them once into one file, in an environment that you
    trust them in, with torch's restricted loader::

        states = [torch.load(path, weights_only=True, map_location="cpu") for path in paths]
        tensors = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        tensors["labels"] = torch.tensor(labels)
        safetensors.torch.save_file(tensors, "inrs.safetensors")

    The file holds the stacked weights, [N, out, in] and [N, out] (keys in any naming, such as ``seq.0.weight`` or
    ``net.0.linear.weight``, whose numbers give the order of the layers), ``labels`` [N] and, where they are known,
    ``image`` [N] (equal for copies of one image, which then share a split) and ``split`` [N] (0 train, 1 val, 2 test).

    Args:
        file: ``.safetensors`` or ``.npz``.
        omega: Frequency of the networks; 30 in both sets.
        output_shift: Added to the output; 0.5 for DWSNets, whose networks add it outside of their weights.
        name: What to call the zoo; by default the file's name.
        seed: Of the splits, where the file has none.
        shares: Of train, val and test, where the file has none.

    Returns:
        The zoo, of architecture ``siren``.

    Raises:
        UserError: A pickle or another file that is not read, tensors that are missing or do not fit, or splits that
            part the copies of an image.
    """
    path = Path(file)
    if path.suffix.lower() in _PICKLES or path.is_dir():
        what = "a folder" if path.is_dir() else "a pickle, which can run code when it is read"
        raise UserError(
            f"{path} is {what}; convert the networks once: load each with torch.load(path, weights_only=True), stack "
            "them by key, add 'labels', and write one file with safetensors.torch.save_file (see the help of inr_zoo)"
        )
    if path.suffix == ".safetensors":
        tensors = load_tensors(path)
    elif path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                tensors = {key: torch.from_numpy(np.ascontiguousarray(archive[key])) for key in archive.files}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} does not read as plain NumPy arrays ({error})") from error
    else:
        raise UserError(f"{path}: a set of SIRENs is read from .safetensors or .npz")
    weights = _siren_weights(path, tensors)
    number = len(next(iter(weights.values())))
    labels = tensors.get("labels", tensors.get("label"))
    extra = {"labels": labels, "image": tensors.get("image", torch.arange(number)), "split": tensors.get("split")}
    for key, value in extra.items():
        if value is None and key == "split":
            continue
        if value is None or value.shape != (number,):
            what = "is missing" if value is None else f"has shape {list(value.shape)}"
            raise UserError(f"{path}: {key!r} {what}, wanted [{number}]")
    count = len(weights) // 2
    sizes = [weights[f"layers.{i}.weight"].shape[1] for i in range(count)]
    if output_shift:
        weights[f"layers.{count - 1}.bias"] = weights[f"layers.{count - 1}.bias"] + output_shift
    groups = extra["image"].long()
    splits = split_groups(groups, shares, seed)
    if extra["split"] is not None:
        splits = {split: torch.nonzero(extra["split"] == k).flatten() for k, split in enumerate(SPLITS)}
    return Zoo(
        name=name or path.stem,
        architecture="siren",
        network=Siren(weights["layers.0.weight"].shape[2], sizes[:-1], sizes[-1], omega).config,
        weights=weights,
        targets={"label": labels.long(), "image": groups},
        splits=splits,
        groups=groups,
        config={"omega": omega, "output_shift": output_shift},
    )


def _siren_weights(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by our keys, in the order of the numbers in theirs."""
    found: dict[str, dict[tuple[int, ...], Tensor]] = {"weight": {}, "bias": {}}
    for key, value in tensors.items():
        kind = key.rpartition(".")[2]
        if kind in found:
            found[kind][tuple(int(n) for n in re.findall(r"\d+", key))] = value.float()
    out = {}
    if not found["weight"] or found["weight"].keys() != found["bias"].keys():
        raise UserError(f"{path} has keys {sorted(tensors)[:8]}: wanted a .weight and a .bias for each layer")
    inputs = None
    for i, place in enumerate(sorted(found["weight"])):
        weight, bias = found["weight"][place], found["bias"][place]
        if weight.dim() != 3 or bias.shape != weight.shape[:2] or inputs not in (None, weight.shape[2]):
            raise UserError(
                f"{path}: layer {i} has weight {list(weight.shape)} and bias {list(bias.shape)}; wanted [N, out, in] "
                f"and [N, out]" + (f" with in={inputs}" if inputs else "")
            )
        inputs = weight.shape[1]
        out[f"layers.{i}.weight"], out[f"layers.{i}.bias"] = weight.contiguous(), bias.contiguous()
    return out
