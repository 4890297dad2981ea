"""A linear program put together from blocks of columns and rows, as arrays; no loop touches a single coefficient."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array

from solver.control import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive columns or rows."""

    start: int
    size: int

    @property
    def index(self) -> IntArray:
        """Their positions."""
        return np.arange(self.start, self.start + self.size, dtype=np.int64)

    @property
    def slice(self) -> slice:
        """Their place in an array over all columns or rows."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True, slots=True, eq=False)
class LinearProgram:
    """Minimise cost over columns within bounds, rows within limits; integrality 1 marks whole-number columns."""

    cost: FloatArray
    upper: FloatArray
    lower: FloatArray
    integrality: FloatArray
    matrix: csc_array
    row_lower: FloatArray
    row_upper: FloatArray
    row_names: tuple[tuple[str, Block], ...]

    def row_name(self, row: int) -> tuple[str, int]:
        """The name of a row's block, and its place in the block."""
        name, block = next((n, b) for n, b in self.row_names if b.start <= row < b.start + b.size)
        return name, row - block.start


@dataclass(slots=True, eq=False)
class ProgramBuilder:
    """Collects columns, rows and coefficients; ``build`` makes the program."""

    _cost: list[FloatArray] = field(default_factory=list)
    _lower: list[FloatArray] = field(default_factory=list)
    _upper: list[FloatArray] = field(default_factory=list)
    _integrality: list[FloatArray] = field(default_factory=list)
    _row_lower: list[FloatArray] = field(default_factory=list)
    _row_upper: list[FloatArray] = field(default_factory=list)
    _names: list[tuple[str, Block]] = field(default_factory=list)
    _at_row: list[IntArray] = field(default_factory=list)
    _at_column: list[IntArray] = field(default_factory=list)
    _values: list[FloatArray] = field(default_factory=list)
    _columns: int = 0
    _rows: int = 0

    def columns(
        self,
        size: int,
        cost: npt.ArrayLike = 0.0,
        lower: npt.ArrayLike = 0.0,
        upper: npt.ArrayLike = np.inf,
        whole: bool = False,
    ) -> Block:
        """Add ``size`` columns."""
        block = Block(self._columns, size)
        self._columns += size
        for target, values in ((self._cost, cost), (self._lower, lower), (self._upper, upper)):
            target.append(np.broadcast_to(np.asarray(values, dtype=np.float64), (size,)))
        self._integrality.append(np.full(size, float(whole)))
        return block

    def rows(self, name: str, size: int, lower: npt.ArrayLike = -np.inf, upper: npt.ArrayLike = np.inf) -> Block:
        """Add ``size`` rows that hold the sum of their coefficients x columns between the limits."""
        block = Block(self._rows, size)
        self._rows += size
        self._row_lower.append(np.broadcast_to(np.asarray(lower, dtype=np.float64), (size,)))
        self._row_upper.append(np.broadcast_to(np.asarray(upper, dtype=np.float64), (size,)))
        self._names.append((name, block))
        return block

    def put(self, rows: IntArray, columns: IntArray, values: npt.ArrayLike) -> None:
        """Add coefficients; those at one place add up."""
        self._at_row.append(rows)
        self._at_column.append(columns)
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float64), rows.shape))

    def cost_of(self, block: Block) -> FloatArray:
        """Costs of columns added before."""
        return np.concatenate(self._cost)[block.slice]

    def build(self) -> LinearProgram:
        """The program of all that was added."""
        places = (np.concatenate(self._at_row), np.concatenate(self._at_column))
        matrix = csc_array((np.concatenate(self._values), places), shape=(self._rows, self._columns))
        matrix.eliminate_zeros()
        return LinearProgram(
            cost=np.concatenate(self._cost),
            upper=np.concatenate(self._upper),
            lower=np.concatenate(self._lower),
            integrality=np.concatenate(self._integrality),
            matrix=matrix,
            row_lower=np.concatenate(self._row_lower),
            row_upper=np.concatenate(self._row_upper),
            row_names=tuple(self._names),
        )
