"""Changes to presets from the command line: types, and what is refused."""

import pytest

from fleetgym.benchmarks.overrides import changes
from fleetgym.core import UserError

DEFAULTS = {"steps": 5, "rate": 0.1, "name": "a", "flag": True, "sizes": (8, 16), "texts": ("x",), "tasks": 1}


def test_values_have_the_type_of_the_default():
    texts = ["steps=7", "rate=3", "name=b=c", "flag=false", "sizes=4", "texts='y','z'", "tasks=all"]
    found = changes(texts, DEFAULTS, words={"tasks": ("all",)})
    assert found == {
        "steps": 7, "rate": 3.0, "name": "b=c", "flag": False, "sizes": (4,), "texts": ("y", "z"), "tasks": "all"
    }  # fmt: skip
    assert type(found["rate"]) is float
    assert changes([], DEFAULTS) == {}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["step=3"], "unknown preset field 'step'; nearest: 'steps'"),
        (["name"], "--override name: FIELD=VALUE is wanted, such as name=a"),
        (["steps=7", "steps=8"], "steps=7 steps=8: steps is given twice"),
        (["steps=3.5"], "--override steps=3.5: steps takes a int, such as 5"),
        (["rate=fast"], "rate takes a float"),
        (["flag=1"], "flag takes a bool"),
        (["sizes=1,a"], "sizes takes a tuple"),
        (["sizes=1,'a'"], "sizes takes a tuple"),
        (["tasks=some"], "tasks takes a int or all"),
    ],
)
def test_what_is_refused(texts, words):
    with pytest.raises(UserError, match=words):
        changes(texts, DEFAULTS, words={"tasks": ("all",)})


def test_what_stands_before_the_fields_is_said():
    with pytest.raises(UserError, match=r"--override policy.steps=x: steps takes a int"):
        changes(["steps=x"], DEFAULTS, prefix="policy.")
    with pytest.raises(UserError, match="unknown setting 'steq'"):
        changes(["steq=1"], DEFAULTS, what="setting", prefix="policy.")
