"""``fleetgym bench linear_fleet``: merging linear policies on linear control, every cost in closed form.

Robot k has a plant x' = A x + B u + w, y = C x + v of its own: a nominal plant whose physical parameters are each
multiplied by 1 + perturbation * U(-1, 1). Its policy is the LQG-optimal controller of its plant in a random basis of
the controller's state, as learning from a random initialisation would find it. The policies are merged by
:func:`fleetgym.merging.linear.merge_linear`, and the one merged policy runs on every robot's plant. Its score is the
exact mean cost E[x' Q x + u' R u] (discrete Lyapunov equation, no rollouts), divided by the optimum of that plant.

Rows beside the merges: ``first``, robot 0's policy for all, which is no merge at all; ``average_same_basis``, the mean
of the matrices in the bases of the physical state, which somebody would have to know; ``joint``, one controller of the
same order, fitted to all plants by gradient descent on the exact cost, from the best of the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, write_json
from fleetgym.core.records import provenance
from fleetgym.core.run import track
from fleetgym.core.seeding import generator
from fleetgym.merging.linear import LINEAR_MERGES, LinearPolicy, balanced, in_one_frame, margin, mean, merge_linear

REFERENCES = ("first", "average_same_basis", "joint")
"""Rows that are no merges of weights alone."""


@dataclass(frozen=True, eq=False)
class Plant:
    """x' = A x + B u + w, y = C x + v with independent w ~ N(0, W), v ~ N(0, V), and the cost E[x' Q x + u' R u].

    Attributes:
        A: [n, n].
        B: [n, Da].
        C: [Do, n].
        Q: [n, n].
        R: [Da, Da].
        W: [n, n].
        V: [Do, Do].
    """

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    Q: np.ndarray
    R: np.ndarray
    W: np.ndarray
    V: np.ndarray


def _sampled(A: np.ndarray, B: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """Exact discretisation of x' = A x + B u with u held for ``dt`` seconds."""
    import scipy.linalg

    n, actions = B.shape
    joint = scipy.linalg.expm(dt * np.block([[A, B], [np.zeros((actions, n + actions))]]))
    return joint[:n, :n], joint[:n, n:]


def _physical(A: Any, B: Any, C: Any, Q: Sequence[float], R: Sequence[float], dt: float) -> Plant:
    """A plant with a unit disturbance on its inputs and 1 cm (0.01 rad) of noise on what is measured."""
    A, B = _sampled(np.array(A, dtype=float), np.array(B, dtype=float), dt)
    C = np.array(C, dtype=float)
    W = B @ B.T + 1e-6 * np.eye(len(A))
    return Plant(A, B, C, np.diag(Q), np.diag(R), W, 1e-4 * np.eye(len(C)))


def double_integrator(parameters: np.ndarray) -> Plant:
    """A mass [kg] with friction [N s/m], pushed; its position is measured, every 0.1 s."""
    mass, friction = parameters
    return _physical([[0, 1], [0, -friction / mass]], [[0], [1 / mass]], [[1, 0]], (1, 0.1), (0.1,), 0.1)


def cart_pole(parameters: np.ndarray) -> Plant:
    """A pole (point mass [kg] at a length [m]) upright on a cart [kg]; both positions are measured, every 0.05 s.

    State (x, x', angle, angle'), linearised: M x'' = u - m g a, M l a'' = (M + m) g a - u.
    """
    cart, pole, length = parameters
    g = 9.81
    A = [[0, 1, 0, 0], [0, 0, -pole * g / cart, 0], [0, 0, 0, 1], [0, 0, (cart + pole) * g / (cart * length), 0]]
    B = [[0], [1 / cart], [0], [-1 / (cart * length)]]
    return _physical(A, B, [[1, 0, 0, 0], [0, 0, 1, 0]], (1, 0.1, 1, 0.1), (0.1,), 0.05)


def quadrotor(parameters: np.ndarray) -> Plant:
    """A planar quadrotor near hover: mass [kg], inertia [kg m^2], arm [m]; two rotors' forces, every 0.05 s.

    State (x, z, tilt, and their rates): x'' = -g tilt, m z'' = f1 + f2, J tilt'' = arm (f1 - f2). Positions and tilt
    are measured.
    """
    mass, inertia, arm = parameters
    A, B = np.zeros((6, 6)), np.zeros((6, 2))
    A[:3, 3:], A[3, 2] = np.eye(3), -9.81
    B[4], B[5] = 1 / mass, (arm / inertia, -arm / inertia)
    return _physical(A, B, np.eye(3, 6), (1, 1, 1, 0.1, 0.1, 0.1), (0.1, 0.1), 0.05)


def random_plant(parameters: np.ndarray) -> Plant:
    """Four states, two actions, two observations: every entry of A and B is a parameter; the first states are seen."""
    A, B = parameters[:16].reshape(4, 4), parameters[16:].reshape(4, 2)
    return Plant(A, B, np.eye(2, 4), np.eye(4), np.eye(2), 0.1 * np.eye(4), 0.1 * np.eye(2))


def _random_parameters(rng: np.random.Generator) -> np.ndarray:
    A = rng.normal(size=(4, 4))
    A *= rng.uniform(0.9, 1.1) / np.abs(np.linalg.eigvals(A)).max()
    return np.concatenate([A.ravel(), rng.normal(size=8)])


PLANTS: dict[str, tuple[Callable[[np.ndarray], Plant], Callable[[np.random.Generator], np.ndarray]]] = {
    "double_integrator": (double_integrator, lambda rng: np.array([1.0, 0.1])),
    "cart_pole": (cart_pole, lambda rng: np.array([1.0, 0.1, 0.5])),
    "quadrotor": (quadrotor, lambda rng: np.array([0.5, 0.005, 0.15])),
    "random": (random_plant, _random_parameters),
}
"""Name -> the plant of given parameters, and its nominal parameters."""


def fleet(name: str, robots: int, perturbation: float, seed: int) -> list[Plant]:
    """The plants of a fleet; the first ones do not depend on how many there are."""
    make, nominal = PLANTS[name]
    parameters = nominal(generator("linear_fleet", "plant", name, seed))
    out = []
    for robot in range(robots):
        rng = generator("linear_fleet", "robot", name, seed, robot)
        out.append(make(parameters * (1 + perturbation * rng.uniform(-1, 1, parameters.shape))))
    return out


def random_basis(name: str, n: int, robot: int, seed: int) -> np.ndarray:
    """A matrix [n, n] with independent normal entries."""
    return generator("linear_fleet", "basis", name, seed, robot).normal(size=(n, n))


def lqg(plant: Plant) -> LinearPolicy:
    """The controller with the least cost, in the basis of the plant's state.

    Action t may depend on observation t, so the estimate is filtered before it is fed back: with the gains K of the
    regulator and L of the Kalman filter (u = -K x_{t|t}, x_{t|t} = x_t + L (y_t - C x_t)) the policy is
    ((A - B K)(I - L C), (A - B K) L, -K (I - L C), -K L). Separation principle; e.g. Anderson and Moore 1990.
    """
    import scipy.linalg

    A, B, C = plant.A, plant.B, plant.C
    S = scipy.linalg.solve_discrete_are(A, B, plant.Q, plant.R)
    P = scipy.linalg.solve_discrete_are(A.T, C.T, plant.W, plant.V)
    K = np.linalg.solve(B.T @ S @ B + plant.R, B.T @ S @ A)
    L = np.linalg.solve(C @ P @ C.T + plant.V, C @ P).T
    closed, kept = A - B @ K, np.eye(len(A)) - L @ C
    return LinearPolicy(closed @ kept, closed @ L, -K @ kept, -K @ L)


def _accumulated(F: np.ndarray, M: np.ndarray) -> np.ndarray:
    """sum_k F^k M F^Tk for stable F [N, n, n], by doubling: after i steps 2^i terms."""
    total = M
    for _ in range(64):
        total = total + F @ total @ F.mT
        F = F @ F
        if np.abs(F).max(initial=0.0) < 1e-9:  # what is left is F total F^T
            break
    return total


class Costs:
    """The exact cost of a linear policy on several plants of one shape, and its gradient.

    With the state (x, z) the policy is static feedback: (u, z') = G (y, z) with G = [[D, C], [B, A]] of the policy, so
    the closed loop is F = A0 + B0 G C0, the covariance S = F S F' + W0 + B0 G V0 G' B0', and the cost
    tr(Q0 S) + tr(R0 G (C0 S C0' + V0) G'). With X = F' X F + Q0 + C0' G' R0 G C0 its derivative by G is
    2 (B0' X F S C0' + (B0' X B0 + R0) G V0 + R0 G C0 S C0') (Levine and Athans, IEEE TAC 15, 1970).

    Args:
        plants: The plants.
        order: The order n of the policies.
    """

    def __init__(self, plants: Sequence[Plant], order: int) -> None:
        def padded(name: str, corner: np.ndarray) -> np.ndarray:
            blocks = np.stack([getattr(plant, name) for plant in plants])
            (rows, columns), (more, further) = blocks.shape[1:], corner.shape
            out = np.zeros((len(plants), rows + more, columns + further))
            out[:, :rows, :columns], out[:, rows:, columns:] = blocks, corner
            return out

        nothing, identity = np.zeros((order, order)), np.eye(order)
        self.A, self.B, self.C = padded("A", nothing), padded("B", identity), padded("C", identity)
        self.Q, self.R, self.W, self.V = (padded(name, nothing) for name in "QRWV")

    def __call__(self, policy: LinearPolicy) -> np.ndarray:
        """The mean cost a step on each plant, [N]; infinite where the closed loop is not stable."""
        return self.with_gradient(policy, gradient=False)[0]

    def with_gradient(self, policy: LinearPolicy, gradient: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The costs [N] and their derivatives by G [N, Da + n, Do + n] (zero where a loop is not stable)."""
        G = np.block([[policy.D, policy.C], [policy.B, policy.A]])
        F = self.A + self.B @ G @ self.C
        stable = np.abs(np.linalg.eigvals(F)).max(-1) < 1 - 1e-9
        costs, slopes = np.full(len(F), np.inf), np.zeros((len(F), *G.shape))
        if stable.any():
            F, B, C = F[stable], self.B[stable], self.C[stable]
            Q, R, V = self.Q[stable], self.R[stable], self.V[stable]
            noise = B @ G
            S = _accumulated(F, self.W[stable] + noise @ V @ noise.mT)
            seen, action = C @ S @ C.mT, R @ G
            costs[stable] = np.einsum("kij,kji->k", Q, S) + np.einsum("kij,kji->k", action @ (seen + V), G.T[None])
            if gradient:
                X = _accumulated(F.mT, Q + C.mT @ (G.T @ action) @ C)
                slopes[stable] = 2 * (B.mT @ X @ (F @ S @ C.mT + noise @ V) + action @ (seen + V))
        return costs, slopes


def joint(costs: Costs, optimal: np.ndarray, start: LinearPolicy, steps: int) -> LinearPolicy:
    """The controller of the start's order with the least mean cost ratio, as far as gradient descent (BFGS) finds it.

    A local minimum at most: the problem is not convex.

    Args:
        costs: The fleet's plants.
        optimal: For each the least cost, [N].
        start: A policy that stabilises all of them.
        steps: Most iterations.
    """
    import scipy.optimize

    start = balanced(start, margin([start]))  # a basis in which no entry is out of scale
    outputs, inputs = start.D.shape
    size = outputs + start.order, inputs + start.order

    def policy(flat: np.ndarray) -> LinearPolicy:
        G = flat.reshape(size)
        return LinearPolicy(G[outputs:, inputs:], G[outputs:, :inputs], G[:outputs, inputs:], G[:outputs, :inputs])

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        found, slopes = costs.with_gradient(policy(flat))
        if not np.isfinite(found).all():
            return 1e12, np.zeros_like(flat)  # the line search comes back
        return float(np.mean(found / optimal)), np.mean(slopes / optimal[:, None, None], axis=0).ravel()

    first = np.block([[start.D, start.C], [start.B, start.A]]).ravel()
    done = scipy.optimize.minimize(objective, first, jac=True, method="BFGS", options={"maxiter": steps, "gtol": 1e-6})
    return policy(done.x)


def measure(name: str, counts: Sequence[int], perturbation: float, seed: int, steps: int) -> dict[int, dict[str, Any]]:
    """One fleet, and the fleets of its first robots.

    Args:
        name: A plant of :data:`PLANTS`.
        counts: Numbers of robots.
        perturbation: How far parameters are from nominal, at most, as a fraction.
        seed: Of the fleet.
        steps: Iterations of the row ``joint``; it is left out with 0.

    Returns:
        For each count and row the cost ratios [N]; a single infinity where a merger refuses the policies, or ``joint``
        has no start.
    """
    plants = fleet(name, max(counts), perturbation, seed)
    experts = [lqg(plant) for plant in plants]
    n = experts[0].order
    optimal = np.array([Costs([plant], n)(expert)[0] for plant, expert in zip(plants, experts)])
    policies = [expert.moved(random_basis(name, n, robot, seed)) for robot, expert in enumerate(experts)]
    placed: dict[str, list[LinearPolicy]] = {}
    for method in LINEAR_MERGES:
        try:
            placed[method] = in_one_frame(method, policies)
        except UserError:
            placed[method] = []
    out: dict[int, dict[str, Any]] = {}
    for count in counts:
        made = {"first": experts[0], "average_same_basis": mean(experts[:count])}
        for method, moved in placed.items():
            if moved:
                # In one frame already; what is left of the merge is its mean.
                made[method] = merge_linear("responses" if method == "responses" else "average", moved[:count])
        costs = Costs(plants[:count], n)
        ratios = {method: costs(policy) / optimal[:count] for method, policy in made.items()}
        best = min(made, key=lambda method: float(np.mean(ratios[method])))
        if steps:
            start = np.isfinite(ratios[best]).all()
            ratios["joint"] = (
                costs(joint(costs, optimal[:count], made[best], steps)) / optimal[:count]
                if start
                else np.array([np.inf])
            )
        out[count] = {**{method: np.array([np.inf]) for method in placed if method not in made}, **ratios}
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown: a line for each plant, number of robots and perturbation, a column for each method.

    The last column has the median of ``balanced`` over ``joint``, on the seeds that have both.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = [*methods, "balanced / joint"]
    lines = [f"| plant | robots | perturbation | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    cells = {(row["plant"], row["robots"], row["perturbation"], row["method"]): row for row in rows}
    for key in dict.fromkeys(key[:3] for key in cells):
        found = [_cell(cells[(*key, method)]["ratios"]) for method in methods]
        pairs = zip(cells[(*key, "balanced")]["ratios"], cells[(*key, "joint")]["ratios"])
        found.append(_cell([a and a / b for a, b in pairs if b is not None]))
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:g} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def median(ratios: Sequence[float | None]) -> float:
    """The median over seeds, where None (a loop that is not stable) counts as infinite."""
    middle = sorted(np.inf if ratio is None else ratio for ratio in ratios)
    return (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2


def _cell(ratios: Sequence[float | None]) -> str:
    if not ratios:
        return "-"
    stable, middle = sum(ratio is not None for ratio in ratios), median(ratios)
    text = f"{middle:.4f}" if np.isfinite(middle) else "unstable"
    return text if stable == len(ratios) else f"{text} ({stable}/{len(ratios)})"


_STYLES = {
    "first": ("#999999", "--", "o"),
    "average_same_basis": ("#000000", ":", "s"),
    "average": ("#dd3333", "-", "v"),
    "signed": ("#dd8833", "-", "<"),
    "orthogonal": ("#ccaa00", "-", ">"),
    "gl": ("#9955cc", "-", "^"),
    "balanced": ("#3366cc", "-", "D"),
    "balanced_gl": ("#22aacc", "-", "P"),
    "observable": ("#338844", "-", "X"),
    "responses": ("#cc4499", "-", "*"),
}


def plot(rows: Sequence[Mapping[str, Any]], robots: int, path: Path) -> Path:
    """Draws the median excess cost (ratio - 1) against the perturbation, a panel for each plant.

    ``joint``, which is known for other seeds than the rest, is not drawn.

    Args:
        rows: As in ``results.json``.
        robots: Which fleets.
        path: A .png or .svg file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    floor, ceiling = 1e-5, 30.0
    plants = list(dict.fromkeys(row["plant"] for row in rows))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc: the same results give the same plot everywhere
        matplotlib.rcParams.update({"svg.hashsalt": "linear_fleet", "font.size": 9})
        figure = Figure(figsize=(3.1 * len(plants) + 2, 3.6), layout="constrained")
        grid = figure.subplots(1, len(plants), sharey=True, squeeze=False)[0]
        for axes, plant in zip(grid, plants):
            for method, (colour, line, marker) in _STYLES.items():
                mine = [r for r in rows if (r["plant"], r["robots"], r["method"]) == (plant, robots, method)]
                points = [(r["perturbation"], median(r["ratios"]) - 1) for r in mine if r["ratios"]]
                if points:
                    x, y = np.array(points).T
                    axes.plot(x, y.clip(floor, ceiling), line, color=colour, marker=marker, markersize=4, label=method)
            axes.set_yscale("log")
            axes.set_ylim(floor / 2, ceiling * 2)
            axes.axhline(ceiling, color="#bbbbbb", linewidth=0.6)
            axes.set_title(f"{plant}, {robots} robots")
            axes.set_xlabel("perturbation of the plants")
            axes.spines[["top", "right"]].set_visible(False)
        ticks = [10.0**k for k in range(-5, 2)]
        names = ["≤ 1e-5", *(f"1e{k}" for k in range(-4, 1)), "10"]
        grid[0].set_yticks([*ticks, ceiling], [*names, "unstable"])
        grid[0].set_ylabel("cost above each robot's optimum (fraction)")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        with atomic_write(path) as temporary:
            kind = path.suffix[1:]
            figure.savefig(temporary, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return path


@dataclass
class Args:
    """Merge LQG controllers of perturbed plants, and score the merged policy by its exact cost on all of them."""

    plants: tuple[str, ...] = tuple(PLANTS)
    """Nominal plants."""
    robots: tuple[int, ...] = (2, 5, 20)
    """Numbers of robots; the smaller fleets are the first robots of the largest."""
    perturbations: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    """How far each parameter of a robot's plant is from nominal at most, as a fraction below 1."""
    seeds: int = 20
    """Fleets of each kind."""
    joint_seeds: int = 5
    """In so many of them one controller is also fitted to the whole fleet."""
    joint_steps: int = 60
    """Iterations of that fit."""
    out: Path = Path("runs/linear_fleet")
    """Folder for results.json, table.md and plot.svg."""


def _check(args: Args) -> None:
    for name in args.plants:
        if name not in PLANTS:
            raise unknown("plant", name, PLANTS)
    for option in ("plants", "robots", "perturbations"):
        if not getattr(args, option):
            raise UserError(f"--{option}: name at least one")
    for option, least in (("robots", 2), ("seeds", 1), ("joint_seeds", 0), ("joint_steps", 1)):
        value = getattr(args, option)
        if min(value if isinstance(value, tuple) else (value,)) < least:
            raise UserError(f"--{option.replace('_', '-')} {value}: at least {least} is wanted")
    if not all(0 <= value < 1 for value in args.perturbations):
        raise UserError(f"--perturbations {args.perturbations}: fractions from 0 to below 1 are wanted")


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench linear_fleet``."""
    import time

    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench linear_fleet")
    _check(args)
    began = time.process_time()
    methods = [*REFERENCES[:2], *LINEAR_MERGES, REFERENCES[2]]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {
        (name, count, size, method): {
            "plant": name,
            "robots": count,
            "perturbation": size,
            "method": method,
            "ratios": [],
            "stabilised": [],
        }
        for name in args.plants
        for count in args.robots
        for size in args.perturbations
        for method in methods
    }
    work = [(name, size, seed) for name in args.plants for size in args.perturbations for seed in range(args.seeds)]
    for name, size, seed in track(work, "linear_fleet"):
        steps = args.joint_steps if seed < args.joint_seeds else 0
        for count, found in measure(name, args.robots, size, seed, steps).items():
            for method, ratios in found.items():
                row = rows[name, count, size, method]
                ratio = float(np.mean(ratios))
                row["ratios"].append(float(f"{ratio:.9g}") if np.isfinite(ratio) else None)
                row["stabilised"].append(int(np.isfinite(ratios).sum()))
    seconds = round(time.process_time() - began, 1)
    listed = list(rows.values())
    text = (
        f"{table(listed)}\nMean cost over the robots' plants, as a multiple of each one's optimum: the median of "
        f"{args.seeds} seeds, for `joint` of the first {args.joint_seeds} (so compare it by the last column, which has "
        f"them in pairs). In brackets the seeds in which every robot is stable, where that is not all of them; `joint` "
        f"is sought only where another row is stable on all robots.\n"
    )
    write_json(args.out / "results.json", {"rows": listed, "cpu_seconds": seconds, "provenance": provenance()})
    with atomic_write(args.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    middle = sorted(args.robots)[len(args.robots) // 2]
    plot(listed, middle, args.out / "plot.svg")
    print(text, end="")
    print(f"{len(work)} fleets, {seconds} CPU-seconds: {args.out}")
    return 0
