"""Pictures and plain tables of report.html: inside the page, in both colour schemes, and scrolling where they are wide."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import BinaryIO

from qwha_cli.report import plots
from qwha_cli.report.layers import Records
from qwha_cli.report.markup import Safe, element
from qwha_cli.report.plots import Theme
from qwha_cli.report.table import number

# The largest size that pictures are shown in; the page's column is as wide as the pictures of a model with 30 blocks.
PIXELS_PER_INCH = 110
# Heat maps from here on keep a width at which their cells can be read, and scroll on a phone.
MANY_BLOCKS = 12


def scrolling(inside: Safe, label: str) -> Safe:
    """Wrap something wide so that it scrolls by itself on a narrow screen, by keyboard too."""
    return element("div", inside, class_="scroll", tabindex="0", role="region", aria_label=label)


def picture(draw: Callable[[BinaryIO, Theme], None], text: str) -> Safe:
    """Draw a picture in both themes and return it as one element that follows the reader's colour scheme."""
    files: dict[Theme, bytes] = {}
    for theme in ("light", "dark"):
        stream = io.BytesIO()
        draw(stream, theme)
        files[theme] = stream.getvalue()
    uris = {theme: "data:image/png;base64," + base64.b64encode(content).decode() for theme, content in files.items()}
    dark = element("source", srcset=uris["dark"], media="(prefers-color-scheme: dark)")
    # a small model's map is a small picture: blown up to the page's width its labels would shout
    width = int.from_bytes(files["light"][16:20], "big") * PIXELS_PER_INCH // plots.DPI
    return element("picture", dark, element("img", src=uris["light"], alt=text, style=f"max-width:{width}px"))


def figure(inside: Safe, caption: str, *, wide: bool = False) -> Safe:
    """Return a picture with its caption."""
    attributes = {"class_": "wide"} if wide else {}
    return element("figure", scrolling(inside, caption), element("figcaption", caption), **attributes)


def heat_map(records: Records, key: str, caption: str, limits: tuple[float, float] | None) -> Safe:
    """Return the heat map of one number of every layer; equal limits make two maps comparable."""
    drawn = picture(lambda out, theme: plots.layer_heatmap(records, key, out, limits=limits, theme=theme), caption)
    return figure(drawn, caption, wide=any((number(r.get("block")) or 0) >= MANY_BLOCKS for r in records))


def plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, chosen: int | None = None) -> Safe:
    """Return a table of texts whose first column names the rows.

    Args:
        titles: Of the columns.
        rows: Cells, as many as titles.
        chosen: Index of a row to set off.
    """
    body = [
        element(
            "tr",
            element("th", first, scope="row"),
            *(element("td", cell) for cell in rest),
            **({"class_": "chosen"} if place == chosen else {}),
        )
        for place, (first, *rest) in enumerate(rows)
    ]
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    return element("table", element("thead", head), element("tbody", *body))
