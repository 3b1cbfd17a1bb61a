"""The live view of a run on a Visdom server, and its record, visdom.log.

A run says what its windows show. A thread of its own records that, in the format of Visdom's own log, and sends it.
What waits is at most the newest state of every window, so nothing piles up: a server that is absent, slow, hung or dead
costs the run no time, and once it answers it is sent every window whole.

Pictures go to the server on this machine, or to the one that --visdom_server names, and nowhere else: neither through a
proxy that the environment names nor where a server redirects to.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from urllib.parse import quote, urlsplit

import numpy as np
from PIL import Image, ImageOps

from . import logger, storage
from .errors import InputError

# Okabe and Ito's, told apart by colour-blind readers
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442"]
BUTTONS = ["zoom", "pan", "zoomin", "zoomout", "autoscale", "resetscale", "toimage", "select", "lasso"]


class Text:
    """A window of the view that shows HTML.

    :param every: seconds between two contents that are sent; those between are left out. One in thirty is recorded.
    :param opts: Visdom's, such as width and height in pixels.
    """

    def __init__(self, title, every=0.0, **opts):
        self.title, self.every, self.opts = title, every, {"title": title, **opts}
        self.content, self.changed, self.next_time = "", True, 0.0
        self.whole, self.unrecorded, self.next_record = [], [], 0.0

    def show(self, content):
        self.content, self.changed = content, True

    def update(self, client):
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

    def __init__(self, title, names, log=False, xlabel="step", first_width=2, **opts):
        names = names if isinstance(names, dict) else {name: name for name in names}
        super().__init__(title, legend=list(names.values()), **opts)
        # the page's own title and buttons would lie over the curves
        self.opts["layoutopts"] = {"plotly": {
            "title": "", "showlegend": True, "colorway": COLOURS, "margin": {"l": 45, "r": 10, "t": 34, "b": 34},
            "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
            "xaxis": {"title": {"text": xlabel, "standoff": 5}, "automargin": True},
            "yaxis": {"type": "log" if log else "linear", "automargin": True, "exponentformat": "power"},
            "modebar": {"remove": BUTTONS, "orientation": "v", "bgcolor": "rgba(0,0,0,0)"}}}
        self.opts["traceopts"] = {"plotly": {self.opts["legend"][0]: {"line": {"width": first_width}}}}
        self.names, self.log = list(names), log
        self.points, self._taken = [], 0

    def add(self, x, values):
        """Add a point to every curve that the dict `values` has a finite value for."""
        y = [values.get(name, math.nan) for name in self.names]
        y = [value if math.isfinite(value) and (value > 0 or not self.log) else math.nan for value in y]
        if not all(map(math.isnan, y)):
            self.points.append((x, y))
            self.changed = True

    def update(self, client):
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


class Monitor:
    """Draws windows on a Visdom server and keeps them in a log.

    :param env: the Visdom environment, named after the run.
    :param windows: Text, Picture and Curves objects in the order of the page.
    :param folder: where visdom.log goes; None for none.
    :param server: address of the server, see split_address; "" for this machine's.
    :param port: its port; 0 draws nothing.
    :param start: whether to start a server on this machine if none answers.
    """

    tick = 0.2  # seconds between two looks at the windows
    patience = 10.0  # seconds until a server that does not answer is asked again

    def __init__(self, env, windows, folder=None, server="", port=8097, start=False):
        self.env, self.windows = environment_name(env), windows
        self.active = False
        if not port:
            return
        if importlib.util.find_spec("visdom") is None:
            logger.log("the package visdom is not installed; going on without")
            return
        self.active, self.address = True, split_address(server, port)
        self.url = "{}:{}{}".format(*self.address)
        self._start, self._file = start, folder and Record(folder)
        self._connected, self._missed, self._retry_at = False, False, 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self, timeout=3.0):
        """Record and send what is still to be sent, but wait no longer than `timeout` seconds for it."""
        if self.active:
            self._closed.set()
            self._thread.join(timeout)

    # ---- the thread ----

    def _run(self):
        try:
            client = visdom_client(self.env, *self.address)
        except ImportError as error:  # something that it needs
            self.active = False
            return logger.log(f"the package visdom cannot be imported ({error}); going on without")
        if self._start:
            start_server(*self.address)
        while not self._closed.wait(self.tick):
            self._look(client)
        self._look(client, last=True)

    def _look(self, client, last=False):
        """Record the windows that have changed and send them; all of them to a server that is new or was away."""
        now = time.monotonic()
        fresh = [window for window in self.windows if window.changed and (last or now >= window.next_time)]
        for window in fresh:
            window.changed, window.next_time = False, now + window.every
            window.unrecorded = window.update(client)
        for window in self.windows:
            if self._file and window.unrecorded and (last or now >= window.next_record):
                self._file.write(window.unrecorded)
                window.unrecorded, window.next_record = [], now + 30 * window.every
        if not self._connected and now < self._retry_at or not fresh and self._connected:
            return
        try:
            if self._connected and not client.has(self.windows[-1].title):  # it was started anew
                self._connected = False
            for window in fresh if self._connected else self.windows:
                for message in window.whole:
                    client.post(*message)
        except OSError as error:  # requests' errors are such
            self._retry_at = time.monotonic() + self.patience
            if self._connected or not self._missed:
                self._report(error)
            self._connected, self._missed = False, True
        else:
            if not self._connected:
                logger.log(f"watch it at {page(self.url, self.env)}" if not self._missed else
                           f"the Visdom server at {self.url} answers; the view has caught up")
            self._connected = True

    def _report(self, error):
        why = "asks for a login: set VISDOM_USERNAME and VISDOM_PASSWORD" if _status(error) == 400 else (
            "stopped answering" if self._connected else "does not answer")
        hint = "" if self._connected else "; --visdom start, or make visdom, starts one"
        logger.log(f"the Visdom server at {self.url} {why} ({type(error).__name__}); going on without it{hint}")


class Record:
    """visdom.log in a folder: a line of JSON a message, [endpoint, content], as Visdom keeps them and replays them.

    What cannot be written, or was cut off, leaves no trace.
    """

    def __init__(self, folder):
        self.path = os.path.join(folder, "visdom.log")
        storage.replace_link(self.path)
        with contextlib.suppress(OSError), open(self.path, "ab+") as file:
            file.truncate(_end_of_lines(file))

    def write(self, messages):
        data = "".join(json.dumps(message) + "\n" for message in messages).encode()
        if not data:
            return
        with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                written = file.write(data)
            except OSError:
                written = 0
            if written < len(data):
                file.truncate(start)


def _end_of_lines(file):
    """The place behind the last newline of a binary file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def recorded(path):
    """What a visdom.log shows in the end: the content of every window, as Visdom's endpoint "events" takes it.

    :raises InputError: if the file cannot be read, or holds none.
    """
    windows = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError, LookupError, TypeError):  # a line that was cut off
                    endpoint, content = json.loads(line)
                    place = content["eid"], content["win"]
                    if endpoint == "events":
                        windows[place] = content
                    elif endpoint == "update" and content["append"]:
                        for whole, new in zip(windows[place]["data"], content["data"], strict=True):
                            whole["x"] += new["x"]
                            whole["y"] += new["y"]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not windows:
        raise InputError(f"{path}: holds nothing that Visdom has shown")
    return [*windows.values()]


# ---- the server ----

def environment_name(name):
    """What Visdom calls an environment that a run would name so: some characters its pages cannot be reached under, and
    what stands before an underscore it takes for a group."""
    return re.sub(r"[^\w.]|_", "-", name) or "main"


def page(url, env):
    """Where an environment of the server at this URL is to be seen."""
    return f"{url}/env/{quote(env)}"


def split_address(server, port):
    """(scheme://host, port, path) of a server.

    :param server: http:// or https://, host, and optionally :port and /path; "" for this machine's.
    :raises InputError: if it is no such address.
    """
    if not server:
        return "http://127.0.0.1", port, ""
    try:
        parts = urlsplit(server)
        port = parts.port or port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"--visdom_server {server}: must be http:// or https:// and a host, as in"
                         f" https://visdom.example.org:8097/path")
    if parts.username or parts.password:
        raise InputError("--visdom_server: holds a name and password, which would be kept in flags.json; set"
                         " VISDOM_USERNAME and VISDOM_PASSWORD instead")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}", port, parts.path.rstrip("/")


def start_server(address, port, path="", patience=60.0):
    """Start a Visdom server on this machine that outlives this process, unless one listens already, and wait for it."""
    if _listens(port):
        return
    logger.log(f"starting a Visdom server at {address}:{port}, which stays when this has ended")
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen([sys.executable, "-m", "guided_diffusion.visdom_server", str(port)], stderr=said,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        end = time.monotonic() + patience
        while not _listens(port) and server.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        said.seek(0)
        if words := said.read().decode(errors="replace").strip():
            logger.log("the Visdom server says:", words.splitlines()[-1])


def _listens(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def visdom_client(env, address, port, path):
    """Visdom's own client, which hands over its messages instead of sending them.

    It logs in with VISDOM_USERNAME and VISDOM_PASSWORD if they are set.
    """
    import requests
    import visdom

    logging.getLogger("visdom").setLevel(logging.CRITICAL)  # what there is to say, the log says

    class Direct(requests.Session):
        """Goes to the server and nowhere else, and does not wait for ever."""

        def __init__(self):
            super().__init__()
            self.trust_env = False  # else http_proxy, ALL_PROXY and .netrc count
            self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            self.max_redirects = 0

        def request(self, *args, **kwargs):
            response = super().request(*args, **kwargs, timeout=(3, 10))
            response.raise_for_status()
            return response

    class Client(visdom.Visdom):
        direct = None  # the session, once there is one

        def messages(self, draw):
            self.made = []
            draw(self)
            return self.made

        def _send(self, msg, endpoint="events", **_):
            self.made.append([endpoint, {**msg, "eid": self.env}])

        def has(self, window):
            return self.post("win_exists", {"win": window, "eid": self.env}) == "true"

        def post(self, endpoint, content):
            url = f"{self.server}:{self.port}{self.base_url}"
            direct = self.direct or Direct()
            if self.username and not self.direct:
                direct.post(url, json={"username": self.username, "password": self.password})
            self.direct = None  # after an error it logs in anew
            text = direct.post(f"{url}/{endpoint}", data=json.dumps(content)).text
            self.direct = direct
            return text

    login = {"username": os.environ.get("VISDOM_USERNAME"), "password": os.environ.get("VISDOM_PASSWORD")}
    return Client(server=address, port=port, base_url=path or "/", env=env, offline=True, log_to_filename=os.devnull,
                  **(login if all(login.values()) else {}))


def _status(error):
    return getattr(getattr(error, "response", None), "status_code", None)
