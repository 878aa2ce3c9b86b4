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
from fleetgym.envs.office_nav.non_reader import best_non_reader, weight
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
    # The fact sheet's search gets 1/120: it opens the near doors first. Left for the second episode they cost less.
    single = reference.non_reader_score(STANDARD, single_goal=True)
    assert single.mean_return == pytest.approx(7 / 240) and single.success == pytest.approx(11 / 12)
    unexplored = reference.non_reader_score(STANDARD, explore=False)
    assert unexplored.mean_return == pytest.approx(-0.277, abs=0.01)


def test_the_search_opens_the_six_left_doors_in_26_actions():
    walk = reference.search(STANDARD)
    assert len(walk.actions) == 26 and sorted(walk.doors) == [0, 1, 4, 5, 8, 9] and walk.times[-1] == 26


def draw(number, offices=12, single_goal=False, seed=0):
    """Colours of buildings by the rule of the fact sheet, int [number, offices]."""
    rng = np.random.default_rng(seed)
    forced = np.tile(np.arange(6), (number, 1))
    free = rng.integers(1 if single_goal else 0, 6, size=(number, offices - 6))
    return rng.permuted(np.concatenate([forced, free], 1), axis=1)


def test_chances_of_goals_are_those_of_the_buildings():
    for plan in LAYOUTS.values():
        numbers = reference.goal_numbers(plan, False)
        assert sum(numbers) == pytest.approx(1)
        assert sum(k * chance for k, chance in enumerate(numbers)) == pytest.approx(1 + (plan.offices - 6) / 6)
        for single in (False, True):
            drawn = draw(100000, plan.offices, single) == GOAL
            share = np.bincount(drawn.argmax(1), minlength=plan.offices) / len(drawn)
            assert np.allclose(share, reference.first_goal(plan, single), atol=0.007)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("single_goal", [False, True])
def test_nothing_is_better_without_reading(layout, single_goal):
    plan = LAYOUTS[layout]
    assert best_non_reader(plan, single_goal) == pytest.approx(
        reference.non_reader_score(plan, single_goal).mean_return, abs=1e-9
    )


def test_the_best_non_reader_by_single_actions():
    # The same by another way: all poses, all sets of opened doors, all actions, without pairs or mirrors.
    offices = [tuple(xy) for xy in STANDARD.office_xy.tolist()]
    doors = {tuple(xy): k for k, xy in enumerate(STANDARD.door_xy.tolist())}
    cells = [(x, y) for y, x in np.argwhere(~STANDARD.walls) if (x, y) not in doors and (x, y) not in offices]
    poses = {(int(x), int(y), d): 4 * i + d for i, (x, y) in enumerate(cells) for d in range(4)}
    moves, facing = np.zeros((3, len(poses)), int), {}
    for (x, y, d), i in poses.items():
        ahead = (x + int(reference.DIRECTIONS[d, 0]), y + int(reference.DIRECTIONS[d, 1]))
        moves[:, i] = poses[x, y, (d - 1) % 4], poses[x, y, (d + 1) % 4], poses.get((*ahead, d), i)
        if ahead in doors:
            facing[i] = doors[ahead]
    opened = np.arange(1 << 12)
    start = poses[STANDARD.start]
    # Second episode, backwards: the sum over all offices not seen yet of the return if that one is the goal.
    value = np.repeat(-1.5 * (12.0 - np.array([bin(s).count("1") for s in opened]))[:, None], len(poses), 1)
    for time in range(29, -1, -1):
        best = value[:, moves].max(1)
        for i, k in facing.items():
            shut = opened[opened >> k & 1 == 0]
            won = reference.episode_return(time + 3) + value[shut | 1 << k, i]
            best[shut, i] = np.maximum(best[shut, i], won)
        value = best
    reached = np.zeros((1 << 12, len(poses)), bool)
    reached[0, start] = True
    for _ in range(30):
        sets, at = np.nonzero(reached)
        for move in moves:
            reached[sets, move[at]] = True
        for i, k in facing.items():
            here = sets[at == i]
            reached[here | 1 << k, i] = True
    known = np.array([reference.episode_return(steps) for steps in STANDARD.distances])
    scores = [known[s >> np.arange(12) & 1 == 1].sum() + value[s, start] for s in np.flatnonzero(reached.any(1))]
    assert best_non_reader(STANDARD, single_goal=True) == pytest.approx(max(scores) / 12)


def test_the_next_colour_is_as_likely_as_in_drawn_buildings():
    drawn = draw(400000)
    seen = (drawn[:, :3] == [1, 1, 3]).all(1)  # two green offices, a purple one
    whole = weight((0, 2, 1, 0, 0, 0), 9)
    for colour in range(6):
        counts = [0, 2, 0, 1, 0, 0]
        counts[colour] += 1
        expected = weight(counts, 8) / whole
        found = (drawn[seen, 3] == colour).mean()
        assert abs(found - expected) < 5 * np.sqrt(expected / seen.sum())


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
    single = worlds.variant.single_goal
    policies = OracleReader(STANDARD), NonReader(STANDARD, single_goal=single)
    for policy, score in zip(policies, (reference.oracle_score, reference.non_reader_score)):
        played = reading(policy, variant, trials=200, seed=11)
        exact = score(STANDARD, single, goals=[np.flatnonzero(blue) for blue in played.blue])
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


@pytest.mark.parametrize(("variant", "actions"), [("OfficeNav-Symbolic-v0", 4), ("OfficeNav-Released-v0", 7)])
def test_random_walks_reach_the_exact_score(variant, actions):
    exact = reference.random_score(STANDARD, actions=actions)
    env, rng = gym.make_vec(variant, num_envs=2048, autoreset_mode="same_step"), np.random.default_rng(0)
    env.reset(seed=0)
    solved = episodes = 0
    for _ in range(1500):
        _, _, terminated, truncated, _ = env.step(rng.integers(actions, size=2048))
        solved += terminated.sum()
        episodes += (terminated | truncated).sum()
    assert abs(solved / episodes - exact.success) < 4 * np.sqrt(exact.success / episodes)
    assert -1.5 < exact.mean_return < -1.5 + 2 * exact.success
    summary = reading(RandomPolicy(actions), variant, trials=500, split="train").summary()
    assert summary["return"] == pytest.approx(exact.mean_return, abs=0.03)


def test_bad_input():
    with pytest.raises(UserError, match="office 12: the standard layout has offices 0 to 11"):
        reference.path_to_office(STANDARD, 12)
    with pytest.raises(UserError, match="choice of sign 'swap'.*swapped"):
        reading(RandomPolicy(), sign="swap")
    with pytest.raises(UserError, match="trials 0"):
        reading(RandomPolicy(), trials=0)
    with pytest.raises(UserError, match="episodes 0"):
        OracleReader(STANDARD, episodes=0)
    with pytest.raises(UserError, match="actions 3"):
        reference.random_score(STANDARD, actions=3)


def test_the_page_is_what_the_docstrings_say():
    from fleetgym.envs.docs import FILMS, film, page

    folder = Path(__file__).parents[2] / "docs" / "envs"
    text = page("office_nav")
    assert (folder / "office_nav.md").read_text(encoding="utf-8") == text, "run: python -m fleetgym.envs.docs docs/envs"
    for env_id, _ in FILMS["office_nav"]:
        assert f"({film(env_id)})" in text
        assert 1000 < (folder / film(env_id)).stat().st_size < 400_000
