"""Rigid motions: round trips, inverses, small and half turns, what is refused."""

import numpy as np
import pytest

from fleetgym.core import UserError, se3


def random_poses(seed, *shape):
    rng = np.random.default_rng(seed)
    return se3.pose(rng.normal(size=(*shape, 3)), rng.uniform(-1.7, 1.7, (*shape, 3)))


def test_round_trips_and_inverses_in_batches():
    poses = random_poses(0, 4, 5)
    translation, vector = se3.parts(poses)
    np.testing.assert_allclose(se3.pose(translation, vector), poses, atol=1e-12)
    np.testing.assert_allclose(se3.inverse(poses) @ poses, np.broadcast_to(np.eye(4), poses.shape), atol=1e-12)
    assert np.allclose(np.linalg.det(poses[..., :3, :3]), 1)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 1.0, np.pi - 1e-7, np.pi])
def test_angles(angle):
    axis = np.array([0.36, -0.48, 0.8])
    matrix = se3.rotation(angle * axis)
    np.testing.assert_allclose(matrix @ axis, axis, atol=1e-12)
    assert np.trace(matrix) == pytest.approx(1 + 2 * np.cos(angle), abs=1e-9)
    found = se3.rotation_vector(matrix)
    assert np.linalg.norm(found) == pytest.approx(angle, abs=1e-6)
    np.testing.assert_allclose(se3.rotation(found), matrix, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m[:3], "shape"),
        (lambda m: np.where(np.arange(4) == 0, np.nan, m), "finite"),
        (lambda m: m @ np.diag([1.0, 1.0, -1.0, 1.0]), "mirror"),
        (lambda m: m @ np.diag([1.0, 1.0, 1.1, 1.0]), "no rigid motion"),
    ],
)
def test_what_is_no_pose_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        se3.check(change(random_poses(1)), "the camera")
    with pytest.raises(UserError, match="the cameras"):
        se3.check(np.stack([np.eye(4), 2 * np.eye(4)]), "the cameras")
