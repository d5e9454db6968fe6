"""The dense vectors of a step's texts, as leaves of autograd: their scores at all widths of Matryoshka.

`StepVectors`, `StepWeights` and `StepTokens` have the same methods, by which a loss compares queries with documents
whatever represents them.
"""

import torch
from torch import Tensor

EPSILON = 1e-12  # vectors shorter than this count as this long, as in torch.nn.functional.normalize
Places = Tensor | slice
ALL = slice(None)


class StepVectors:
    """vectors: float32 [texts, dim]. widths: ascending; vectors are cut into pieces between them, so that one product
    serves all widths. normalize: cosines, else products."""

    def __init__(self, vectors: Tensor, widths: tuple[int, ...], normalize: bool):
        starts = (0, *widths[:-1])
        self.shape, self.normalize, self.widest = vectors.shape, normalize, widths[-1]
        self.pieces = [
            vectors[:, start:end].detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            for start, end in zip(starts, widths, strict=True)
        ]
        with torch.no_grad():
            squares = torch.stack([piece.square().sum(dim=1) for piece in self.pieces]).cumsum(dim=0)
            lengths = squares.sqrt() if normalize else torch.ones_like(squares)
        # 1 / length at [width, vector], leaves too: their own gradient is taken once, not once a block
        self.scales = [scale.requires_grad_() for scale in lengths.clamp(min=EPSILON).reciprocal().unbind()]

    def __len__(self) -> int:
        return self.shape[0]

    def row_elements(self, others: "StepVectors", own: int) -> int:
        """Values that a record of a block adds to its largest matrix. own: number of documents of a record."""
        return max(len(self), len(others), own * self.shape[1]) * len(self.pieces)

    def at(self, places: Tensor, width: int) -> Tensor:
        """The vectors at these places, at one width and normalized: [places, width]."""
        parts = torch.cat([piece[places] for piece in self.pieces[: width + 1]], dim=-1)
        return parts * self.scales[width][places].unsqueeze(-1)

    def against(self, places: Places, others: "StepVectors", other_places: Places = ALL) -> list[Tensor]:
        """Scores of the texts at places [n] with those of others at other_places [m]: [n, m] for each width."""
        product, scores = 0.0, []
        for piece, other, scale, other_scale in zip(
            self.pieces, others.pieces, self.scales, others.scales, strict=True
        ):
            product = product + piece[places] @ other[other_places].T
            scores.append(product * scale[places].unsqueeze(1) * other_scale[other_places])
        return scores

    def with_own(self, places: Tensor, others: "StepVectors", other_places: Tensor) -> list[Tensor]:
        """Scores of the texts at places [n] with those of theirs at other_places [n, k]: [n, k] for each width."""
        product, scores = 0.0, []
        for piece, other, scale, other_scale in zip(
            self.pieces, others.pieces, self.scales, others.scales, strict=True
        ):
            product = product + torch.einsum("nd,nkd->nk", piece[places], other[other_places])
            scores.append(product * scale[places].unsqueeze(1) * other_scale[other_places])
        return scores

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Of all that was back-propagated, at the vectors as they were given: float32 [texts, dim]."""
        # the gradient of 1 / |x| is -x / |x|^3
        of_lengths = [
            torch.zeros_like(scale) if scale.grad is None else -scale.grad * scale**3 for scale in self.scales
        ]
        gradient = torch.zeros(self.shape, dtype=self.pieces[0].dtype, device=self.pieces[0].device)
        parts = gradient.split([*(piece.shape[1] for piece in self.pieces), self.shape[1] - self.widest], dim=1)
        for place, (part, piece) in enumerate(zip(parts, self.pieces, strict=False)):
            if piece.grad is not None:
                part += piece.grad
            if self.normalize:
                part += piece * sum(of_lengths[place:]).unsqueeze(1)
        return gradient
