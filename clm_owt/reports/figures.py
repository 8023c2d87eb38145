"""Writing matplotlib's figures to files."""

from pathlib import Path
from typing import TYPE_CHECKING

from clm_owt.files import replacing

if TYPE_CHECKING:  # matplotlib takes a second to import; it is imported where it draws
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: Path, dpi: int = 180) -> None:
    """To a PNG or SVG file, by its name, which is replaced in one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=dpi, format=path.suffix.removeprefix("."))
