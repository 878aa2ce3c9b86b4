"""A zoo of GRUs that add two numbers digit by digit; what is measured is how many sums they get right.

After the Tiny RNN Zoo of Zhou et al., "Universal neural functionals" (NeurIPS 2024, arXiv 2402.05232): 10,000 GRUs of
128 units that read a sum as characters and write the answer (sequence to sequence, up to five digits), trained with
learning rates and batch sizes of their own. Here a network is a :class:`SequenceGRU` of 16 units. At each step it sees
the digits of both numbers at one place, units first, and says the digit of their sum at that place: the memory has to
keep one carry, not the numbers. How many sums it has seen and how many steps it took are its own, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fleetgym.agents.networks import gru_scan
from fleetgym.benchmarks.zoos.networks import SequenceGRU
from fleetgym.benchmarks.zoos.stacked import fan_in_uniform, linear, log_uniform, train
from fleetgym.benchmarks.zoos.zoo import Part, chunk
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator

_AT_ONCE = 125
_BATCHES = (8, 16, 32)  # sums in a gradient step; all networks of a part have the same
_TEST = 512  # sums that every network is measured by


def sums(numbers: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """Pairs of numbers as sequences of digits, units first.

    Args:
        numbers: int64 [..., 2], each from 0 to 10^digits - 1.
        digits: K, of a number.

    Returns:
        The digits of both [..., K + 1, 2], the last ones zero, and those of their sum [..., K + 1]; int64.
    """
    powers = 10 ** torch.arange(digits + 1, device=numbers.device)
    return (
        numbers[..., None, :] // powers[:, None] % 10,
        numbers.sum(-1)[..., None] // powers % 10,
    )


@dataclass(frozen=True)
class AdditionGRU:
    """GRUs that see one-hot digits, 20 numbers a step, and give logits of the ten digits.

    Targets are ``success`` (share of 512 sums, the same for all networks, of which every digit is right; the networks
    have not trained on these sums but by chance), ``digits_right`` (share of the digits) and each network's settings:
    ``learning_rate``, ``steps``, ``batch`` and ``examples``.

    Attributes:
        networks: N.
        hidden: Units of the memory.
        digits: Of a number; a sequence is one longer.
        learning_rate: Bounds; log-uniform.
        steps: Bounds of the number of gradient steps; log-uniform.
        examples: Bounds of the number of different sums that a network trains on; log-uniform.
        seed: Of everything.
        shares: Of train, val and test.

    Raises:
        UserError: A number below one, more digits than there is room for in a sequence of int64, or bounds that are not
            rising and positive.
    """

    name: ClassVar[str] = "addition_gru"
    version: ClassVar[int] = 1
    networks: int = 1000
    hidden: int = 16
    digits: int = 3
    learning_rate: tuple[float, float] = (1e-2, 8e-2)
    steps: tuple[int, int] = (150, 1000)
    examples: tuple[int, int] = (100, 4000)
    seed: int = 0
    shares: tuple[float, float, float] = (2 / 3, 2 / 15, 1 / 5)

    def __post_init__(self) -> None:
        for name in ("networks", "hidden", "digits"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.digits > 17:
            raise UserError(f"digits={self.digits}: at most 17, so that a sum fits in 64 bits")
        for name in ("learning_rate", "steps", "examples"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"{name}={(low, high)}: give the lower and the upper bound, positive")

    def network(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return "sequence_gru", SequenceGRU(20, self.hidden, 10).config

    def parts(self) -> int:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return -(-self.networks // _AT_ONCE)

    def part(self, number: int, device: str) -> Part:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        rng = torch_generator("zoo", self.name, self.seed, number)
        count = len(chunk(self.networks, _AT_ONCE, number))
        batch = _BATCHES[int(torch.randint(len(_BATCHES), (), generator=rng))]
        settings = {
            "steps": log_uniform(*self.steps, count, rng=rng).round().sort(descending=True).values,
            "learning_rate": log_uniform(*self.learning_rate, count, rng=rng),
            "examples": log_uniform(*self.examples, count, rng=rng).floor(),
        }
        shapes = {key: tuple(value.shape) for key, value in SequenceGRU(**self.network()[1]).named_parameters()}
        weights = {key: value.to(device) for key, value in self._initial(shapes, count, rng).items()}
        own = torch.randint(10**self.digits, (count, int(settings["examples"].max()), 2), generator=rng)
        digits, answers = (tensor.to(device) for tensor in sums(own, self.digits))
        settings = {name: value.to(device) for name, value in settings.items()}
        rows = torch.arange(count, device=device)[:, None]

        def loss(weights: Mapping[str, Tensor], active: int, step: int) -> Tensor:
            uniform = torch.rand(active, batch, generator=rng).to(device)
            index = (uniform * settings["examples"][:active, None]).long()
            logits = self.forward(weights, digits[rows[:active], index])
            target = answers[rows[:active], index]
            each = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
            return each.view(active, -1).mean(1)

        train(weights, loss, **{name: settings[name] for name in ("steps", "learning_rate")})
        right = self.evaluate(weights)
        return Part(
            weights,
            {
                "success": right.all(-1).float().mean(1),
                "digits_right": right.float().mean((1, 2)),
                "batch": torch.full((count,), float(batch)),
                **settings,
            },
        )

    @staticmethod
    def _initial(shapes: Mapping[str, tuple[int, ...]], number: int, rng: torch.Generator) -> dict[str, Tensor]:
        """As torch's layers draw them: a GRU's tensors all within 1 / sqrt(hidden)."""
        weights = fan_in_uniform(shapes, number, rng)
        hidden, inputs = shapes["core.weight_hh_l0"][1], shapes["core.weight_ih_l0"][1]
        weights["core.weight_ih_l0"] *= (inputs / hidden) ** 0.5
        return weights

    @staticmethod
    def forward(weights: Mapping[str, Tensor], digits: Tensor) -> Tensor:
        """N networks on sums of their own.

        Args:
            weights: Stacked state dict of :class:`SequenceGRU`, tensors [N, ...].
            digits: int64 [N, B, T, 2], as :func:`sums` gives them.

        Returns:
            Logits [N, B, T, 10].
        """
        count, batch, time = digits.shape[:3]
        # Time before batch, as the recurrence wants it.
        x = F.one_hot(digits.transpose(1, 2), 10).to(weights["head.bias"].dtype).view(count, time * batch, 20)
        gates = linear(x, weights["core.weight_ih_l0"], weights["core.bias_ih_l0"])
        gates = gates.view(count, time, batch, -1).transpose(0, 1).contiguous()
        memory = gru_scan(gates, weights["core.weight_hh_l0"], weights["core.bias_hh_l0"])  # [T, N, B, H]
        memory = memory.transpose(0, 1).reshape(count, time * batch, -1)
        logits = linear(memory, weights["head.weight"], weights["head.bias"])
        return logits.view(count, time, batch, -1).transpose(1, 2)

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Which digits every network gets right, of the same sums: bool [N, 512, T].

        Args:
            weights: Tensors [N, ...].
        """
        rng = torch_generator("zoo", self.name, "evaluation", self.digits)
        digits, answers = sums(torch.randint(10**self.digits, (_TEST, 2), generator=rng), self.digits)
        first = weights["head.bias"]
        digits, answers = digits.to(first.device), answers.to(first.device)
        return self.forward(weights, digits.expand(len(first), -1, -1, -1)).argmax(-1) == answers
