import json

import numpy as np
import pytest

from fleetgym.benchmarks import fleet_merge, one_shot
from fleetgym.core.errors import UserError

TINY = (
    "tasks=reach-v3,door-close-v3 robots_per_task=2 demonstrations=3 hidden=8 batch_size=2 warmup=1 local_steps=2"
    " rounds=2 episodes=2 max_steps=40 curve_points=1 curve_episodes=1"
)


@pytest.mark.slow
def test_every_row_says_what_was_sent(tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    words = ["--methods", "alone_own", "--out", str(runs), "--no-film", "--workers", "1", "--override", *TINY.split()]
    assert fleet_merge.main(words) == 0
    rows = ["average", "fleet_merge", "regmean", "refit_last", "mixture"]
    command = ["--runs", str(runs), "--episodes", "1", "--out", str(out)]
    assert one_shot.main([*command, "--methods", *rows]) == 0
    document = json.loads((out / "results.json").read_text())
    found = {row["method"]: row for row in document["rows"]}
    assert list(found) == rows and all(row["robots"] == 4 and row["episodes"] == 2 for row in found.values())
    assert found["average"]["bytes_beside"] == found["mixture"]["bytes_beside"] == 0
    # The last layer of 8 units and 4 actions: 9 * 10 / 2 + 9 * 4 numbers, and the count.
    assert found["refit_last"]["bytes_beside"] == found["regmean"]["bytes_beside"] + 4 * (45 + 36) + 8
    assert "| `refit_last` |" in (out / "table.md").read_text() and "4 robots" in capsys.readouterr().out
    assert one_shot.main([*command, "--methods", "average", "fisher"]) == 0  # what is there is kept
    document = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in document["rows"]] == [*rows, "fisher"]
    with pytest.raises(UserError, match="unknown method 'averages'; nearest: 'average'"):
        one_shot.main([*command, "--methods", "averages"])
    with pytest.raises(UserError, match="--robots-per-task 3: there are 2"):
        one_shot.main([*command, "--robots-per-task", "3"])
    with pytest.raises(UserError, match="has rows of 4 robots and 2 episodes, these would be of 2 and 2; choose ano"):
        one_shot.main([*command, "--robots-per-task", "1"])
    with pytest.raises(UserError, match="these would be of 4 and 4; choose another --out"):
        one_shot.main([*command, "--episodes", "2"])


class Constant:
    def __init__(self, value):
        self.value = value

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        count = 0.0 if state is None else state[0] + 1
        return np.full(2, self.value), (count,)


def test_the_mixture_asks_the_policies_of_the_task():
    mixture = one_shot.Mixture([Constant(1.0), Constant(3.0), Constant(9.0)], [0, 0, 1], 2)
    action, state = mixture.predict(np.array([5.0, 1.0, 0.0]))
    assert action.tolist() == [2.0, 2.0] and state == (0.0, 0.0)
    action, state = mixture.predict(np.array([5.0, 1.0, 0.0]), state)
    assert state == (1.0, 1.0)
    assert mixture.predict(np.array([5.0, 0.0, 1.0]))[0].tolist() == [9.0, 9.0]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"benchmark": "experts"}}')
    with pytest.raises(UserError, match="is not a folder of `fleetgym bench fleet_merge`"):
        one_shot.main(["--runs", str(tmp_path)])
