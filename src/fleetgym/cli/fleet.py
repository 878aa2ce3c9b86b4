"""``fleetgym fleet server`` and ``fleetgym fleet client``: fleet merging across machines."""

from __future__ import annotations

import dataclasses
import ipaddress
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fleetgym.cli.options import parse
from fleetgym.core.errors import UserError, unknown

SIDES = {
    "server": "merge the weights of robots that connect",
    "client": "train one robot on its own demonstrations, in a fleet",
}


@dataclass
class Server:
    """Merge the weights of robots that connect, round by round; their data stays with them."""

    out: Path
    """Folder of the run: checkpoints, a record of each round, state to go on from."""

    listen: str = "127.0.0.1:9092"
    """HOST:PORT that robots connect to; 0.0.0.0:9092 for all of this machine's networks."""

    rounds: int = 100
    """Merges after the first."""

    warmup: int = 20
    """Gradient steps of each robot alone before the first merge."""

    local_steps: int = 20
    """Gradient steps of each robot between merges."""

    merger: str = "fleet_merge"
    """A merger that `fleetgym list mergers` prints and that needs nothing beside weights."""

    matcher: str | None = None
    """How the merger aligns: frank_wolfe, lap, git_rebasin or sinkhorn; the merger's own choice by default."""

    min_robots: int = 2
    """Robots that a round takes at least; with fewer it waits."""

    start_robots: int | None = None
    """Robots to wait for before the first round; --min-robots by default. Later ones join at the next round."""

    timeout: float = 600.0
    """Seconds that robots have for a round; those that are late are left out of it."""

    tasks: tuple[str, ...] = ()
    """The fleet's tasks: the policy sees a one-hot of them beside its observation, and each robot does one."""

    differences: Literal["auto", "meta_world", "none"] = "auto"
    """Offsets between positions that the policy sees too: auto takes Meta-World's when all --tasks are of it."""

    cell: Literal["gru", "lstm", "rnn", "mlp"] = "gru"
    """Core of the policy."""

    hidden: int = 64
    """Width of every hidden layer."""

    layers: int = 1
    """Layers of the core."""

    action_range: tuple[float, float] | None = (-1.0, 1.0)
    """What the policy's actions are clipped to."""

    batch_size: int = 2
    """Episodes a robot draws for a gradient step."""

    learning_rate: float = 2e-3
    """Adam's step size at the beginning; it falls to 1% along half a cosine."""

    seed: int = 0
    """Of the robots' initial weights and draws."""

    certificate: Path | None = None
    """PEM file with this server's certificate (chain); robots then connect by TLS."""

    certificate_key: Path | None = None
    """PEM file with the certificate's private key."""

    robot_keys: Path | None = None
    """Folder with NAME.pub for each robot that may take part (`ssh-keygen -t ecdsa`); needs --certificate."""

    resume: bool = False
    """Go on in a folder that exists, after the last finished round."""


@dataclass
class Client:
    """Train one robot of a fleet on its own demonstrations, whenever the server asks; only weights are sent."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATASET ...")]
    """Folders of demonstrations, as `fleetgym collect` writes them."""

    out: Path
    """Folder of this robot's state and, at the end, of the fleet's policy."""

    name: str
    """The robot's name; each robot of a fleet has its own."""

    server: str = "127.0.0.1:9092"
    """HOST:PORT of the server."""

    task: str | None = None
    """Which of the fleet's tasks this robot does; by default what the demonstrations note."""

    root_certificate: Path | None = None
    """PEM file of the authority that signed the server's certificate; TLS is spoken if it is given."""

    key: Path | None = None
    """This robot's private key (`ssh-keygen -t ecdsa`), for a server that has --robot-keys."""

    wait: float = 60.0
    """Seconds to try to reach the server, at the start and whenever it is lost."""

    device: str = "cpu"
    """cpu or cuda."""

    resume: bool = False
    """Go on in a folder that exists."""


def main(argv: Sequence[str]) -> int:
    """Runs the side that the first word names."""
    names = ", ".join(SIDES)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<6}  {text}" for name, text in SIDES.items()]
        print("usage: fleetgym fleet SIDE [options]\n\n" + "\n".join(lines))
        print("\nfleetgym fleet SIDE --help   its options")
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"fleetgym fleet SIDE: the side comes before {argv[0]!r}; it is one of: {names}")
    if argv[0] not in SIDES:
        raise unknown("side of a fleet", argv[0], SIDES)
    if argv[0] == "server":
        return _server(parse(Server, argv[1:], "fleet server"))
    return _client(parse(Client, argv[1:], "fleet client"))


def _say(line: str) -> None:
    print(line, flush=True)


def _plan(options: Server) -> dict[str, Any]:
    """What the robots are told."""
    from fleetgym.agents.networks import META_WORLD_DIFFERENCES, RecurrentPolicy

    for name in ("rounds", "warmup", "local_steps", "batch_size", "learning_rate", "hidden", "layers", "timeout"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be positive")
    if len(set(options.tasks)) < len(options.tasks):
        raise UserError(f"--tasks {' '.join(options.tasks)}: a task stands there twice")
    differences = options.differences == "meta_world"
    if options.differences == "auto" and options.tasks:
        from fleetgym.envs import suite

        differences = set(options.tasks) <= set(suite("meta_world").tasks)
    low, high = options.action_range or (None, None)
    policy = {
        "cell": options.cell,
        "hidden": options.hidden,
        "layers": options.layers,
        "differences": [list(d) for d in META_WORLD_DIFFERENCES] if differences else [],
        "action_low": low,
        "action_high": high,
    }
    return {
        "architecture": RecurrentPolicy.architecture,
        "policy": policy,
        "imitation": {
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "final_learning_rate": options.learning_rate / 100,
        },
        "tasks": list(options.tasks),
        "warmup": options.warmup,
        "local_steps": options.local_steps,
        "rounds": options.rounds,
        "seed": options.seed,
    }


def _server(options: Server) -> int:
    from fleetgym.core.optional import require

    require("fleet")
    from fleetgym.core.run import Run
    from fleetgym.core.seeding import seed_everything
    from fleetgym.merging.federated import FleetMerge
    from fleetgym.merging.fleet_link import check_server_certificate, parse_address, public_keys, serve
    from fleetgym.merging.mergers import check_merger

    host, _ = parse_address(options.listen)
    chosen = {} if options.matcher is None else {"matcher": options.matcher}
    check_merger(options.merger, chosen)
    if (options.certificate is None) != (options.certificate_key is None):
        raise UserError("--certificate and --certificate-key go together: the file and its private key")
    if options.certificate is not None:
        check_server_certificate(options.certificate, options.certificate_key)
    keys = None
    if options.robot_keys is not None:
        if options.certificate is None:
            raise UserError("--robot-keys needs --certificate: keys without TLS would prove nothing about what is sent")
        keys = public_keys(options.robot_keys)
        least = options.start_robots or options.min_robots
        if len(keys) < least:
            raise UserError(f"--robot-keys {options.robot_keys} has {len(keys)} keys, {least} robots are waited for")
    plan = _plan(options)
    seed_everything(options.seed)
    local = ("out", "resume", "listen", "certificate", "certificate_key", "robot_keys", "timeout")
    config = {k: v for k, v in dataclasses.asdict(options).items() if k not in local}
    with Run.open(
        options.out, {"system": "fleet server", **config}, resume=options.resume, name="fleet", tensorboard=False
    ) as run:
        strategy = FleetMerge(
            plan,
            merger=options.merger,
            options=chosen,
            min_robots=options.min_robots,
            start_robots=options.start_robots,
            run=run,
            say=_say,
        )
        with serve(
            options.listen,
            certificate=options.certificate,
            certificate_key=options.certificate_key,
            robot_keys=keys,
        ) as (grid, names):
            strategy.names = names if keys is not None else None
            _say(f"listening on {options.listen}{' (TLS)' if options.certificate else ''}")
            if options.certificate is None and not _is_loopback(host):
                print(
                    "warning: no --certificate, so whoever is on the way can read and change weights", file=sys.stderr
                )
            if keys is None and not _is_loopback(host):
                print("warning: no --robot-keys, so whoever reaches this port can take part", file=sys.stderr)
            strategy.start(grid, timeout=options.timeout)
    _say(f"done after {options.rounds + 1} merges; written to {options.out / 'checkpoints' / 'last'}")
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _client(options: Client) -> int:
    from fleetgym.core.optional import require

    require("fleet")
    if not options.datasets:
        raise UserError("no dataset: name at least one folder, such as one that `fleetgym collect` wrote")
    if not options.wait > 0:
        raise UserError(f"--wait {options.wait}: it must be positive")
    import torch

    from fleetgym.agents.robot import CloningRobot
    from fleetgym.core.demonstrations import Demonstrations
    from fleetgym.core.run import Run
    from fleetgym.merging.federated import check_name, client_app
    from fleetgym.merging.fleet_link import parse_address, private_key, read_file, work

    parse_address(options.server)
    check_name(options.name)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: no such device here; `fleetgym doctor` lists what there is")
    if options.root_certificate is not None:
        read_file(options.root_certificate, "the certificate", "--root-certificate")
        _check_authority(options.root_certificate)
    key = None
    if options.key is not None:
        if options.root_certificate is None:
            raise UserError("--key needs TLS: give the --root-certificate of the server")
        key = private_key(options.key)
    demonstrations = Demonstrations.concatenate([Demonstrations.load(path) for path in options.datasets])
    config = {
        "system": "fleet client",
        "name": options.name,
        "task": options.task,
        "datasets": [path.name for path in options.datasets],
    }
    with Run.open(options.out, config, resume=options.resume, name=options.name, tensorboard=False) as run:
        robot = CloningRobot(options.name, demonstrations, run, task=options.task, device=options.device)
        reasons: list[str] = []
        work(
            options.server,
            client_app(robot, reasons.append),
            lambda: robot.finished or bool(reasons),
            root_certificate=options.root_certificate,
            key=key,
            wait=options.wait,
            say=lambda line: _say(f"{options.name}: {line}"),
        )
    if reasons:
        raise UserError(f"the server at {options.server} does not take robot {options.name!r}: {reasons[0]}")
    _say(f"{options.name}: the fleet's policy is in {options.out / 'checkpoints' / 'last'}")
    return 0


def _check_authority(path: Path) -> None:
    import ssl

    try:
        ssl.create_default_context(cafile=str(path))
    except ssl.SSLError:
        raise UserError(f"--root-certificate {path} is not a PEM certificate; give that of the authority") from None
