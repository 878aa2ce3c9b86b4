import json
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

from fleetgym.benchmarks import learned_optimizer as bench
from fleetgym.core import UserError
from fleetgym.merging.learned_optimizer import PES, Adam, LearnedOptimizer, unroll

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", bench.FAMILIES)
def test_families_can_be_learned_on(name):
    found = bench.family(name)
    task = found.make(found.width)
    few = replace(task, sets={"train": tree_map(lambda x: x[:200], task.sets["train"])})
    plain = unroll(Adam(task.spec, 0.02), few, 25, range(2)).measured["train"][0]
    assert bool((plain[:, -1] < plain[:, 0]).all())
    rule = LearnedOptimizer(task.spec, "deepset", symmetry=found.symmetry)
    gradient, info = PES(rule, task, pairs=1, horizon=2, truncation=2).estimate(0)
    assert bool(torch.isfinite(gradient).all()) and float(gradient.norm()) > 0 and info["resets"] == 0
    # Rules serve the width that they have not seen.
    other = found.make(found.other)
    for kind in found.kinds:
        learned = LearnedOptimizer(task.spec, kind, symmetry="np" if kind == "nfn" else found.symmetry)
        moved = learned.on(other.spec)
        assert sum(p.numel() for p in moved.parameters()) == sum(p.numel() for p in learned.parameters())


def test_a_comparison_is_written_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TUNING_SEEDS", (1000,))
    monkeypatch.setitem(bench.FAMILIES, "mlp", bench.Family(bench.mlp_task, 4, 6))
    settings = bench.Settings(steps=2, horizon=4, truncation=2, pairs=1, seeds=(0,), inner_seeds=2, every=2)
    rows = bench.compare("mlp", settings, tmp_path, ("unf",))
    found = [(row["width"], row["rule"], row["tuned_on"]) for row in rows]
    assert found == [
        ("trained", "unf", "trained"),
        ("trained", "sgdm", "trained"),
        ("trained", "adam", "trained"),
        ("other", "unf", "trained"),
        ("other", "sgdm", "trained"),
        ("other", "adam", "trained"),
        ("other", "sgdm", "other"),
        ("other", "adam", "other"),
    ]
    assert all(len(row["final"]) == 2 and row["places"] == [0, 2, 4] for row in rows)
    document = json.loads((tmp_path / "mlp.json").read_text())
    assert document["rows"] == rows and document["tuning"]["trained"]["sgdm"]["by"] in ("grid", "pes")
    text = bench.table(rows)
    assert text.count("\n") == 10 and "adam, tuned again" in text
    assert bench.plot(rows, tmp_path / "curves.svg").stat().st_size > 1000
    # The learned rule is read, not learned again, and a folder of other settings is refused.
    rule = bench.meta_train("mlp", "unf", settings, 0, tmp_path / "mlp" / "unf-0")
    task = bench.mlp_task(4)
    assert bench.measure(rule, task, settings)["final"] == rows[0]["final"]
    with pytest.raises(UserError, match="steps"):
        bench.meta_train("mlp", "unf", bench.Settings(steps=3), 0, tmp_path / "mlp" / "unf-0")


def test_bad_names():
    with pytest.raises(UserError, match="unknown task family 'mpl'"):
        bench.family("mpl")
    with pytest.raises(UserError, match="does not fit the family 'rnn'"):
        bench.meta_train("rnn", "nfn", bench.Settings(), 0, None)
    with pytest.raises(UserError, match="multiple of 4"):
        bench.transformer_task(30)
