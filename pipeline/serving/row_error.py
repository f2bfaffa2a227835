"""The error of a row of a request."""

from features.errors import UserError
from features.printable import printable

LONGEST = 500  # characters of a reason: it may show a value


class RowError(UserError):
    """A value of a request that is refused; `str` names the row and the field.

    Attributes:
        row: its place in the request, from 0; None where it is of all rows.
        field: the column; None where it is the row itself.
        reason: what is wrong with it. where: what the rows are called.
    """

    def __init__(self, row: int | None, field: str | None, reason: str, where: str = "rows") -> None:
        self.row, self.field, self.where = row, field, where
        self.reason = printable(reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}…")
        place = where if row is None else f"{where}[{row}]"
        super().__init__(f"{place}.{printable(field[:LONGEST])}: {self.reason}" if field else f"{place}: {self.reason}")

    def at(self, row: int | None, where: str | None = None) -> "RowError":
        """The same error of another row, or of rows that are called otherwise."""
        return RowError(row, self.field, self.reason, where or self.where)
