"""OfficeNav's compiled kernels and how the vector environment calls them."""

import importlib.util
import os
import sys

import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import kernels
from fleetgym.envs.office_nav.vector import OfficeNavVectorEnv

FORWARD, RIGHT, LEFT = 2, 1, 0


def test_kept_compilations_know_the_numbers_of_other_files(tmp_path):
    """Numba alone would take the old result: the file of the functions is the same to the second."""
    file = tmp_path / "kept_functions.py"
    file.write_text(
        "from fleetgym.envs.office_nav.kernels import _jit\n"
        "import kept_numbers\n"
        "STEP, TABLE = kept_numbers.STEP, kept_numbers.TABLE\n"
        "@_jit\n"
        "def one(x):\n    return x + STEP\n"
        "@_jit\n"
        "def both(x):\n    return one(x) * TABLE[0]\n"
    )
    os.utime(file, (1, 1))

    class Numbers:
        pass

    found = []
    for step, table in ((1, 10), (2, 10), (2, 20), (1, 10)):
        Numbers.STEP, Numbers.TABLE = step, np.array([table])
        sys.modules["kept_numbers"] = Numbers
        spec = importlib.util.spec_from_file_location("kept_functions", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        del sys.modules["kept_numbers"]
        assert module.both(5) == (5 + step) * table
        found.append(sum(module.both.stats.cache_hits.values()))
    assert found == [0, 0, 0, 1]  # what is as it was is found again
    assert len(list((tmp_path / "__pycache__").glob("*.both_*.nbi"))) == 3


def test_every_global_of_a_kernel_is_in_its_name():
    """Numbers, arrays and tuples are hashed and kernels named; of other kinds there are only modules and builtins."""
    for name, kernel in vars(kernels).items():
        if not hasattr(kernel, "py_func"):
            continue
        assert kernel.py_func.__qualname__.startswith(f"{name}_")
        for used in kernel.py_func.__code__.co_names:
            value = kernels.__dict__.get(used)
            hashed = isinstance(value, (int, float, tuple, np.generic, np.ndarray)) or hasattr(value, "py_func")
            assert value is None or hashed or value is np, (name, used)


def test_last_observations_are_new_arrays_with_the_sign_where_it_was_seen():
    envs = OfficeNavVectorEnv(6, variant="OfficeNav-Symbolic-v0", horizon=9)
    envs.reset(seed=0)
    to_sign = [FORWARD] * 5 + [RIGHT] + [FORWARD] * 2 + [LEFT]
    kept = []
    for _ in range(2):
        for index, action in enumerate(to_sign):
            # The even ones walk to the sign, the others turn.
            seen, _, _, truncated, infos = envs.step(np.where(np.arange(6) % 2 == 0, action, LEFT))
            if index == len(to_sign) - 2:
                before = {key: value.copy() for key, value in seen.items()}
        assert truncated.all() and not seen["on_sign"].any() and not seen["sign"].any()
        final = infos["final_obs"]
        assert [final[row]["on_sign"] for row in range(6)] == [1, 0] * 3
        for row in range(6):
            np.testing.assert_array_equal(final[row]["sign"], before["sign"][row])
            assert final[row]["sign"].any() == (row % 2 == 0)
            if row % 2:
                assert not final[row]["sign"].flags.writeable
        kept.append((final, [{key: np.copy(value) for key, value in last.items()} for last in final]))
    for final, copies in kept:  # they are not written again
        for last, copied in zip(final, copies):
            for key in last:
                np.testing.assert_array_equal(last[key], copied[key])


def test_a_refused_step_changes_nothing():
    envs, twin = (OfficeNavVectorEnv(4, variant="OfficeNav-v0") for _ in range(2))
    seen, _ = envs.reset(seed=3)
    twin.reset(seed=3)
    before = {key: value.copy() for key, value in seen.items()}
    for wrong in ([0, 0, 9, 0], [-1, 0, 0, 0]):
        with pytest.raises(UserError, match="does not exist"):
            envs.step(wrong)
    for key in seen:
        np.testing.assert_array_equal(seen[key], before[key])
    for action in np.random.default_rng(0).integers(4, size=(40, 4)):
        one, two = envs.step(action), twin.step(action)
        for key in seen:
            np.testing.assert_array_equal(one[0][key], two[0][key])
        np.testing.assert_array_equal(one[1], two[1])
