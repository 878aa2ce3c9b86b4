"""Fleet merging over Flower: what the Strategy takes and refuses, TLS and keys, and what survives a kill."""

import datetime
import ipaddress
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fleetgym[fleet]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fleetgym.agents.networks import RecurrentPolicy, masked_mse
from fleetgym.agents.robot import CloningRobot
from fleetgym.cli.fleet import Server, _plan
from fleetgym.core import Checkpoint, Demonstrations, Episode, SequenceBatch, UserError, WeightSpec
from fleetgym.core.demonstrations import Statistics
from fleetgym.core.run import Run
from fleetgym.merging import MERGERS
from fleetgym.merging.federated import FleetMerge, client_app, pack
from fleetgym.merging.fleet_link import free_port, public_keys, serve, work

PLAN = {
    "architecture": "recurrent_policy",
    "policy": {"hidden": 4},
    "imitation": {"batch_size": 2, "learning_rate": 1e-2, "final_learning_rate": 1e-4},
    "tasks": [],
    "warmup": 3,
    "local_steps": 2,
    "rounds": 2,
    "seed": 0,
}


class Stub:
    """A robot whose weights are a function of its name, the round and what it got."""

    def __init__(self, name, identity=None, sizes=(3, 2), count=10, features=None, floor=1e-3):
        self.name, self.identity, self.sizes, self.count = name, identity or f"id-{name}", sizes, count
        self.features, self.floor = sizes[0] if features is None else features, floor
        self.orders, self.finished = [], False

    def describe(self, plan):
        mean = np.full(self.features, float(ord(self.name[0]) - ord("a")))
        statistics = Statistics(mean, np.ones_like(mean), self.count, self.floor)
        return {"observation_size": self.sizes[0], "action_size": self.sizes[1]}, statistics

    def train(self, order):
        self.orders.append(order)
        own = dict(RecurrentPolicy(*self.sizes, hidden=4).named_parameters())
        # A generator of its own: robots run in threads here.
        rng = torch.Generator().manual_seed(ord(self.name[0]) + 1000 * order.number)
        noise = {name: 0.3 * torch.randn(value.shape, generator=rng) for name, value in own.items()}
        base = order.weights or {name: torch.zeros_like(value) for name, value in own.items()}
        return {name: base[name] + value for name, value in noise.items()}, {"loss": 1.0}

    def finish(self, order):
        self.finished = True


class Loopback(Grid):
    """A grid without a network: nodes answer at once, or never."""

    def __init__(self):
        self.nodes, self.replies, self.silent = {}, {}, set()

    def set_run(self, run):
        pass

    run = None

    def create_message(self, *args, **options):
        raise AssertionError

    def join(self, node, robot, spoil=lambda reply: reply):
        self.nodes[node] = (client_app(robot), spoil, str(time.monotonic_ns()))

    def get_nodes(self):
        return [NodeInfo(node_id=node, last_activated_at=since) for node, (_, _, since) in self.nodes.items()]

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.nodes:
                ids.append("")
                continue
            name = f"m{time.monotonic_ns()}"
            message.metadata.__dict__["_message_id"] = name
            ids.append(name)
            if node in self.silent and message.metadata.message_type == "train":
                continue
            app, spoil, _ = self.nodes[node]
            try:
                reply = app(message, None)
                if message.metadata.message_type == "train":
                    reply = spoil(reply)
            except Exception as error:
                reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
            self.replies[name] = reply
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


@pytest.fixture(autouse=True)
def identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def fleet(names="abc", **options):
    lines = []
    options = {
        "min_robots": 2,
        "start_robots": len(names),
        "poll": 0.01,
        "merger": "average",
        "say": lines.append,
        **options,
    }
    strategy, grid = FleetMerge(PLAN, **options), Loopback()
    robots = {name: Stub(name) for name in names}
    for number, robot in enumerate(robots.values()):
        grid.join(100 + number, robot)
    return strategy, grid, robots, lines


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_first_merge_is_that_of_the_library():
    strategy, grid, robots, _ = fleet(merger="fleet_merge")
    result = strategy.start(grid, num_rounds=0)
    statistics = Statistics.pool([robot.describe(PLAN)[1] for robot in robots.values()])
    np.testing.assert_allclose(strategy.module.normaliser.mean, statistics.mean, rtol=1e-6)
    np.testing.assert_allclose(strategy.module.normaliser.std, statistics.std, rtol=1e-6)
    spec, buffers = WeightSpec.from_module(strategy.module), dict(strategy.module.named_buffers())
    states = [{**buffers, **robot.train(robot.orders[0])[0]} for robot in robots.values()]
    weights, _, _ = MERGERS.get("fleet_merge")(spec, states)
    assert same(weights, strategy.module.state_dict())
    assert result.train_metrics_clientapp[0]["robots"] == 3 and all(robot.finished for robot in robots.values())


def test_robots_get_what_was_merged():
    strategy, grid, robots, _ = fleet()
    strategy.start(grid)
    orders = robots["a"].orders
    assert [(o.number, o.step, o.steps) for o in orders] == [(0, 0, 3), (1, 3, 2), (2, 5, 2)]
    assert orders[0].weights is None and set(orders[1].weights) == dict(strategy.module.named_parameters()).keys()
    assert same(orders[1].weights, robots["b"].orders[1].weights) and not same(orders[1].weights, orders[2].weights)
    assert len({order.key for order in orders}) == 3 and orders[1].key == robots["c"].orders[1].key


def changed(change):
    """A reply whose weights were changed on the way."""

    def spoil(reply):
        from fleetgym.merging.federated import unpack

        weights = unpack(reply.content["arrays"]["weights"])
        change(weights)
        reply.content["arrays"] = ArrayRecord({"weights": pack(weights)})
        return reply

    return spoil


def with_array(array):
    def spoil(reply):
        reply.content["arrays"] = ArrayRecord(array)
        return reply

    return spoil


def stale(reply):
    reply.content["result"]["round"] = 7
    return reply


def no_result(reply):
    del reply.content["result"]
    return reply


def raises(reply):
    raise ValueError("the gripper is stuck")


BAD = {
    "nan": (changed(lambda w: w["encoder.bias"].__setitem__(1, float("nan"))), "'encoder.bias' has 1 values"),
    "infinite": (changed(lambda w: w["head.2.bias"].fill_(float("inf"))), "'head.2.bias' has 2 values"),
    "shape": (changed(lambda w: w.update({"encoder.bias": torch.zeros(5)})), "has shape [5], the policy's is [4]"),
    "type": (changed(lambda w: w.update({"encoder.bias": w["encoder.bias"].double()})), "is torch.float64"),
    "missing": (changed(lambda w: w.pop("encoder.bias")), "'encoder.bias' is missing"),
    "extra": (changed(lambda w: w.update({"extra": torch.zeros(1)})), "'extra' is not the policy's"),
    "stale": (stale, "its reply is for round 7"),
    "no round": (no_result, "no ConfigRecord 'result'"),
    "no weights": (with_array({}), "no weights"),
    "pickle": (with_array({"weights": Array("uint8", (4,), "pickle", b"\x80\x04N.")}), "of kind 'pickle'"),
    "garbage": (with_array({"weights": Array("uint8", (4,), "safetensors", b"\xff" * 40)}), "not safetensors"),
    "error": (raises, "it raised ValueError: the gripper is stuck"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_round_goes_on_without_a_bad_reply_and_says_so(kind, tmp_path):
    spoil, why = BAD[kind]
    without, grid, _, _ = fleet("abc")
    without.start(grid, num_rounds=0)
    with Run.open(tmp_path / "run", {}, tensorboard=False) as run:
        strategy, grid, robots, lines = fleet("abc", run=run)
        bad = Stub("d")
        # Statistics that leave the pooled ones as they are.
        alike = Statistics(np.full(3, 1.0), np.full(3, 5 / 3), 30, 1e-3)
        bad.describe = lambda plan: ({"observation_size": 3, "action_size": 2}, alike)
        grid.join(200, bad, spoil)
        strategy.start_robots = 4
        strategy.start(grid, num_rounds=0)
    assert same(dict(without.module.named_parameters()), dict(strategy.module.named_parameters()))
    record = json.loads((tmp_path / "run" / "rounds" / "00000.json").read_text())
    assert record["robots"] == ["a", "b", "c"] and [item["robot"] for item in record["refused"]] == ["d"]
    assert why in record["refused"][0]["why"]
    assert any(line.startswith("round 0 goes on without d: ") and why in line for line in lines)
    assert any(line.startswith("round 0: merged a, b, c, without d") for line in lines)
    assert record["bytes_up"] >= 3 * sum(4 * p.numel() for p in strategy.module.parameters())


def test_a_repeated_reply_counts_once():
    strategy, grid, _, lines = fleet("abc")
    strategy.start(grid, num_rounds=0)
    replies = grid.send_and_receive(strategy.configure_train(1, strategy.arrays(), {}, grid))
    arrays, metrics = strategy.aggregate_train(1, [*replies, replies[0]])
    assert metrics["robots"] == 3 and "round 1 goes on without a: it replied twice; the first reply counts" in lines
    # The same replies in the next round are stale.
    assert strategy.aggregate_train(2, replies) == (None, None)
    assert "round 2 goes on without b: its reply is for round 1" in lines


def test_late_robots_join_and_lost_ones_are_left_out():
    strategy, grid, robots, lines = fleet("abc")
    robots["d"] = Stub("d")

    def after(number, arrays):
        if number == 0:
            grid.join(103, robots["d"])
            grid.silent.add(100)

    strategy.start(grid, timeout=0.3, evaluate_fn=after)
    assert [order.number for order in robots["d"].orders] == [1, 2] and robots["d"].orders[0].weights is not None
    assert "robot d joined; takes part from round 1" in lines
    assert "round 1 goes on without a: no reply within 0.3 s" in lines
    assert any(line.startswith("round 2: merged b, c, d, without a") for line in lines)


def test_a_robot_that_comes_back_in_the_middle_of_a_round_is_asked_again():
    strategy, grid, robots, lines = fleet("abc")
    grid.silent.add(101)
    threading.Timer(0.3, lambda: (grid.nodes.pop(101), grid.join(300, Stub("b")))).start()
    strategy.start(grid, timeout=20, num_rounds=0)
    assert any(line.startswith("round 0: merged a, b, c, loss") for line in lines)
    assert "robot b is back; takes part from round 0" in lines


def test_a_round_without_enough_robots_waits_and_says_so():
    strategy, grid, robots, lines = fleet("a")
    strategy.start_robots = 2
    threading.Timer(0.3, lambda: grid.join(101, Stub("b"))).start()
    strategy.start(grid, num_rounds=0)
    assert "round 0 waits for robots: 1 of 2 are here (a)" in lines
    assert any(line.startswith("round 0: merged a, b") for line in lines)


def test_too_few_good_replies_are_not_merged():
    strategy, grid, _, lines = fleet("ab")
    ill = [BAD["nan"][0]]

    def spoil(reply):
        return ill.pop()(reply) if ill else reply

    grid.join(101, Stub("b"), spoil)
    strategy.start(grid, num_rounds=0)
    assert "round 0: 1 robots of at least 2; asked again in 1 s" in lines
    assert any(line.startswith("round 0: merged a, b, loss") for line in lines)


def test_features_that_the_policy_does_not_have_are_said():
    strategy, grid, _, _ = fleet("")
    for node, name in enumerate("ab", 100):
        grid.join(node, Stub(name, features=4))
    with pytest.raises(UserError, match="statistics are of 4 features, the policy that the plan describes has 3"):
        strategy.start(grid, num_rounds=0)


@pytest.mark.parametrize(
    "robot, why",
    [
        (Stub("a", identity="another"), "another robot is called 'a'"),
        (Stub("d", sizes=(5, 2)), "observations and actions of sizes (5, 2), 5 features; the fleet has (3, 2) and 3"),
        (Stub("d", count=0), "robot 'd' has no data"),
        (Stub("d", sizes=(3, 0)), "robot 'd' has observations and actions of sizes (3, 0); both must be at least 1"),
        (Stub("d", floor=math.nan), "robot 'd' sent statistics that are not finite vectors"),
        (Stub("x/../y"), "robot's name 'x/../y'"),
    ],
)
def test_who_is_not_taken_hears_why(robot, why):
    strategy, grid, _, lines = fleet("abc")
    strategy.start(grid, num_rounds=0)
    heard = []
    grid.nodes[300] = (client_app(robot, heard.append), lambda reply: reply, "x")
    strategy._greet(grid)
    assert why in heard[0] and any(why in line for line in lines)
    assert strategy.members["a"].node == 100 and set(strategy.members) == {"a", "b", "c"}


def test_a_fleet_of_tasks(tmp_path):
    plan = _plan(Server(out=tmp_path, tasks=("reach-v3", "drawer-close-v3")))
    assert plan["policy"]["differences"] == [[0, 36, 3], [4, 36, 3], [0, 4, 3]]
    assert _plan(Server(out=tmp_path, tasks=("reach-v3", "mine")))["policy"]["differences"] == []
    with Run.open(tmp_path / "a", {}, tensorboard=False) as run:
        plain = {"policy": {}, "tasks": ["left", "right"]}
        sizes, statistics = CloningRobot("a", episodes(0), run, task="right").describe(plain)
        assert sizes == {"observation_size": 5, "action_size": 2}
        np.testing.assert_array_equal(statistics.mean[3:], [0, 1])
        with pytest.raises(UserError, match="unknown task of this fleet 'up'"):
            CloningRobot("a", episodes(0), run, task="up").describe(plain)


def test_state_survives_the_server(tmp_path):
    whole, grid, _, _ = fleet()
    whole.start(grid)
    with Run.open(tmp_path / "run", {}, tensorboard=False) as run:
        first, grid, _, _ = fleet(run=run)
        first.start(grid, num_rounds=0)
    with Run.open(tmp_path / "run", {}, resume=True, tensorboard=False) as run:
        second, grid, robots, lines = fleet(run=run)
        assert lines == ["going on after round 0; known robots: a, b, c"]
        second.start(grid)
        assert [order.number for order in robots["a"].orders] == [1, 2]
        assert same(whole.module.state_dict(), second.module.state_dict())
        assert [row["step"] for row in run.metrics()] == [0, 1, 2]
        with pytest.raises(UserError, match="another plan"):
            FleetMerge({**PLAN, "rounds": 9}, run=run)


def episodes(seed, count=4, steps=12):
    rng, out = np.random.default_rng(seed), []
    for i in range(count):
        observations = rng.normal(size=(steps + 1, 3))
        zeros = np.zeros(steps)
        actions = np.tanh(observations[:-1, :2]).astype(np.float32)
        out.append(Episode(i, observations, actions, zeros, zeros > 1, zeros > 1, True))
    return Demonstrations(out)


def test_a_robot_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    def train(folder, restart):
        """The parameters of robot ``a`` after each round; its process may end after each."""
        strategy, grid, _, _ = fleet("bc", start_robots=3)
        seen = []
        run = Run.open(tmp_path / folder, {}, resume=True, tensorboard=False)
        robot = CloningRobot("a", episodes(0), run)
        grid.join(300, robot, lambda reply: seen.append(bytes(reply.content["arrays"]["weights"].data)) or reply)

        def after(number, arrays):
            nonlocal run, robot
            if not restart:
                return
            run.close()
            run = Run.open(tmp_path / folder, {}, resume=True, tensorboard=False)
            again = CloningRobot("a", episodes(0), run)
            assert again.identity == robot.identity
            robot = again
            grid.nodes[300] = (client_app(robot), grid.nodes[300][1], grid.nodes[300][2])

        strategy.start(grid, evaluate_fn=after)
        assert robot.finished
        weights = robot.run.path / "checkpoints" / "last" / "model.safetensors"
        run.close()
        return seen, weights.read_bytes()

    one, two = train("one", False), train("two", True)
    assert len(one[0]) == 3 and len(set(one[0])) == 3 and one == two


def test_a_repeated_order_gives_the_same_bytes_and_trains_once(tmp_path):
    strategy, grid, robots, _ = fleet("bc")
    strategy.start(grid)
    with Run.open(tmp_path / "a", {}, tensorboard=False) as run:
        robot = CloningRobot("a", episodes(0), run)
        first = robot.train(robots["b"].orders[1])[0]
        again = robot.train(robots["b"].orders[1])[0]
        assert same(first, again) and len(run.metrics()) == 1
        assert not same(first, robot.train(robots["b"].orders[2])[0])


# -- over the network --------------------------------------------------------------------------------------------------


def certificate(folder, name="server"):
    """A self-signed certificate for the loopback interface: its file and its key's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    return paths


def connect(address, robot, errors, **options):
    """A robot in a thread."""

    def run():
        try:
            work(address, client_app(robot, errors.append), lambda: robot.finished, say=lambda line: None, **options)
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_tls_and_keys(tmp_path):
    ours, theirs = certificate(tmp_path), certificate(tmp_path, "other")
    (tmp_path / "keys").mkdir()
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in ("a", "b", "thief")}
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    for name in "ab":
        (tmp_path / "keys" / f"{name}.pub").write_bytes(keys[name].public_key().public_bytes(*form))
    address, lines, errors = f"127.0.0.1:{free_port()}", [], []
    known = public_keys(tmp_path / "keys")
    with serve(address, certificate=ours[0], certificate_key=ours[1], robot_keys=known) as (grid, names):
        secure = {"root_certificate": ours[0], "wait": 3}
        for wrong, options, why in (
            (Stub("a"), {**secure, "root_certificate": theirs[0], "key": keys["a"]}, "does not convince"),
            (Stub("a"), {"wait": 3}, "does not speak plain HTTP"),
            (Stub("a"), secure, "takes only robots whose keys it knows"),
            (Stub("a"), {**secure, "key": keys["thief"]}, "does not know this robot's key"),
        ):
            said = []
            connect(address, wrong, said, **options).join(20)
            assert len(said) == 1 and why in said[0], said
        with pytest.raises(UserError, match="Address already in use"), serve(address):
            pass
        robots = {name: Stub(name) for name in "ab"}
        strategy = FleetMerge(PLAN, names=names, say=lines.append)
        # With the key of `b` nobody can be `a`.
        impostor = connect(address, Stub("a"), errors, **secure, key=keys["b"])
        while not any("calls itself 'a', its key is that of 'b'" in line for line in lines):
            strategy._greet(grid)
            time.sleep(0.05)
        (node,) = strategy._greeted
        grid._state.deactivate_node(node[0])
        del impostor
        threads = [connect(address, robots["a"], errors, **secure, key=keys["a"])]
        assert grid.traffic()[1] > 0
        while "a" not in strategy.members:
            strategy._greet(grid)
            time.sleep(0.05)
    for thread in threads:
        thread.join(0.1)


def test_a_fleet_over_the_loopback_interface_merges_as_without_a_network():
    direct, grid, _, _ = fleet()
    direct.start(grid)
    address, errors, lines = f"127.0.0.1:{free_port()}", [], []
    robots = {name: Stub(name) for name in "abc"}
    with serve(address) as (grid, _):
        threads = [connect(address, robot, errors, wait=60) for robot in robots.values()]
        strategy = FleetMerge(PLAN, merger="average", start_robots=3, say=lines.append)
        strategy.start(grid, timeout=60)
        for thread in threads:
            thread.join(10)
        down, up = grid.traffic()
    assert errors == [] and all(robot.finished for robot in robots.values())
    assert same(direct.module.state_dict(), strategy.module.state_dict())
    size = sum(4 * p.numel() for p in strategy.module.parameters())
    assert up > 9 * size and down > 6 * size


def test_a_node_that_has_gone_is_known_at_once():
    with serve(f"127.0.0.1:{free_port()}") as (grid, _):
        node = grid._state.create_node("<id:none>", "none", b"key", 10)
        grid._state.activate_node(node, 10)
        (name,) = grid.push_messages([Message(RecordDict(), node, "train")])
        assert list(grid.get_node_ids()) == [node] and grid.pull_messages([name]) == []
        grid._state.deactivate_node(node)
        (reply,) = grid.pull_messages([name])
        assert reply.has_error() and reply.metadata.src_node_id != node and list(grid.get_node_ids()) == []


def test_nobody_there():
    port = free_port()
    with pytest.raises(UserError, match=f"no fleet server at 127.0.0.1:{port} within 1 s .*fleetgym fleet server"):
        work(f"127.0.0.1:{port}", client_app(Stub("a")), lambda: False, wait=1, say=lambda line: None)


# -- processes that are killed -----------------------------------------------------------------------------------------


class Process:
    """``fleetgym fleet`` as a process; its output goes to a file."""

    def __init__(self, folder, name, words):
        self.words = [sys.executable, "-m", "fleetgym", "fleet", *words, "--out", str(folder / name), "--resume"]
        self.log = folder / f"{name}.log"
        self.start()

    def start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(self.words, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def until(self, text, seconds=400):
        """Waits until the process has printed a text."""
        end = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_robot_and_a_killed_server_change_nothing(tmp_path):
    names, rounds, port = "abcd", 4, free_port()
    for number, name in enumerate(names):
        episodes(number).save(tmp_path / f"demos-{name}")
    options = {"rounds": rounds, "warmup": 20, "local_steps": 40, "hidden": 16}

    # What an uninterrupted fleet gives, without a network.
    grid = Loopback()
    whole = FleetMerge(_plan(Server(out=tmp_path, **options)), min_robots=4, options={"matcher": "lap"}, poll=0.01)
    runs = [Run.open(tmp_path / f"whole-{name}", {}, tensorboard=False) for name in names]
    for number, (name, run) in enumerate(zip(names, runs)):
        grid.join(100 + number, CloningRobot(name, Demonstrations.load(tmp_path / f"demos-{name}"), run))
    whole.start(grid)

    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    server = Process(
        tmp_path, "server", ["server", "--listen", f"127.0.0.1:{port}", "--min-robots", "4", "--matcher", "lap", *words]
    )
    robots = {
        name: Process(
            tmp_path,
            name,
            [
                "client",
                str(tmp_path / f"demos-{name}"),
                "--name",
                name,
                "--server",
                f"127.0.0.1:{port}",
                "--wait",
                "400",
            ],
        )
        for name in names
    }
    try:
        server.until("round 1: merged a, b, c, d")
        robots["b"].kill()
        robots["b"].start()
        server.until("robot b is back")
        server.until("round 2: merged a, b, c, d")
        server.kill()
        server.start()
        server.until("going on after round")
        for process in (server, *robots.values()):
            assert process.process.wait(timeout=400) == 0, process.log.read_text()
    finally:
        for process in (server, *robots.values()):
            process.process.kill()
            process.process.wait()

    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "server" / "rounds").glob("?????.json"))]
    assert [record["round"] for record in records] == list(range(rounds + 1))
    assert all(record["robots"] == list(names) for record in records)
    found = Checkpoint.load(tmp_path / "server" / "checkpoints" / "last")
    # The same robots took part in every round, so it is the same policy to the bit, and everybody has it.
    assert same(whole.module.state_dict(), found.weights)
    for name in names:
        assert Checkpoint.load(tmp_path / name / "checkpoints" / "last").weights_sha256 == found.weights_sha256
    test = SequenceBatch.concatenate([episodes(50 + number).padded() for number in range(4)])
    with torch.no_grad():
        error = masked_mse(found.module()(test.observations)[0], test.actions, test.mask)
    assert float(error) < 0.1 * float(test.actions.square().mean())
