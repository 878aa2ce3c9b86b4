"""The equivariant map term by term, as in the paper: slow, and simple enough to be believed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.linear import UNFLinear
from fleetgym.merging.functionals.partitions import Term


class TermByTerm(nn.Module):
    """What :class:`UNFLinear` computes, one basis map after the other (arXiv 2402.05232, Algorithm 1).

    Each map takes a diagonal, averages, multiplies by its own matrix, writes into zeros where output indices are equal
    and broadcasts. It shares no code with the grouped layer; tests compare the two, and speed is measured against it.

    Args:
        layer: Whose terms and weights to take (copies).
        folded: Whether the folded entries of two parts (gates, fixed axes) are one matrix; without it each pair of
            entries is a term with a matrix ``[c_in, c_out]`` of its own, as where the gates of a GRU are tensors.
    """

    def __init__(self, layer: UNFLinear, folded: bool = True) -> None:
        super().__init__()
        self.layout, self.plan, self.folded = layer.layout, layer.plan, folded
        self.c_in, self.c_out = layer.c_in, layer.c_out
        self.weights = nn.ParameterList()
        self.rows: list[tuple[Term, int, int]] = []  # the term, the entry of the output, that of the input
        parts = self.layout.parts
        for n, term in enumerate(self.plan.terms):
            matrix = layer.coefficient(n).detach()
            if folded:
                self.weights.append(nn.Parameter(matrix.clone()))
                self.rows.append((term, 0, 0))
                continue
            blocks = matrix.view(parts[term.input].fold, self.c_in, parts[term.output].fold, self.c_out)
            for o in range(parts[term.output].fold):
                for i in range(parts[term.input].fold):
                    self.weights.append(nn.Parameter(blocks[i, :, o].clone()))
                    self.rows.append((term, o, i))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: WeightBatch) -> WeightBatch:
        """Applies the map, [B, P, c_in] -> [B, P, c_out]."""
        parts, batch = self.layout.parts, x.batch
        steps = [1 if self.folded else part.fold for part in parts]  # how many tensors a part is
        inputs: list[list[Tensor]] = []
        outputs: list[list[Tensor]] = []
        biases = None if self.bias is None else self.bias.split([part.fold * self.c_out for part in parts])
        for n, (part, step) in enumerate(zip(parts, steps)):
            sizes = [atom.size for atom in self.plan.atoms[n]]
            width = part.fold // step
            view = x.view(part).reshape(batch, *sizes, step, width * self.c_in)
            inputs.append(list(view.unbind(-2)))
            zeros = x.data.new_zeros(batch, *sizes, step, width * self.c_out)
            if biases is not None:
                zeros = zeros + biases[n].view(step, -1)
            outputs.append(list(zeros.unbind(-2)))
        for (term, o, i), weight in zip(self.rows, self.weights):
            split = len(self.plan.atoms[term.output])
            sizes = [atom.size for atom in self.plan.atoms[term.output]]
            value = _basis(inputs[term.input][i], term.partition[:split], term.partition[split:], sizes, weight)
            outputs[term.output][o] = outputs[term.output][o] + value
        data = [
            torch.stack(found, dim=-2).reshape(batch, part.length, self.c_out) for part, found in zip(parts, outputs)
        ]
        return x.replace(torch.cat(data, dim=1))


def _basis(x: Tensor, out: Sequence[int], source: Sequence[int], sizes: Sequence[int], weight: Tensor) -> Tensor:
    """One basis map: diagonal, mean, matrix, zeros off the diagonal; a tensor that broadcasts over the output.

    Args:
        x: Input tensor, [B, *sizes of its indices, K].
        out: The block of each output index.
        source: The block of each input index.
        sizes: Size of each output index.
        weight: [K, N].
    """
    letters = {block: chr(ord("a") + n) for n, block in enumerate(dict.fromkeys([*out, *source]))}
    carried = [block for block in dict.fromkeys(out) if block in source]
    reduced = [block for block in dict.fromkeys(source) if block not in out]
    count = 1
    for block in reduced:
        count *= x.shape[1 + list(source).index(block)]
    arms = "".join(letters[block] for block in source)
    kept = "".join(letters[block] for block in carried)
    value = torch.einsum(f"Z{arms}Y->Z{kept}Y", x) / count @ weight  # repeated letters are a diagonal
    # One axis for each block of the output, of length 1 where nothing is carried.
    blocks = list(dict.fromkeys(out))
    length = {block: size for block, size in zip(out, sizes)}
    shape = [length[block] if block in carried else 1 for block in blocks]
    value = value.reshape(len(x), *shape, -1)
    if len(blocks) == len(out):
        return value
    value = value.expand(len(x), *(length[block] for block in blocks), -1)
    zeros = value.new_zeros(len(x), *sizes, value.shape[-1])
    grid = torch.meshgrid(*(torch.arange(length[block], device=x.device) for block in blocks), indexing="ij")
    place = tuple(grid[blocks.index(block)] for block in out)
    zeros[(slice(None), *place)] = value
    return zeros
