"""The Visdom view of a run: loss curves, and the images of the latest batch with the prediction.

Everything is sent from a thread of its own, through a short queue: a server that is absent, slow or dies costs the
run one line in the log and no time. Pictures go to the server on this machine and nowhere else: neither through a proxy
that the environment names nor where a server redirects to.
"""

import logging
import queue
import socket
import threading

from . import logger


class Monitor:
    """Draws on a Visdom server on localhost.

    :param port: its port; 0 draws nothing.
    :param env: the Visdom environment, named after the run.
    """

    def __init__(self, port, env="main"):
        self._queue = None
        if not port:
            return
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            import visdom
        except OSError:
            logger.log(f"no Visdom server on port {port}; going on without (start one: python -m visdom.server)")
            return
        except ImportError:
            logger.log("the package visdom is not installed; going on without")
            return
        self._queue = queue.Queue(maxsize=16)
        threading.Thread(target=self._send, args=(visdom, port, env), daemon=True).start()

    @property
    def active(self):
        return self._queue is not None

    def curves(self, step, values):
        """Add one point to the curve of each name in `values`."""
        for name, value in values.items():
            self._put("line", Y=[value], X=[step], win=f"curve {name}", update="append",
                      opts={"title": name, "xlabel": "step"})

    def pictures(self, name, pictures, caption=""):
        """Show a row of pictures, [N, 1 or 3, H, W] in [0, 1], in the window called `name`."""
        if self.active:
            pictures = pictures.detach().float().clamp(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
            self._put("images", tensor=(pictures * 255).cpu().numpy(), nrow=len(pictures), win=name,
                      opts={"title": name, "caption": caption})

    def close(self, timeout=5):
        """Wait for what is still to be sent, but no longer than `timeout` seconds."""
        if self.active:
            thread_done = threading.Event()
            self._put("close", done=thread_done)
            thread_done.wait(timeout)

    def _put(self, method, **kwargs):
        jobs = self._queue  # the sending thread may give up at any moment
        if jobs is not None:
            try:
                jobs.put_nowait((method, kwargs))
            except queue.Full:
                pass  # the server is slow: a picture less

    def _send(self, visdom, port, env):
        jobs = self._queue
        logging.getLogger("visdom").setLevel(logging.CRITICAL)  # what there is to say, the log says below
        try:
            server = _client(visdom, port, env)
            while True:
                method, kwargs = jobs.get()
                if method == "close":
                    kwargs["done"].set()
                    return
                getattr(server, method)(**kwargs)
        except Exception as error:  # visdom, requests and tornado each raise their own
            logger.log(f"the Visdom server on port {port} stopped answering ({type(error).__name__});"
                       f" going on without")
            self._queue = None


def _client(visdom, port, env):
    """A visdom.Visdom that speaks to 127.0.0.1 alone, from the request of its constructor on."""
    import requests

    direct = requests.Session()
    direct.trust_env = False  # else http_proxy, ALL_PROXY and .netrc count
    direct.max_redirects = 0  # else a redirect takes the pictures along

    class Client(visdom.Visdom):
        session = direct

    return Client(server="http://127.0.0.1", port=port, env=env, use_incoming_socket=False, raise_exceptions=True)
