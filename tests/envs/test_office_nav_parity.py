"""OfficeNav against a second statement of its rules: maps in characters, a grammar in lists, a simulator on dicts.

Nothing here is taken from the package but what is compared. The rules are those of the code released with Liu et al.
2023, which stands on MiniGrid; where the released code is mistaken (its bounds, its leak), both forms are written down.
"""

import collections
import itertools
from fractions import Fraction

import numpy as np
import pytest

from fleetgym.envs.office_nav import kernels, language, tiles
from fleetgym.envs.office_nav.buildings import building, buildings, sign_goals
from fleetgym.envs.office_nav.env import OfficeNavEnv
from fleetgym.envs.office_nav.layout import COLOURS, LAYOUTS, layout
from fleetgym.envs.office_nav.vector import OfficeNavVectorEnv

LEFT, RIGHT, FORWARD, TOGGLE = range(4)
TO_SIGN = [FORWARD] * 5 + [RIGHT] + [FORWARD] * 2

# "#" wall, "o" office, "D" closed door, "S" the cell of the sign, ">" where the agent starts, looking east.
MAPS = {
    "standard": """
        #############
        #oD Do#oD Do#
        ### ##### ###
        #oD Do#oD Do#
        ### ##### ###
        #oD Do#oD Do#
        ### ##### ###
        #>          #
        ###### ######
        ######S######
        #############""",
    "tall_skinny": """
        #############
        #oD Do#oD Do#
        ### ##### ###
        ### ##### ###
        #oD Do#oD Do#
        ### ##### ###
        ### ##### ###
        #oD Do#oD Do#
        ### ##### ###
        ### ##### ###
        #>          #
        ###### ######
        ######S######
        #############""",
    "tall": """
        ###################
        #oD Do#oD Do#oD Do#
        ### ##### ##### ###
        ### ##### ##### ###
        #oD Do#oD Do#oD Do#
        ### ##### ##### ###
        ### ##### ##### ###
        #oD Do#oD Do#oD Do#
        ### ##### ##### ###
        ### ##### ##### ###
        #>                #
        ###### ############
        ######S############
        ###################""",
}
MAPS = {name: [line.strip() for line in drawn.split("\n")[1:]] for name, drawn in MAPS.items()}
#: Steps of the shortest path into each office: a row of hallway ends further up costs 2 (3 in the tall layouts) more, a
#: wing further right 6.
STEPS = {
    "standard": [[13, 13, 19, 19], [11, 11, 17, 17], [9, 9, 15, 15]],
    "tall_skinny": [[16, 16, 22, 22], [13, 13, 19, 19], [10, 10, 16, 16]],
    "tall": [[16, 16, 22, 22, 28, 28], [13, 13, 19, 19, 25, 25], [10, 10, 16, 16, 22, 22]],
}
# MiniGrid's numbers: the object, the colour and, of a door, whether it is closed.
OBJECT = {"unseen": 0, "empty": 1, "wall": 2, "floor": 3, "door": 4, "ball": 6}
COLOUR = {"red": 0, "green": 1, "blue": 2, "purple": 3, "yellow": 4, "grey": 5}


def places(name, letter):
    """Where a letter stands on a map, row by row."""
    return [(x, y) for y, line in enumerate(MAPS[name]) for x, found in enumerate(line) if found == letter]


def path_to(name, office):
    """A shortest path: along the corridor below the office's hallway, up, and through its door."""
    (x, y), (door, _) = places(name, "o")[office], places(name, "D")[office]
    (start, corridor) = places(name, ">")[0]
    hall = door + (door - x)
    turn = LEFT if door < hall else RIGHT
    return [FORWARD] * (hall - start) + [LEFT] + [FORWARD] * (corridor - y) + [turn, TOGGLE, FORWARD, FORWARD]


def colours_of(task_id, name):
    """The colours of a building's offices, by name, row by row, as the released code draws them."""
    random, columns = np.random.RandomState(task_id), len(STEPS[name][0])
    names = ["blue", "green", "grey", "purple", "red", "yellow"]
    names += [random.choice(names[:6]) for _ in range(3 * columns - 6)]
    random.shuffle(names)
    return [names[3 * column + row] for row in range(3) for column in range(columns)]


class Simulator:
    """One building of a layout, cell by cell."""

    def __init__(self, name, colours, horizon=30):
        self.map, self.horizon = MAPS[name], horizon
        self.colours = dict(zip(places(name, "o"), colours))
        self.start = places(name, ">")[0]
        self.reset()

    def reset(self):
        self.x, self.y = self.start
        self.direction, self.steps, self.open = 0, 0, set()

    def cell(self, x, y):
        """MiniGrid's three numbers for a cell; outside of the grid there is wall."""
        inside = 0 <= y < len(self.map) and 0 <= x < len(self.map[0])
        letter = self.map[y][x] if inside else "#"
        if letter == "#":
            return OBJECT["wall"], COLOUR["grey"], 0
        if letter == "D":
            return OBJECT["door"], COLOUR["red"], int((x, y) not in self.open)
        if letter == "o":
            return OBJECT["floor"], COLOUR[self.colours[x, y]], 0
        return (OBJECT["ball"], COLOUR["blue"], 0) if letter == "S" else (OBJECT["empty"], 0, 0)

    def ahead(self):
        return self.x + (1, 0, -1, 0)[self.direction], self.y + (0, 1, 0, -1)[self.direction]

    def step(self, action):
        """Reward, terminated, truncated."""
        self.steps += 1
        reached, ahead = False, self.ahead()
        what, _, closed = self.cell(*ahead)
        if action in (LEFT, RIGHT):
            self.direction = (self.direction + (1 if action == RIGHT else -1)) % 4
        elif action == TOGGLE and what == OBJECT["door"]:
            self.open ^= {ahead}
        elif action == FORWARD and what != OBJECT["wall"] and not closed:
            self.x, self.y = ahead
            reached = self.colours.get(ahead) == "blue"
        return 1.0 if reached else -0.05, reached, self.steps >= self.horizon and not reached

    def on_sign(self):
        return self.map[self.y][self.x] == "S"

    def view(self):
        """What is seen, [7, 7, 3], x to the right first; the agent stands at (3, 6) and looks up."""
        ahead_x, ahead_y = (1, 0, -1, 0)[self.direction], (0, 1, 0, -1)[self.direction]
        right_x, right_y = -ahead_y, ahead_x
        view = np.zeros((7, 7, 3), int)
        for i, j in itertools.product(range(7), range(7)):
            x = self.x + (6 - j) * ahead_x + (i - 3) * right_x
            y = self.y + (6 - j) * ahead_y + (i - 3) * right_y
            view[i, j] = self.cell(x, y)
        view[3, 6] = OBJECT["empty"], 0, 0  # the agent hides what it stands on
        # Light spreads from the agent sideways and upwards, row by row, and not beyond what cannot be seen through.
        dark = (view[..., 0] == OBJECT["wall"]) | ((view[..., 0] == OBJECT["door"]) & (view[..., 2] == 1))
        seen = {(3, 6)}
        for j in range(6, -1, -1):
            for order, side in ((range(6), 1), (range(6, 0, -1), -1)):
                for i in order:
                    if (i, j) in seen and not dark[i, j]:
                        seen |= {(i + side, j), (i + side, j - 1), (i, j - 1)}
        hidden = np.array([[(i, j) not in seen for j in range(7)] for i in range(7)])
        view[hidden] = 0
        return view


# -- Geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cell(name):
    plan, drawn = layout(name), MAPS[name]
    assert (plan.width, plan.height) == (len(drawn[0]), len(drawn)) and {len(line) for line in drawn} == {plan.width}
    letters = ["#", " ", "S", *["D"] * 18, *["o"] * 18]
    codes = kernels.cell_codes(plan)
    assert ["".join(letters[code] for code in row) for row in codes] == [line.replace(">", " ") for line in drawn]
    assert plan.walls.tolist() == [[letter == "#" for letter in line] for line in drawn]
    assert plan.office_xy.tolist() == [list(place) for place in places(name, "o")]
    assert plan.door_xy.tolist() == [list(place) for place in places(name, "D")]
    assert (plan.rows, plan.columns) == np.shape(STEPS[name])
    assert plan.start == (*places(name, ">")[0], 0) and [plan.sign_xy] == places(name, "S")
    assert plan.distances.reshape(3, -1).tolist() == STEPS[name]
    assert [len(path_to(name, office)) for office in range(plan.offices)] == np.ravel(STEPS[name]).tolist()
    assert plan.sign_distance == len(TO_SIGN) == 8


def test_buildings_are_those_of_the_released_code():
    released = buildings(200, "standard", False, False)
    blue = (released == 0).sum(1)
    assert (blue.mean(), blue.min(), blue.max()) == (1.98, 1, 5)
    goals = sign_goals(released, layout("standard"))
    assert (1 - 0.05 * (np.ravel(STEPS["standard"])[goals] - 1)).mean() == pytest.approx(0.442, abs=5e-4)
    for name, task_id in itertools.product(LAYOUTS, (*range(20), 172, 199)):
        assert [COLOURS[colour] for colour in building(task_id, name)] == colours_of(task_id, name)
    assert [[COLOURS[colour] for colour in row] for row in released] == [colours_of(k, "standard") for k in range(200)]
    # The building that the released code prints, by first letters, has the number 172.
    assert [COLOURS[colour][0] for colour in released[172]] == list("ybgggrgygrpg")


# -- Grammar -----------------------------------------------------------------------------------------------------------

ORDINALS = ["1st", "2nd", "3rd", *(f"{number}th" for number in range(4, 14))]


def describe(column, row, last_column, last_row, steps):
    """Every description of a place and its probability, by the rules of ``LocationDescription``."""
    chances = collections.Counter()
    if steps == 0:
        at_corner = row in (0, last_row) and column in (0, last_column)
        for tenth in range(10):  # the uniform number, of which only < 0.3 and < 0.6 are asked
            upper = "upper" if row == 0 else "lower"
            if at_corner and tenth < 3:
                phrase = f"{upper} {'left' if column == 0 else 'right'} corner"
            elif row in (0, last_row) and tenth < 6:
                phrase = f"{ORDINALS[column]} office in the {upper} row"
            else:
                phrase = f"{ORDINALS[column]} office in the {ORDINALS[row]} row"
            chances[phrase] += Fraction(1, 10)
        return chances
    around = [
        (x, y)
        for x in (column - 1, column, column + 1)
        for y in (row - 1, row, row + 1)
        if (x, y) != (column, row) and 0 <= x <= last_column and 0 <= y <= last_row
    ]
    for x, y in around:
        across = "right of" if x < column else "left of" if x > column else ""
        down = "below" if y < row else "above" if y > row else ""
        relation = f"{across} and {down}" if across and down else across + down
        for phrase, chance in describe(x, y, last_column, last_row, steps - 1).items():
            chances[f"{relation} the {'office ' if steps > 1 else ''}{phrase}"] += chance / len(around)
    return chances


def cells_of(offices, steps, bounds=None):
    """The cells of every phrase of that many steps."""
    columns = offices // 3
    cells = collections.defaultdict(set)
    for cell in range(offices):
        for phrase in describe(cell % columns, cell // columns, *(bounds or (columns - 1, 2)), steps):
            cells[phrase].add(cell)
    return cells


@pytest.mark.parametrize(("offices", "direct", "relative", "two"), [(12, 24, 102, 574), (18, 34, 158, 938)])
def test_every_phrase_and_its_cell(offices, direct, relative, two):
    found = [cells_of(offices, steps) for steps in (0, 1, 2)]
    assert [len(phrases) for phrases in found] == [direct, relative, two]
    assert set(found[0]) == language.phrases(offices, 0) and set(found[2]) == language.phrases(offices, 2)
    assert {*found[0], *found[1]} == language.phrases(offices) and not {*found[0]} & {*found[1]}
    for phrases in found:
        for phrase, cells in phrases.items():
            assert cells == {language.resolve(phrase, offices)}, phrase  # one cell: no phrase is ambiguous
            assert str(language.parse(phrase)) == phrase


def test_every_phrase_of_the_released_code_and_its_cell():
    bounds = (5, 11)  # the largest y and x of an office, taken for the last column and row
    direct, relative = (cells_of(12, steps, bounds) for steps in (0, 1))
    relative = {phrase: cells for phrase, cells in relative.items() if "3rd office in the 2nd row" not in phrase}
    assert (len(direct), len(relative)) == (17, 89)
    strings, _ = language.released_phrase_table()
    assert len(strings) == 106 and set(strings) == {*direct, *relative}
    for phrase, cells in (direct | relative).items():
        assert cells == {language.resolve(phrase, released=True)}
    words = {word for phrase in strings for word in phrase.split()}
    assert len(words) == 17 and {"4th", "5th"} <= words and not {"lower"} & words
    assert not any("right corner" in phrase for phrase in strings)


def shown(column, row, last_column, last_row, keep, leak):
    """The probability of each sign: half direct, half relative, drawn again until ``keep``.

    What cannot be drawn gives its share to the other half; with ``leak`` it is shown all the same.
    """
    halves = []
    for steps in (0, 1):
        drawn = describe(column, row, last_column, last_row, steps)
        kept = {phrase: chance for phrase, chance in drawn.items() if keep(phrase)} or (drawn if leak else {})
        if kept:
            halves.append({phrase: chance / sum(kept.values()) for phrase, chance in kept.items()})
    return {phrase: chance / len(halves) for half in halves for phrase, chance in half.items()}


@pytest.mark.parametrize(
    ("offices", "split"), [*itertools.product((12, 18), ("all", "train", "phrases")), (12, "released")]
)
def test_every_probability(offices, split):
    columns = offices // 3
    held_out = "3rd office in the 2nd row"
    keep = {
        "all": lambda phrase: True,
        "train": lambda phrase: held_out not in phrase,
        "phrases": lambda phrase: held_out in phrase,
        "released": lambda phrase: held_out not in phrase,
    }[split]
    released = split == "released"
    strings, cumulative = language.released_phrase_table() if released else language.phrase_table(offices, split)
    bounds = (5, 11) if released else (columns - 1, 2)
    named = 0
    for cell in range(offices):
        expected = shown(cell % columns, cell // columns, *bounds, keep, released)
        assert sum(expected.values()) == (1 if expected else 0)
        named += bool(expected)
        found = np.diff(cumulative[cell], prepend=0) / language.UNIT
        # The tables are rounded to units of 2^-24.
        np.testing.assert_allclose(found, [float(expected.get(phrase, 0)) for phrase in strings], rtol=0, atol=2**-24)
        assert set(expected) == {strings[number] for number in np.flatnonzero(found)}
        if not released:
            assert language.probabilities(cell, offices, split) == expected
    assert named == (9 if split == "phrases" else offices)
    if split == "all":  # an office at an edge but not a corner, by hand
        assert language.probabilities(1, offices)["2nd office in the upper row"] == Fraction(3, 10)
        assert language.probabilities(1, offices)["right of the upper left corner"] == Fraction(1, 2 * 5) * Fraction(
            3, 10
        )
    if released:  # the leak
        assert cumulative[6, strings.index(held_out)] - cumulative[6, strings.index(held_out) - 1] == language.UNIT / 2


# -- Views -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pose_with_random_doors(name):
    """What is seen from everywhere, in symbols and in pixels: every symbol has its tile, the agent is drawn on one."""
    random = np.random.default_rng(1)
    pixels, symbols = (OfficeNavEnv(f"OfficeNav-{kind}-v0", layout=name) for kind in ("SingleGoal", "Symbolic"))
    pixels.reset(seed=0)
    colours = [COLOURS[k] for k in pixels._rows.tables.colours[0, pixels._rows.state[kernels.TASK, 0]][:18] if k >= 0]
    sim = Simulator(name, colours)
    symbols.reset(seed=0)
    others = Simulator(name, colours_of(int(symbols._rows.state[kernels.TASK, 0]), name))
    kind_of = {tuple(symbol): kind for kind, symbol in reversed(list(enumerate(tiles.SYMBOLS[: tiles.KINDS].tolist())))}
    doors = places(name, "D")
    for (x, y), direction in itertools.product(sorted(free(name)), range(4)):
        # Nobody stands in a closed door.
        open_doors = [k for k in range(len(doors)) if random.random() < 0.5 or doors[k] == (x, y)]
        for env, twin in ((pixels, sim), (symbols, others)):
            twin.x, twin.y, twin.direction, twin.open = x, y, direction, {doors[k] for k in open_doors}
            values = (x, y, direction, sum(1 << k for k in open_doors))
            for row, value in zip((kernels.X, kernels.Y, kernels.DIR, kernels.DOORS), values):
                env._rows.state[row, 0] = value
        np.testing.assert_array_equal(symbols._observe()[0]["image"], others.view())
        seen = sim.view()
        kinds = np.array([[kind_of[tuple(seen[i, j].tolist())] for i in range(7)] for j in range(7)])
        kinds[6, 3] = tiles.AGENT + kind_of[sim.cell(x, y)]
        expected = tiles.atlas()[kinds].swapaxes(1, 2).reshape(56, 56, 3)
        np.testing.assert_array_equal(pixels._observe()[0]["image"], expected)


def free(name):
    """Every cell that is no wall."""
    return {(x, y) for y, line in enumerate(MAPS[name]) for x, letter in enumerate(line) if letter != "#"}


# -- Replays -----------------------------------------------------------------------------------------------------------


def task_with(env, goal):
    """A building whose one goal is that office."""
    return int(np.flatnonzero(env._rows.tables.goals[0] == goal)[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_office_by_its_shortest_path(name):
    env = OfficeNavEnv("OfficeNav-SingleGoal-v0", layout=name)
    returns = []
    for office, steps in enumerate(np.ravel(STEPS[name])):
        _, info = env.reset(seed=0, options={"task_id": task_with(env, office)})
        assert info["goal"] == office
        for episode in (1, 2):  # the second finds the doors closed again
            results = [env.step(action)[1:4] for action in path_to(name, office)]
            assert results == [(-0.05, False, False)] * (steps - 1) + [(1.0, True, False)]
            returns.append(sum(result[0] for result in results))
            _, info = env.reset()
            assert (info["goal"] == office) == (episode == 1) or info["trial"] == 1
    if name == "standard":
        table = [[0.4, 0.4, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2], [0.6, 0.6, 0.3, 0.3]]
        np.testing.assert_allclose(np.reshape(returns, (3, 4, 2)), np.stack([table, table], 2))
        assert np.mean(returns) == pytest.approx(0.35)


def test_any_blue_office_counts_and_the_sign_names_the_nearest():
    env = OfficeNavEnv("OfficeNav-Symbolic-v0")
    further = 0
    for task_id in range(40):
        blue = [office for office, colour in enumerate(colours_of(task_id, "standard")) if colour == "blue"]
        nearest = min(blue, key=lambda office: np.ravel(STEPS["standard"])[office])
        for office in blue:
            _, info = env.reset(seed=task_id, options={"task_id": task_id})
            assert info["goal"] == nearest and language.resolve(info["phrase"]) == nearest
            *_, (_, reward, terminated, _, info) = [env.step(action) for action in path_to("standard", office)]
            assert (reward, terminated, info["success"]) == (1.0, True, True)
            further += office != nearest
    assert further > 20


def test_wrong_offices_closed_doors_and_walls_cost_a_step_each():
    env = OfficeNavEnv("OfficeNav-SingleGoal-v0")
    state = env._rows.state[:, 0]
    for wrong in range(1, 12):
        env.reset(seed=0, options={"task_id": task_with(env, 0)})
        results = [env.step(action)[1:4] for action in path_to("standard", wrong)]
        assert set(results) == {(-0.05, False, False)}
        assert places("standard", "o")[wrong] == (state[kernels.X], state[kernels.Y])
    # A door that is opened and closed again is closed; walls and closed doors are not walked through.
    env.reset(seed=0, options={"task_id": task_with(env, 11)})
    moves = [*path_to("standard", 0)[:-3], FORWARD, TOGGLE, TOGGLE, FORWARD, LEFT, LEFT, LEFT]
    assert {env.step(action)[1:4] for action in moves} == {(-0.05, False, False)}
    assert (state[kernels.X], state[kernels.Y], state[kernels.DIR], state[kernels.DOORS]) == (3, 1, 3, 0)
    assert env.step(FORWARD)[1] == -0.05 and (state[kernels.X], state[kernels.Y]) == (3, 1)


@pytest.mark.parametrize("spare", [0, 1])
def test_the_thirtieth_step_truncates_unless_it_arrives(spare):
    env = OfficeNavEnv("OfficeNav-SingleGoal-v0")
    env.reset(seed=0, options={"task_id": task_with(env, 8)})
    path = [LEFT, RIGHT] * 10 + [TOGGLE] * (1 + spare) + path_to("standard", 8)
    results = [env.step(action)[1:4] for action in path[:30]]
    assert results[:29] == [(-0.05, False, False)] * 29
    assert results[29] == ((-0.05, False, True) if spare else (1.0, True, False))


@pytest.mark.parametrize("name", LAYOUTS)
def test_thousands_of_random_steps(name):
    """Rewards, ends, views, signs and trials, step by step: 60 environments, 90 steps, three episodes or more."""
    number = 60
    envs = OfficeNavVectorEnv(number, variant="OfficeNav-Symbolic-v0", layout=name)
    random = np.random.default_rng(3)
    observation, info = envs.reset(seed=5)
    cells = cells_of(18 if name == "tall" else 12, 0) | cells_of(18 if name == "tall" else 12, 1)
    twins = [Simulator(name, colours_of(task_id, name)) for task_id in info["task_id"].tolist()]
    trials = [(0, 1)] * number
    views, ends, reached, read = set(), 0, 0, 0

    def script():
        """What a row does first, with slips, before it goes on at random: to the sign, or into some office."""
        return TO_SIGN if random.random() < 0.3 else path_to(name, int(random.integers(np.size(STEPS[name]))))

    scripts = [script() for _ in range(number)]
    for _ in range(90):
        actions = np.zeros(number, int)
        for row, twin in enumerate(twins):
            view = twin.view()
            np.testing.assert_array_equal(observation["image"][row], view)
            views.add(view.tobytes())
            assert observation["on_sign"][row] == twin.on_sign()
            assert observation["sign"][row].any() == twin.on_sign()
            read += twin.on_sign()
            assert (info["trial"][row], info["episode_index"][row] + 1) == trials[row]
            blue = [office for office, colour in enumerate(twin.colours.values()) if colour == "blue"]
            assert info["goal"][row] == min(blue, key=lambda office: np.ravel(STEPS[name])[office])
            assert cells[envs.phrases[info["phrase_id"][row]]] == {info["goal"][row]}
            what, _, closed = twin.cell(*twin.ahead())
            if twin.steps < len(scripts[row]) and random.random() < 0.97:
                actions[row] = scripts[row][twin.steps]
            elif what == OBJECT["door"] and closed:
                actions[row] = random.choice(4, p=[0.1, 0.1, 0.1, 0.7])
            else:
                actions[row] = random.choice(4, p=[0.2, 0.2, 0.5, 0.1])
        observation, rewards, terminated, truncated, info = envs.step(actions)
        for row, twin in enumerate(twins):
            assert twin.step(actions[row]) == (rewards[row], terminated[row], truncated[row])
            if terminated[row] or truncated[row]:
                ends, reached = ends + 1, reached + terminated[row]
                np.testing.assert_array_equal(info["final_obs"][row]["image"], twin.view())
                trial, episode = trials[row]
                trials[row] = (trial, 2) if episode == 1 else (trial + 1, 1)
                if episode == 2:
                    twins[row] = Simulator(name, colours_of(int(info["task_id"][row]), name))
                twins[row].reset()
                scripts[row] = script()
    assert len(views) > 150 and ends > 150 and reached > 5 and read > 200
