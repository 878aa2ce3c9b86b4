"""Reference scores, policies that play, and the metrics of reading."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import language, reference, signs
from fleetgym.envs.office_nav.buildings import buildings
from fleetgym.envs.office_nav.layout import GOAL, LAYOUTS
from fleetgym.envs.office_nav.metrics import reading
from fleetgym.envs.office_nav.reference import NonReader, OracleReader, RandomPolicy, Reader, Tracker
from fleetgym.envs.office_nav.variants import resolve_variant, tables

STANDARD = LAYOUTS["standard"]


def released_goals():
    return [np.flatnonzero(colours == GOAL) for colours in buildings(200, "standard", False, False)]


def test_the_shortest_paths_are_those_of_the_fact_sheet():
    lengths = {(1, 5): 9, (1, 3): 11, (1, 1): 13, (7, 5): 15, (7, 3): 17, (7, 1): 19}
    for k, (x, y) in enumerate(STANDARD.office_xy.tolist()):
        assert len(reference.path_to_office(STANDARD, k)) == lengths[x if x in (1, 7) else x - 4, y]
    assert reference.path_to_sign(STANDARD) == (2, 2, 2, 2, 2, 1, 2, 2)
    for plan in LAYOUTS.values():
        assert [len(reference.path_to_office(plan, k)) for k in range(plan.offices)] == plan.distances.tolist()
        assert len(reference.path_to_sign(plan)) == plan.sign_distance


@pytest.mark.parametrize(("steps", "expected"), [(9, 0.6), (13, 0.4), (19, 0.1), (30, -0.45), (31, -1.5), (None, -1.5)])
def test_returns(steps, expected):
    assert reference.episode_return(steps) == pytest.approx(expected)


def test_exact_scores():
    # The fact sheet's figures are means over drawn buildings; these are sums over all of them.
    assert reference.oracle_score(STANDARD).mean_return == pytest.approx(0.435, abs=0.003)
    assert reference.oracle_score(STANDARD, goals=released_goals()).mean_return == pytest.approx(0.442, abs=5e-4)
    single = reference.oracle_score(STANDARD, single_goal=True)
    assert single.mean_return == pytest.approx(0.35) and single.success == 1 and single.length == pytest.approx(14)
    assert reference.oracle_score(LAYOUTS["tall"]).mean_return == pytest.approx(0.321, abs=0.003)

    other = reference.non_reader_score(STANDARD)
    assert other.mean_return == pytest.approx(0.292, abs=0.005) and other.success == pytest.approx(0.937, abs=0.002)
    single = reference.non_reader_score(STANDARD, single_goal=True)
    assert single.mean_return == pytest.approx(1 / 120) and single.success == pytest.approx(10 / 12)
    unexplored = reference.non_reader_score(STANDARD, explore=False)
    assert unexplored.mean_return == pytest.approx(-0.277, abs=0.01)


def test_the_search_opens_the_six_left_doors_in_26_actions():
    walk = reference.search(STANDARD)
    assert len(walk.actions) == 26 and sorted(walk.doors) == [0, 1, 4, 5, 8, 9] and walk.times[-1] == 26


def test_goal_sets_are_a_distribution():
    for plan in LAYOUTS.values():
        sets = reference.goal_sets(plan, False)
        assert sum(chance for _, chance in sets) == pytest.approx(1)
        mean = sum(len(goals) * chance for goals, chance in sets)
        assert mean == pytest.approx(1 + (plan.offices - 6) / 6)


def test_the_tracker_knows_where_the_agent_is():
    env = gym.make_vec("OfficeNav-Symbolic-v0", num_envs=64)
    env.reset(seed=0)
    tracker, random = Tracker(STANDARD, 64), np.random.default_rng(0)
    for _ in range(100):
        actions = random.choice(4, size=64, p=[0.2, 0.2, 0.4, 0.2])
        tracker.step(actions)
        observation, _, terminated, truncated, _ = env.step(actions)
        tracker.reset(terminated | truncated)
        assert np.array_equal((tracker.pose[:, :2] == STANDARD.sign_xy).all(1), observation["on_sign"] == 1)
        ahead = tracker.pose[:, :2] + reference.DIRECTIONS[tracker.pose[:, 2]]
        wall = STANDARD.walls[ahead[:, 1], ahead[:, 0]]
        assert np.array_equal(wall, observation["image"][:, 3, 5, 0] == 2)


def test_the_reader_reads_every_phrase_and_every_style():
    for plan in LAYOUTS.values():
        reader = Reader(plan)
        for phrase in language.phrases(plan.offices):
            assert reader.cell(signs.text_signs([phrase])[0]) == language.resolve(phrase, plan.offices)
    assert reader.cell(np.zeros((84, 84, 3), np.uint8)) == -1
    worlds = tables(resolve_variant("Map"))
    styles, reader = signs.picture_styles(worlds.layouts[0]), Reader(STANDARD)
    for task in range(20):
        for style in range(len(styles.base)):
            plan = signs.compose(styles, style, worlds.colours[0, task, :12])
            assert reader.cell(plan) == worlds.goals[0, task]


@pytest.mark.parametrize("variant", ["OfficeNav-Symbolic-v0", "OfficeNav-v0", "OfficeNav-SingleGoal-v0"])
def test_policies_that_play_reach_the_exact_scores(variant):
    worlds = tables(resolve_variant(variant))
    for policy, score in ((OracleReader, reference.oracle_score), (NonReader, reference.non_reader_score)):
        played = reading(policy(STANDARD), variant, trials=200, seed=11)
        exact = score(STANDARD, goals=[np.flatnonzero(blue) for blue in played.blue])
        summary = played.summary()
        assert summary["return"] == pytest.approx(exact.mean_return)
        assert summary["success"] == pytest.approx(exact.success) and summary["length"] == pytest.approx(exact.length)
    assert not worlds.variant.released


def test_what_tells_a_reader_from_others():
    true = reading(OracleReader(STANDARD), "OfficeNav-Symbolic-v0", trials=100).summary()
    assert true["first_named"] == true["first_goal"] == true["saw_sign"] == 1 and true["doors_before_goal"] == 1
    swapped = reading(OracleReader(STANDARD), "OfficeNav-Symbolic-v0", trials=100, sign="swapped").summary()
    assert swapped["first_named"] == 1 and swapped["first_goal"] == 0 and swapped["success"] == 0
    blank = reading(OracleReader(STANDARD), "OfficeNav-Symbolic-v0", trials=50, sign="blank").summary()
    assert blank["success"] == 0 and blank["saw_sign"] == 1

    others = [
        reading(NonReader(STANDARD), "OfficeNav-Symbolic-v0", trials=100, sign=sign).summary()
        for sign in ("true", "swapped", "blank")
    ]
    assert len({row["return"] for row in others}) == 1 and others[0]["saw_sign"] == 0
    assert others[1]["first_named"] < 0.05 and others[0]["doors_before_goal"] >= 1


@pytest.mark.parametrize(
    ("variant", "split"),
    [
        ("OfficeNav-Map-v0", "style"),
        ("OfficeNav-Tall-v0", "test"),
        ("OfficeNav-Symbolic-v0", "phrases"),
        ("OfficeNav-Symbolic-v0", "layout"),
        ("OfficeNav-Released-v0", "train"),
    ],
)
def test_the_reader_reads_everywhere(variant, split):
    worlds = tables(resolve_variant(variant))
    plan = worlds.layouts[int(worlds.layout_of[worlds.split(split)])]
    policy = OracleReader(plan, released=worlds.variant.released)
    for sign in ("true", "swapped"):
        summary = reading(policy, variant, trials=40, split=split, sign=sign).summary()
        assert summary["first_named"] == 1 and summary["first_goal"] == (sign == "true")


def test_a_single_environment_is_played_too():
    env = gym.make("OfficeNav-v0")
    policy = OracleReader(STANDARD)
    observation, info = env.reset(seed=3)
    state, start = None, True
    for episode in range(4):
        total, over = 0.0, False
        while not over:
            action, state = policy.predict(observation, state, np.array([start]))
            observation, reward, terminated, truncated, info = env.step(action)
            total, start, over = total + reward, False, terminated or truncated
        assert terminated and info["success"]
        if episode % 2:
            assert total == pytest.approx(reference.episode_return(STANDARD.distances[info["goal"]]))
        observation, info = env.reset()
        start = True


def test_random_is_bad():
    summary = reading(RandomPolicy(4), "OfficeNav-Symbolic-v0", trials=2000).summary()
    assert -1.5 <= summary["return"] < -1.45


def test_bad_input():
    with pytest.raises(UserError, match="office 12: the standard layout has offices 0 to 11"):
        reference.path_to_office(STANDARD, 12)
    with pytest.raises(UserError, match="choice of sign 'swap'.*swapped"):
        reading(RandomPolicy(), sign="swap")
    with pytest.raises(UserError, match="trials 0"):
        reading(RandomPolicy(), trials=0)


def test_the_page_is_what_the_docstrings_say():
    from fleetgym.envs.docs import page

    path = Path(__file__).parents[2] / "docs" / "envs" / "office_nav.md"
    assert path.read_text(encoding="utf-8") == page("office_nav"), "run: python -m fleetgym.envs.docs"
