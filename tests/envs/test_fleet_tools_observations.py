"""What fleet-tools shows besides the state: spaces, places recomputed from MuJoCo, surfaces, forces, pictures."""

import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import fleetgym  # noqa: F401
from fleetgym.core.errors import UserError
from fleetgym.core.render import BACKENDS, NO_GL_HELP, choose_gl
from fleetgym.core.rollout import rollout
from fleetgym.envs import rendering, suite
from fleetgym.envs.fleet_tools import observe
from fleetgym.envs.fleet_tools.env import FleetToolsEnv
from fleetgym.envs.fleet_tools.instances import UNSEEN
from fleetgym.envs.rendering import Camera

draws = pytest.mark.skipif(choose_gl() not in BACKENDS, reason="no OpenGL here that renders without a screen")

FLEET_TOOLS = suite("fleet_tools")
SHAPES = {"keypoints": (4, 3), "points": (4, 1024), "wrench": (32, 6), "torque": (7,)}
#: Class of objects -> bodies that move.
MOVING = {"pin": ["pin"], "nut": ["nut"], "pieces": ["object", "other"]}
MOVING |= dict.fromkeys(("patty", "bin", "bowl"), ["object"])
BLIND = ["state", *SHAPES]
SEEING = ["wrist", "overhead"]


def checked(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?s).*infinity")  # the space has no bounds
        check_env(env, skip_render_check=True)
    env.close()


def moved(env, seed=0, steps=6):
    """Resets and moves along; returns the last observation."""
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        observation, *_ = env.step(rng.uniform(-0.4, 0.4, env.action_space.shape))
    return observation


def hand(env):
    """Place between the finger tips and rotation of the hand, from MuJoCo's bodies."""
    body = env.data.body("hand")
    rotation = body.xmat.reshape(3, 3)
    return body.xpos + rotation @ [0, 0, 0.1034], rotation


def from_surface(model, data, geom, points):
    """Distance of world points [N, 3] from the surface of a geom, negative inside; exact but for ellipsoids."""
    local = (points - data.geom_xpos[geom]) @ data.geom_xmat[geom].reshape(3, 3)
    size, kind = model.geom_size[geom], mujoco.mjtGeom(model.geom_type[geom]).name[7:]
    if kind == "SPHERE":
        return np.linalg.norm(local, axis=1) - size[0]
    if kind == "ELLIPSOID":
        level, slope = np.linalg.norm(local / size, axis=1), np.linalg.norm(local / size**2, axis=1)
        return level * (level - 1) / slope
    if kind == "CAPSULE":
        along = np.clip(local[:, 2], -size[1], size[1])
        return np.linalg.norm(local - along[:, None] * [0, 0, 1], axis=1) - size[0]
    if kind == "CYLINDER":
        over = np.stack([np.hypot(*local[:, :2].T) - size[0], np.abs(local[:, 2]) - size[1]], axis=1)
    else:
        assert kind == "BOX"
        over = np.abs(local) - size
    return np.linalg.norm(np.maximum(over, 0), axis=1) + np.minimum(over.max(axis=1), 0)


def distances(env, bodies, points):
    """Of world points [N, 3] from each shape of some bodies [shapes, N]."""
    ids = [env.model.body(body).id for body in bodies]
    geoms = [geom for geom in range(env.model.ngeom) if env.model.geom_bodyid[geom] in ids]
    return np.stack([from_surface(env.model, env.data, geom, points) for geom in geoms])


def clouds(env, observation):
    """Points of tool and object [512, 3] in the world."""
    place, rotation = hand(env)
    world = observation[:3].T @ rotation.T + place
    return world[observation[3] == 0], world[observation[3] == 1]


# ---- spaces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLIND)
def test_one_array_is_a_box(kind):
    env = FleetToolsEnv("Wrench", observation=kind, tool=0, thing=0)
    assert isinstance(env.observation_space, spaces.Box)
    assert env.observation_space.shape == SHAPES.get(kind, (27,))
    observation = moved(env)
    assert observation in env.observation_space and observation.any()
    np.testing.assert_array_equal(observation, moved(env))
    assert (observation != moved(env, seed=1)).any()
    checked(env)


def test_several_kinds_are_a_dict_and_each_is_what_it_is_alone():
    env = FleetToolsEnv("Hammer", observation=BLIND, task_set="tools")
    assert isinstance(env.observation_space, spaces.Dict)
    together = moved(env)
    assert together in env.observation_space and set(together) == set(BLIND)
    for kind in BLIND:
        options = {"task_set": "tools"} if kind == "state" else {}
        alone = moved(FleetToolsEnv("Hammer", observation=kind, **options))
        np.testing.assert_array_equal(together[kind], alone)
    checked(env)


def test_the_task_stands_beside_the_state_or_alone():
    tasks = ("Knife", "Hammer")
    env = FleetToolsEnv("Hammer", observation=["keypoints", "state"], task_set=tasks)
    np.testing.assert_array_equal(moved(env)["state"][27:], [0, 1])
    env = FleetToolsEnv("Hammer", observation="keypoints", task_set=tasks)
    observation = moved(env)
    assert set(observation) == {"keypoints", "task"}
    np.testing.assert_array_equal(observation["task"], [0, 1])
    observation["task"][:] = 5
    np.testing.assert_array_equal(env.reset(seed=0)[0]["task"], [0, 1])
    checked(env)


def test_what_is_observed_changes_nothing_else():
    plain, other = (FleetToolsEnv("Knife", observation=kinds) for kinds in ("state", BLIND))
    for seed in (3, None):
        first, info = plain.reset(seed=seed)
        second, more = other.reset(seed=seed)
        np.testing.assert_array_equal(first, second["state"])
        np.testing.assert_array_equal(info["pose"], more["pose"])
        for _ in range(5):
            first, second = (env.step(np.full(6, 0.2)) for env in (plain, other))
            np.testing.assert_array_equal(first[0], second[0]["state"])
            assert first[1:] == second[1:]


def test_in_other_processes_and_side_by_side():
    envs = FLEET_TOOLS.make_vec(
        ["Hammer", "Spatula"], asynchronous=True, observation=["points", "wrench"], horizon=3, tool=2, thing=1
    )
    try:
        observations, _ = envs.reset(seed=0)
        for _ in range(2):
            observations, *_ = envs.step(np.full((2, 6), 0.1, np.float32))
    finally:
        envs.close()
    assert set(observations) == {"points", "wrench", "task"}
    env = FleetToolsEnv("Spatula", observation=["points", "wrench"], tool=2, thing=1)
    env.reset(seed=1)
    for _ in range(2):
        alone, *_ = env.step(np.full(6, 0.1, np.float32))
    for kind, value in alone.items():
        np.testing.assert_array_equal(observations[kind][1], value)
    np.testing.assert_array_equal(observations["task"], np.eye(2))


def test_rollout_keeps_them():
    make = FLEET_TOOLS.make_fn("Hammer", observation=["state", "keypoints"], tool=0, thing=0)
    (episode,) = rollout(FLEET_TOOLS.expert("Hammer"), make, [0], stop_on_success=True)
    assert episode.success and episode.observations["keypoints"].shape == (episode.length + 1, 4, 3)
    assert episode.observations["state"].shape == (episode.length + 1, 27)


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["Hammer", "Wrench", "Spatula", "Knife", "SpatulaForHammer"])
@pytest.mark.parametrize("arm", ["panda", "hand"])
def test_keypoints_are_where_mujoco_has_them(task, arm):
    env = FleetToolsEnv(task, arm=arm, observation="keypoints")
    observation = moved(env)
    place, rotation = hand(env)
    wanted = [env.data.site(name).xpos for name in ("head", "tail", "side", "keypoint")]
    np.testing.assert_allclose(observation @ rotation.T + place, wanted, rtol=0, atol=1e-12)
    assert np.linalg.norm(observation[0]) < 0.25 < np.linalg.norm(observation[3]) + 0.2
    # The tool is rigid in the hand.
    before = env.reset(seed=4)[0]
    after, *_ = env.step(np.full(env.action_space.shape, 0.3))
    np.testing.assert_allclose(before[:3], after[:3], rtol=0, atol=1e-9)
    assert np.abs(before[3] - after[3]).max() > 1e-3


@pytest.mark.parametrize("task", ["Hammer", "Wrench", "Spatula", "Knife", "WrenchForHammer"])
def test_points_of_shapes_lie_on_surfaces(task):
    env = FleetToolsEnv(task, observation="points")
    observation = moved(env)
    assert observation.dtype == np.float32
    np.testing.assert_array_equal(observation[3], np.repeat([0, 1], 512))
    for bodies, points in zip((["tool"], MOVING[env.object_kind]), clouds(env, observation)):
        from_shapes = distances(env, bodies, points)
        assert np.abs(from_shapes).min(axis=0).max() < 1e-6
        # No point is inside of another shape.
        assert from_shapes.min() > -3e-6
        assert len(np.unique(points, axis=0)) == 512


def test_what_touches_unseen_has_no_points_and_is_in_no_picture():
    env = FleetToolsEnv("Whisk", arm="hand", observation="points")
    env.reset(seed=0)
    model = env.model
    (core,) = np.flatnonzero(model.geom_group == UNSEEN)
    assert model.geom_contype[core] == 1 and model.geom_conaffinity[core] == 1
    assert not mujoco.MjvOption().geomgroup[UNSEEN]
    held, _ = observe.moving_bodies(model)
    (points,) = observe.sample_surface(model, held, 20000, np.random.default_rng(0))
    place, rotation = env.data.body("tool").xpos, env.data.body("tool").xmat.reshape(3, 3)
    away = np.abs(from_surface(model, env.data, core, points @ rotation.T + place))
    # Wires pass through its surface in places; a core with points of its own has far more.
    assert (away < 1e-6).mean() < 1e-3


def test_points_belong_to_the_instances():
    """The same tool has the same points in any scene and episode; another tool has others."""
    clouds = []
    for task, tool, thing in (("Wrench", 1, 0), ("WrenchForHammer", 1, 3), ("Wrench", 2, 0)):
        env = FleetToolsEnv(task, observation="points", tool=tool, thing=thing)
        observation, _ = env.reset(seed=0)
        body = env.data.body("tool")
        place, rotation = hand(env)
        world = observation[:3, :512].T @ rotation.T + place
        clouds.append((world - body.xpos) @ body.xmat.reshape(3, 3))
    np.testing.assert_allclose(clouds[0], clouds[1], rtol=0, atol=1e-6)
    assert np.abs(clouds[0] - clouds[2]).max() > 1e-3


def surface(shapes, number=40000):
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody><body><freejoint/>{shapes}</body></worldbody></mujoco>")
    (points,) = observe.sample_surface(model, [1], number, np.random.default_rng(0))
    assert points.shape == (number, 3)
    return points


@pytest.mark.parametrize(
    ("shape", "where", "share"),
    [
        ('type="sphere" size="0.2"', lambda p: p[:, 2] > 0.1, 0.25),
        ('type="box" size="0.1 0.2 0.3"', lambda p: p[:, 2] > 0.29999, 0.02 / 0.22),
        ('type="box" size="0.1 0.2 0.3"', lambda p: p[:, 0] > 0.09999, 0.06 / 0.22),
        ('type="cylinder" size="0.1 0.3"', lambda p: np.abs(p[:, 2]) > 0.29999, 0.02 / 0.14),
        ('type="cylinder" size="0.1 0.3"', lambda p: np.hypot(p[:, 0], p[:, 1]) < 0.05, 0.005 / 0.14),
        ('type="capsule" size="0.1 0.3"', lambda p: np.abs(p[:, 2]) > 0.3, 0.25),
        ('type="capsule" size="0.1 0.3"', lambda p: p[:, 2] > 0.35, 0.0625),
    ],
)
def test_points_are_uniform_in_area(shape, where, share):
    found = where(surface(f"<geom {shape}/>")).mean()
    assert abs(found - share) < 5 * np.sqrt(share / 40000)


def test_points_of_an_ellipsoid_are_uniform_in_area():
    size = np.array([0.3, 0.2, 0.1])
    points = surface('<geom type="ellipsoid" size="0.3 0.2 0.1"/>')
    # Numerically: the area of a piece of the parametrised surface.
    u, v = np.meshgrid((np.arange(400) + 0.5) * np.pi / 400, (np.arange(800) + 0.5) * np.pi / 400, indexing="ij")
    normal = np.stack([np.sin(u) * np.cos(v) / size[0], np.sin(u) * np.sin(v) / size[1], np.cos(u) / size[2]])
    area = np.sin(u) * np.linalg.norm(normal, axis=0)
    for axis, at in ((2, 0.05), (0, 0.15)):
        inside = np.abs(normal[axis] * size[axis] ** 2) < at
        share = area[inside].sum() / area.sum()
        assert abs((np.abs(points[:, axis]) < at).mean() - share) < 0.012


def test_shapes_that_overlap_are_one_surface():
    """A hexagon made of three boxes, as the nut is: tops that coincide count once, insides not at all."""
    w, half = 0.03, 0.02
    boxes = "".join(f'<geom type="box" size="{w} {w / np.sqrt(3)} {half}" euler="0 0 {60 * k}"/>' for k in range(3))
    points = surface(boxes)
    ends, sides = 4 * np.sqrt(3) * w**2, 6 * (2 * w / np.sqrt(3)) * 2 * half
    assert abs((np.abs(points[:, 2]) > half - 1e-9).mean() - ends / (ends + sides)) < 0.012
    flats = np.stack([points[:, :2] @ [np.cos(a), np.sin(a)] for a in np.arange(3) * np.pi / 3])
    across = np.abs(flats).max(axis=0)
    assert across.max() < w + 1e-9
    # Shapes that are nearer than a micrometre count as touching.
    np.testing.assert_allclose(across[np.abs(points[:, 2]) < half - 2e-6], w, rtol=0, atol=2e-6)


def test_surfaces_that_cannot_be_sampled():
    with pytest.raises(UserError, match='points_from="depth"'):
        model = mujoco.MjModel.from_xml_string(
            '<mujoco><asset><mesh name="m" vertex="0 0 0 1 0 0 0 1 0 0 0 1"/></asset><worldbody><body><freejoint/>'
            '<geom type="mesh" mesh="m"/></body></worldbody></mujoco>'
        )
        observe.sample_surface(model, [1], 10, np.random.default_rng(0))


def test_farthest_points():
    line = np.stack([np.arange(101.0), np.zeros(101), np.zeros(101)], axis=1)
    chosen = observe.farthest_points(line, 5)
    np.testing.assert_array_equal(chosen[:3], [0, 100, 50])
    assert {*chosen[3:]} == {25, 75}
    np.testing.assert_array_equal(observe.farthest_points(line[:3], 7), [0, 2, 1, 0, 2, 1, 0])


# ---- forces ----------------------------------------------------------------------------------------------------------


def test_wrench_of_a_known_load():
    """At rest: the tool's weight, and a force that pulls at it, with its moment about where it is held."""
    env = FleetToolsEnv("Hammer", arm="hand", observation="wrench", tool=3, thing=0)
    assert not env.reset(seed=0)[0].any()
    tool, model, data = env.model.body("tool").id, env.model, env.data
    felt = []
    for force in ([0, 0, 0], [3.0, -2.0, -4.0]):
        data.xfrc_applied[tool, :3] = force
        mujoco.mj_step(model, data, 500)
        felt.append(observe.wrench(env.sim))
        _, rotation = hand(env)
        pull = np.array(force) + [0, 0, -9.81 * model.body_mass[tool]]
        arm = data.xipos[tool] - data.site("grip").xpos
        np.testing.assert_allclose(felt[-1][:3], rotation.T @ pull, rtol=0, atol=2e-3)
        np.testing.assert_allclose(felt[-1][3:], rotation.T @ np.cross(arm, pull), rtol=0, atol=2e-4)
    assert np.linalg.norm(felt[1] - felt[0]) > 5


def test_wrench_history_is_newest_last_and_feels_the_blow():
    env = FleetToolsEnv("Hammer", observation=["wrench", "state"], tool=0, thing=0)
    expert = FLEET_TOOLS.expert("Hammer")
    expert.attach(env)
    before, _ = env.reset(seed=0)
    assert before["wrench"].shape == (32, 6) and not before["wrench"].any()
    start, kept, amounts = np.array([True]), [], []
    for _ in range(40):
        action, _ = expert.predict(before["state"][None], None, start)
        start[:] = False
        now, *_, info = env.step(action[0])
        np.testing.assert_array_equal(now["wrench"][:-1], before["wrench"][1:])
        kept.append(np.linalg.norm(now["wrench"][-1, :3]))
        amounts.append(info["amount"])
        before = now
    pushed = np.diff(amounts, prepend=0) > 1e-3
    assert pushed.any() and not pushed[:3].any()
    # The pin sticks with so many newtons.
    assert max(np.array(kept)[pushed]) > env.sim.object_instance.grip > max(kept[:3])
    assert not env.reset(seed=1)[0]["wrench"].any()


def test_torques_carry_what_pulls_at_the_tool_and_not_the_arm():
    env = FleetToolsEnv("Hammer", observation="torque", tool=3, thing=0)
    env.reset(seed=0)
    tool, model, data = env.model.body("tool").id, env.model, env.data
    jacobian = np.zeros((3, model.nv))
    for force in (np.zeros(3), np.array([6.0, -4.0, 5.0])):
        data.xfrc_applied[tool, :3] = force
        mujoco.mj_step(model, data, 500)
        torques = observe.torque(env.sim)
        mujoco.mj_jac(model, data, jacobian, None, data.xipos[tool], tool)
        np.testing.assert_allclose(torques, -(jacobian[:, :7].T @ force), rtol=0, atol=2e-3)
    assert np.abs(torques).max() > 1
    assert not moved(FleetToolsEnv("Hammer", arm="hand", observation="torque")).any()


# ---- pictures --------------------------------------------------------------------------------------------------------


@draws
@pytest.mark.parametrize("kind", SEEING)
def test_pictures_with_depth(kind):
    env = FleetToolsEnv("Hammer", observation=kind, image_size=40, tools="train", objects="train")
    assert set(env.observation_space) == {kind, f"{kind}_depth"}
    first = moved(env)
    assert first in env.observation_space and first[kind].shape == (40, 40, 3)
    assert first[kind].std() > 10 and first[f"{kind}_depth"].min() > 0.01
    # Another tool and object, drawn in the same context, and back.
    other = moved(env, seed=1)
    again = moved(env)
    assert (other[kind] != first[kind]).any()
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    alone = moved(FleetToolsEnv("Hammer", observation=kind, image_size=40, tool=env.tool, thing=env.thing), seed=0)
    assert alone[kind].shape == first[kind].shape
    checked(env)


@draws
def test_depth_is_where_things_are():
    env = FleetToolsEnv("Wrench", observation=SEEING, image_size=64)
    observation = moved(env)
    rows = np.argwhere(np.ones((64, 64), bool))
    geoms = np.array([geom for geom in range(env.model.ngeom) if env.model.geom(geom).name != "table"])
    for view in SEEING:
        depth = observation[f"{view}_depth"]
        points = observe.back_projected(env.sim, view, depth, rows)
        near = depth.ravel() < 3
        below = np.abs(points[near, 2])
        shapes = np.stack([from_surface(env.model, env.data, geom, points[near]) for geom in geoms])
        # Round shapes are drawn with flat facets.
        assert np.minimum(below, np.abs(shapes).min(axis=0)).max() < 1e-3
        if view == "overhead":
            assert (below < 1e-4).any() and (below > 0.05).any()


@draws
def test_pictures_show_the_moment():
    """The cameras stand where the hand is, also right after a step: all anew, it is the same picture."""
    env = FleetToolsEnv("Hammer", observation="wrist", image_size=32, tool=0, thing=0)
    observation = moved(env)
    mujoco.mj_forward(env.model, env.data)
    camera = Camera(env.model, 32, 32, "wrist")
    colours, depth = camera.rgbd(env.data)
    np.testing.assert_array_equal(observation["wrist_depth"], depth)
    np.testing.assert_array_equal(observation["wrist"], colours)
    np.testing.assert_array_equal(camera.render(env.data), colours)
    geoms, again = camera.segmented(env.data)
    np.testing.assert_array_equal(depth, again)
    camera.camera = "overhead"
    geoms, depth = camera.segmented(env.data)
    assert {"tool", "pin", "object", "world"} < {
        env.model.body(env.model.geom_bodyid[geom]).name for geom in geoms.flat
    }
    assert abs(depth[geoms == env.model.geom("table").id] - 0.95).max() < 1e-4
    camera.close()


@draws
def test_a_picture_upside_down():
    env = FleetToolsEnv("Hammer", tool=0, thing=0)
    env.reset(seed=0)
    upright, turned = (Camera(env.model, 24, 32, "front", upside_down=down) for down in (False, True))
    for one, other in zip(upright.rgbd(env.data), turned.rgbd(env.data)):
        np.testing.assert_array_equal(one, other[::-1, ::-1])
    upright.close()
    turned.close()


@draws
@pytest.mark.parametrize("task", ["Hammer", "Wrench", "Spatula", "Knife"])
def test_points_of_depth_lie_on_surfaces(task):
    env = FleetToolsEnv(task, observation="points", points_from="depth")
    observation = moved(env)
    np.testing.assert_array_equal(observation[3], np.repeat([0, 1], 512))
    for bodies, points in zip((["tool"], MOVING[env.object_kind]), clouds(env, observation)):
        assert np.abs(distances(env, bodies, points)).min(axis=0).max() < 3e-3
        assert len(np.unique(points.round(5), axis=0)) > 10
    np.testing.assert_array_equal(observation, moved(env))
    if task == "Hammer":
        checked(env)


@draws
def test_what_is_not_seen_has_no_points():
    env = FleetToolsEnv("Hammer", observation="points", points_from="depth", tool=0, thing=0)
    env.reset(seed=0)
    bodies = env.model.geom_bodyid == env.model.body("pin").id
    env.model.geom_rgba[bodies, 3] = 0
    observation, *_ = env.step(np.zeros(6))
    assert observation[:3, :512].any() and not observation[:3, 512:].any()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"observation": "keypoint"}, "'keypoints'"),
        ({"observation": ["state", "pixels"]}, "'pixels'"),
        ({"observation": ["wrench", "wrench"]}, "names a kind twice"),
        ({"observation": []}, "is empty"),
        ({"observation": "points", "points_from": "meshes"}, "'mesh'"),
        ({"observation": "state", "image_size": 0}, "image_size=0"),
        ({"observation": "wrist", "image_size": -3}, "image_size=-3"),
        ({"observation": "wrist", "image_size": 8.5}, "image_size=8.5"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(UserError) as error:
        FleetToolsEnv("Hammer", **options)
    assert words in str(error.value)


@pytest.mark.parametrize("options", [{"observation": "overhead"}, {"observation": "points", "points_from": "depth"}])
def test_without_opengl_it_is_said_when_the_environment_is_made(monkeypatch, options):
    monkeypatch.setattr(rendering, "choose_gl", lambda: "disable")
    with pytest.raises(UserError) as error:
        gym.make("FleetTools/Hammer-v0", **options)
    assert NO_GL_HELP in str(error.value)
    # All else works.
    assert moved(FleetToolsEnv("Hammer", observation=["points", "wrench"]))["points"].any()


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_docstring_and_the_instances_say():
    from fleetgym.envs.docs import FILMS, film, page
    from fleetgym.envs.fleet_tools.instances import MEANING, OBJECTS, TOOLS
    from fleetgym.envs.fleet_tools.page import SHEETS

    folder = Path(__file__).parents[2] / "docs" / "envs"
    text = page("fleet_tools")
    assert (folder / "fleet_tools.md").read_text(encoding="utf-8") == text, (
        "run: python -m fleetgym.envs.docs docs/envs"
    )
    pictures = [*SHEETS.values(), *(film(env_id) for env_id, _ in FILMS["fleet_tools"])]
    assert len(pictures) == 2 + len(FLEET_TOOLS.tasks)
    for name in pictures:
        assert f"]({name})" in text and 10_000 < (folder / name).stat().st_size < 400_000
    for kind, ranges in {**TOOLS, **OBJECTS}.items():
        assert f"**{kind}**" in text and all(name in MEANING for name in ranges)


@draws
def test_a_sheet_has_a_cell_for_each_instance(tmp_path, monkeypatch):
    from PIL import Image

    from fleetgym.envs.fleet_tools import page

    kinds = {"hammer": page.TOOLS["hammer"]}
    monkeypatch.setattr(page, "TOOLS", kinds)
    monkeypatch.setattr(page, "CELL", (20, 30))
    path = page.draw(tmp_path, "tools")
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * 20 + 2, 6 * 30 + 5 * 2, 3) and [*tmp_path.iterdir()] == [path]
    cells = [picture[22 * row : 22 * row + 20, 32 * k : 32 * k + 30] for row in range(2) for k in range(6)]
    assert all((one != other).any() for i, one in enumerate(cells) for other in cells[:i])
