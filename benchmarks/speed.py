"""``fleetgym bench speed``: us beside a peer, in one process, in turn, with the ratio.

Each comparison runs A B A B ...; the ratio is the median of the pairs' ratios, so that a machine whose speed drifts
disturbs both sides alike. Seconds are processor seconds of one thread, or seconds on the clock where a side works on an
accelerator.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import write_json
from fleetgym.core.optional import install_line, installed, require
from fleetgym.core.records import provenance


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same work.

    Attributes:
        unit: What is counted.
        count: How many of them a call does.
        ours: Does the work once.
        peer: The same work, the peer's way.
        peer_name: Who the peer is.
        peer_count: How many of the units the peer's call does, if not as many; a fast side needs more of them to be
            measured.
        about: What is compared, where a comparison has several rows.
        device: Where our side works.
        unit_bytes: Bytes that one of our units writes, where the peer copies memory and its units are bytes read and
            written; the ratio is then one of bytes a second.
        before_peer: Called before each of the peer's calls, off the clock.
        results: What is reached, where the sides reach different things: its name, ours, the peer's.
        period: Seconds of the unit of time that a line counts in: 1, or 60 for a minute.
    """

    unit: str
    count: int
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    peer_name: str
    peer_count: int | None = None
    about: str = ""
    device: str = "cpu"
    unit_bytes: int = 1
    before_peer: Callable[[], Any] | None = None
    results: tuple[str, Callable[[], float], Callable[[], float]] | None = None
    period: int = 1


def meta_world() -> Comparison:
    """Steps of pick-place with random actions, resets among them, beside upstream's class."""
    import warnings

    from fleetgym.envs import suite

    steps = 300
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 4)).astype(np.float32)
    env = suite("meta_world").make("pick-place-v3")

    def ours() -> None:
        env.reset(seed=0)
        for action in actions:
            env.step(action)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        upstream = ALL_V3_ENVIRONMENTS["pick-place-v3"]()
    upstream._partially_observable, upstream._freeze_rand_vec, upstream._set_task_called = False, False, True
    upstream.seeded_rand_vec = True
    upstream.__dict__.pop("sawyer_observation_space", None)

    def peer() -> None:
        upstream.seed(0)
        upstream.reset()
        for action in actions:
            upstream.step(action)

    return Comparison("environment steps", steps, ours, peer, "metaworld")


#: What makes an environment for robosuite, whose versions clash with those of the rest, and measures in it.
ROBOSUITE = (
    "python -m venv robosuite-env && robosuite-env/bin/pip install robosuite==1.5.2 mujoco==3.3.0 'numpy<2' numba "
    "gymnasium scipy torch tyro, then in a checkout: PYTHONPATH=src robosuite-env/bin/python -m fleetgym bench speed "
    "--only fleet_tools"
)


def fleet_tools() -> list[Comparison]:
    """Steps of the tool-use tasks beside robosuite's with its Panda: Lift, and the nut assembly with one round nut.

    All of it as in robosuite: 20 control steps a second, 25 time steps of 2 ms each, random actions, no cameras,
    a reset every 100 steps. robosuite's Panda has its operational-space controller for poses (its default for this arm,
    computed anew in every time step), a gripper that moves and meshes for links; ours has position servos, inverse
    kinematics once a control step, a tool that is part of the hand, and primitives. So the ratio says what an
    environment step costs, and not which of two codes does the same work faster. The last rows have our own time step
    of 4 ms and control step of 80 ms beside the same peer.

    Without robosuite there is nothing to compare: our figures are printed, and how to get it.
    """
    import importlib.util

    from fleetgym.envs.fleet_tools.env import FleetToolsEnv

    steps = 100
    generator = np.random.default_rng(0)

    def walker(env: Any, low: Any, high: Any, seeded: bool, episodes: int) -> Callable[[], None]:
        actions = generator.uniform(low, high, (steps, len(low)))

        def work() -> None:
            for episode in range(episodes):
                if seeded:
                    env.reset(seed=episode)
                else:
                    env.reset()
                for action in actions:
                    env.step(action)

        return work

    episodes = 10
    same = {"timestep": 0.002, "control_step": 0.05}
    ours = []
    for task, arm, options in (
        ("Hammer", "panda", same),
        ("Wrench", "panda", same),
        ("Knife", "panda", same),
        ("Hammer", "hand", same),
        ("Knife", "panda", {}),
        ("Knife", "hand", {}),
    ):
        env = FleetToolsEnv(task, arm=arm, **options)
        times = f"{1000 * env.timestep:.0f} ms x {env.substeps}"
        about = f"{task}, {'full arm' if arm == 'panda' else 'hand alone'}, {times}"
        low, high = env.action_space.low, env.action_space.high
        ours.append((about, walker(env, low, high, True, episodes)))

    if importlib.util.find_spec("robosuite") is None:
        for about, work in ours:
            work()
            began = time.process_time()
            work()
            rate = steps * episodes / (time.process_time() - began)
            print(f"fleet_tools ({about}): {rate:.4g} environment steps a CPU-second")
        print(f"robosuite, the peer, is missing here, and needs an environment of its own: {ROBOSUITE}")
        return []

    import robosuite
    from robosuite.controllers import load_composite_controller_config

    controller = load_composite_controller_config(controller=None, robot="Panda")
    peers = []
    for task in ("Lift", "NutAssemblyRound"):
        env = robosuite.make(
            task,
            robots="Panda",
            controller_configs=controller,
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=20,
            ignore_done=True,
            hard_reset=False,
        )
        name = f"robosuite {robosuite.__version__} {task} with {controller['body_parts']['right']['type']}"
        peers.append((name, walker(env, *env.action_spec, False, 1)))
    return [
        Comparison("environment steps", steps * episodes, work, peer, name, steps, f"{about}, beside {name.split()[2]}")
        for about, work in ours
        for name, peer in (peers if about.startswith("Hammer, full") else peers[:1])
    ]


def fleet_training() -> Comparison:
    """A gradient step of five GRU policies on five robots' episodes, beside five ``nn.GRU`` networks in a loop."""
    from fleetgym.agents.networks import PolicyStack, RecurrentPolicy, masked_mse

    torch.manual_seed(0)
    robots, batch, steps = 5, 8, 90
    policies = [RecurrentPolicy(44, 4) for _ in range(robots)]
    stack = PolicyStack(policies)
    x, y = torch.randn(robots, batch, steps, 44), torch.randn(robots, batch, steps, 4)
    mask = torch.ones(robots, batch, steps)

    def ours() -> None:
        stack.zero_grad()
        masked_mse(stack(x), y, mask).sum().backward()

    def peer() -> None:
        for n, policy in enumerate(policies):
            policy.zero_grad()
            masked_mse(policy(x[n])[0], y[n], mask[n]).backward()

    return Comparison("gradient steps of a fleet of 5", 1, ours, peer, "torch.nn.GRU, one robot after the other")


class _Block(nn.Module):
    """Two 3x3 convolutions and a path around them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.around = nn.Sequential()
        if before != after:
            self.around = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, before, H, W] -> [B, after, H', W']
        """Applies the block."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.around(x))


class ResNet18(nn.Module):
    """The residual network of He et al. (2016) with 18 layers, for small pictures (3x3 stem, no pooling behind it).

    Args:
        classes: Logits.
        channels: Of the first of the four stages; each of the others has twice those of the one before it.
    """

    def __init__(self, classes: int = 10, channels: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        sizes = [channels * factor for factor in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in zip(sizes, sizes[1:])))
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 3, H, W] -> [B, classes]
        """Gives the classes' logits."""
        return self.head(self.blocks(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


def _pair(make: Callable[[], nn.Module]) -> list[nn.Module]:
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(make().eval())
    return made


def matching(cells: Sequence[int] = (64, 128, 256), width: int = 512, channels: int = 64) -> list[Comparison]:
    """Aligning two networks by Frank-Wolfe: beside the Sinkhorn operator, and beside weight matching in PyTorch.

    The peer of the last is ``rebasin`` (PyPI), which restates Git Re-Basin's coordinate descent for PyTorch; its
    tracing is not counted. Each row says the squared distance that either side ends at.

    Args:
        cells: Hidden sizes of the GRU policies, one row each.
        width: Of the hidden layers of the MLP.
        channels: Of the first stage of the ResNet-18.

    Raises:
        UserError: ``rebasin`` is not installed.
    """
    require("bench")
    import copy
    from importlib.metadata import version

    from rebasin import PermutationCoordinateDescent

    from fleetgym.agents.networks import RecurrentPolicy
    from fleetgym.core.weights import WeightSpec
    from fleetgym.merging.matching import match

    rows = []

    def distance(work: Callable[[], Any]) -> float:
        return work().distance_after

    for hidden in cells:
        policies = _pair(lambda hidden=hidden: RecurrentPolicy(44, 4, hidden=hidden))
        spec, states = WeightSpec.from_module(policies[0]), [policy.state_dict() for policy in policies]
        sides = [
            lambda m=m, spec=spec, states=states: match(spec, *states, method=m) for m in ("frank_wolfe", "sinkhorn")
        ]
        rows.append(
            Comparison(
                "alignments",
                1,
                *sides,
                "our own sinkhorn matcher",
                about=f"GRU-{hidden}",
                results=("squared distance", *(functools.partial(distance, side) for side in sides)),
            )
        )

    def mlp() -> nn.Module:
        sizes = (784, width, width, width)
        layers = [part for i, o in zip(sizes, sizes[1:]) for part in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    for name, make, example in (
        (f"MLP 784-{width}-{width}-{width}-10", mlp, torch.zeros(2, 784)),
        ("ResNet-18", lambda: ResNet18(channels=channels), torch.zeros(2, 3, 32, 32)),
    ):
        a, b = _pair(make)
        spec = WeightSpec.from_module(a, example)
        # A fresh one for each call, made beforehand: tracing is not what is compared, and a second call would be free.
        fresh: list[tuple[Any, nn.Module]] = []

        def prepare(a: nn.Module = a, b: nn.Module = b, example: Any = example, fresh: list = fresh) -> None:
            other = copy.deepcopy(b)
            fresh.append((PermutationCoordinateDescent(a, other, example), other))

        def peer(spec: Any = spec, a: nn.Module = a, fresh: list = fresh) -> float:
            descent, other = fresh.pop()
            torch.manual_seed(0)
            descent.rebasin()
            return spec.distance(a.state_dict(), other.state_dict())

        def ours(spec: Any = spec, a: nn.Module = a, b: nn.Module = b) -> Any:
            return match(spec, a.state_dict(), b.state_dict())

        def peer_distance(prepare: Callable = prepare, peer: Callable = peer) -> float:
            prepare()
            return peer()

        rows.append(
            Comparison(
                "alignments",
                1,
                ours,
                peer,
                f"PyPI's rebasin {version('rebasin')} (weight matching)",
                about=name,
                before_peer=prepare,
                results=("squared distance", functools.partial(distance, ours), peer_distance),
            )
        )
    return rows


def office_nav(
    device: str = "cpu", batch: int = 1024, tensor_batch: int = 4096, copied: int = 1 << 27
) -> list[Comparison]:
    """Steps of OfficeNav beside Minigrid's: symbols and pixels in a batch, one environment; and as tensors on a device.

    Minigrid has no batches of its own, so its steps are those of one environment in a loop, made by ``gym.make``;
    ``RGBImgPartialObsWrapper(tile_size=8)`` gives it the same 56x56x3 pixels. Episodes that end are reset. Its tasks
    are the ones that come nearest: four rooms, and a corridor whose end must be remembered.

    Tensors stand beside the native vector environment, with all that it returns; and, with signs by index and without
    last observations, beside the device's own memory. That counts the bytes of ``image`` alone that are written (9,408
    a step of pixels, 147 of symbols), over the bytes read and written by copies. The 3D office has no peer
    that needs no OpenGL, and stands beside itself.

    Args:
        device: Of the tensors.
        batch: Environments of a native vector environment beside Minigrid.
        tensor_batch: Environments of tensors; an accelerator has 16 times as many beside its memory.
        copied: Bytes that a copy reads, and writes; the caches should not hold them.

    Raises:
        UserError: Minigrid is not installed, or the device is not there.
    """
    require("bench")
    import gymnasium as gym
    from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper

    from fleetgym.envs.office_nav.torch_env import TorchOfficeNav

    TorchOfficeNav(1, device, "OfficeNav-Symbolic-v0")  # refuses a device that cannot be used
    generator = np.random.default_rng(0)
    memory_batch, peer_steps = tensor_batch * (1 if device == "cpu" else 16), 400
    views = {"symbols": ("OfficeNav-Symbolic-v0", 256, 7 * 7 * 3), "pixels": ("OfficeNav-v0", 64, 56 * 56 * 3)}

    def stepper(env: gym.Env, number: int) -> Callable[[], None]:
        actions = generator.choice([0, 1, 2, 2, env.unwrapped.action_space.n - 1], size=number).tolist()
        env.reset(seed=0)

        def work() -> None:
            for action in actions:
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()

        return work

    def walker(env: Any, steps: int) -> Callable[[], None]:
        actions = generator.choice([0, 1, 2, 2, 3], size=(steps, env.num_envs))
        if isinstance(env, TorchOfficeNav):
            actions = torch.as_tensor(actions, device=env.device)
        env.reset(seed=0)

        def work() -> None:
            for action in actions:
                env.step(action)

        return work

    rows = []
    for peer_id in ("MiniGrid-FourRooms-v0", "MiniGrid-MemoryS13-v0"):
        peers = {
            "symbols": gym.make(peer_id),
            "pixels": ImgObsWrapper(RGBImgPartialObsWrapper(gym.make(peer_id), tile_size=8)),
        }
        name = f"minigrid {peer_id}"
        for view, (env_id, steps, _) in views.items():
            rows.append(
                Comparison(
                    "environment steps",
                    steps * batch,
                    walker(gym.make_vec(env_id, num_envs=batch), steps),
                    stepper(peers[view], peer_steps),
                    name if view == "symbols" else f"{name} with pixels",
                    peer_steps,
                    f"{view}, {batch} environments, beside {peer_id}",
                )
            )
        rows.append(
            Comparison(
                "environment steps",
                4 * peer_steps,
                stepper(gym.make("OfficeNav-Symbolic-v0"), 4 * peer_steps),
                stepper(peers["symbols"], peer_steps),
                name,
                peer_steps,
                f"symbols, gym.make, beside {peer_id}",
            )
        )
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    where = "the CPU" if device == "cpu" else device
    for view, (env_id, steps, size) in views.items():
        rows.append(
            Comparison(
                "environment steps",
                steps * tensor_batch,
                walker(TorchOfficeNav(tensor_batch, device, env_id), steps),
                walker(gym.make_vec(env_id, num_envs=tensor_batch), steps),
                "our native vector environment",
                about=f"{view}, tensors on {where}, {tensor_batch} environments",
                device=device,
            )
        )
        plain = TorchOfficeNav(memory_batch, device, env_id, sign="index", final_obs=False)
        rows.append(
            Comparison(
                "environment steps",
                steps * memory_batch,
                walker(plain, steps),
                lambda: target.copy_(source),
                "bytes read and written by a copy",
                2 * len(source),
                f"{view}, tensors on {where}, {memory_batch} environments, beside its memory",
                device,
                size,
            )
        )
    rows.append(
        Comparison(
            "frames",
            32 * (batch // 4),
            walker(gym.make_vec("OfficeNav3D-v0", num_envs=batch // 4), 32),
            stepper(gym.make("OfficeNav3D-v0"), peer_steps),
            "the same by gym.make, one environment",
            peer_steps,
            f"OfficeNav3D, 60x80 pixels, {batch // 4} environments",
        )
    )
    return rows


def _peak_bytes(work: Callable[[], Any], device: str) -> float:
    """The most memory of tensors that a call holds at one time beyond what is held before it, in bytes."""
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _differentiated(layer: nn.Module, inputs: Sequence[torch.Tensor], apply: Callable[[], Sequence[torch.Tensor]]):
    """A call of a layer forward and backward: gradients of inputs and parameters from given ones of the outputs."""
    wanted = [*inputs, *layer.parameters()]
    with torch.no_grad():
        given = [torch.randn_like(out) for out in apply()]

    def work() -> None:
        torch.autograd.grad(apply(), wanted, given)

    return work


def functionals(device: str = "cpu") -> list[Comparison]:
    """Layers of networks that read weights, forward and backward, beside nfn's (PyPI, 0.1.2, of the papers' authors).

    The weights are 64 SIRENs' (2-32-32-1) with 64 channels, random numbers; gradients of inputs and of parameters are
    taken, and float32 is the type of both. nfn's attention and normalisation are what its experiments use. nfn has no
    layer for recurrent networks: UNF for a GRU (16 inputs, 64 units, 16 of them with 16 channels), whose gates are
    tensors of their own as in the paper, stands beside the same basis term by term, as its Algorithm 1 has it.

    Each row says the most megabytes that tensors take at one time beyond weights, features and incoming gradients, of
    ours and of the peer's (torch's profiler of memory, or its count on the accelerator).

    The last rows stand beside the device's own memory: of each feature are counted the bytes that must be read and
    written, 8 forward (input, output) and 12 backward (both inputs, and the result). A CPU has 64 networks there, an
    accelerator 1,024, which its caches do not hold.

    Args:
        device: Where the tensors are.

    Raises:
        UserError: nfn is not installed, or the device is not there.
    """
    try:
        from nfn import layers as peers
        from nfn.common import WeightSpaceFeatures, network_spec_from_wsfeat
    except ImportError as error:
        raise UserError(f"nfn is missing (a peer of functionals); install it with: {install_line('bench')}") from error

    from fleetgym.core.weights import Axis, WeightSpec
    from fleetgym.merging.functionals import NFAttention, NFLinear, NFNorm, UNFLinear, WeightBatch
    from fleetgym.merging.functionals.layout import Layout
    from fleetgym.merging.functionals.norm import NFBlock
    from fleetgym.merging.functionals.reference import TermByTerm

    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch finds no CUDA device here")
    torch.manual_seed(0)
    batch, channels, widths = 64, 64, (2, 32, 32, 1)
    chain = [part for i, o in zip(widths, widths[1:]) for part in (nn.Linear(i, o), nn.ReLU())][:-1]
    spec = WeightSpec.from_module(nn.Sequential(*chain), torch.zeros(1, widths[0]))
    free, fixed = Layout.of(spec.free("in", "out")), Layout.of(spec.fix("in", "out"))

    def features(layout: Layout, batch: int = batch, channels: int = channels) -> WeightBatch:
        return WeightBatch(layout, torch.randn(batch, layout.size, channels, device=device, requires_grad=True))

    def ours_of(layer: nn.Module, x: WeightBatch) -> Callable[[], None]:
        layer.to(device)
        return _differentiated(layer, [x.data], lambda: [layer(x).data])

    theirs = WeightSpaceFeatures(
        [torch.randn(batch, channels, o, i, device=device, requires_grad=True) for i, o in zip(widths, widths[1:])],
        [torch.randn(batch, channels, o, device=device, requires_grad=True) for o in widths[1:]],
    )
    peer_spec = network_spec_from_wsfeat(theirs)

    def peer_of(layer: nn.Module) -> Callable[[], None]:
        def apply() -> Sequence[torch.Tensor]:
            made = layer(theirs)
            return made.weights + made.biases

        layer.to(device)
        return _differentiated(layer, theirs.weights + theirs.biases, apply)

    def block(layout: Layout) -> nn.Module:
        return NFBlock(NFLinear(layout, channels, channels, symmetry=None), NFNorm(layout, channels))

    x = {free: features(free), fixed: features(fixed)}
    peer_block = nn.Sequential(
        peers.NPLinear(peer_spec, channels, channels),
        peers.SimpleLayerNorm(peer_spec, channels),
        peers.TupleOp(nn.ReLU()),
    )
    pairs = [
        ("NP", free, NFLinear(free, channels, channels, None), peers.NPLinear(peer_spec, channels, channels)),
        ("HNP", fixed, NFLinear(fixed, channels, channels, None), peers.HNPLinear(peer_spec, channels, channels)),
        ("normalisation", free, NFNorm(free, channels), peers.SimpleLayerNorm(peer_spec, channels)),
        ("NP, normalisation, ReLU", free, block(free), peer_block),
        ("attention", free, NFAttention(free, channels, 8), peers.NPAttention(peer_spec, channels, 8)),
    ]
    rows = []

    def row(about: str, ours: Callable[[], None], peer: Callable[[], None], peer_name: str, number: int) -> None:
        peak = [lambda work=work: _peak_bytes(work, device) / 1e6 for work in (ours, peer)]
        rows.append(
            Comparison(
                "networks", number, ours, peer, peer_name, about=about, device=device, results=("peak MB", *peak)
            )
        )

    for about, layout, layer, peer in pairs:
        row(about, ours_of(layer, x[layout]), peer_of(peer), f"nfn's {type(peer).__name__}", batch)

    gates = {f"{name}_{gate}": axes for gate in "rzn" for name, axes in (("w", "h in"), ("u", "h h"))}
    gates |= {f"{name}_{gate}": "h" for gate in "rzn" for name in ("b", "c")}
    axes = {key: tuple(Axis(name) for name in names.split()) for key, names in gates.items()}
    recurrent = Layout.of(WeightSpec(axes, {"h": 64, "in": 16}))
    y = features(recurrent, 16, 16)
    layer = UNFLinear(recurrent, 16, 16)
    terms = ours_of(TermByTerm(layer), y)
    row(f"UNF for a GRU, {layer.terms} terms", ours_of(layer, y), terms, "the same term by term", 16)

    many = batch if device == "cpu" else 1024
    source = torch.ones(1 << 27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wide = features(free, many)
    for about, _, layer, _ in pairs[:1] + pairs[2:4]:
        rows.append(
            Comparison(
                "features",
                many * free.size * channels,
                ours_of(layer, wide),
                lambda: target.copy_(source),
                "bytes read and written by a copy",
                2 * len(source),
                f"{about}, {many} networks, beside its memory",
                device,
                20,
            )
        )
    return rows


def sirens() -> Comparison:
    """SIRENs (2-32-32-1) fitted to digits of 28 x 28 to at least 38 dB in the mean, beside torch's way.

    The peer differentiates the same networks by autograd, a batch of matrices a layer, and steps with
    ``torch.optim.Adam``: 60 steps of 5e-3, which of the step sizes 1e-3, 3e-3, 5e-3 and 1e-2 is the first to reach
    38 dB. Ours are the 40 steps that ``fit_sirens`` takes unless told otherwise. Mean decibels are printed.
    """
    from fleetgym.benchmarks.zoos.images import mnist
    from fleetgym.envs.fields.siren import Siren, fit_sirens, places

    count, few = 250, 25
    images = mnist()[0][:: 5000 // count]
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = float(fit_sirens(images, progress=False).psnr.mean())

    def peer() -> None:
        torch.manual_seed(0)
        networks = [Siren() for _ in range(few)]
        weights = [nn.Parameter(torch.stack(same).detach()) for same in zip(*(n.parameters() for n in networks))]
        optimizer = torch.optim.Adam(weights, lr=5e-3)
        at, wanted = places((28, 28)).expand(few, -1, -1), images[:few].flatten(1)[..., None]

        def error() -> torch.Tensor:
            x = at
            for i, (weight, bias) in enumerate(zip(weights[::2], weights[1::2])):
                x = torch.baddbmm(bias[:, None], x, weight.mT)
                x = torch.sin(30 * x) if i < 2 else x
            return (x - wanted).square().mean((1, 2))

        for _ in range(60):
            optimizer.zero_grad()
            error().sum().backward()
            optimizer.step()
        with torch.no_grad():
            found["peer"] = float(-10 * error().log10().mean())

    results = ("mean dB", lambda: found["ours"], lambda: found["peer"])
    return Comparison("SIRENs", count, ours, peer, "autograd and torch.optim.Adam", few, results=results)


def grasping_captures(count: int, size: int, views: int, more: int, seed: int = 0) -> tuple[list[Any], np.ndarray]:
    """What a palm camera sees of objects on a table on its way down to them.

    Args:
        count: Scenes.
        size: Pixels along a side.
        views: Pictures a scene, over the last 0.15 m, each up to 3 cm and 0.2 rad off the way.
        more: Further poses a scene, drawn alike.
        seed: Of the poses.

    Returns:
        Captures, of which nothing is masked, and the further poses [count, more, 4, 4].
    """
    import gymnasium as gym

    import fleetgym.envs  # noqa: F401
    from fleetgym.core import se3
    from fleetgym.envs.fields.captures import Capture, Intrinsics
    from fleetgym.envs.grasping.poses import FOV, HAND_EYE

    env = gym.make("Grasping/Procedural-v0", image_size=size).unwrapped
    draws = np.random.default_rng(seed)
    lens, captures, others = Intrinsics.from_fov(FOV, size, size), [], []
    for scene in range(count):
        env.reset(seed=scene)
        start = env.hand @ HAND_EYE
        poses = []
        for share in np.concatenate([np.linspace(0, 1, views), draws.uniform(size=more)]):
            error = se3.pose(draws.uniform(-0.03, 0.03, 3), draws.uniform(-0.2, 0.2, 3))
            poses.append(start @ se3.pose([0.0, 0.0, -0.15 * share], np.zeros(3)) @ error)
        poses = np.stack(poses)
        pictures = np.stack([env.render_at(pose) for pose in poses[:views]])
        captures.append(Capture(pictures, poses[:views], lens))
        others.append(poses[views:])
    env.close()
    return captures, np.stack(others)


def radiance_fields(
    device: str = "cpu",
    size: int | None = None,
    distinct: int | None = None,
    scenes: int | None = None,
    views: int | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> list[Comparison]:
    """Scenes fitted, and views drawn, by voxels and by hash tables; beside nerfstudio's nerfacto where it is installed.

    Without nerfstudio the two stand beside each other. Each row of fits says the decibels on views that were held out.
    nerfacto fits one scene in a call, on an accelerator with its own settings and 500 steps. On a CPU it has 8 levels
    with tables of 2^15 and takes 60 steps of 512 rays, and hash tables take 60 steps: there voxels are what to use.

    Args:
        device: Where to fit and to draw.
        size: Pixels along a side; 112 on an accelerator and 48 on a CPU, if None.
        distinct: Scenes that are different; 8 on an accelerator and 1 on a CPU.
        scenes: Scenes that ours fit at once, some of them alike; 50 and 1.
        views: Views that are drawn of each scene by ours; 100 and 8. nerfacto draws 2 of one scene.
        options: Of ``fit``, by kind, instead of those above.
    """
    from fleetgym.envs.fields import fit

    fast = torch.device(device).type != "cpu"
    if options is None and not fast:
        small = {"num_levels": 8, "log2_hashmap_size": 15, "max_res": 512}
        options = {"hash": {"iterations": 60}, "nerfstudio": {"iterations": 60, "batch": 512, "model": small}}
    size, distinct = size or (112 if fast else 48), distinct or (8 if fast else 1)
    scenes, views = scenes or (50 if fast else 1), views or (100 if fast else 8)
    captures, poses = grasping_captures(distinct, size, 20, views)
    many = [captures[n % distinct] for n in range(scenes)]
    where = np.stack([poses[n % distinct] for n in range(scenes)])
    kept: dict[str, Any] = {}

    def fitted(kind: str, captures: list[Any]) -> None:
        chosen = (options or {}).get(kind, {})
        kept[kind] = fit(kind, captures, hold_out=3, device=device, **chosen)

    def quality(kind: str) -> float:
        return float(np.mean([report.held_out for report in kept[kind].report]))

    def drawn(kind: str, poses: np.ndarray) -> None:
        if kind not in kept:
            fitted(kind, captures[:1] if kind == "nerfstudio" else many)
        kept[kind].render(poses)

    rows = []
    beside = installed("nerfstudio")
    if not beside:
        print(f"nerfstudio, the peer, is missing here: {install_line('nerfstudio')}")
    for kind in ("voxel", "hash") if beside else ("hash",):
        peer = "nerfstudio" if beside else "voxel"
        name = "nerfstudio's nerfacto" if beside else "voxel"
        theirs, seen = (captures[:1], where[:1, :2]) if beside else (many, where)
        rows.append(
            Comparison(
                "scenes",
                scenes,
                functools.partial(fitted, kind, many),
                functools.partial(fitted, peer, theirs),
                name,
                len(theirs),
                f"{kind}, fits of {size} x {size} pixels",
                device,
                results=("dB", functools.partial(quality, kind), functools.partial(quality, peer)),
                period=60,
            )
        )
        rows.append(
            Comparison(
                "views",
                scenes * views,
                functools.partial(drawn, kind, where),
                functools.partial(drawn, peer, seen),
                name,
                seen.shape[0] * seen.shape[1],
                f"{kind}, views of {size} x {size} pixels",
                device,
            )
        )
    return rows


COMPARISONS: dict[str, Callable[..., Comparison | list[Comparison]]] = {
    "fields": radiance_fields,
    "functionals": functionals,
    "meta_world": meta_world,
    "fleet_tools": fleet_tools,
    "fleet_training": fleet_training,
    "matching": matching,
    "office_nav": office_nav,
    "sirens": sirens,
}
_EXTRAS = {"functionals": "bench", "matching": "bench", "office_nav": "bench", "sirens": "zoos"}
_ON_DEVICE = ("fields", "functionals", "office_nav")  # measured with tensors on a device of one's choice


def compare(comparison: Comparison, repeat: int) -> dict[str, Any]:
    """Runs both sides in turn.

    Args:
        comparison: What to run.
        repeat: Pairs after one warm-up pair.

    Returns:
        Medians in units a second of ``clock`` (``"cpu"``, or ``"wall"`` on an accelerator), and the median ratio ours /
        peer's.
    """
    on_cpu = comparison.device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter

    def seconds(work: Callable[[], Any]) -> float:
        began = clock()
        work()
        if not on_cpu:
            torch.cuda.synchronize(comparison.device)
        return clock() - began

    pairs = []
    for _ in range(repeat + 1):
        ours = seconds(comparison.ours)
        if comparison.before_peer is not None:
            comparison.before_peer()
        pairs.append((ours, seconds(comparison.peer)))
    pairs = pairs[1:]
    peer_count = comparison.peer_count or comparison.count
    ratios = [comparison.count * comparison.unit_bytes / ours / (peer_count / peer) for ours, peer in pairs]
    name = "cpu" if on_cpu else "wall"
    reached = {}
    if comparison.results is not None:
        what, ours_result, peer_result = comparison.results
        reached = {"result": what, "ours_result": ours_result(), "peer_result": peer_result()}
    return {
        "unit": comparison.unit,
        "clock": name,
        f"ours_per_{name}_second": comparison.count / statistics.median(ours for ours, _ in pairs),
        f"peer_per_{name}_second": peer_count / statistics.median(peer for _, peer in pairs),
        "peer": comparison.peer_name,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": repeat,
        **reached,
    }


def line(comparison: Comparison, row: dict[str, Any]) -> str:
    """One row as it is printed."""
    ours, peer = (row[f"{side}_per_{row['clock']}_second"] * comparison.period for side in ("ours", "peer"))
    second = ("CPU-" if row["clock"] == "cpu" else "") + {1: "second", 60: "minute"}[comparison.period]
    spread = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f} in {row['pairs']} pairs)"
    measured = f"{ours:.4g} {row['unit']} a {second}, {row['peer']} {peer:.4g}"
    if comparison.unit_bytes == 1:
        reached = f"; {row['result']} {row['ours_result']:.5g}, {row['peer_result']:.5g}" if "result" in row else ""
        return f"{measured}: {row['ratio']:.2f} times as fast {spread}{reached}"
    return f"{measured}: at {comparison.unit_bytes} bytes each, {row['ratio']:.3f} of the bandwidth {spread}"


@dataclass
class Args:
    """Measure fleetgym beside a peer, in one process and in turn, and print the ratio."""

    only: tuple[str, ...] = ()
    """Comparisons to run; all by default."""
    repeat: int = 5
    """Pairs of runs of each."""
    device: str = "cpu"
    """Where fields, functionals and office_nav work; on an accelerator, seconds are those of the clock."""
    out: Path | None = None
    """Write the figures to this .json file."""


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench speed``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench speed")
    for name in args.only:
        if name not in COMPARISONS:
            raise unknown("comparison", name, COMPARISONS)
    if args.repeat < 1:
        raise UserError(f"--repeat {args.repeat}: it must be at least 1")
    torch.set_num_threads(1)
    results = {}
    names = args.only or tuple(COMPARISONS)
    if not args.only:
        left = {name: _EXTRAS[name] for name in names if name in _EXTRAS and not installed(_EXTRAS[name])}
        names = tuple(name for name in names if name not in left)
        for name, extra in left.items():
            print(f"{name} is left out: {install_line(extra)}")
    for name in names:
        found = COMPARISONS[name](args.device) if name in _ON_DEVICE else COMPARISONS[name]()
        for comparison in found if isinstance(found, list) else [found]:
            title = f"{name} ({comparison.about})" if comparison.about else name
            results[title] = row = compare(comparison, args.repeat)
            print(f"{title}: {line(comparison, row)}")
    if args.out is not None:
        write_json(args.out, {"results": results, "provenance": provenance()})
    return 0
