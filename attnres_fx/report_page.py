"""What a report shows, said once: printed as text, in a notebook as HTML, in a `repr` as one line."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from attnres_fx.shown import table

_STYLE = (
    ".attnres{background:#fff;color:#111;font:12px/1.35 system-ui,sans-serif;padding:8px;overflow-x:auto}"
    ".attnres table{border-collapse:collapse;color:#111}"
    ".attnres th,.attnres td{padding:1px 6px;text-align:left;border:0;background:none}"
    ".attnres th{font-weight:600;border-bottom:1px solid #999}"
    ".attnres td.n,.attnres th.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".attnres p{margin:4px 0}"
)


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
        before, after = ("".join(f"<p>{escape(line)}</p>" for line in part if line) for part in (self.head, self.lines))
        return f'<div class="attnres"><style>{_STYLE}</style>{before}{self._html_table()}{after}</div>'

    def _html_table(self) -> str:
        if not self.rows:
            return ""
        numbers = {h: all(isinstance(r[h], int | float) for r in self.rows) or h in self.right for h in self.rows[0]}
        kinds = {h: ' class="n"' if right else "" for h, right in numbers.items()}
        head = "".join(f"<th{kind}>{escape(h)}</th>" for h, kind in kinds.items())
        body = "".join(
            f"<tr>{''.join(f'<td{kinds[h]}>{escape(str(cell))}</td>' for h, cell in row.items())}</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Shown:
    """A report: `print` it for all, look at it in a notebook; its `repr` is one line."""

    def _page(self) -> ReportPage:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._page().text()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._page().head[0]}; print it to see all>"

    def _repr_html_(self) -> str:
        return self._page().html()
