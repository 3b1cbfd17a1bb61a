"""Windows of Visdom's page: what they show, as messages to its server."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..draw.style import CURVES

BUTTONS = ["zoom", "pan", "zoomin", "zoomout", "autoscale", "resetscale", "toimage", "select", "lasso"]


class Text:
    """A window of the view that shows HTML.

    :param every: seconds between two contents that are sent; those between are left out. One in thirty is recorded.
    :param opts: Visdom's, such as width and height in pixels.
    """

    def __init__(self, title: str, every: float = 0.0, **opts: Any):
        self.title, self.every, self.opts = title, every, {"title": title, **opts}
        self.content, self.changed, self.next_time = "", True, 0.0
        self.whole, self.unrecorded, self.next_record = [], [], 0.0

    def show(self, content: str | Callable[[], Image.Image]) -> None:
        self.content, self.changed = content, True

    def update(self, client: Any) -> list[list]:
        """Take over what has changed: Visdom's messages for it; those that make the whole window stay in `whole`."""
        self.whole = client.messages(self._draw)
        return self.whole

    def _draw(self, client):
        client.text(self.content, win=self.title, opts=dict(self.opts))


class Picture(Text):
    """A window that shows a picture, which show() is given as a function that makes it: a PIL picture. It is called on
    the thread of the view, when its turn comes.

    :param width, height: of the window, which shows pictures of up to (width - 10) x (height - 2) pixels as they are,
        larger ones smaller; height + 24 is a multiple of 15, the page's grid.
    """

    def _draw(self, client):
        if not self.content:  # as yet; this keeps its place
            return super()._draw(client)
        picture = self.content()
        # the page scales a picture to its window, whose lowest 17 rows are out of sight, without smoothing
        page = Image.new("RGB", (self.opts["width"] - 10, self.opts["height"] + 15), "white")
        page.paste(ImageOps.contain(picture, (page.width, page.height - 17), Image.Resampling.LANCZOS)
                   if picture.width > page.width or picture.height > page.height - 17 else picture)
        client.image(np.asarray(page).transpose(2, 0, 1), win=self.title, opts=dict(self.opts))


class Curves(Text):
    """A window of curves over steps.

    :param names: of the curves, the keys of their values; names of their own for the legend may be a dict's values.
    :param log: whether the axis of values is logarithmic; values that are not above 0 are then left out.
    :param first_width: of the first curve in pixels.

    The log gets every point, the page about `most` of them.
    """

    most = 1000

    def __init__(self, title: str, names: Iterable[str] | dict[str, str], log: bool = False, xlabel: str = "step",
                 first_width: int = 2, **opts: Any):
        names = names if isinstance(names, dict) else {name: name for name in names}
        super().__init__(title, legend=list(names.values()), **opts)
        # the page's own title and buttons would lie over the curves
        self.opts["layoutopts"] = {"plotly": {
            "title": "", "showlegend": True, "colorway": CURVES, "margin": {"l": 45, "r": 10, "t": 34, "b": 34},
            "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
            "xaxis": {"title": {"text": xlabel, "standoff": 5}, "automargin": True},
            "yaxis": {"type": "log" if log else "linear", "automargin": True, "exponentformat": "power"},
            "modebar": {"remove": BUTTONS, "orientation": "v", "bgcolor": "rgba(0,0,0,0)"}}}
        self.opts["traceopts"] = {"plotly": {self.opts["legend"][0]: {"line": {"width": first_width}}}}
        self.names, self.log = list(names), log
        self.points, self._taken = [], 0

    def add(self, x: float, values: Mapping[str, float]) -> None:
        """Add a point to every curve that the dict `values` has a finite value for."""
        y = [values.get(name, math.nan) for name in self.names]
        y = [value if math.isfinite(value) and (value > 0 or not self.log) else math.nan for value in y]
        if not all(map(math.isnan, y)):
            self.points.append((x, y))
            self.changed = True

    def update(self, client: Any) -> list[list]:
        start, self._taken = self._taken, len(self.points)
        if not self._taken:
            return super().update(client)
        points = self.points[:self._taken]
        stride = -(-len(points) // self.most)
        self.whole = client.messages(lambda client: self._line(client, points[::-1][::stride][::-1]))
        return client.messages(lambda client: self._line(client, points[start:], "append")) if start else self.whole

    def _line(self, client, points, update=None):
        x, y = (np.array(column, float) for column in zip(*points))
        opts = {"legend": self.opts["legend"]} if update else {
            **self.opts, "markers": len(points) <= 50, "markersize": 4, "markerborderwidth": 0}  # one point is no line
        client.line(y, x, win=self.title, update=update, opts=opts)
