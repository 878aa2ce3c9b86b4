"""SPARTN's labels are exact, its pictures are where they should be, and a failed field costs its demonstration only."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fleetgym.agents.spartn import (
    AboutTheEye,
    EyeInHand,
    Noise,
    approach,
    augment,
    collides,
    field_renderer,
    homography_renderer,
    spartn,
)
from fleetgym.agents.visual import (
    CONTROL_POINTS,
    Steps,
    VisualConfig,
    VisualPolicy,
    point_matching,
    rotations,
    train_visual,
)
from fleetgym.core import Checkpoint, Demonstrations, Run, UserError, se3
from fleetgym.core.pictures import psnr
from fleetgym.core.rollout import Episode

SIZE = 16
EYE = EyeInHand(
    se3.pose([0.036, 0, 0.036], [0, np.pi, 0]) @ se3.pose([0, 0, 0], [0, 0, np.pi / 2]),
    np.arange(SIZE)[:, None] >= SIZE - 3 * np.ones((1, SIZE)),
    0.06,
    np.pi / 6,
)


def demonstration(seed, steps=7):
    """A hand that comes down; its pictures are noise, so that what was pasted can be told."""
    rng = np.random.default_rng(seed)
    motion = se3.pose([0.002, 0.001, 0.02], [0.02, -0.01, 0.05])
    hands = [se3.pose([0.5, 0, 0.4], [np.pi, 0, 0]) @ se3.pose([0, 0, 0], rng.uniform(-0.2, 0.2, 3))]
    for _ in range(steps):
        hands.append(hands[-1] @ motion)
    observations = {
        "rgb": rng.integers(0, 256, (steps + 1, SIZE, SIZE, 3), dtype=np.uint8),
        "pose": np.stack(hands),
        "remaining": np.linspace(1, 0, steps + 1, dtype=np.float32)[:, None],
    }
    ends = np.zeros(steps, bool)
    actions = np.repeat(EYE.action(motion)[None], steps, 0).astype(np.float32)
    return Episode(seed, observations, actions, np.zeros(steps), ends, ends.copy(), True)


def demonstrations(number=3):
    space = {
        "rgb": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
        "pose": spaces.Box(-np.inf, np.inf, (4, 4), np.float64),
        "remaining": spaces.Box(0, 1, (1,), np.float32),
    }
    episodes = [demonstration(seed) for seed in range(number)]
    return Demonstrations(
        episodes, observation_space=spaces.Dict(space), action_space=spaces.Box(-1, 1, (6,), np.float32)
    )


def grey(episode, poses):
    return np.full((len(poses), SIZE, SIZE, 3), 77, np.uint8), {}


def test_labels_lead_to_where_the_demonstration_went_next():
    episode = demonstration(0)
    made, row = augment(episode, EYE, grey, number=5, seed=3)
    assert row["made"] == 5 * 7 and row["rejected"] == 0 and len(made) == 5
    for one in made:
        steps = one.infos["step"]
        next_hands = one.observations["pose"][:-1] @ EYE.motion(one.actions)
        np.testing.assert_allclose(next_hands, episode.observations["pose"][steps + 1], atol=1e-6)
        np.testing.assert_array_equal(one.observations["remaining"][:-1], episode.observations["remaining"][steps])
    erred = se3.inverse(episode.observations["pose"][:7]) @ made[0].observations["pose"][:-1]
    translation, vector = se3.parts(erred)
    assert np.abs(translation[:3]).max() > 0.01 and np.abs(translation).max() <= 0.03
    assert np.abs(vector).max() <= 0.2 and np.abs(translation[-4:]).max() <= 0.4 * 0.03 + 1e-12
    again, _ = augment(episode, EYE, grey, number=5, seed=3)
    np.testing.assert_array_equal(again[4].actions, made[4].actions)
    other, _ = augment(episode, EYE, grey, number=5, seed=4)
    assert (other[4].actions != made[4].actions).any()


def test_the_gripper_is_pasted_and_the_rest_is_drawn_from_the_eye():
    episode, asked = demonstration(1), []

    def render(episode, poses):
        asked.append(poses)
        return grey(episode, poses)

    made, _ = augment(episode, EYE, render, number=2)
    views = np.concatenate([one.observations["pose"][:-1] for one in made]) @ EYE.hand_eye
    np.testing.assert_allclose(asked[0], views, atol=1e-12)
    for one in made:
        pictures, at = one.observations["rgb"][:-1], one.infos["step"]
        np.testing.assert_array_equal(pictures[:, EYE.gripper], episode.observations["rgb"][at][:, EYE.gripper])
        assert (pictures[:, ~EYE.gripper] == 77).all()


def test_what_comes_after_the_fingers_close_is_not_used():
    whole = demonstration(2)
    lifted = whole.observations["pose"].copy()
    lifted[6:, 2, 3] += 0.25  # the hand lifts within the sixth step and after it
    flags = np.arange(7) == 5
    episode = Episode(
        2, {**whole.observations, "pose": lifted}, whole.actions, whole.rewards, *[whole.terminations] * 2, True,
        {"grasping": flags},
    )  # fmt: skip
    assert approach(episode) == 6 and approach(whole) == 7
    made, row = augment(episode, EYE, grey, number=2)
    assert row["views"] == 6 and row["made"] == 12 and max(one.infos["step"].max() for one in made) == 5
    centres = []

    def fit(captures, centre):
        centres.append(centre)
        raise UserError("enough")

    augment(episode, EYE, field_renderer(fit, lambda *parts: parts, EYE), number=1)
    # Between the fingers where they closed, not where the lifted hand is.
    np.testing.assert_allclose(centres[0], (whole.observations["pose"][6] @ [0, 0, 0.1034, 1])[:3], atol=1e-6)


def test_low_poses_are_dropped_and_large_labels_are_cut():
    episode = demonstration(0)
    high = float(episode.observations["pose"][4, 2, 3])
    made, row = augment(episode, EYE, grey, number=4, noise=Noise(lowest=high))
    assert row["rejected"] > 0 and row["made"] + row["rejected"] == 28
    assert min(one.observations["pose"][:, 2, 3].min() for one in made) >= high
    none, row = augment(episode, EYE, grey, number=4, noise=Noise(lowest=9))
    assert not none and row["rejected"] == 28 and "lowest=9" in row["failed"]
    _, far = augment(episode, EYE, grey, number=4, noise=Noise(translation=0.09, last=0))
    assert 0 < far["clipped"] < 1


def test_what_the_hand_would_hit_is_found():
    solid = np.array([[[-0.01, 0.04, 0.06], [0.01, 0.06, 0.11]], [[-0.03, -0.1, 0.0], [0.03, 0.1, 0.06]]])
    hand = se3.pose([0.4, 0.1, 0.3], [2.8, 0.3, -0.2])
    rng = np.random.default_rng(0)

    def world(low, high):
        return rng.uniform(low, high, (20, 3)) @ hand[:3, :3].T + hand[:3, 3]

    finger, palm = world(solid[0, 0] + 0.004, solid[0, 1] - 0.004), world(solid[1, 0] + 0.004, solid[1, 1] - 0.004)
    between = world([-0.03, -0.03, 0.062], [0.03, 0.03, 0.15])  # an object between the fingers
    skin = world([-0.01, 0.0405, 0.06], [0.01, 0.0425, 0.11])
    for points, hit in ((finger, True), (palm, True), (between, False), (skin, False), (finger[:2], False)):
        assert collides(hand[None], solid, points) == [hit]
    aside = hand @ se3.pose([0.0, 0.0, -0.2], [0, 0, 0])
    assert collides(np.stack([hand, aside]), solid, np.concatenate([finger, palm])).tolist() == [True, False]
    assert not collides(hand[None], solid, np.zeros((0, 3))).any()


def test_poses_that_hit_something_are_dropped_and_counted():
    episode = demonstration(0)

    def render(episode, poses):
        return grey(episode, poses)[0], {"collides": np.arange(len(poses)) % 5 == 0, "fit_seconds": 0.5}

    made, row = augment(episode, EYE, render, number=5, seed=3)
    everything, _ = augment(episode, EYE, grey, number=5, seed=3)
    assert (row["made"], row["rejected"], row["collided"]) == (28, 7, 7) and row["fit_seconds"] == 0.5
    assert "collides" not in row and sum(one.length for one in made) == 28
    poses = {one.observations["pose"][step].tobytes() for one in everything for step in range(one.length)}
    assert all(one.observations["pose"][step].tobytes() in poses for one in made for step in range(one.length))
    made, row = augment(episode, EYE, lambda e, p: (grey(e, p)[0], {"collides": np.ones(len(p), bool)}), number=5)
    assert made == [] and row["made"] == 0 and "would hit something at all 35 poses" in row["failed"]


def test_a_field_tells_what_the_hand_would_hit():
    solid = np.array([[[-0.03, -0.03, 0.0], [0.03, 0.03, 0.06]]])
    asked = []

    class Wall:
        """A field whose surface is a plane of points 4 cm below where the hand begins."""

        def render(self, poses):
            return np.full((1, len(poses), SIZE, SIZE, 3), 77, np.uint8)

        def surfaces(self, poses):
            asked.append(poses)
            grid = np.linspace(-0.2, 0.2, 60)
            x, y = np.meshgrid(grid, grid)
            return [np.stack([0.5 + x.ravel(), y.ravel(), np.full(x.size, 0.24)], 1)]

    eye = dataclasses.replace(EYE, solid=solid)
    noise = Noise(translation=0.0, rotation=0.0)
    render = field_renderer(lambda captures, **options: Wall(), lambda *views: views, eye)
    episode = demonstration(0)
    made, row = augment(episode, eye, render, number=1, noise=noise)
    heights = episode.observations["pose"][:7, 2, 3]
    free = heights - 0.06 > 0.24
    assert 0 < free.sum() < 7 and row["collided"] == 7 - free.sum()
    assert set(made[0].infos["step"]) == set(np.flatnonzero(free))
    np.testing.assert_allclose(asked[0], episode.observations["pose"][:7] @ EYE.hand_eye)
    _, row = augment(episode, EYE, field_renderer(lambda c, **o: Wall(), lambda *v: v, EYE), number=1, noise=noise)
    assert row["collided"] == 0  # nobody knows what the hand fills


def test_a_failed_field_costs_its_own_demonstration_only():
    def render(episode, poses):
        if episode.seed == 1:
            raise UserError("too few views")
        return grey(episode, poses)

    found, report = spartn(demonstrations(), EYE, render, number=2)
    assert len(found) == 4 and {episode.seed for episode in found} == {0, 2}
    assert [row["failed"] for row in report.rows] == [None, "too few views", None]
    assert "1 fields failed" in str(report)

    def never(episode, poses):
        raise UserError("all masked")

    with pytest.raises(UserError, match="none of 3 demonstrations.*all masked"):
        spartn(demonstrations(), EYE, never)


def test_an_interrupted_augmentation_goes_on_and_workers_change_nothing(tmp_path):
    own, rendered = demonstrations(4), []
    whole, rows = spartn(own, EYE, grey, number=2, seed=5)

    def stops(episode, poses):
        if len(rendered) == 2:
            raise KeyboardInterrupt
        rendered.append(episode.seed)
        return grey(episode, poses)

    with pytest.raises(KeyboardInterrupt):
        spartn(own, EYE, stops, number=2, seed=5, folder=tmp_path / "views")

    def goes_on(episode, poses):
        rendered.append(episode.seed)
        return grey(episode, poses)

    again, report = spartn(own, EYE, goes_on, number=2, seed=5, folder=tmp_path / "views")
    assert rendered == [0, 1, 2, 3]
    same(again, whole)
    assert [row["made"] for row in report.rows] == [row["made"] for row in rows.rows] == [14] * 4
    (tmp_path / "views" / "00001.safetensors").write_bytes(b"half")  # a damaged one is made again
    same(spartn(own, EYE, goes_on, number=2, seed=5, folder=tmp_path / "views")[0], whole)
    assert rendered == [0, 1, 2, 3, 1]
    with pytest.raises(UserError, match="seed .folder: 5, now: 6"):
        spartn(own, EYE, goes_on, number=2, seed=6, folder=tmp_path / "views")

    render = homography_renderer(EYE, SIZE / 2)
    alone, _ = spartn(own, EYE, render, number=1)
    two, _ = spartn(own, EYE, render, number=1, workers=2, folder=tmp_path / "two")
    same(two, alone)
    same(spartn(own, EYE, grey, number=1, folder=tmp_path / "two")[0], alone)  # read, not made
    with pytest.raises(UserError, match="picklable"):
        spartn(own, EYE, lambda episode, poses: grey(episode, poses), workers=2)
    with pytest.raises(UserError, match="0 workers"):
        spartn(own, EYE, grey, workers=0)


def same(one, other):
    assert len(one) == len(other) and one.observation_space == other.observation_space
    for mine, yours in zip(one, other):
        assert mine.seed == yours.seed and set(mine.observations) == set(yours.observations)
        for key in mine.observations:
            np.testing.assert_array_equal(mine.observations[key], yours.observations[key])
            assert mine.observations[key].dtype == yours.observations[key].dtype
        np.testing.assert_array_equal(mine.actions, yours.actions)
        np.testing.assert_array_equal(mine.infos["step"], yours.infos["step"])


def test_only_what_is_known_from_there_is_observed():
    own = demonstrations(2)
    for episode in own:
        episode.observations["depth"] = np.ones((8, SIZE, SIZE), np.float32)
    parts = {**own.observation_space, "depth": spaces.Box(0, 3, (SIZE, SIZE), np.float32)}
    own = Demonstrations(own.episodes(), observation_space=spaces.Dict(parts), action_space=own.action_space)
    found, _ = spartn(own, EYE, grey, number=1)
    assert set(found[0].observations) == set(found.observation_space) == {"rgb", "pose", "remaining"}


def test_a_field_sees_each_view_and_its_mask_and_is_measured_on_others():
    calls = []

    class Fields:
        def render(self, poses):
            return np.zeros((1, len(poses), SIZE, SIZE, 3), np.uint8)

    def fit(captures, **options):
        calls.append((captures, options))
        return Fields()

    render = field_renderer(fit, lambda *parts: parts, EYE, left_out=2, iterations=5)
    episode = demonstration(0)
    _, row = augment(episode, EYE, render, number=1)
    (held, _), (whole, options) = calls
    assert len(held[0][0]) == 5 and len(whole[0][0]) == 7 and options["iterations"] == 5
    last = episode.observations["pose"][6] @ EYE.motion(episode.actions[6])
    np.testing.assert_allclose(options["centre"], (last @ [0, 0, 0.1034, 1])[:3])
    np.testing.assert_allclose(whole[0][1], episode.observations["pose"][:7] @ EYE.hand_eye)
    assert (whole[0][2] == ~EYE.gripper).all()
    left = episode.observations["rgb"][[1, 5]]
    assert row["psnr"] == pytest.approx(psnr(np.zeros_like(left), left, ~EYE.gripper))


def test_a_homography_shows_a_turn_about_the_eye():
    focal = SIZE / 2
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5

    def sky(pose):
        """Colours that depend on the direction of the ray alone: a turned camera sees just that."""
        rays = np.stack([(columns - SIZE / 2) / focal, -(rows - SIZE / 2) / focal, -np.ones_like(rows)], -1)
        rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True) @ pose[:3, :3].T
        return np.clip(127 + 100 * rays, 0, 255).astype(np.uint8)

    episode = demonstration(0, steps=4)
    episode.observations["rgb"] = np.stack([sky(hand @ EYE.hand_eye) for hand in episode.observations["pose"]])
    noise = AboutTheEye(0.0, 0.2, last=0, hand_eye=EYE.hand_eye)
    errors = noise.draw(np.random.default_rng(0), 4, 3)
    eyes = episode.observations["pose"][:4] @ errors @ EYE.hand_eye
    at_rest = episode.observations["pose"][:4] @ EYE.hand_eye
    np.testing.assert_allclose(eyes[..., :3, 3], np.broadcast_to(at_rest[..., :3, 3], (3, 4, 3)), atol=1e-12)
    pictures, _ = homography_renderer(EYE, focal)(episode, eyes.reshape(-1, 4, 4))
    wanted = np.stack([sky(pose) for pose in eyes.reshape(-1, 4, 4)])
    inside = (slice(None), slice(4, 12), slice(4, 12))
    assert np.abs(pictures[inside].astype(int) - wanted[inside]).max() <= 4
    still = np.repeat(episode.observations["rgb"][:4][None], 3, 0).reshape(-1, SIZE, SIZE, 3)
    assert np.abs(still[inside].astype(int) - wanted[inside]).max() > 15


def test_bad_demonstrations_are_named():
    episode = demonstration(5)
    lacking = {key: value for key, value in episode.observations.items() if key != "pose"}
    with pytest.raises(UserError, match="seed 5.*'pose' is needed"):
        augment(Episode(5, lacking, episode.actions, *[episode.rewards] * 3), EYE, grey)
    episode.observations["pose"][2, :3, 0] *= -1
    with pytest.raises(UserError, match="seed 5, pose 2 is a mirror"):
        augment(episode, EYE, grey)
    with pytest.raises(UserError, match="translation=-1"):
        Noise(translation=-1)


# ---- the policy ------------------------------------------------------------------------------------------------------


def test_point_matching_is_the_distance_of_the_grippers_points():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (2, 5, 6))
    points = np.array(CONTROL_POINTS)
    moved = [points @ se3.rotation(np.pi / 6 * a[:, 3:]).transpose(0, 2, 1) + 0.06 * a[:, None, :3] for a in actions]
    want = np.abs(moved[0] - moved[1]).sum(-1).mean()
    found = point_matching(*torch.from_numpy(actions), 0.06, np.pi / 6)
    assert float(found) == pytest.approx(want, abs=1e-9)
    vectors = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: rotations(v + 1e-3), vectors)


def steps(number=64):
    """Pictures whose brightness says what to do."""
    rng = torch.Generator().manual_seed(0)
    value = torch.rand(number, generator=rng)
    rgb = (value * 255).to(torch.uint8)[:, None, None, None].expand(-1, SIZE, SIZE, 3).contiguous()
    actions = torch.zeros(number, 6)
    actions[:, 0] = 2 * value - 1
    return Steps(rgb, torch.rand(number, 1, generator=rng), actions)


def test_it_learns_and_a_stopped_training_goes_on_to_the_same_policy(tmp_path):
    config = VisualConfig(steps=100, batch_size=16, learning_rate=5e-3)

    def made():
        torch.manual_seed(0)
        return VisualPolicy(SIZE, width=8, hidden=16)

    whole = made()
    history = train_visual(whole, steps(), steps(16), config)
    assert history[-1]["loss"] < 0.012  # saying nothing costs 0.03

    class Stop(Exception):
        pass

    def stop(done, words):
        raise Stop

    with Run.open(tmp_path / "run", {"a": 1}, tensorboard=False) as run:
        with pytest.raises(Stop):
            # The state of step 50 is saved, that of step 100 is not.
            train_visual(made(), steps(), steps(16), config, run=run, save_every=-1, report=_after(1, stop))
    with Run.open(tmp_path / "run", {"a": 1}, resume=True, tensorboard=False) as run:
        again = made()
        train_visual(again, steps(), steps(16), config, run=run)
    for one, two in zip(whole.parameters(), again.parameters()):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    Checkpoint.save(tmp_path / "policy", again)
    loaded = Checkpoint.load(tmp_path / "policy").module()
    observation = {"rgb": np.full((SIZE, SIZE, 3), 255, np.uint8), "remaining": np.ones(1, np.float32)}
    action, _ = loaded.predict(observation)
    dark, _ = loaded.predict({**observation, "rgb": np.zeros((SIZE, SIZE, 3), np.uint8)})
    assert action.shape == (6,) and action[0] > 0.2 and dark[0] < -0.2
    batch, _ = loaded.predict({key: np.stack([value] * 3) for key, value in observation.items()})
    np.testing.assert_allclose(batch[2], action, atol=1e-6)


def _after(number, stop):
    calls = []

    def report(done, words):
        calls.append(done)
        if len(calls) > number:
            stop(done, words)

    return report


def test_bad_input():
    with pytest.raises(UserError, match="image_size=8"):
        VisualPolicy(8)
    with pytest.raises(UserError, match="rgb"):
        VisualPolicy(SIZE).predict(np.zeros(3))
    with pytest.raises(UserError, match="of uint8"):
        VisualPolicy(SIZE).predict({"rgb": np.zeros((SIZE, SIZE, 3)), "remaining": np.ones(1)})
    with pytest.raises(UserError, match="depth"):
        Steps.of(demonstrations(1), depth=True)
    with pytest.raises(UserError, match="corrective=2"):
        VisualConfig(corrective=2)
    with pytest.raises(UserError, match="mixing=-1"):
        VisualConfig(mixing=-1)
