import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator, seed_everything, torch_generator

FIXED = [559986, 180391, 763844]


def test_equal_keys_give_equal_numbers_and_other_keys_others():
    assert generator("collect", 3).random(4).tolist() == generator("collect", np.int64(3)).random(4).tolist()
    keys = [("a",), ("a", 0), ("a", 1), ("a", "1"), ("a", -1), ("ab", "c"), ("a", "bc"), (1, 23), (12, 3), (2**70,)]
    first = {generator(*key).random() for key in keys}
    assert len(first) == len(keys)


def test_numbers_are_those_of_every_process_and_version():
    assert generator("fleet_merge", 3).integers(1_000_000, size=3).tolist() == FIXED
    code = "from fleetgym.core.seeding import generator; print(generator('fleet_merge', 3).integers(1_000_000, size=3))"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": hash_seed}, check=True
        )
        assert done.stdout.strip() == str(np.array(FIXED))


def test_torch_generator():
    draw = lambda *keys: torch.rand(3, generator=torch_generator(*keys)).tolist()  # noqa: E731
    assert draw("init", 1) == draw("init", 1) != draw("init", 2)


@pytest.mark.parametrize("keys", [(), (1.5,), ("a", None), (("a",),)])
def test_keys_are_integers_and_strings(keys):
    with pytest.raises(UserError, match="key"):
        generator(*keys)


def test_seed_everything_seeds_the_global_generators():
    threads = torch.get_num_threads()
    try:
        draws = []
        for _ in range(2):
            seed_everything(7, threads=1)
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        assert draws[0] == draws[1]
        assert torch.get_num_threads() == 1
        seed_everything(2**40, threads=None)  # larger than NumPy takes
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(UserError, match="-1"):
        seed_everything(-1)
