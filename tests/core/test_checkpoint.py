import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from fleetgym.core.checkpoint import MODULES, Checkpoint, load_tensors, load_weights, save_tensors
from fleetgym.core.errors import UserError


class Net(nn.Module):
    architecture = "test_net"

    def __init__(self, size=3, hidden=4):
        super().__init__()
        self.config = {"size": size, "hidden": hidden}
        self.body = nn.Linear(size, hidden)
        self.head = nn.Linear(hidden, 2)
        self.register_buffer("steps", torch.tensor(5))

    def forward(self, x):
        return self.head(self.body(x).tanh())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(MODULES, "_items", {**MODULES._items, "test_net": Net})


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    return Checkpoint.save(tmp_path / "net", Net(), info={"metrics": {"success": 0.75}})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_loaded_is_what_was_saved(tmp_path, dtype):
    net = Net(hidden=6).to(dtype)
    state = {"exp_avg": torch.rand(3), "step": torch.tensor(3)}, {"epoch": 2, "rng": [1, 2]}
    Checkpoint.save(tmp_path / "a", net, normaliser={"mean": torch.zeros(3)}, state=state, info={"task": "reach-v3"})
    loaded = Checkpoint.load(tmp_path / "a")
    x = torch.rand(7, 3, dtype=dtype)
    assert torch.equal(loaded.module()(x), net(x)) and not loaded.module().training
    assert loaded.config == {"size": 3, "hidden": 6} and loaded.architecture == "test_net"
    assert loaded.info["task"] == "reach-v3" and loaded.info["provenance"]["python"]
    assert torch.equal(loaded.normaliser["mean"], torch.zeros(3))
    tensors, meta = loaded.load_state()
    assert torch.equal(tensors["exp_avg"], state[0]["exp_avg"]) and meta == state[1]
    loaded.check_finite()


def test_it_loads_in_a_process_that_knows_only_the_folder(tmp_path):
    from fleetgym.agents.networks import RecurrentPolicy

    policy = RecurrentPolicy(5, 2, hidden=8)
    Checkpoint.save(tmp_path / "policy", policy)
    code = (
        "from fleetgym.core import Checkpoint; import numpy as np\n"
        f"m = Checkpoint.load({str(tmp_path / 'policy')!r}).module(); print(m.predict(np.ones(5))[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import numpy as np

    assert json.loads(done.stdout) == pytest.approx(policy.predict(np.ones(5))[0].tolist(), abs=1e-6)


def test_shared_and_strided_weights(tmp_path):
    net = Net()
    net.twin = net.head
    net.body.weight = nn.Parameter(torch.rand(3, 4).t())
    path = tmp_path / "w.safetensors"
    save_tensors(path, net.state_dict())
    assert torch.equal(load_tensors(path)["body.weight"], net.body.weight)
    assert torch.equal(load_tensors(path)["twin.bias"], net.head.bias)


def test_the_folder(saved):
    assert names(saved.path) == ["README.md", "config.json", "model.safetensors"]
    assert saved.load_state() is None and saved.normaliser == {}
    document = json.loads((saved.path / "config.json").read_text())
    assert document["schema"] == 1 and document["class"] == "test_net" and document["parameters"] == 26


def test_the_model_card(saved):
    card = (saved.path / "README.md").read_text()
    for part in ("`test_net`", "26 parameters", "`hidden` | 4", "`success` | 0.75", 'Checkpoint.load("net").module()'):
        assert part in card
    assert str(saved.path.parent) not in card


def test_a_checkpoint_is_replaced_and_nothing_else_is(tmp_path, saved):
    again = Checkpoint.save(saved.path, Net(hidden=9))
    assert again.config["hidden"] == 9 and names(tmp_path) == ["net"]
    for path in ("thesis", "run"):
        (tmp_path / path).mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    (tmp_path / "run" / "config.json").write_text('{"schema": 1, "config": {}}')
    (tmp_path / "file").write_text("x")
    for path in ("thesis", "run", "file"):
        with pytest.raises(UserError, match="not a checkpoint"):
            Checkpoint.save(tmp_path / path, Net())
    assert names(tmp_path / "thesis") == ["thesis.tex"]


@pytest.mark.parametrize("call", ["replace", "rename", "write_bytes", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, saved, monkeypatch, call):
    before = {path.name: path.read_bytes() for path in saved.path.iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    target = "pathlib.Path" if call == "write_bytes" else "os"
    with monkeypatch.context() as patch:
        patch.setattr(f"{target}.{call}", full)
        with pytest.raises(OSError, match="No space left"):
            Checkpoint.save(saved.path, Net())
    assert {path.name: path.read_bytes() for path in saved.path.iterdir()} == before
    assert names(tmp_path) == ["net"]


def test_a_real_limit_of_the_file_size_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    from fleetgym.agents.networks import RecurrentPolicy

    torch.manual_seed(1)
    small = Checkpoint.save(tmp_path / "policy", RecurrentPolicy(5, 2, hidden=8))
    code = (
        "import sys\nfrom fleetgym.core import Checkpoint\nfrom fleetgym.agents.networks import RecurrentPolicy\n"
        "try:\n    Checkpoint.save(sys.argv[1], RecurrentPolicy(5, 2, hidden=256))\n"
        "except OSError as error:\n    sys.exit(7)"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run([sys.executable, "-c", code, tmp_path / "policy"], preexec_fn=limit, timeout=120)
    assert done.returncode == 7
    assert Checkpoint.load(tmp_path / "policy").weights_sha256 == small.weights_sha256
    assert names(tmp_path) == ["policy"]


def test_a_kill_in_the_middle_of_replacing_loses_nothing(saved):
    os.rename(saved.path, saved.path.with_name(".net.previous"))
    assert Checkpoint.load(saved.path).weights_sha256 == saved.weights_sha256
    assert Checkpoint.load(saved.path).load_state() is None
    assert Checkpoint.save(saved.path, Net(hidden=9)).config["hidden"] == 9
    assert names(saved.path.parent) == ["net"]


def edit(checkpoint, **changes):
    file = checkpoint.path / "config.json"
    document = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def refused(checkpoint, *parts, build=True):
    with pytest.raises(UserError) as caught:
        loaded = Checkpoint.load(checkpoint.path)
        if build:
            loaded.module()
    for part in (str(checkpoint.path), *parts):
        assert part in str(caught.value), caught.value


def test_truncated_weights(saved):
    file = saved.path / "model.safetensors"
    data = file.read_bytes()
    for size in (0, 5, 60, len(data) - 1):
        file.write_bytes(data[:size])
        refused(saved, "model.safetensors", "truncated")


def test_one_flipped_bit(saved):
    file = saved.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    refused(saved, "model.safetensors", "SHA-256")


def test_a_pickle_is_not_opened(saved):
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    (saved.path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(saved, "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_file(saved, name):
    (saved.path / name).unlink()
    refused(saved, name)


def test_missing_folder_and_state(tmp_path):
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        Checkpoint.load(tmp_path / "nowhere")
    saved = Checkpoint.save(tmp_path / "a", Net(), state=({"m": torch.ones(2)}, {}), normaliser={"m": torch.ones(2)})
    (tmp_path / "a" / "state.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="state.safetensors"):
        saved.load_state()
    (tmp_path / "a" / "normaliser.safetensors").unlink()
    refused(saved, "normaliser.safetensors")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"schema": 2}, ("config.json", "schema 2", "upgrade")),
        ({"schema": None}, ("config.json", "'schema'")),
        ({"class": None}, ("config.json", "'class'")),
        ({"class": 3}, ("config.json", "'class'")),
        ({"config": []}, ("config.json", "'config'")),
        ({"class": "test_nett"}, ("config.json", "unknown architecture 'test_nett'", "'test_net'")),
        ({"class": "os:system"}, ("config.json", "unknown architecture 'os:system'")),
        ({"config": {"size": 3, "wings": 2}}, ("config.json", "wings")),
        ({"config": {"size": 3, "hidden": 8}}, ("model.safetensors", "'body.weight'", "[4, 3]", "[8, 3]")),
    ],
)
def test_bad_config(saved, changes, parts):
    edit(saved, **changes)
    refused(saved, *parts)


def test_other_keys(saved):
    weights = dict(saved.weights)
    weights["neck.weight"] = weights.pop("head.weight")
    digest = save_tensors(saved.path / "model.safetensors", weights)
    edit(saved, weights_sha256=digest)
    refused(saved, "model.safetensors", "missing key 'head.weight'", "unexpected key 'neck.weight'")
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match="head.weight"):
        load_weights(net, saved.path / "model.safetensors")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_load_weights(saved):
    net = Net()
    load_weights(net, saved.path / "model.safetensors")
    assert torch.equal(net.body.weight, saved.weights["body.weight"])
    with pytest.raises(UserError, match=r"'body.weight' has shape \[4, 3\], the network wants \[8, 3\]"):
        load_weights(Net(hidden=8), saved.path / "model.safetensors")


def test_nan_weights_are_found_on_request(tmp_path):
    net = Net()
    with torch.no_grad():
        net.head.weight[0, 1] = float("nan")
        net.head.weight[1, 1] = float("inf")
    loaded = Checkpoint.save(tmp_path / "a", net)
    with pytest.raises(UserError, match="model.safetensors: 'head.weight' has 2 NaN or infinite entries of 8"):
        loaded.check_finite()


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match="Linear cannot be saved.*architecture"):
        Checkpoint.save(tmp_path / "a", nn.Linear(2, 2))
    net = Net()
    net.architecture = "unheard_of"
    with pytest.raises(UserError, match="'unheard_of' of Net is not registered"):
        Checkpoint.save(tmp_path / "a", net)
    with pytest.raises(UserError, match="no JSON form"):
        Checkpoint.save(tmp_path / "a", Net(), info={"f": print})
    assert names(tmp_path) == []
