"""``fleetgym fleet``: help and bad input. What it does is tested in tests/merging/test_federated.py."""

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fleetgym[fleet]'")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fleetgym.cli import main
from fleetgym.core import Demonstrations, Episode


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zeros = np.zeros(5)
    episode = Episode(0, np.zeros((6, 3)), np.zeros((5, 2), np.float32), zeros, zeros > 1, zeros > 1, True)
    Demonstrations([episode]).save(tmp_path / "demos")
    (tmp_path / "text.pem").write_text("no certificate")
    (tmp_path / "empty").mkdir()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (tmp_path / "edwards").write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*form))
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    for name in "ab":
        (tmp_path / f"{name}.pub").write_bytes(line)
    return tmp_path


CLIENT = "client demos --out run --name a"
CASES = {
    "fleet": ("servr", "unknown side of a fleet 'servr'; nearest: 'server'"),
    "option first": ("--out run", "the side comes before '--out'"),
    "no data": ("client --out run --name a", "no dataset"),
    "absent data": ("client nowhere --out run --name a", "nowhere"),
    "address": (f"{CLIENT} --server robots", "address 'robots': HOST:PORT is wanted"),
    "odd digits": (f"{CLIENT} --server robots:9²", "address 'robots:9²': HOST:PORT is wanted"),
    "port": (f"{CLIENT} --server robots:99999", "address 'robots:99999': HOST:PORT is wanted"),
    "name": ("client demos --out run --name a/b", "robot's name 'a/b'"),
    "absent certificate": (
        f"{CLIENT} --root-certificate no.pem",
        "no.pem: the certificate cannot be read",
    ),
    "no certificate": (f"{CLIENT} --root-certificate text.pem", "--root-certificate text.pem is not a PEM certificate"),
    "key without TLS": (f"{CLIENT} --key edwards", "--key needs TLS"),
    "unreachable": (f"{CLIENT} --server 127.0.0.1:1 --wait 0.5", "no fleet server at 127.0.0.1:1 within 0.5 s"),
    "server's address": ("server --out run --listen 9092", "address '9092': HOST:PORT is wanted"),
    "merger": ("server --out run --merger averag", "unknown merger 'averag'; nearest: 'average'"),
    "merger of data": ("server --out run --merger regmean", "merger 'regmean' needs statistics="),
    "matcher of data": ("server --out run --matcher activations", "matcher 'activations' needs correlations="),
    "merger without a matcher": ("server --out run --merger average --matcher lap", "option of merger 'average'"),
    "half of TLS": ("server --out run --certificate text.pem", "--certificate and --certificate-key go together"),
    "absent server certificate": (
        "server --out run --certificate a --certificate-key b",
        "--certificate a: the cert",
    ),
    "not a certificate": (
        "server --out run --certificate text.pem --certificate-key text.pem",
        "--certificate text.pem and --certificate-key text.pem do not make a TLS server",
    ),
    "keys without TLS": ("server --out run --robot-keys .", "--robot-keys needs --certificate"),
    "one robot": ("server --out run --min-robots 1", "min_robots=1: a merge takes at least two"),
    "rounds": ("server --out run --rounds 0", "--rounds 0: it must be positive"),
    "tasks": ("server --out run --tasks reach-v3 reach-v3", "a task stands there twice"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, folder, capsys):
    words, message = CASES[case]
    assert main(["fleet", *words.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert "listening" not in captured.out


def test_bad_keys(folder):
    from fleetgym.core import UserError
    from fleetgym.merging.fleet_link import private_key, public_keys

    with pytest.raises(UserError, match="b.pub holds the key of another robot too"):
        public_keys(folder)
    with pytest.raises(UserError, match="a folder with a NAME.pub for each robot is wanted"):
        public_keys(folder / "empty")
    (folder / "b.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(UserError, match="b.pub is not an ECDSA public key"):
        public_keys(folder)
    with pytest.raises(UserError, match="edwards is not an ECDSA private key"):
        private_key(folder / "edwards")


@pytest.mark.parametrize("side, option", [("server", "--robot-keys"), ("client", "--root-certificate")])
def test_help(side, option, capsys):
    assert main(["fleet", side, "--help"]) == 0
    assert option in capsys.readouterr().out
