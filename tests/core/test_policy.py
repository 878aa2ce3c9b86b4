import numpy as np
import pytest
from gymnasium import spaces

from fleetgym.core.errors import UserError
from fleetgym.core.policy import FunctionPolicy, Policy


def swing(observation):
    return np.array([-3.0 * observation[1] - observation[2]])


PENDULUM = spaces.Box(-2.0, 2.0, (1,), np.float32)


def test_function_policy_batches_clips_and_keeps_the_state():
    policy = FunctionPolicy(swing, PENDULUM)
    assert isinstance(policy, Policy)
    batch = np.array([[1.0, 0.1, 0.2], [1.0, 1.0, 8.0]])
    actions, state = policy.predict(batch, ("mine",), np.array([True, False]))
    assert actions.shape == (2, 1) and actions.dtype == np.float32 and state == ("mine",)
    np.testing.assert_allclose(actions, [[-0.5], [-2.0]], rtol=1e-6)
    single, _ = policy.predict(batch[0])
    assert single.shape == (1,) and single[0] == actions[0, 0]


def test_function_policy_of_mappings_and_of_discrete_actions():
    policy = FunctionPolicy(lambda o: int(o["x"][0] > 0), spaces.Discrete(2))
    action, _ = policy.predict({"x": np.array([1.0])})
    assert action == 1
    actions, _ = policy.predict({"x": np.array([[1.0], [-1.0]])})
    assert actions.tolist() == [1, 0]


def test_function_policy_refuses_other_dimensions():
    with pytest.raises(UserError, match=r"\(2, 3, 4\).*observation_ndim"):
        FunctionPolicy(swing).predict(np.zeros((2, 3, 4)))
