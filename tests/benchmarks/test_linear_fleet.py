import json

import numpy as np
import pytest

from fleetgym.benchmarks import linear_fleet
from fleetgym.benchmarks.linear_fleet import PLANTS, Costs, fleet, lqg, measure
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator
from fleetgym.merging.linear import LinearPolicy, mean

QUICK = ["--plants", "double_integrator", "--robots", "2", "3", "--perturbations", "0", "0.3", "--seeds", "2"]


def least_cost(plant):
    """The optimum by the two Riccati equations: tr(S W) + tr(K' (B' S B + R) K P_filtered)."""
    import scipy.linalg

    A, B, C = plant.A, plant.B, plant.C
    S = scipy.linalg.solve_discrete_are(A, B, plant.Q, plant.R)
    P = scipy.linalg.solve_discrete_are(A.T, C.T, plant.W, plant.V)
    filtered = P - P @ C.T @ np.linalg.solve(C @ P @ C.T + plant.V, C @ P)
    return np.trace(S @ plant.W) + np.trace((A.T @ S @ A - S + plant.Q) @ filtered)


@pytest.mark.parametrize("name", PLANTS)
def test_the_expert_has_the_least_cost_and_the_cost_sees_no_basis(name):
    (plant,) = fleet(name, 1, 0.2, 0)
    expert = lqg(plant)
    costs = Costs([plant], expert.order)
    (best,) = costs(expert)
    assert best == pytest.approx(least_cost(plant), rel=1e-8)
    rng = generator("test_linear_fleet", name)
    assert costs(expert.moved(rng.normal(size=expert.A.shape)))[0] == pytest.approx(best, rel=1e-7)
    for _ in range(20):
        near = LinearPolicy(
            *(getattr(expert, k) * (1 + 1e-4 * rng.normal(size=getattr(expert, k).shape)) for k in "ABCD")
        )
        assert costs(near)[0] > best * (1 - 1e-9)


def test_the_cost_is_that_of_rollouts():
    (plant,) = fleet("cart_pole", 1, 0.3, 1)
    policy = mean([lqg(p) for p in fleet("cart_pole", 2, 0.3, 1)])  # not the optimal one
    rng = generator("test_linear_fleet", "rollouts")
    roots = np.linalg.cholesky(plant.W), np.linalg.cholesky(plant.V)
    x, z, found = np.zeros((4, 500)), np.zeros((4, 500)), []
    for _ in range(1500):
        y = plant.C @ x + roots[1] @ rng.normal(size=(2, 500))
        u = policy.C @ z + policy.D @ y
        found.append(np.mean(np.sum(x * (plant.Q @ x), 0) + np.sum(u * (plant.R @ u), 0)))
        x, z = plant.A @ x + plant.B @ u + roots[0] @ rng.normal(size=(4, 500)), policy.A @ z + policy.B @ y
    assert Costs([plant], 4)(policy)[0] == pytest.approx(np.mean(found[300:]), rel=0.02)


def test_the_gradient_is_the_derivative():
    plants = fleet("random", 3, 0.1, 0)
    policy = mean([lqg(plant) for plant in plants])
    costs = Costs(plants, 4)
    values, slopes = costs.with_gradient(policy)
    direction = generator("test_linear_fleet", "direction").normal(size=slopes.shape[1:])

    def moved(step):
        G = np.block([[policy.D, policy.C], [policy.B, policy.A]]) + step * direction
        return costs(LinearPolicy(G[2:, 2:], G[2:, :2], G[:2, 2:], G[:2, :2]))

    assert np.allclose((moved(1e-5) - moved(-1e-5)) / 2e-5, (slopes * direction).sum((1, 2)), rtol=1e-5)
    assert np.isfinite(values).all()


def test_a_loop_that_is_not_stable_costs_infinitely_much():
    plants = [*fleet("cart_pole", 1, 0.0, 0), *fleet("double_integrator", 1, 0.0, 0)]
    nothing = [LinearPolicy(np.zeros((1, 1)), np.zeros((1, o)), np.zeros((1, 1)), np.zeros((1, o))) for o in (2, 1)]
    assert [Costs([plant], 1)(policy)[0] for plant, policy in zip(plants, nothing)] == [np.inf, np.inf]
    two = fleet("random", 2, 0.0, 0)
    good = lqg(two[0])
    broken = linear_fleet.Plant(2.0 * two[1].A, 0.0 * two[1].B, *(getattr(two[1], k) for k in "CQRWV"))
    values, slopes = Costs([two[0], broken], 4).with_gradient(good)
    assert values[0] == Costs([two[0]], 4)(good)[0] and values[1] == np.inf and not slopes[1].any()


def test_plants():
    plant = linear_fleet.double_integrator(np.array([2.0, 0.0]))
    assert np.allclose(plant.A, [[1, 0.1], [0, 1]]) and np.allclose(plant.B, [[0.0025], [0.05]])
    three, five = fleet("quadrotor", 3, 0.2, 4), fleet("quadrotor", 5, 0.2, 4)
    assert all(np.array_equal(a.B, b.B) for a, b in zip(three, five)) and not np.allclose(five[0].B, five[1].B)
    same = fleet("random", 2, 0.0, 4)
    assert np.array_equal(same[0].A, same[1].A) and not np.array_equal(same[0].A, fleet("random", 1, 0.0, 5)[0].A)


def test_one_plant_in_many_bases_is_merged_without_loss():
    for name in PLANTS:
        found = measure(name, (2, 4), 0.0, 0, 0)[4]
        for method in ("gl", "balanced", "balanced_gl", "observable", "responses", "average_same_basis"):
            assert np.allclose(found[method], 1, atol=1e-6), (name, method)
        assert not np.mean(found["average"]) < 1.01


def test_the_joint_controller_is_no_worse_than_where_it_starts():
    found = measure("cart_pole", (3,), 0.3, 0, 60)[3]
    rest = min(np.mean(ratios) for method, ratios in found.items() if method != "joint")
    assert 1 < np.mean(found["joint"]) < rest and np.mean(found["balanced"]) < np.mean(found["first"])


def test_files(tmp_path, capsys):
    assert linear_fleet.main([*QUICK, "--joint-seeds", "1", "--out", str(tmp_path)]) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert text in printed and "4 fleets" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 11 and (tmp_path / "plot.svg").read_text().startswith("<?xml")
    cells = {(row["robots"], row["perturbation"], row["method"]): row for row in rows}
    assert cells[3, 0.0, "balanced"]["ratios"] == pytest.approx([1, 1], abs=1e-7)
    assert cells[3, 0.0, "balanced"]["stabilised"] == [3, 3] and len(cells[3, 0.3, "joint"]["ratios"]) == 1
    assert cells[2, 0.3, "joint"]["ratios"][0] <= cells[2, 0.3, "balanced"]["ratios"][0]
    # A fleet of two is the first two of three.
    alone = measure("double_integrator", (2,), 0.3, 1, 0)[2]
    assert np.mean(alone["gl"]) == pytest.approx(cells[2, 0.3, "gl"]["ratios"][1], rel=1e-8)


def test_medians_count_what_is_unstable():
    assert linear_fleet.median([1.0, None, 2.0]) == 2.0 and linear_fleet.median([1.0, None]) == np.inf
    assert linear_fleet._cell([1.0, 3.0]) == "2.0000" and linear_fleet._cell([1.0, None]) == "unstable (1/2)"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--plants", "cart_pol"], "unknown plant 'cart_pol'; nearest: 'cart_pole'"),
        (["--robots", "1"], "--robots (1,): at least 2"),
        (["--seeds", "0"], "--seeds 0: at least 1"),
        (["--perturbations", "1.5"], "--perturbations (1.5,): fractions"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError) as refused:
        linear_fleet.main(words)
    assert message in str(refused.value)
