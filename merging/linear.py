"""Linear dynamic policies, z' = A z + B y and u = C z + D y, and their symmetry GL(n): aligning and merging them.

The policies of LQG control are of this kind: recurrent networks without the nonlinearity. For any invertible T,
(T A T^-1, T B, C T^-1, D) is the same policy, seen with the state T z; signed permutations, the whole symmetry of a
tanh network, are a few of these. Three ways to bring policies into one frame, and what each solves:

- **Least squares over GL(n)** (:func:`solve_gl`): the T that minimises ||T A_i - A_1 T||^2 + ||T B_i - B_1||^2 +
  ||C_i - C_1 T||^2, linear in T. *For two realisations of one policy, reachable or observable, it is the T between
  them, and the only one:* T A_i = A_1 T and T B_i = B_1 give T R_i = R_1 for the reachability matrices
  R = [B, A B, ..., A^(n-1) B]; R_i has n independent columns, which fixes T, and so has R_1, which makes T invertible.
  (Observable: the same with C_i = C_1 T.) For different policies it is not the distance of the moved weights, whose
  infimum over GL(n) need not be attained, and its answer depends on the bases at hand.
- **O(n)** (:func:`solve_orthogonal`), the T that leave every norm: there ||T A_i - A_1 T|| = ||T A_i T^-1 - A_1||, so
  both objectives are one, a constant less twice the inner product with the reference. That is quadratic in T; there is
  no closed form. Steps T <- polar(gradient + c T) never lower it: with c = 2 ||A_1|| ||A_i|| (spectral norms) it is
  convex when c ||T||^2 / 2, a constant on O(n), is added, so it lies above its tangent, which the polar factor
  maximises (von Neumann).
- **Canonical forms**, which look at one policy alone: :func:`balanced` (reachability and observability Gramians P and
  Q equal and diagonal) and :func:`observable` (rows of the observability matrix O become the state). *They do not
  depend on the basis:* T maps P to T P T^T and Q to T^-T Q T^-1, so P Q keeps its eigenvalues, and balancing leaves
  the T in O(n) that commute with them: signs, where these Hankel singular values are distinct. T maps O to O T^-1, so
  rows S of it become S T^-1, and the basis that they make, (S T^-1) (T z) = S z, is the same.

Wang et al., "Robot Fleet Learning via Policy Merging" (ICLR 2024) has linear control among its experiments; that
GL(n) is what acts there is not used by it as far as we know, and no figure of it is reproduced. Balanced realisations:
Moore, IEEE TAC 26 (1981). Observable canonical forms: Luenberger, IEEE TAC 12 (1967).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.weights import Axis, WeightSpec
from fleetgym.merging.matching import match_many
from fleetgym.merging.mergers import normalised

_MARGIN = 0.98  # spectral radius that Gramians are computed with at most


@dataclass(frozen=True, eq=False)
class LinearPolicy:
    """The policy z_{t+1} = A z_t + B y_t, u_t = C z_t + D y_t.

    Attributes:
        A: How the state moves, [n, n] float64.
        B: What an observation does to it, [n, Do].
        C: Actions from the state, [Da, n].
        D: Actions from the observation, [Da, Do].

    Raises:
        UserError: Shapes that do not fit, or NaN or infinite entries.
    """

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray

    def __post_init__(self) -> None:
        for name in "ABCD":
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.ndim != 2 or not np.isfinite(value).all():
                raise UserError(f"{name} of shape {value.shape}: a finite matrix is wanted")
            object.__setattr__(self, name, value)
        n, inputs, outputs = len(self.A), self.B.shape[1], len(self.C)
        wanted = {"A": (n, n), "B": (n, inputs), "C": (outputs, n), "D": (outputs, inputs)}
        found = {name: getattr(self, name).shape for name in "ABCD"}
        if found != wanted:
            raise UserError(f"a linear policy of shapes {found}; with A and B as they are, {wanted} is wanted")

    @property
    def order(self) -> int:
        """The number n of its states."""
        return len(self.A)

    @property
    def radius(self) -> float:
        """The spectral radius of A; the policy by itself is stable below 1."""
        return float(np.abs(np.linalg.eigvals(self.A)).max(initial=0.0))

    def moved(self, T: np.ndarray) -> LinearPolicy:
        """The same policy with the state T z, for an invertible T [n, n].

        Raises:
            UserError: T has another shape or no inverse.
        """
        T = np.asarray(T, dtype=np.float64)
        if T.shape != self.A.shape or not np.linalg.cond(T) < 1 / np.finfo(float).eps:
            raise UserError(f"T of shape {T.shape} is no basis of {self.order} states: an invertible matrix is wanted")
        inverse = np.linalg.inv(T)
        return LinearPolicy(T @ self.A @ inverse, T @ self.B, self.C @ inverse, self.D)

    def responses(self, count: int) -> np.ndarray:
        """Its actions 0, 1, ... steps after a unit observation: D, C B, C A B, ...; [count, Da, Do].

        2 n of them tell policies of order n apart, and no basis changes them (they are the Markov parameters).
        """
        out, state = [self.D], self.B
        for _ in range(count - 1):
            out.append(self.C @ state)
            state = self.A @ state
        return np.stack(out[:count])

    def spec(self) -> WeightSpec:
        """Its symmetry as far as a :class:`WeightSpec` can say it: signed permutations of the states."""
        state, (outputs, inputs) = Axis("state", signs=(True,)), self.D.shape
        into, out = Axis(name="in", size=inputs), Axis(name="out", size=outputs)
        axes = {"A": (state, state), "B": (state, into), "C": (out, state), "D": (out, into)}
        return WeightSpec(axes, {"state": self.order}, {"state": True})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its matrices as float64 tensors: what :func:`fleetgym.merging.match` takes, with :meth:`spec`."""
        return {name: torch.from_numpy(getattr(self, name)) for name in "ABCD"}


def distance(a: LinearPolicy, b: LinearPolicy) -> float:
    """The squared distance of their matrices, in the bases they are in."""
    return float(sum(np.square(getattr(a, name) - getattr(b, name)).sum() for name in "ABCD"))


def _polar(matrix: np.ndarray) -> np.ndarray:
    """The orthogonal matrix with the largest inner product with ``matrix``."""
    left, _, right = np.linalg.svd(matrix)
    return left @ right


def solve_gl(reference: LinearPolicy, policy: LinearPolicy) -> np.ndarray:
    """The T that minimises ||T A - A_1 T||^2 + ||T B - B_1||^2 + ||C - C_1 T||^2; index 1 is the reference's.

    n^2 unknowns in closed form, dense: meant for tens of states at most. There is one such T if the policy is reachable
    or the reference observable; else this is the shortest.

    Returns:
        T [n, n] such that ``policy.moved(T)`` is near the reference. Nothing keeps T well conditioned, or even
        invertible, where the policies differ much.
    """
    identity = np.eye(policy.order)
    # Row-major: vec(X T Y) = (X kron Y^T) vec(T).
    system = np.concatenate(
        [
            np.kron(identity, policy.A.T) - np.kron(reference.A, identity),
            np.kron(identity, policy.B.T),
            np.kron(reference.C, identity),
        ]
    )
    wanted = np.concatenate([np.zeros(policy.order**2), reference.B.ravel(), policy.C.ravel()])
    return np.linalg.lstsq(system, wanted, rcond=None)[0].reshape(policy.order, policy.order)


def solve_orthogonal(
    reference: LinearPolicy, policy: LinearPolicy, *, steps: int = 50, tolerance: float = 1e-6
) -> np.ndarray:
    """An orthogonal T that brings the policy near the reference: a local minimum of the squared distance over O(n).

    Starts from the best of the identity, the solution of B and C alone (Procrustes; Schoenemann 1966) and the
    orthogonal matrix nearest to :func:`solve_gl`'s, which is the answer where the policies are the same.

    Args:
        reference: The policy to come near to.
        policy: The policy to move.
        steps: Most steps.
        tolerance: It ends when a step gains less than this fraction of the squared norms.

    Returns:
        T [n, n]; never further from the reference than the identity.
    """
    fixed = reference.B @ policy.B.T + reference.C.T @ policy.C
    shift = 2 * np.linalg.norm(reference.A, 2) * np.linalg.norm(policy.A, 2)
    scale = sum(float(np.square(x).sum()) for p in (reference, policy) for x in (p.A, p.B, p.C))

    def products(T: np.ndarray) -> tuple[float, np.ndarray]:
        right = reference.A @ T @ policy.A.T
        return float(np.sum(T * (right + fixed))), right + reference.A.T @ T @ policy.A + fixed

    starts = (np.eye(policy.order), _polar(fixed), _polar(solve_gl(reference, policy)))
    T = max(starts, key=lambda start: products(start)[0])
    value, gradient = products(T)
    for _ in range(steps):
        following = _polar(gradient + shift * T)
        last, (value, gradient) = value, products(following)
        T = following
        if value - last <= tolerance * scale:
            break
    return T


def solve_signed(reference: LinearPolicy, policies: Sequence[LinearPolicy]) -> list[np.ndarray]:
    """For each policy the signed permutation T [n, n] that the matcher ``frank_wolfe`` finds, as for networks."""
    states = [policy.state_dict() for policy in policies]
    out = []
    for result in match_many(reference.spec(), [reference.state_dict()] * len(states), states):
        T = np.zeros_like(reference.A)
        T[np.arange(len(T)), result.element.perms["state"].numpy()] = result.element.signs["state"].numpy()
        out.append(T)
    return out


SOLVERS: dict[str, Callable[[LinearPolicy, Sequence[LinearPolicy]], list[np.ndarray]]] = {
    "gl": lambda reference, policies: [solve_gl(reference, policy) for policy in policies],
    "orthogonal": lambda reference, policies: [solve_orthogonal(reference, policy) for policy in policies],
    "signed": solve_signed,
}
"""Group -> for each policy the T that brings it near the reference."""


def margin(policies: Sequence[LinearPolicy]) -> float:
    """The factor of A, one for all, with which every policy has Gramians: 1 where they are well stable."""
    return min(1.0, _MARGIN / max(1e-300, *(policy.radius for policy in policies)))


def _root(F: np.ndarray, B: np.ndarray) -> np.ndarray:
    """A square root R [n, n] of sum F^k B B^T F^Tk = R R^T for stable F, by doubling: after i steps 2^i terms.

    The sum itself would lose what is small in an ill-conditioned basis: it has the squared condition number.
    """
    root = np.concatenate([B, np.zeros((len(F), len(F)))], axis=1)
    for _ in range(64):
        root = np.linalg.qr(np.concatenate([root, F @ root], axis=1).T, mode="r").T
        F = F @ F
        largest = np.abs(F).max(initial=0.0)
        if largest < 1e-30:
            return root
        if not largest < 1e30:
            break
    raise UserError("a stable policy whose powers do not vanish in floating point: its basis is too ill-conditioned")


def gramian_roots(policy: LinearPolicy, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Square roots, P = R R^T and Q = S S^T, of the reachability and observability Gramians.

    P = sum F^k B B^T F^Tk and Q = sum F^Tk C^T C F^k with F = factor * A. A factor below 1 discounts time. It gives
    policies Gramians that are not stable by themselves, as an LQG controller need not be, and takes nothing from what
    they are for: T maps them to T P T^T and T^-T Q T^-1 for every factor.

    Returns:
        R and S, [n, n] each.

    Raises:
        UserError: factor * A is not stable, or its basis is beyond floating point (condition numbers from about 1e6).
    """
    if not factor * policy.radius < 1:
        raise UserError(f"spectral radius {policy.radius:.4g} times factor {factor:.4g}: below 1 is wanted")
    F = factor * policy.A
    return _root(F, policy.B), _root(F.T, policy.C.T)


def _balancing(policy: LinearPolicy, order: int, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T [order, n], a right inverse [n, order], and all Hankel singular values [n] (the square-root method)."""
    roots = gramian_roots(policy, factor)
    left, sizes, right = np.linalg.svd(roots[1].T @ roots[0])
    if not sizes[order - 1] > 1e-12 * sizes[0]:
        raise UserError(
            f"Hankel singular values {sizes}: a policy with states that are not reached or not seen has no balanced "
            f"form of order {order}; reduce it first"
        )
    scale = 1 / np.sqrt(sizes[:order])
    return scale[:, None] * (left.T[:order] @ roots[1].T), roots[0] @ right.T[:, :order] * scale, sizes


def balanced(policy: LinearPolicy, factor: float = 1.0) -> LinearPolicy:
    """The policy in its balanced basis, where both Gramians (with ``factor``) are the same diagonal matrix.

    Each state's sign is such that the entry of B and C^T that is largest over that state is positive, a rule that no
    basis changes. Where Hankel singular values are near each other the basis is sensitive to the policy.

    Raises:
        UserError: The policy has no Gramians with this factor, or is not minimal.
    """
    T, _, _ = _balancing(policy, policy.order, factor)
    found = policy.moved(T)
    rows = np.concatenate([found.B, found.C.T], axis=1)
    largest = rows[np.arange(policy.order), np.abs(rows).argmax(1)]
    return found.moved(np.diag(np.where(largest < 0, -1.0, 1.0)))


def reduced(policy: LinearPolicy, order: int, factor: float = 1.0) -> LinearPolicy:
    """The policy with the ``order`` states of its balanced form that matter most (balanced truncation; Moore 1981).

    States that are not reached or not seen go without a trace.

    Raises:
        UserError: The order is not within 1 and the policy's, or above what it is minimal with; no Gramians.
    """
    if not 1 <= order <= policy.order:
        raise UserError(f"order {order}: between 1 and the policy's {policy.order} is wanted")
    T, back, _ = _balancing(policy, order, factor)
    return LinearPolicy(T @ policy.A @ back, T @ policy.B, policy.C @ back, policy.D)


def independent_rows(policy: LinearPolicy, tolerance: float = 1e-6) -> list[int]:
    """Which rows of [C; C A; C A^2; ...] are independent of those before them: n of them, no basis changes which.

    Raises:
        UserError: There are fewer than n: the policy is not observable.
    """
    kept: list[int] = []
    basis = np.zeros((0, policy.order))
    for i, row in enumerate(_observability(policy, policy.order)):
        rest = row - basis.T @ (basis @ row)
        if np.linalg.norm(rest) > tolerance * max(np.linalg.norm(row), np.linalg.norm(policy.C)):
            kept, basis = [*kept, i], np.concatenate([basis, rest[None] / np.linalg.norm(rest)])
    if len(kept) < policy.order:
        raise UserError(f"{policy.order} states, of which actions show {len(kept)}: the policy is not observable")
    return kept


def _observability(policy: LinearPolicy, powers: int) -> np.ndarray:
    blocks = [policy.C]
    for _ in range(powers - 1):
        blocks.append(blocks[-1] @ policy.A)
    return np.concatenate(blocks)


def observable(policy: LinearPolicy, rows: Sequence[int] | None = None) -> LinearPolicy:
    """The policy in its observable canonical form: its state is what it will do, unless something is observed.

    Args:
        policy: An observable policy.
        rows: Which n rows of [C; C A; ...] are the state (row k Da + j: action j in k steps); by default
            :func:`independent_rows`. Policies that are to be merged need the same ones.

    Raises:
        UserError: The rows are not independent.
    """
    rows = independent_rows(policy) if rows is None else rows
    return policy.moved(_observability(policy, policy.order)[list(rows)])


def align(policies: Sequence[LinearPolicy], group: str, *, reference: LinearPolicy | None = None) -> list[LinearPolicy]:
    """Moves each policy near the reference by an element of a group: ``gl``, ``orthogonal`` or ``signed``.

    Args:
        policies: Policies of one order and the same observations and actions.
        group: Name of the group, a key of :data:`SOLVERS`.
        reference: What to come near to; the first policy by default.

    Returns:
        The same policies in new bases. One whose T has no inverse, or that would end further from the reference than
        it is, stays in its own.

    Raises:
        UserError: No such group, or policies of different shapes.
    """
    if group not in SOLVERS:
        raise unknown("group", group, SOLVERS)
    _check_alike(policies)
    reference = policies[0] if reference is None else reference
    out = []
    for policy, T in zip(policies, SOLVERS[group](reference, policies)):
        try:
            moved = policy.moved(T)
        except UserError:  # singular: the policies are too different
            moved = policy
        out.append(moved if distance(moved, reference) < distance(policy, reference) else policy)
    return out


def mean(policies: Sequence[LinearPolicy], coefficients: Sequence[float] | None = None) -> LinearPolicy:
    """The weighted mean of the matrices, in the bases they are in.

    Raises:
        UserError: Policies of different shapes, or coefficients that are no weights.
    """
    _check_alike(policies)
    shares = normalised(coefficients, len(policies))
    return LinearPolicy(*(sum(s * getattr(p, name) for s, p in zip(shares, policies)) for name in "ABCD"))


def parallel(policies: Sequence[LinearPolicy], coefficients: Sequence[float] | None = None) -> LinearPolicy:
    """All policies side by side, the action being the weighted mean of theirs: of order N n, the mean of the responses.

    Raises:
        UserError: Policies of different shapes, or coefficients that are no weights.
    """
    _check_alike(policies)
    shares = normalised(coefficients, len(policies))
    return LinearPolicy(
        scipy.linalg.block_diag(*(p.A for p in policies)),
        np.concatenate([p.B for p in policies]),
        np.concatenate([s * p.C for s, p in zip(shares, policies)], axis=1),
        sum(s * p.D for s, p in zip(shares, policies)),
    )


def _check_alike(policies: Sequence[LinearPolicy]) -> None:
    if not policies:
        raise UserError("no linear policies: at least one is wanted")
    first = [getattr(policies[0], name).shape for name in "ABCD"]
    for i, policy in enumerate(policies):
        shapes = [getattr(policy, name).shape for name in "ABCD"]
        if shapes != first:
            raise UserError(f"policy {i} has matrices of shapes {shapes}, policy 0 of {first}: they cannot be merged")


LINEAR_MERGES = ("average", "signed", "orthogonal", "gl", "balanced", "balanced_gl", "observable", "responses")
"""The methods of :func:`merge_linear`."""


def in_one_frame(method: str, policies: Sequence[LinearPolicy]) -> list[LinearPolicy]:
    """The policies in the bases that a method of :func:`merge_linear` averages them in.

    ``average`` and ``responses``, which need none, leave them as they are.

    Raises:
        UserError: As :func:`merge_linear`.
    """
    if method not in LINEAR_MERGES:
        raise unknown("linear merge", method, LINEAR_MERGES)
    _check_alike(policies)
    if method in SOLVERS:
        return align(policies, method)
    if method == "observable":
        rows = independent_rows(policies[0])
        return [observable(policy, rows) for policy in policies]
    if method in ("balanced", "balanced_gl"):
        factor = margin(policies)
        policies = [balanced(policy, factor) for policy in policies]
        return align(policies, "gl" if method == "balanced_gl" else "orthogonal")
    return list(policies)


def merge_linear(
    method: str, policies: Sequence[LinearPolicy], coefficients: Sequence[float] | None = None
) -> LinearPolicy:
    """Merges linear policies into one of their order.

    Args:
        method: ``average``, the mean of the matrices as they are; ``signed``, ``orthogonal``, ``gl``, the mean after
            :func:`align` to the first; ``balanced``, the mean of balanced forms, aligned over O(n), which settles signs
            and near-equal Hankel singular values; ``balanced_gl``, balanced forms aligned over GL(n); ``observable``,
            the mean of observable canonical forms; ``responses``, the mean of the policies' responses
            (:func:`parallel`), reduced to their order (:func:`reduced`). The result of the last four does not depend
            on the bases (as a policy), and for policies that are the same in different bases, reachable and
            observable, it is that policy. The latter holds for ``gl``, too.
        policies: Policies of one order, from the same observations to the same actions.
        coefficients: Weights of the mean, scaled to sum to one; equal if None.

    Returns:
        The merged policy. Nothing makes it stabilise anything: a mean of stabilising policies need not.

    Raises:
        UserError: No such method; policies of different shapes, or not minimal where a canonical form is wanted.
    """
    placed = in_one_frame(method, policies)
    if method == "responses":
        return reduced(parallel(placed, coefficients), placed[0].order, margin(placed))
    return mean(placed, coefficients)
