import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator
from fleetgym.merging import linear
from fleetgym.merging.linear import LINEAR_MERGES, LinearPolicy, balanced, distance, merge_linear

EXACT = ("gl", "balanced", "balanced_gl", "observable", "responses")


def policy(n, inputs, outputs, seed=0, radius=0.9):
    rng = generator("test_linear", n, inputs, outputs, seed)
    A = rng.normal(size=(n, n))
    A *= radius / np.abs(np.linalg.eigvals(A)).max()
    return LinearPolicy(A, *(rng.normal(size=size) for size in ((n, inputs), (outputs, n), (outputs, inputs))))


def basis(n, seed):
    return generator("test_linear", "basis", n, seed).normal(size=(n, n))


def apart(a, b):
    """Largest difference of responses, relative to the largest response."""
    count = 2 * max(a.order, b.order) + 1
    return np.abs(a.responses(count) - b.responses(count)).max() / np.abs(b.responses(count)).max()


SHAPES = [(4, 2, 2), (6, 3, 2), (3, 1, 1), (5, 1, 2), (2, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_changes_no_response_and_a_planted_one_is_found(shape):
    first, T = policy(*shape), basis(shape[0], 1)
    moved = first.moved(T)
    assert distance(first, moved) > 0.1 and apart(moved, first) < 1e-12
    assert np.abs(linear.solve_gl(first, moved) @ T - np.eye(shape[0])).max() < 1e-10
    assert np.abs(linear.solve_gl(moved, first) - T).max() < 1e-10
    rotation = np.linalg.qr(T)[0]
    found = linear.solve_orthogonal(first, first.moved(rotation))
    assert np.abs(found @ rotation - np.eye(shape[0])).max() < 1e-10


def test_planted_signed_permutations_are_found():
    first = policy(6, 3, 2)
    planted = np.eye(6)[[3, 0, 5, 1, 2, 4]] * np.array([1, -1, -1, 1, -1, 1])[:, None]
    (found,) = linear.solve_signed(first, [first.moved(planted)])
    assert np.array_equal(found @ planted, np.eye(6))
    spec, element = first.spec(), first.spec().random(generator("test_linear", "element"))
    weights = {key: value.numpy() for key, value in spec.apply(first.state_dict(), element).items()}
    assert apart(LinearPolicy(**weights), first) < 1e-12  # the spec's symmetry is one


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", EXACT)
def test_realisations_of_one_policy_merge_to_it(shape, method):
    first = policy(*shape)
    realisations = [first, *(first.moved(basis(shape[0], seed)) for seed in range(1, 4))]
    assert apart(merge_linear(method, realisations), first) < 1e-9
    assert apart(merge_linear(method, realisations, [0.1, 2.0, 0.0, 1.0]), first) < 1e-9
    assert apart(merge_linear("average", realisations), first) > 0.05  # and the mean of the matrices is another one


@pytest.mark.parametrize("method", ["balanced", "balanced_gl", "observable", "responses"])
def test_these_merges_see_policies_and_not_bases(method):
    ours = [policy(4, 2, 2, seed) for seed in range(3)]
    theirs = [p.moved(basis(4, 10 + i)) for i, p in enumerate(ours)]
    assert apart(merge_linear(method, theirs), merge_linear(method, ours)) < 1e-7


def test_the_least_squares_answer_depends_on_bases_where_policies_differ():
    ours = [policy(4, 2, 2, seed) for seed in range(2)]
    theirs = [p.moved(basis(4, 10 + i)) for i, p in enumerate(ours)]
    assert apart(merge_linear("gl", theirs), merge_linear("gl", ours)) > 1e-3


def test_least_squares_is_least():
    first, second = policy(4, 2, 2, 0), policy(4, 2, 2, 1)

    def residual(T):
        parts = (T @ second.A - first.A @ T, T @ second.B - first.B, second.C - first.C @ T)
        return sum(np.square(part).sum() for part in parts)

    T = linear.solve_gl(first, second)
    rng = generator("test_linear", "around")
    assert all(residual(T) < residual(T + 1e-3 * rng.normal(size=T.shape)) for _ in range(50))
    assert residual(T) < residual(np.eye(4))


@pytest.mark.parametrize("sign", [1, -1])  # with -1 the gain is far from convex: bare polar steps go to and fro
def test_steps_over_orthogonal_matrices_come_ever_nearer(sign):
    first, second = policy(5, 2, 2, 0), policy(5, 2, 2, 1)
    second = LinearPolicy(sign * (first.A if sign < 0 else second.A), 0.1 * second.B, 0.1 * second.C, second.D)
    found = [linear.solve_orthogonal(first, second, steps=steps, tolerance=0.0) for steps in range(0, 40)]
    assert all(np.abs(T @ T.T - np.eye(5)).max() < 1e-12 for T in found)
    distances = [distance(first, second.moved(T)) for T in found]
    assert all(after <= before + 1e-9 for before, after in zip(distances, distances[1:]))
    assert distances[-1] < 0.999 * distances[0] and distances[0] <= distance(first, second)
    # Stationary: along rotations from the end, nothing falls at first order.
    end = linear.solve_orthogonal(first, second, steps=5000, tolerance=1e-15)
    turn = generator("test_linear", "turn").normal(size=(5, 5))
    turn = 1e-4 * (turn - turn.T)
    around = [distance(first, second.moved(np.linalg.qr(np.eye(5) + s * turn)[0] @ end)) for s in (-1, 0, 1)]
    assert abs(around[2] - around[0]) < 1e-2 * abs(around[0] + around[2] - 2 * around[1])


@pytest.mark.parametrize("radius", [0.9, 1.3])
def test_balanced_form(radius):
    first = policy(5, 2, 3, radius=radius)
    factor = linear.margin([first])
    assert factor == min(1.0, 0.98 / first.radius)
    found = balanced(first, factor)
    P, Q = (root @ root.T for root in linear.gramian_roots(found, factor))
    assert np.abs(P - np.diag(np.diag(P))).max() < 1e-9 * P.max() and np.abs(P - Q).max() < 1e-9 * P.max()
    F = factor * found.A
    assert np.abs(F @ P @ F.T + found.B @ found.B.T - P).max() < 1e-9 * P.max()
    again = balanced(first.moved(basis(5, 3)), factor)  # the same matrices, signs included
    assert all(np.abs(getattr(found, name) - getattr(again, name)).max() < 1e-7 for name in "ABCD")
    assert apart(found, first) < 1e-9


def test_small_states_survive_a_bad_basis():
    """Gramians as sums would lose them: their condition is that of the basis, squared."""
    first = policy(4, 2, 2)
    small = np.array([1, 1, 1, 1e-3])
    first = LinearPolicy(first.A * small, first.B, first.C * small, first.D)
    sizes = linear._balancing(first, 4, 1.0)[2]
    assert sizes[3] < 1e-3 * sizes[0]
    stretch = np.linalg.qr(basis(4, 1))[0] @ np.diag([1, 30, 1e3, 1e4])
    assert np.allclose(linear._balancing(first.moved(stretch), 4, 1.0)[2], sizes, rtol=1e-2)
    assert apart(balanced(first.moved(stretch)), first) < 1e-6
    with pytest.raises(UserError, match="too ill-conditioned"):
        balanced(first.moved(basis(4, 1) @ np.diag([1, 1e3, 1e-3, 1]) @ basis(4, 2)))


def test_observable_form():
    first = policy(4, 2, 2)
    found, again = linear.observable(first), linear.observable(first.moved(basis(4, 3)))
    assert linear.independent_rows(first) == [0, 1, 2, 3]
    assert np.allclose(found.C, np.eye(2, 4)) and np.allclose(found.A[:2], np.eye(4)[2:])
    assert all(np.abs(getattr(found, name) - getattr(again, name)).max() < 1e-8 for name in "ABCD")
    # Action 0 shows one state only, so the other three are seen in action 1: rows are chosen, not counted.
    A = np.zeros((4, 4))
    A[0, 0], A[1:, 1:] = 0.5, policy(3, 1, 1).A
    apart_ones = LinearPolicy(A, np.ones((4, 1)), [[1, 0, 0, 0], [0, 1, 0.3, -0.5]], np.zeros((2, 1)))
    assert linear.independent_rows(apart_ones.moved(basis(4, 5))) == [0, 1, 3, 5]


def test_parallel_policies_answer_with_the_mean():
    both = [policy(3, 2, 2, seed) for seed in range(2)]
    found = linear.parallel(both, [3, 1])
    assert found.order == 6
    assert np.allclose(found.responses(9), 0.75 * both[0].responses(9) + 0.25 * both[1].responses(9))
    # Reduced to an order that is enough, nothing changes: half of these six states say the same as the others.
    assert apart(linear.reduced(linear.parallel([both[0], both[0]]), 3), both[0]) < 1e-9
    assert 0 < apart(linear.reduced(found, 5), found) < apart(linear.reduced(found, 1), found)


def test_a_policy_that_would_end_further_stays():
    first, far = policy(4, 1, 1, 0), policy(4, 1, 1, 1)
    nothing = LinearPolicy(far.A, np.zeros((4, 1)), np.zeros((1, 4)), far.D)  # T = 0 solves it
    assert linear.align([first, nothing], "gl")[1] is nothing
    for group in linear.SOLVERS:
        moved = linear.align([first, far], group)
        assert moved[0] is first and distance(first, moved[1]) <= distance(first, far)


def test_refusals():
    first = policy(3, 2, 1)
    with pytest.raises(UserError, match=r"shapes .*'C': \(1, 2\).* is wanted"):
        LinearPolicy(first.A, first.B, first.C[:, :2], first.D)
    with pytest.raises(UserError, match=r"B of shape \(3, 2\): a finite matrix"):
        LinearPolicy(first.A, first.B * np.nan, first.C, first.D)
    with pytest.raises(UserError, match="invertible"):
        first.moved(np.ones((3, 3)))
    with pytest.raises(UserError, match="unknown linear merge 'balance'; nearest: 'balanced'"):
        merge_linear("balance", [first])
    with pytest.raises(UserError, match="unknown group 'g'"):
        linear.align([first], "g")
    with pytest.raises(UserError, match="policy 1 has matrices of shapes"):
        merge_linear("average", [first, policy(4, 2, 1)])
    with pytest.raises(UserError, match="no linear policies"):
        merge_linear("average", [])
    with pytest.raises(UserError, match="2 coefficients"):
        merge_linear("gl", [first, first, first], [1, 2])
    with pytest.raises(UserError, match="not reached or not seen"):
        balanced(linear.parallel([first, first]))
    with pytest.raises(UserError, match="of which actions show 3: the policy is not observable"):
        linear.observable(linear.parallel([first, first]))
    with pytest.raises(UserError, match="spectral radius 1.5 times factor 1: below 1"):
        balanced(policy(3, 2, 1, radius=1.5))
    with pytest.raises(UserError, match="order 4: between 1 and the policy's 3"):
        linear.reduced(first, 4)
    assert set(EXACT) < set(LINEAR_MERGES)
