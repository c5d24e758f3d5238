"""What a report shows, said once: printed as text, in a notebook as HTML, in a `repr` as one line."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from attnres_fx.html_parts import html_table, page, paragraph
from attnres_fx.shown import table


@dataclass(frozen=True)
class ReportPage:
    """Lines, a table, and lines again.

    Attributes:
        head: Before the table; the first says what the report is about.
        rows: Of the table, by the headers of the columns.
        lines: Behind the table; an empty one is a gap.
        wrapped: The columns whose cells go on in the next line.
        right: The columns that stand at the right.
    """

    head: Sequence[str]
    rows: Sequence[Mapping[str, object]] = ()
    lines: Sequence[str] = ()
    wrapped: Collection[str] = ()
    right: Collection[str] = ()

    def text(self) -> str:
        """For a screen."""
        shown = ["", table(self.rows, wrapped=self.wrapped, right=self.right)] if self.rows else []
        return "\n".join([*self.head, *shown, *self.lines])

    def html(self) -> str:
        """For a notebook, light or dark."""
        numbers = [h for h in (self.rows[0] if self.rows else ()) if self._is_number(h)]
        table_of_all = html_table([{h: str(cell) for h, cell in row.items()} for row in self.rows], numbers=numbers)
        before, after = (map(paragraph, filter(None, lines)) for lines in (self.head, self.lines))
        return page(*before, table_of_all, *after)

    def _is_number(self, header: str) -> bool:
        return header in self.right or all(isinstance(row[header], int | float) for row in self.rows)


class Shown(ABC):
    """A report: `print` it for all, look at it in a notebook; its `repr` is one line."""

    @abstractmethod
    def _page(self) -> ReportPage: ...

    def __str__(self) -> str:
        return self._page().text()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._page().head[0]}; print it to see all>"

    def _repr_html_(self) -> str:
        return self._page().html()
