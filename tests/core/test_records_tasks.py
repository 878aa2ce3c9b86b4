import pytest

from fleetgym.core.errors import UserError
from fleetgym.core.files import write_json
from fleetgym.core.records import EvalRecord


def record(successes, system="joint", task="reach-v3", **fields):
    n = len(successes)
    return EvalRecord(system, task, range(n), successes, [0.5] * n, [10] * n, **fields)


def test_episodes_are_of_the_record_s_task_unless_named():
    assert record([1, 0, 1]).per_task() == {"reach-v3": (2, 3)}
    mixed = record([1, 0, 1], task="meta_world/quick", tasks=("push-v3", "reach-v3", "push-v3"))
    assert mixed.per_task() == {"push-v3": (2, 2), "reach-v3": (0, 1)}


@pytest.mark.parametrize("tasks", [("push-v3",), ("push-v3",) * 4, "abc"])
def test_one_task_name_for_each_episode(tasks):
    with pytest.raises(UserError, match="one task for each of 3 episodes"):
        record([1, 0, 1], tasks=tasks)


def test_tasks_survive_the_file_and_may_be_missing_from_it(tmp_path):
    mixed = record([1, 0], tasks=["push-v3", "reach-v3"])
    assert EvalRecord.load(mixed.save(tmp_path / "mixed.json")) == mixed
    without = {key: value for key, value in record([1, 0]).to_dict().items() if key != "tasks"}
    write_json(tmp_path / "without.json", without)
    assert EvalRecord.load(tmp_path / "without.json").tasks == ()
    with pytest.raises(UserError, match="seeds"):
        EvalRecord.from_dict({key: value for key, value in without.items() if key != "seeds"})


def test_concatenate():
    first, second = record([1, 0], metrics={"seed": 3}), record([1], task="push-v3")
    whole = EvalRecord.concatenate([first, second], task="meta_world/two", seed=3, bytes_sent=12)
    assert (whole.system, whole.task) == ("joint", "meta_world/two")
    assert whole.tasks == ("reach-v3", "reach-v3", "push-v3")
    assert whole.successes == (True, False, True) and whole.seeds == (0, 1, 0)
    assert whole.metrics == {"seed": 3, "bytes_sent": 12}
    assert whole.provenance == first.provenance
    again = EvalRecord.concatenate([whole, record([0], task="push-v3")])
    assert again.per_task() == {"reach-v3": (1, 2), "push-v3": (1, 2)}


def test_concatenate_refuses_nothing_and_mixed_systems():
    with pytest.raises(UserError, match="no system"):
        EvalRecord.concatenate([])
    with pytest.raises(UserError, match="'average', 'joint'"):
        EvalRecord.concatenate([record([1]), record([1], system="average")])
