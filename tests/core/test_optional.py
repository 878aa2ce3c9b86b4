import pytest

from fleetgym.core import optional
from fleetgym.core.errors import UserError
from fleetgym.core.optional import EXTRAS, Extra, install_line, installed, missing, require


def test_dev_is_here():
    assert installed("dev") and missing("dev") == []
    require("dev")


def test_what_is_missing_is_said_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(EXTRAS, "moon", Extra(("pytest", "no_such_module"), "going to the moon"))
    assert not optional.installed("moon") and missing("moon") == ["no_such_module"]
    with pytest.raises(
        UserError, match=r"no_such_module is missing \(going to the moon\).*pip install 'fleetgym\[moon\]'"
    ):
        require("moon")


@pytest.mark.parametrize("function", [installed, missing, install_line, require])
def test_unknown_extra(function):
    with pytest.raises(UserError, match="unknown extra 'devv'; nearest: 'dev'"):
        function("devv")
