"""Scoop and Whisk: experts, what counts as success; and whether every tool fits every object that it is meant for."""

import itertools

import numpy as np
import pytest

from fleetgym.envs.fleet_tools.env import FleetToolsEnv
from fleetgym.envs.fleet_tools.expert import expert
from fleetgym.envs.fleet_tools.instances import INSTANCES, OBJECTS, TOOLS, WIRES, thing, tool, tool_shapes
from fleetgym.envs.fleet_tools.mechanisms import MECHANISMS, ROLES, USE
from fleetgym.envs.fleet_tools.names import SPLITS, TASKS

#: The deepest that shapes may enter one another in an episode that is solved, metres.
DEEPEST = 0.003


def play(env, seed, **options):
    """Plays an episode with the expert: whether it was solved, control steps, and the deepest contact, metres."""
    agent = expert(env.task)
    agent.attach(env)
    env.reset(seed=seed, options=options)
    deepest = 0.0
    for step in range(env.horizon):
        action, _ = agent.predict(None, None, np.array([step == 0]))
        _, _, _, _, info = env.step(np.clip(action[0], -1, 1))
        deepest = max(deepest, env.contacts().depth)
        if info["success"]:
            break
    return info["success"], step + 1, deepest


def pairs(tool_kind, object_kind):
    """All pairs of instances of two classes."""
    return itertools.product(
        [tool(tool_kind, index) for index in range(INSTANCES)],
        [thing(object_kind, index) for index in range(INSTANCES)],
    )


@pytest.mark.parametrize("arm", ("panda", "hand"))
@pytest.mark.parametrize("task", SPLITS["kitchen"])
def test_the_expert_solves_it(task, arm):
    env = FleetToolsEnv(task, arm=arm, tools="all", objects="all")
    for seed in range(4):
        solved, steps, deepest = play(env, seed)
        assert solved and steps <= 60 and deepest < DEEPEST, (seed, solved, steps, deepest)


@pytest.mark.parametrize("task", SPLITS["kitchen"])
def test_nothing_is_solved_by_doing_nothing_or_by_lifting_the_tool(task):
    env = FleetToolsEnv(task, arm="hand", tool=0, thing=0)
    for action in (np.zeros(6), np.array([0, 0, -1.0, 0, 0, 0])):
        env.reset(seed=0)
        for _ in range(20):
            _, reward, _, _, info = env.step(action)
            assert not info["success"] and reward < 0.3
    assert env.sim.head[2] > 0.4  # it was indeed lifted


def test_a_ball_counts_only_while_the_scoop_carries_it():
    env = FleetToolsEnv("Scoop", arm="hand", tool=0, thing=0)
    env.reset(seed=0)
    sim, mechanism = env.sim, env.mechanism
    inside = 0.5 * (sim.keypoints["head"] + sim.keypoints["tail"]) + [0, 0, 0.003 + sim.object_instance.radius]
    across = np.array([0, sim.tool_instance.width, 0])
    for place, carried in (
        (inside, True),
        (inside + [0, 0, 0.08], False),  # thrown up
        (inside - [0, 0, 0.04], False),  # below the scoop
        (inside + across, False),
        (inside - across, False),
        (inside + [0.1, 0, 0], False),
        (inside - [0.1, 0, 0], False),
    ):
        sim.keypoint[:] = sim.tool_place + sim.tool_rotation @ place
        assert mechanism.amount(sim) == pytest.approx(sim.keypoint[2] if carried else 0.0)
    # Below 5 cm it is carried, and not yet solved.
    assert mechanism.wanted == 0.05


def test_the_ball_stays_in_the_scoop_to_the_end():
    env = FleetToolsEnv("Scoop", arm="panda", tools="all", objects="all")
    assert play(env, 1)[0]
    for _ in range(10):
        _, _, _, _, info = env.step(np.zeros(6))
    assert info["success"]
    assert np.linalg.norm(env.data.qvel[-6:-3]) < 0.02


def test_stirring_adds_up_the_angle_of_the_ball():
    env = FleetToolsEnv("Whisk", arm="hand", tool=0, thing=0)
    for sign in (1, -1):
        env.reset(seed=3)
        sim, mechanism = env.sim, env.mechanism
        x, y, z = sim.middle
        assert mechanism.amount(sim) == pytest.approx(0.0, abs=1e-9)
        first = sim.direction
        for turn in np.linspace(0.0, 2.5 * np.pi, 26)[1:]:
            angle = first + sign * turn
            sim.keypoint[:] = x + 0.04 * np.cos(angle), y + 0.04 * np.sin(angle), z + 0.012
            assert mechanism.amount(sim) == pytest.approx(turn)
            assert mechanism.amount(sim) == pytest.approx(turn)  # to ask twice changes nothing
        # Back by half a turn counts as less; outside of the bowl nothing counts.
        for turn in np.linspace(2.5 * np.pi, 1.5 * np.pi, 11):
            angle = first + sign * turn
            sim.keypoint[:] = x + 0.04 * np.cos(angle), y + 0.04 * np.sin(angle), z + 0.012
            mechanism.amount(sim)
        assert mechanism.amount(sim) == pytest.approx(1.5 * np.pi)
        sim.keypoint[:] = x - 0.2 * np.cos(angle), y + 0.2, z
        assert mechanism.amount(sim) == pytest.approx(1.5 * np.pi)
    env.reset(seed=3)
    assert mechanism.amount(env.sim) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "task, arm, seed",
    (
        ("Hammer", "panda", 0),
        ("Spatula", "panda", 179),  # was caught under the stop
        ("Wrench", "panda", 30),  # met the nut's corner
        ("WrenchForHammer", "hand", 82),  # the jaw's arms wedged the pin's head
        ("Scoop", "panda", 10),
        ("Whisk", "panda", 27),
    ),
)
def test_nothing_is_done_by_brute_force(task, arm, seed):
    env = FleetToolsEnv(task, arm=arm, tools="all", objects="all")
    agent = expert(task)
    agent.attach(env)
    env.reset(seed=seed)
    for step in range(60):
        action, _ = agent.predict(None, None, np.array([step == 0]))
        _, _, _, _, info = env.step(np.clip(action[0], -1, 1))
        depth, force = env.contacts()
        assert depth < DEEPEST and force < 300, (step, depth, force)
        if task == "Wrench":  # the thread holds: a turn is a pitch
            sim = env.sim
            climbed = sim.object_instance.pitch * env.data.qpos[sim.turn] / (2 * np.pi)
            assert abs(env.data.qpos[sim.thread] - climbed) < 0.002
        if info["success"]:
            break
    assert info["success"]


def test_a_ball_that_falls_into_the_scoop_gains_no_energy():
    # A contact solver that stops before it has converged gives a ball that spins up to a joule a kilogram.
    env = FleetToolsEnv("Scoop", arm="panda", tool=0, thing=0)
    rng = np.random.default_rng(0)
    for seed in range(30):
        env.reset(seed=seed)
        sim, radius, q = env.sim, env.sim.object_instance.radius, env.sim.free[0]
        place = 0.5 * (sim.keypoints["head"] + sim.keypoints["tail"])
        env.data.qpos[q : q + 3] = sim.tool_place + sim.tool_rotation @ place + [0, 0, radius + 0.02]
        env.data.qvel[-6:] = [*rng.uniform(-0.3, 0.3, 2), -0.2, *rng.uniform(-20, 20, 3)]
        before = np.inf
        for _ in range(6):
            env.step(np.zeros(6))
            v = env.data.qvel[-6:]
            energy = 0.5 * (v[:3] ** 2).sum() + 0.2 * radius**2 * (v[3:] ** 2).sum() + 9.81 * env.data.qpos[q + 2]
            # Soft contacts lift it back by a tenth of a millimetre.
            assert energy < before + 0.01
            before = energy


def test_what_is_observed_of_tray_and_bowl():
    env = FleetToolsEnv("Scoop", arm="hand", thing=2)
    observation, info = env.reset(seed=5)
    made, (x, y, yaw, _, far) = env.sim.object_instance, info["pose"]
    along = np.array([np.cos(yaw), np.sin(yaw)])
    np.testing.assert_allclose(observation[18:20], np.array([x, y]) + along * made.length / 2)
    assert observation[20] == yaw
    left = (observation[18:20] - observation[15:17]) @ along
    assert left == pytest.approx(far + made.radius + 0.003)
    env = FleetToolsEnv("Whisk", arm="hand", thing=2)
    observation, info = env.reset(seed=5)
    x, y, angle, _ = info["pose"]
    np.testing.assert_allclose(observation[18:20], (x, y))
    offset = observation[15:17] - observation[18:20]
    assert np.arctan2(offset[1], offset[0]) == pytest.approx(angle)


@pytest.mark.parametrize("task", SPLITS["kitchen"])
def test_everything_begins_at_rest_and_apart(task):
    env = FleetToolsEnv(task, arm="hand", tools="all", objects="all")
    corners = list(itertools.product(*zip(env.mechanism.low, env.mechanism.high)))
    for index in range(INSTANCES):
        env.reset(seed=index, options={"object": index, "tool": index, "pose": corners[7 * index % len(corners)]})
        before = env.sim.keypoint.copy()
        for _ in range(5):
            env.step(np.zeros(6))
        assert np.linalg.norm(env.sim.keypoint - before) < 1e-3
        assert env.contacts().depth < 5e-4


def test_every_task_has_all_it_needs():
    assert SPLITS["all"] == TASKS and set(ROLES) == set(TASKS)
    assert set(SPLITS["tools"]) | set(SPLITS["cross"]) | set(SPLITS["kitchen"]) == set(TASKS)
    assert {made for _, made in ROLES.values()} == set(OBJECTS) == set(MECHANISMS) == set(USE)
    assert {kind for kind, _ in ROLES.values()} == set(TOOLS) == set(USE.values())
    for kind in TOOLS:
        for index in range(INSTANCES):
            _, keypoints = tool_shapes(tool(kind, index), kind)
            assert set(keypoints) == {"head", "tail", "side"}
            assert np.linalg.norm(keypoints["head"] - keypoints["tail"]) > 0.01


def test_every_jaw_fits_every_nut():
    for wrench, nut in pairs("wrench", "nut"):
        # Wider than the flats with at least a millimetre to spare, and too narrow to turn around the corners.
        assert nut.size + 0.001 < wrench.jaw < nut.size / np.cos(np.pi / 6)


def test_every_spatula_fits_every_patty():
    sim = FleetToolsEnv("Spatula", arm="hand").sim
    board = next(geom for geom in range(sim.model.ngeom) if sim.model.geom_bodyid[geom] == sim.stop)
    lower = sim.model.geom_pos[board][2] - sim.model.geom_size[board][2]
    blades = [geom for geom in range(sim.model.ngeom) if sim.model.geom_priority[geom]]
    assert len(blades) == 1
    thick = 2 * sim.model.geom_size[blades[0]][2]
    # The blade passes under the stop, with the millimetre at which the expert leads it.
    assert thick + 0.001 < lower
    for spatula, patty in pairs("spatula", "patty"):
        assert spatula.width > 2 * patty.radius and spatula.length > 2 * patty.radius
        # The patty's middle is higher than the stop's lower edge: it is held back, and not led under it.
        assert patty.height > lower


def test_every_knife_fits_between_the_pieces():
    for knife, pieces in pairs("knife", "pieces"):
        assert knife.thickness < 0.5 * pieces.gap
        # The blade reaches past both pieces, and the hand stays above them.
        assert knife.length > 2 * pieces.radius and knife.height - knife.handle > 0.5 * pieces.height


def test_every_scoop_fits_every_tray_and_ball():
    tray = MECHANISMS["bin"]
    for scoop, made in pairs("scoop", "bin"):
        assert 2 * made.radius < scoop.width and 2 * made.radius < scoop.length
        # With the ball as far sideways as it may lie, the scoop's side wall stays off the tray's.
        sideways = max(abs(tray.low[3]), abs(tray.high[3]))
        assert sideways + scoop.width / 2 + 2 * 0.0012 < made.width / 2
        # It comes down behind the ball, in front of the near wall.
        farthest = tray.high[4] + 0.003 + 2 * made.radius
        assert made.length - farthest - 0.006 > scoop.length + 0.5 * scoop.handle
        # The shank passes over the wall.
        assert scoop.drop - 0.6 * scoop.handle > made.height + 2 * tray.thin
        # A ball in the scoop counts as carried.
        assert made.radius + 2 * 0.0012 < 2 * made.radius


def test_every_whisk_fits_every_bowl_and_ball():
    for whisk, bowl in pairs("whisk", "bowl"):
        # No ball gets in between the wires; two of them and the bulb go side by side into the bowl.
        assert 2 * (whisk.bulb - whisk.wire) * np.sin(np.pi / WIRES) < 2 * bowl.ball
        assert whisk.bulb + bowl.ball < bowl.radius - bowl.ball
        # The ball may lie anywhere between where the whisk comes down and the wall.
        assert TOOLS["whisk"]["bulb"][1] + bowl.ball + 0.006 < bowl.radius - bowl.ball - 0.001
        # The handle passes over the wall while the whisk is 3 mm above the floor.
        assert whisk.length + 0.003 - whisk.handle > bowl.height
        # The bulb's upright part is at the height of the ball's middle.
        assert 0.45 * whisk.bulb + 0.003 < bowl.ball < 1.8 * whisk.bulb + 0.003


def test_every_head_strikes_every_pin():
    for kind in ("hammer", "wrench", "spatula"):
        for made, pin in pairs(kind, "pin"):
            _, keypoints = tool_shapes(made, "hammer")
            # The way down to the block: the pin's travel and what it sticks out.
            assert keypoints["tail"][2] > keypoints["head"][2]
            if kind == "wrench":
                # The arms of the jaw begin in front of the pin's head, or span less of it than the jaw's opening.
                bridge = made.reach - 0.62 * made.jaw
                ahead = bridge - keypoints["head"][0]
                assert np.sqrt(max(pin.head**2 - ahead**2, 0.0)) < made.jaw / 2
                # The bridge meets the head.
                assert ahead - made.prong < pin.head
            assert pin.radius < pin.head and pin.grip > 0
