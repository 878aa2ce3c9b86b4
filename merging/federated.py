"""Fleet merging as a Flower Strategy, and the ClientApp of a robot.

The algorithm is that of the benchmark ``fleet_merge``: robots send count, mean and variance of what they observe, once;
the pooled statistics normalise for all; then, round by round, every robot trains on its own demonstrations only and
sends its weights, and the server merges them with any registered merger and sends the result back.

Flower has three generations of interfaces: ``start_server``/``start_client`` (deprecated since 1.13), strategies of
NumPy lists in ``flwr.server`` (kept for compatibility), and messages of records in ``flwr.app``, ``flwr.serverapp``
and ``flwr.clientapp``, which is the one that Flower develops and the one used here. This file needs public names of it
only: :class:`FleetMerge` is a ``flwr.serverapp.strategy.Strategy`` that runs on any ``Grid``, and :func:`client_app`
gives a ``ClientApp``, so both also run under Flower's own programs or its simulation. ``fleetgym fleet server`` and
``fleetgym fleet client`` run them over :mod:`fleetgym.merging.fleet_link`.

Weights travel as safetensors bytes in a Flower array; nothing is pickled on either side.

Source: Wang et al., "Robot Fleet Learning via Policy Merging", ICLR 2024; rounds as in McMahan et al.,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from fleetgym.core.checkpoint import MODULES
from fleetgym.core.demonstrations import Statistics
from fleetgym.core.errors import UserError
from fleetgym.core.files import write_json
from fleetgym.core.optional import require
from fleetgym.core.weights import WeightSpec
from fleetgym.merging import MERGERS
from fleetgym.merging.mergers import MEAN, STD, check_merger

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy
except ImportError:
    require("fleet")
    raise

if TYPE_CHECKING:
    from flwr.app import Context

    from fleetgym.core.run import Run

STYPE = "safetensors"
FINISHED, REFUSED = "query.finished", "query.refused"
"""Message types by which the server says that all rounds are done, and that it does not take a robot."""


# -- what travels ------------------------------------------------------------------------------------------------------


def pack(tensors: Mapping[str, Tensor]) -> Array:
    """Tensors as a Flower array of safetensors bytes; equal tensors give equal bytes."""
    plain = {name: tensors[name].detach().to("cpu").contiguous().clone() for name in sorted(tensors)}
    data = safetensors.torch.save(plain)
    return Array("uint8", (len(data),), STYPE, data)


def unpack(array: Array) -> dict[str, Tensor]:
    """The inverse of :func:`pack`.

    Raises:
        UserError: The array is of another kind, or its bytes are not safetensors.
    """
    if array.stype != STYPE:
        raise UserError(f"an array of kind {array.stype!r} came, {STYPE!r} is wanted")
    try:
        return safetensors.torch.load(array.data)
    except Exception as error:  # the parser's own errors are of many kinds
        raise UserError(f"bytes that are not safetensors ({error})") from error


def payload(message: Message) -> int:
    """Bytes of a message's arrays."""
    if not message.has_content():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def check_name(name: str) -> None:
    """Checks a robot's name.

    Raises:
        UserError: It is empty, long, or has other signs than letters, digits, ``.``, ``_`` and ``-``.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise UserError(f"robot's name {name[:80]!r}: 1 to 64 letters, digits, '.', '_' or '-' are wanted")


def record_of(message: Message, name: str, kind: type) -> Any:
    """A record of a message.

    Raises:
        UserError: There is none of that name and kind.
    """
    found = message.content.get(name) if message.has_content() else None
    if not isinstance(found, kind):
        raise UserError(f"the message has no {kind.__name__} {name!r}")
    return found


@dataclass(frozen=True)
class Order:
    """What the server asks of a robot in a round.

    Attributes:
        plan: The fleet's plan, see :class:`FleetMerge`, with the sizes of observation and action.
        number: The round, from 0.
        step: Gradient steps that the fleet has taken before.
        steps: Gradient steps to take now.
        normaliser: ``mean`` and ``std`` of the policy's features, [Df] each.
        weights: Merged parameters to go on from; None in round 0, where each robot begins with weights of its own.
        key: A hash of all of the above: the same order asked for again has the same key.
    """

    plan: dict[str, Any]
    number: int
    step: int
    steps: int
    normaliser: dict[str, Tensor]
    weights: dict[str, Tensor] | None
    key: str


class Robot(Protocol):
    """What a robot must be able to do; :class:`fleetgym.agents.robot.CloningRobot` is one.

    Attributes:
        name: Its name in the fleet.
        identity: A text that stays the same when it is restarted, and that no other robot has.
    """

    name: str
    identity: str

    def describe(self, plan: Mapping[str, Any]) -> tuple[dict[str, int], Statistics]:
        """Its ``observation_size`` and ``action_size``, and the statistics of the features its data has."""

    def train(self, order: Order) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Trains on its own data; gives parameters, and metrics such as ``loss``. A repeated order gives the same."""

    def finish(self, order: Order) -> None:
        """Takes the fleet's last policy."""


# -- the robot's side --------------------------------------------------------------------------------------------------


def client_app(robot: Robot, refused: Callable[[str], None] | None = None) -> ClientApp:
    """A robot as a Flower ClientApp.

    Args:
        robot: Does the work.
        refused: Called with the reason when the server does not take this robot.

    Returns:
        The app: ``query`` tells who it is and its statistics, ``train`` trains, ``query.finished`` ends.
    """
    app = ClientApp()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        plan = json.loads(str(record_of(message, "order", ConfigRecord)["plan"]))
        sizes, statistics = robot.describe(plan)
        about: dict[str, Any] = {"name": robot.name, "identity": robot.identity, **sizes}
        arrays = ArrayRecord({"statistics": pack(statistics.to_tensors())})
        return Message(RecordDict({"robot": ConfigRecord(about), "arrays": arrays}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = _order_of(message)
        weights, metrics = robot.train(order)
        result = ConfigRecord({"round": order.number, "name": robot.name})
        content = {
            "result": result,
            "arrays": ArrayRecord({"weights": pack(weights)}),
            "metrics": MetricRecord({name: float(value) for name, value in metrics.items()}),
        }
        return Message(RecordDict(content), reply_to=message)

    @app.query("finished")
    def finished(message: Message, context: Context) -> Message:
        robot.finish(_order_of(message))
        return Message(RecordDict(), reply_to=message)

    @app.query("refused")
    def not_taken(message: Message, context: Context) -> Message:
        if refused is not None:
            refused(str(record_of(message, "order", ConfigRecord)["why"]))
        return Message(RecordDict(), reply_to=message)

    return app


def _order_of(message: Message) -> Order:
    config, arrays = record_of(message, "order", ConfigRecord), record_of(message, "arrays", ArrayRecord)
    digest = hashlib.sha256()
    for name in ("plan", "round", "step", "steps"):
        digest.update(f"{name}={config[name]};".encode())
    for name in sorted(arrays):
        digest.update(name.encode() + hashlib.sha256(arrays[name].data).digest())
    return Order(
        plan=json.loads(str(config["plan"])),
        number=int(config["round"]),
        step=int(config["step"]),
        steps=int(config["steps"]),
        normaliser=unpack(arrays["normaliser"]),
        weights=unpack(arrays["weights"]) if "weights" in arrays else None,
        key=digest.hexdigest(),
    )


# -- the server's side -------------------------------------------------------------------------------------------------


_BAD = (UserError, TypeError, ValueError, KeyError, AttributeError, OverflowError)
"""What reading a foreign message may raise."""


@dataclass
class Member:
    """A robot that the server knows.

    Attributes:
        name: Its name.
        identity: See :class:`Robot`.
        node: Flower's id of its connection, None while it has none.
        sizes: ``observation_size`` and ``action_size``.
        statistics: Of the features its data has.
    """

    name: str
    identity: str
    node: int | None
    sizes: tuple[int, int]
    statistics: Statistics


@dataclass
class _Round:
    """What happens in one round, for its record."""

    number: int
    began: float = field(default_factory=time.monotonic)
    asked: dict[str, str] = field(default_factory=dict)  # message id -> robot, of those not answered yet
    replied: set[str] = field(default_factory=set)
    nodes: dict[int, str] = field(default_factory=dict)
    accepted: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    down: int = 0
    up: int = 0


class FleetMerge(Strategy):
    """Merges a fleet in rounds, whatever single robots do.

    A robot that is late joins at the next round. One that drops out, is too slow, raises, or sends something else than
    finite weights of the right names, shapes and types for the round at hand is left out of the round; a line and the
    round's record say so by name. It is asked again in the next round. Which robots take part is thus a matter of
    time; given that, the weights are not: they depend on the plan, the data and the names alone, to the bit.

    Rounds count from 0. In round 0 robots take ``warmup`` steps from weights of their own, later ``local_steps`` from
    the merged ones.

    Args:
        plan: ``architecture`` (a name in ``MODULES``), ``policy`` (its keyword arguments but for the sizes),
            ``warmup``, ``local_steps``, ``rounds`` (merges after the first), ``seed``, and whatever robots want to
            know; JSON values.
        merger: A registered merger.
        options: Its options.
        min_robots: Merges of fewer are not made: the round waits, and is asked for again.
        start_robots: Robots to wait for before round 0; ``min_robots`` if None.
        run: Where checkpoints, records and state go. State that it has is gone on from.
        names: The robot's name of each node whose key the server knows; robots name themselves if None.
        say: Takes lines for people.
        poll: Seconds between looks at the grid.

    Raises:
        UserError: Unknown merger, option or architecture, a merger that needs more than weights, fewer than two robots,
            or state of another plan.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        *,
        merger: str = "fleet_merge",
        options: Mapping[str, Any] | None = None,
        min_robots: int = 2,
        start_robots: int | None = None,
        run: Run | None = None,
        names: Mapping[int, str] | None = None,
        say: Callable[[str], None] = print,
        poll: float = 0.1,
    ) -> None:
        if min_robots < 2:
            raise UserError(f"min_robots={min_robots}: a merge takes at least two")
        self.plan, self.merger, self.options = dict(plan), merger, dict(options or {})
        check_merger(merger, self.options)
        self._merge = MERGERS.get(merger)
        self._architecture = MODULES.get(self.plan["architecture"])
        self.min_robots = min_robots
        self.start_robots = max(start_robots or min_robots, min_robots)
        self.run, self.names, self.say, self.poll = run, names, say, poll
        self.members: dict[str, Member] = {}
        self.next_round = 0
        self.module: nn.Module | None = None
        self._spec: WeightSpec | None = None
        self._merged = False
        self._round: _Round | None = None
        self._asking = False
        self._greeted: set[tuple[int, str]] = set()
        self._hellos: dict[str, int] = {}
        self._waiting = ""
        self._restore()

    # -- Flower's interface --------------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Says what will be done."""
        plan = self.plan
        self.say(
            f"{self.merger} of at least {self.min_robots} robots, rounds {self.next_round} to {plan['rounds']}, "
            f"{plan['warmup']} + {plan['rounds']} x {plan['local_steps']} gradient steps"
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Orders for every robot that is connected.

        Args:
            server_round: The round.
            arrays: What :meth:`aggregate_train` gave, or :meth:`arrays`.
            config: Further entries of the order.
            grid: Asked who is connected.
        """
        online = set(grid.get_node_ids())
        members = [member for _, member in sorted(self.members.items()) if member.node in online]
        self._round = _Round(server_round)
        return [self._message(member, arrays, config) for member in members]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judges the replies, and merges those that pass.

        Args:
            server_round: The round they are for.
            replies: Replies to the messages of :meth:`configure_train`.

        Returns:
            The merged arrays and metrics; None twice if fewer than ``min_robots`` replies pass.
        """
        now = self._round
        if now is None or now.number != server_round:
            now = self._round = _Round(server_round)
        for reply in replies:
            self._judge(now, reply)
        if len(now.accepted) < self.min_robots:
            return None, None
        names = sorted(now.accepted)
        fixed = {name: value.clone() for name, value in self.module.named_buffers()}
        states = [{**fixed, **now.accepted[name]} for name in names]
        weights, _, history = self._merge(self._spec, states, **self.options)
        self.module.load_state_dict(weights)
        self._merged = True
        losses = [now.loss[name] for name in names if name in now.loss]
        metrics: dict[str, Any] = {"robots": len(names)}
        if losses:
            metrics["loss"] = sum(losses) / len(losses)
        if history and "distance" in history[-1]:
            metrics |= {"distance_before": history[0]["distance"], "distance_after": history[-1]["distance"]}
        return self.arrays(), MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: policies are evaluated by ``fleetgym eval``."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Runs the rounds that are left, and tells the robots the result.

        Args:
            grid: Where the robots are.
            initial_arrays: Not used: robots begin with weights of their own.
            num_rounds: Merges after the first; the plan's if None.
            timeout: Seconds that robots have for a round.
            train_config: Further entries of every order.
            evaluate_config: Not used.
            evaluate_fn: Called with (round, arrays) after every merge; gives a MetricRecord or None.

        Returns:
            The last arrays, and the metrics of the rounds run.
        """
        result = Result()
        last = self.plan["rounds"] if num_rounds is None else num_rounds
        self.summary()
        attempt = 0
        while self.next_round <= last:
            number = self.next_round
            self._gather(grid, self.start_robots if number == 0 else self.min_robots)
            if self.module is None:
                self._settle()
            replies = self._ask(grid, number, train_config or ConfigRecord(), timeout)
            arrays, metrics = self.aggregate_train(number, replies)
            self._record(number, metrics, getattr(grid, "traffic", lambda: None)())
            if arrays is None:
                pause, attempt = min(2.0**attempt, 60.0), attempt + 1
                found = len(self._round.accepted)
                self.say(f"round {number}: {found} robots of at least {self.min_robots}; asked again in {pause:g} s")
                time.sleep(pause)
                continue
            attempt = 0
            result.train_metrics_clientapp[number] = metrics
            self.next_round = number + 1
            self._save(metrics)
            if evaluate_fn is not None and (found := evaluate_fn(number, arrays)) is not None:
                result.evaluate_metrics_serverapp[number] = found
        result.arrays = self.arrays()
        self._dismiss(grid, last)
        return result

    # -- who is there --------------------------------------------------------------------------------------------------

    def arrays(self) -> ArrayRecord:
        """The fleet's normaliser and, after the first merge, its parameters."""
        state = self.module.state_dict()
        found = {"normaliser": pack({"mean": state[MEAN], "std": state[STD]})}
        if self._merged:
            found["weights"] = pack(dict(self.module.named_parameters()))
        return ArrayRecord(found)

    def _gather(self, grid: Grid, wanted: int) -> None:
        """Waits until enough robots are connected."""
        while True:
            self._greet(grid)
            online = set(grid.get_node_ids())
            here = sorted(name for name, member in self.members.items() if member.node in online)
            if len(here) >= wanted:
                self._waiting = ""
                return
            text = f"round {self.next_round} waits for robots: {len(here)} of {wanted} are here"
            text += f" ({', '.join(here)})" if here else ""
            if text != self._waiting:
                self.say(text)
                self._waiting = text
            time.sleep(self.poll)

    def _greet(self, grid: Grid) -> None:
        """Asks nodes that have (re)appeared who they are, and takes in those that have said it."""
        # A node that was restarted under its old id has another time of activation.
        online = {(node.node_id, getattr(node, "last_activated_at", "")): node.node_id for node in grid.get_nodes()}
        for mark in sorted(set(online) - self._greeted):
            order = ConfigRecord({"plan": json.dumps(self.plan, sort_keys=True)})
            hello = Message(RecordDict({"order": order}), online[mark], MessageType.QUERY)
            for name in grid.push_messages([hello]):
                if name:
                    self._hellos[name] = online[mark]
        self._greeted = set(online)
        for reply in grid.pull_messages(list(self._hellos)) if self._hellos else ():
            node = self._hellos.pop(reply.metadata.reply_to_message_id)
            if reply.metadata.src_node_id != node:
                continue  # Flower's own word that the node has gone
            try:
                self.admit(node, reply, set(online.values()), grid)
            except _BAD as error:
                self.say(f"robot at node {node} is not taken: {error}")
                if not reply.has_error():
                    order = ConfigRecord({"why": str(error)})
                    grid.push_messages([Message(RecordDict({"order": order}), node, REFUSED)])

    def admit(self, node: int, reply: Message, online: set[int], grid: Grid | None = None) -> Member:
        """Takes in a robot that has said who it is.

        Args:
            node: Its connection.
            reply: What it said.
            online: Nodes that are connected.
            grid: Where to give it the order of the round under way, if it is one that came back.

        Returns:
            The robot.

        Raises:
            UserError: It said nothing usable, its name is another robot's, or its sizes are not the fleet's.
        """
        if reply.has_error():
            raise UserError(f"it raised {reply.error.reason}")
        about = record_of(reply, "robot", ConfigRecord)
        arrays = record_of(reply, "arrays", ArrayRecord)
        missing = {"name", "identity", "observation_size", "action_size"} - set(about)
        if missing or "statistics" not in arrays:
            raise UserError(f"it did not say its {', '.join(sorted(missing)) or 'statistics'}")
        name = str(about["name"])
        check_name(name)
        if self.names is not None and self.names.get(node) != name:
            raise UserError(f"it calls itself {name!r}, its key is that of {self.names.get(node)!r}")
        old = self.members.get(name)
        if old is not None and old.identity != about["identity"] and old.node in online and old.node != node:
            raise UserError(f"another robot is called {name!r}; start it with another --name")
        statistics = Statistics.from_tensors(unpack(arrays["statistics"]))
        shapes = {statistics.mean.shape, statistics.variance.shape}
        finite = all(math.isfinite(x) for x in [*statistics.mean.flat, *statistics.variance.flat])
        finite = finite and math.isfinite(statistics.floor)
        if len(shapes) != 1 or statistics.mean.ndim != 1 or not finite or min(statistics.variance, default=-1) < 0:
            raise UserError(f"robot {name!r} sent statistics that are not finite vectors of one size")
        if statistics.count < 1:
            raise UserError(f"robot {name!r} has no data")
        sizes = (int(about["observation_size"]), int(about["action_size"]))
        if min(sizes) < 1:
            raise UserError(f"robot {name!r} has observations and actions of sizes {sizes}; both must be at least 1")
        if self.module is not None:
            wanted = (self.plan["observation_size"], self.plan["action_size"])
            width = len(self.module.state_dict()[MEAN])
            if sizes != wanted or len(statistics.mean) != width:
                raise UserError(
                    f"robot {name!r} has observations and actions of sizes {sizes}, {len(statistics.mean)} features; "
                    f"the fleet has {wanted} and {width}"
                )
        self.members[name] = Member(name, str(about["identity"]), node, sizes, statistics)
        back = old is not None and old.identity == about["identity"]
        again = False
        if self._asking:
            self._round.joined.append(name)
            again = back and grid is not None and self._ask_again(grid, self.members[name])
        first = self.next_round + (self._asking and not again)
        self.say(f"robot {name} {'is back' if back else 'joined'}; takes part from round {first}")
        return self.members[name]

    def _settle(self) -> None:
        """Fixes the sizes and the normaliser by what the robots have said, and makes the policy."""
        counts = Counter((member.sizes, len(member.statistics.mean)) for member in self.members.values())
        # The most common sizes; of equally common ones those of the first robot by name.
        order = [(m.sizes, len(m.statistics.mean)) for _, m in sorted(self.members.items())]
        kind = max(counts, key=lambda item: (counts[item], -order.index(item)))
        for name, member in sorted(self.members.items()):
            if (member.sizes, len(member.statistics.mean)) != kind:
                self.say(f"robot {name} is left out: its sizes are {member.sizes}, those of the fleet {kind[0]}")
                del self.members[name]
        self.plan["observation_size"], self.plan["action_size"] = kind[0]
        self._build()
        pooled = Statistics.pool([member.statistics for _, member in sorted(self.members.items())])
        state = self.module.state_dict()
        if len(pooled.mean) != len(state[MEAN]):
            raise UserError(
                f"the robots' statistics are of {len(pooled.mean)} features, the policy that the plan describes has "
                f"{len(state[MEAN])}; the robots must compute the features of the plan"
            )
        with torch.no_grad():
            state[MEAN].copy_(torch.as_tensor(pooled.mean))
            state[STD].copy_(torch.as_tensor(pooled.std))

    def _build(self) -> None:
        sizes = {name: self.plan[name] for name in ("observation_size", "action_size")}
        self.module = self._architecture(**sizes, **self.plan["policy"])
        self._spec = WeightSpec.from_module(self.module)
        if not {MEAN, STD} <= set(self.module.state_dict()):
            raise UserError(f"architecture {self.plan['architecture']!r} has no {MEAN} and {STD}, which robots share")

    # -- a round -------------------------------------------------------------------------------------------------------

    def _message(self, member: Member, arrays: ArrayRecord, config: ConfigRecord) -> Message:
        now, plan = self._round, self.plan
        steps = plan["warmup"] if now.number == 0 else plan["local_steps"]
        step = 0 if now.number == 0 else plan["warmup"] + (now.number - 1) * plan["local_steps"]
        order = {**config, "plan": json.dumps(plan, sort_keys=True), "round": now.number, "step": step, "steps": steps}
        now.nodes[member.node] = member.name
        content = RecordDict({"order": ConfigRecord(order), "arrays": arrays})
        return Message(content, member.node, MessageType.TRAIN, group_id=str(now.number))

    def _push(self, grid: Grid, messages: Iterable[Message]) -> None:
        now = self._round
        for message in messages:
            (name,) = grid.push_messages([message])
            robot = now.nodes[message.metadata.dst_node_id]
            if name:
                now.asked[name] = robot
                now.down += payload(message)
            else:
                self._refuse(now, robot, "it was gone when the round began")

    def _ask(self, grid: Grid, number: int, config: ConfigRecord, timeout: float) -> list[Message]:
        """Sends the orders and collects the replies, until all are there or the time is over."""
        self._config, replies = config, []
        self._push(grid, self.configure_train(number, self.arrays(), config, grid))
        now, end = self._round, time.monotonic() + timeout
        self._asking = True
        while now.asked and time.monotonic() < end:
            found = list(grid.pull_messages(list(now.asked)))
            for reply in found:
                robot = now.asked.pop(reply.metadata.reply_to_message_id, None)
                if reply.metadata.src_node_id in now.nodes:
                    now.replied.add(now.nodes[reply.metadata.src_node_id])
                    replies.append(reply)
                elif robot is not None:  # Flower's own word that it has gone
                    self._refuse(now, robot, "it has gone")
            self._greet(grid)
            if not found:
                time.sleep(self.poll)
        self._asking = False
        for robot in sorted(now.asked.values()):
            self._refuse(now, robot, f"no reply within {timeout:g} s")
        return replies

    def _ask_again(self, grid: Grid, member: Member) -> bool:
        """Gives a robot that was restarted in the middle of a round its order again, unless it has replied."""
        now = self._round
        if member.name not in now.nodes.values() or member.name in now.replied:
            return False
        for name in [name for name, robot in now.asked.items() if robot == member.name]:
            del now.asked[name]
        self._push(grid, [self._message(member, self.arrays(), self._config)])
        return True

    def _refuse(self, now: _Round, robot: str, why: str) -> None:
        now.refused.append({"robot": robot, "why": why})
        self.say(f"round {now.number} goes on without {robot}: {why}")

    def _judge(self, now: _Round, reply: Message) -> None:
        """Accepts a reply, or refuses it with a reason."""
        node = reply.metadata.src_node_id
        robot = now.nodes.get(node) or next((m.name for m in self.members.values() if m.node == node), None)
        if robot is None:
            self._refuse(now, f"node {node}", "it is not known")
            return
        if reply.has_error():
            self._refuse(now, robot, f"it raised {reply.error.reason}")
            return
        now.up += payload(reply)
        try:
            if robot in now.accepted:
                raise UserError("it replied twice; the first reply counts")
            sent = record_of(reply, "result", ConfigRecord).get("round")
            if sent != now.number:
                raise UserError(f"its reply is for round {sent}")
            arrays = record_of(reply, "arrays", ArrayRecord)
            if "weights" not in arrays:
                raise UserError("its reply has no weights")
            now.accepted[robot] = self.check(unpack(arrays["weights"]))
        except _BAD as error:
            self._refuse(now, robot, str(error))
            return
        loss = reply.content.metric_records.get("metrics", {}).get("loss")
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            now.loss[robot] = float(loss)

    def check(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Checks that a robot's weights can be merged.

        Raises:
            UserError: A name, shape or type that the policy does not have, or a value that is not finite.
        """
        wanted = dict(self.module.named_parameters())
        if odd := sorted(set(wanted) ^ set(weights)):
            word = "is missing" if odd[0] in wanted else "is not the policy's"
            raise UserError(f"{odd[0]!r} {word}")
        for name, value in wanted.items():
            if weights[name].shape != value.shape:
                raise UserError(f"{name!r} has shape {list(weights[name].shape)}, the policy's is {list(value.shape)}")
            if weights[name].dtype != value.dtype:
                raise UserError(f"{name!r} is {weights[name].dtype}, the policy's is {value.dtype}")
            if not torch.isfinite(weights[name]).all():
                raise UserError(
                    f"{name!r} has {int((~torch.isfinite(weights[name])).sum())} values that are not finite"
                )
        return dict(weights)

    # -- what stays ----------------------------------------------------------------------------------------------------

    def _record(self, number: int, metrics: MetricRecord | None, wire: tuple[int, int] | None) -> None:
        now = self._round
        seconds = time.monotonic() - now.began
        robots = sorted(now.accepted)
        facts = {
            "round": number,
            "merged": metrics is not None,
            "robots": robots,
            "refused": now.refused,
            "joined": now.joined,
            "loss": now.loss,
            "metrics": dict(metrics or {}),
            "bytes_down": now.down,
            "bytes_up": now.up,
            "seconds": round(seconds, 3),
        }
        if wire is not None:
            facts["http_bytes_since_start"] = {"down": wire[0], "up": wire[1]}
        if self.run is not None:
            again = "" if metrics is not None else "-failed"
            write_json(self.run.path / "rounds" / f"{number:05d}{again}.json", facts)
        if metrics is not None:
            loss = f", loss {metrics['loss']:.4f}" if "loss" in metrics else ""
            absent = sorted({item["robot"] for item in now.refused} - set(robots))
            without = f", without {', '.join(absent)}" if absent else ""
            self.say(
                f"round {number}: merged {', '.join(robots)}{without}{loss}"
                f" ({now.down:,} bytes down, {now.up:,} up, {seconds:.1f} s)"
            )

    def _save(self, metrics: MetricRecord) -> None:
        """Writes the checkpoint and then the state, which is what a resume goes on from."""
        if self.run is None:
            return
        number = self.next_round - 1
        self.run.log(number, **{name: float(value) for name, value in metrics.items()})
        info: dict[str, Any] = {
            "metrics": dict(metrics),
            "fleet": {"round": number, "robots": sorted(self._round.accepted), "merger": self.merger},
        }
        if self.plan.get("tasks"):
            info["task_set"] = list(self.plan["tasks"])
        self.run.save_checkpoint("last", self.module, info=info)
        tensors = {f"weights/{name}": value for name, value in self.module.state_dict().items()}
        known = {}
        for name, member in self.members.items():
            tensors |= {f"robot/{name}/{key}": value for key, value in member.statistics.to_tensors().items()}
            known[name] = {"identity": member.identity, "sizes": list(member.sizes)}
        self.run.save_state(number, tensors, {"plan": self.plan, "robots": known})

    def _restore(self) -> None:
        saved = self.run.load_state() if self.run is not None else None
        if saved is None:
            return
        number, tensors, meta = saved
        fresh = {key: value for key, value in meta["plan"].items() if key not in ("observation_size", "action_size")}
        if fresh != json.loads(json.dumps(self.plan)):
            raise UserError(f"{self.run.path} is the state of a fleet with another plan")
        self.plan = meta["plan"]
        self._build()
        self.module.load_state_dict(
            {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
        )
        for name, facts in meta["robots"].items():
            prefix = f"robot/{name}/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            statistics = Statistics.from_tensors(own)
            self.members[name] = Member(name, facts["identity"], None, tuple(facts["sizes"]), statistics)
        self._merged, self.next_round = True, number + 1
        self.say(f"going on after round {number}; known robots: {', '.join(sorted(self.members))}")

    def _dismiss(self, grid: Grid, last: int, seconds: float = 10.0) -> None:
        """Gives every connected robot the last policy, and waits a little for their thanks."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:  # after a resume they may still be on their way
            self._greet(grid)
            if {member.node for member in self.members.values()} <= set(grid.get_node_ids()):
                break
            time.sleep(self.poll)
        messages = list(self.configure_train(last + 1, self.arrays(), ConfigRecord(), grid))
        pending = set()
        for message in messages:
            message.metadata.message_type = FINISHED
            pending |= {name for name in grid.push_messages([message]) if name}
        while pending and time.monotonic() < end:
            pending -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(pending)}
            time.sleep(self.poll)
