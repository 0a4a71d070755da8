"""Principal components of keys, as in He et al. (arXiv:2109.04212)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from nearest.errors import SettingError
from nearest.index.neighbours import Metric


@dataclass(frozen=True)
class Projection:
    """An affine map, applied to keys and queries alike.

    Attributes:
        matrix: float32 [out, dim + 1]; the last column is the offset.
    """

    matrix: Float[np.ndarray, "out dim_plus_1"]

    @classmethod
    def fit(cls, rows: Float[np.ndarray, "n dim"], out: int, metric: Metric) -> "Projection":
        """The `out` directions of largest variance.

        For squared L2 the mean is subtracted: distances do not depend on it. For the inner product
        it is not, since products do.

        Raises:
            SettingError: `out` is not from 1 to dim − 1.
        """
        dim = rows.shape[1]
        if not 1 <= out < dim:
            raise SettingError(f"pca must be from 1 to {dim - 1}, the keys' dims less 1, got {out}")
        mean = rows.mean(axis=0, dtype=np.float64) if metric == "l2" else np.zeros(dim)
        centred = rows - mean
        _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
        weights = directions[:, ::-1][:, :out].T
        return cls(np.column_stack([weights, -weights @ mean]).astype(np.float32))

    @property
    def dim(self) -> int:
        """Dimension of the projected rows."""
        return len(self.matrix)

    def apply(self, rows: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n out"]:
        """Project float32 rows."""
        projected: Float[np.ndarray, "n out"] = rows @ self.matrix[:, :-1].T + self.matrix[:, -1]
        return projected

    def after(self, first: "Projection | None") -> "Projection":
        """The map that applies `first` and then this one."""
        if first is None:
            return self
        matrix = self.matrix[:, :-1] @ first.matrix
        matrix[:, -1] += self.matrix[:, -1]
        return Projection(matrix)
