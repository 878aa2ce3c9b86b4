"""The tensor environment: bit by bit the trajectories of the vector environment."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import rng
from fleetgym.envs.office_nav.reference import OracleReader
from fleetgym.envs.office_nav.torch_env import TorchOfficeNav
from fleetgym.envs.office_nav.torch_tensors import bits
from fleetgym.envs.office_nav.vector import OfficeNavVectorEnv

INFO = ("trial", "episode_index", "task_id", "phrase_id", "goal", "success")


def same_observation(theirs, ours):
    assert set(theirs) == set(ours)
    for key in theirs:
        assert np.array_equal(theirs[key], ours[key].numpy()), key


def same_info(theirs, ours):
    for key in INFO:
        assert np.array_equal(theirs[key], ours[key].numpy()), key


def actions_for(policy, observation, state, start, random, number):
    """Half of the rows walk to the sign and to offices, half at random, so that all that there is is seen."""
    chosen, state = policy.predict(observation, state, start)
    chosen[::2] = random.integers(number, size=len(chosen))[::2]
    wander = random.random(len(chosen)) < 0.01
    return np.where(wander, random.integers(number, size=len(chosen)), chosen), state


@pytest.mark.parametrize("backend", ["kernels", "tensors"])
@pytest.mark.parametrize(
    ("variant", "mode", "steps", "split"),
    [
        ("OfficeNav-v0", "same_step", 90, "train"),
        ("OfficeNav-v0", "next_step", 100, "layout"),
        ("OfficeNav-Symbolic-v0", "same_step", 200, "train"),
        ("OfficeNav-Symbolic-v0", "next_step", 200, "phrases"),
        ("OfficeNav-SingleGoal-v0", "next_step", 70, "test"),
        ("OfficeNav-Tall-v0", "same_step", 100, "train"),
        ("OfficeNav-TallSkinny-v0", "same_step", 70, "train"),
        ("OfficeNav-Map-v0", "same_step", 66, "train"),
        ("OfficeNav-Map-v0", "next_step", 66, "style"),
        ("OfficeNav-Released-v0", "same_step", 100, "train"),
        ("OfficeNav-v0", "disabled", 90, "test"),
        ("OfficeNav-Map-v0", "disabled", 66, "layout"),
    ],
)
def test_trajectories_are_those_of_the_vector_environment(variant, mode, steps, split, backend):
    number = 32  # times steps: thousands of steps each
    theirs = OfficeNavVectorEnv(number, variant=variant, autoreset_mode=mode, split=split)
    ours = TorchOfficeNav(number, "cpu", variant, autoreset=mode, split=split, backend=backend)
    observation, info = theirs.reset(seed=7)
    tensors, our_info = ours.reset(7)
    same_observation(observation, tensors)
    same_info(info, our_info)
    plan = theirs._rows.tables.layouts[int(theirs._rows.tables.layout_of[theirs._rows.tables.split(split)])]
    policy = OracleReader(plan, released=theirs.variant.released)
    random, state, start = np.random.default_rng(1), None, np.ones(number, bool)
    ended, signs, entered = np.zeros(number, bool), 0, 0
    for _ in range(steps):
        action, state = actions_for(policy, observation, state, start, random, theirs.single_action_space.n)
        observation, reward, terminated, truncated, info = theirs.step(action)
        tensors, our_reward, our_terminated, our_truncated, our_info = ours.step(torch.as_tensor(action))
        # After the step that only resets, the next episode begins.
        start, ended = (ended if mode == "next_step" else terminated | truncated), terminated | truncated
        same_observation(observation, tensors)
        same_info(info, our_info)
        assert np.array_equal(reward.astype(np.float32), our_reward.numpy())
        assert np.array_equal(terminated, our_terminated.numpy())
        assert np.array_equal(truncated, our_truncated.numpy())
        signs += int(observation["on_sign"].sum())
        entered += int(terminated.sum())
        if mode == "same_step":
            rows = our_info["final_rows"].tolist()
            assert rows == np.flatnonzero(ended).tolist()
            for place, row in enumerate(rows):
                final = {key: value[place] for key, value in our_info["final_obs"].items()}
                same_observation(info["final_obs"][row], final)
                for key in INFO:
                    assert info["final_info"][key][row] == our_info["final_info"][key][place]
        elif mode == "disabled" and ended.any():
            observation, info = theirs.reset(options={"reset_mask": ended})
            tensors, our_info = ours.reset(options={"reset_mask": torch.as_tensor(ended)})
            same_observation(observation, tensors)
            same_info(info, our_info)
    assert signs > 20 and entered > 5


@pytest.mark.parametrize("backend", ["kernels", "tensors"])
@pytest.mark.parametrize("variant", ["OfficeNav-Symbolic-v0", "OfficeNav-v0"])
def test_reset_goes_on_with_the_trial_and_takes_the_options(backend, variant):
    theirs = OfficeNavVectorEnv(6, variant=variant, autoreset_mode="disabled")
    ours = TorchOfficeNav(6, variant=variant, autoreset="disabled", backend=backend)
    mask = np.array([True, False, True, False, False, True])
    for seed, options in (
        (3, None),
        (None, None),
        (None, None),
        (None, {"split": "test"}),
        (None, {"task_id": 5}),
        (None, {"new_trial": True}),
        (None, {"split": "layout", "task_id": 1003}),
        (None, {"reset_mask": mask}),
        (None, None),
        (4, None),
        ([9, 8, 7, 6, 5, 2**63 + 5], {"split": "phrases"}),
        (None, {"split": ["train", "test", "phrases", "layout", "layout", "train"]}),
        (None, {"task_id": [1, 2, 1003, 4, 5, 1006], "reset_mask": mask}),
        (None, {"task_id": np.arange(1001, 1007), "split": "layout"}),
        ([3, None, None, 4, None, None], None),
        (5, None),
        (None, {"new_trial": False}),
    ):
        observation, info = theirs.reset(seed=seed, options=options)
        arrays = {key: value for key, value in (options or {}).items() if isinstance(value, np.ndarray)}
        as_tensors = {key: torch.as_tensor(value) for key, value in arrays.items()}
        tensors, our_info = ours.reset(seed, options=None if options is None else {**options, **as_tensors})
        same_observation(observation, tensors)
        same_info(info, our_info)
        for action in np.random.default_rng(0).integers(4, size=(5, 6)):
            same_observation(theirs.step(action)[0], ours.step(torch.as_tensor(action))[0])


@pytest.mark.parametrize("backend", ["kernels", "tensors"])
def test_disabled_refuses_finished_episodes(backend):
    env = TorchOfficeNav(2, variant="Symbolic", autoreset="disabled", horizon=1, backend=backend)
    env.reset(0)
    _, _, _, truncated, _ = env.step(torch.zeros(2, dtype=torch.long))
    assert truncated.all()
    with pytest.raises(UserError, match="environment 0: its episode has ended"):
        env.step(torch.zeros(2, dtype=torch.long))
    env.reset(options={"reset_mask": truncated})
    env.step(torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("backend", ["kernels", "tensors"])
def test_signs_by_index(backend):
    pixels, index = (TorchOfficeNav(8, sign=sign, backend=backend, horizon=9) for sign in ("pixels", "index"))
    splits = {"split": ["train", "layout"] * 4}
    to_sign = (2, 2, 2, 2, 2, 1, 2, 2, 0)
    for _ in range(2):
        one, two = pixels.reset(5, options=splits)[0], index.reset(5, options=splits)[0]
        for action in to_sign:
            assert torch.equal(one["sign"], index.sign_pixels[two["sign_index"]])
            one, *_, info = pixels.step(torch.full((8,), action))
            two, *_, our_info = index.step(torch.full((8,), action))
        last, seen = our_info["final_obs"]["sign_index"], info["final_obs"]["sign"]
        assert (last > 0).all() and len(last) == 8 and last[1] > 126 and index.sign_pixels[0].sum() == 0
        assert torch.equal(seen, index.sign_pixels[last])


@pytest.mark.parametrize("backend", ["kernels", "tensors"])
def test_copies_go_on_alike(backend):
    env = TorchOfficeNav(4, variant="Map", backend=backend)
    env.reset(1)
    actions = torch.as_tensor(np.random.default_rng(0).choice(4, size=(80, 4), p=[0.1, 0.2, 0.5, 0.2]))
    for action in actions[:40]:
        env.step(action)
    twin = pickle.loads(pickle.dumps(env))
    for action in actions[40:]:
        (one, *rest, _), (two, *their_rest, _) = env.step(action), twin.step(action)
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert all(torch.equal(a, b) for a, b in zip(rest, their_rest))


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: sizes and values that depend on what tensors hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = name in ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique_dim", "_unique2", "equal")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        assert not waits, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["same_step", "next_step", "disabled"])
@pytest.mark.parametrize("variant", ["OfficeNav-v0", "OfficeNav-Symbolic-v0", "OfficeNav-Released-v0"])
def test_a_step_on_tensors_does_not_wait(variant, mode):
    options = {"autoreset": mode, "backend": "tensors", "sign": "index", "final_obs": False}
    env, twin = (TorchOfficeNav(16, variant=variant, check=check, **options) for check in (False, True))
    env.reset(3), twin.reset(3)
    actions = torch.as_tensor(np.random.default_rng(0).integers(4, size=(29 if mode == "disabled" else 70, 16)))
    for action in actions:
        with _NoWaiting():
            observation, *_ = env.step(action)
        expected, *_ = twin.step(action)
        assert all(torch.equal(observation[key], expected[key]) for key in expected)
    with pytest.raises(AssertionError, match="waits"), _NoWaiting():
        twin.step(actions[0])


def test_unknown_actions_without_check_are_the_nearest():
    options = {"variant": "Symbolic", "backend": "tensors"}
    env, twin = TorchOfficeNav(2, check=False, **options), TorchOfficeNav(2, **options)
    env.reset(0), twin.reset(0)
    assert torch.equal(env.step(torch.tensor([-3, 9]))[0]["image"], twin.step(torch.tensor([0, 3]))[0]["image"])


def test_random_bits_are_those_of_the_others():
    generator = np.random.default_rng(0)
    seed = generator.integers(0, 1 << 64, 500, dtype=np.uint64)
    trial, episode = generator.integers(0, 1 << 40, (2, 500))
    expected = rng.bits(seed, trial, episode, 3)
    found = bits(torch.as_tensor(seed.view(np.int64)), torch.as_tensor(trial), torch.as_tensor(episode), 3)
    assert np.array_equal(expected.astype(np.int64), found.numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TorchOfficeNav(0), "num_envs is 0; it is an integer from 1"),
        (lambda: TorchOfficeNav(2.5), "num_envs is 2.5"),
        (lambda: TorchOfficeNav(2, variant="OfficeNav-v9"), "OfficeNav-v9.*OfficeNav-Symbolic-v0"),
        (lambda: TorchOfficeNav(2, "nonsense"), "device 'nonsense'"),
        (lambda: TorchOfficeNav(2, autoreset="never"), "autoreset 'never'.*same_step"),
        (lambda: TorchOfficeNav(2, sign="words"), "'words'.*pixels"),
        (lambda: TorchOfficeNav(2, variant="Map", sign="index"), "signs of text"),
        (lambda: TorchOfficeNav(2, split="style"), "split 'style'.*train, test, phrases, layout"),
        (lambda: TorchOfficeNav(2).step(torch.zeros(2).long()), "step before reset"),
        (lambda: _ready().step(torch.zeros(3).long()), r"actions of shape \(3,\).*integers \[2\]"),
        (lambda: _ready().step(torch.zeros(2)), "float32"),
        (lambda: _ready().step(torch.tensor([0, 4])), "action 4 of environment 1 does not exist.*3 toggle"),
        (lambda: _ready("tensors").step(torch.tensor([-1, 4])), "action -1 of environment 0 does not exist.*3 toggle"),
        (lambda: TorchOfficeNav(2, backend="cuda"), "unknown backend 'cuda'.*tensors"),
        (lambda: TorchOfficeNav(2, variant="Map").sign_pixels, "has pictures"),
        (lambda: _ready().reset(-1), "seed -1"),
        (lambda: _ready().reset([1]), "1 seeds for 2 environments"),
        (lambda: _ready().reset(options={"split": "tst"}), "split 'tst'"),
        (lambda: _ready().reset(options={"task_id": 1200}), "task_id 1200: it is an integer from 0 to 1199"),
        (lambda: _ready().reset(options={"tsk": 1}), "reset option 'tsk': the options are"),
        (lambda: _ready().reset(options={"task_id": [1, 2, 3]}), "give one value, or 2"),
        (lambda: _ready().reset(0, options={"new_trial": False}), "leave one of them out"),
        (lambda: _ready().reset(options={"reset_mask": [True]}), r"reset_mask: it is a bool array of shape \(2,\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


def _ready(backend=None):
    env = TorchOfficeNav(2, variant="Symbolic", backend=backend)
    env.reset(0)
    return env
