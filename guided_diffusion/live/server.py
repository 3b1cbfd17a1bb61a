"""A Visdom server that only this machine reaches: python -m guided_diffusion.live.server [port]

Unlike `python -m visdom.server` it listens on 127.0.0.1 alone, and starts also where the network does not give what its
page needs in a browser: it then keeps what it is sent until it is started again with a network.
"""

import argparse
import logging
import socket
import sys
from pathlib import Path

from ..system import packages
from ..system.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int, nargs="?", default=8097)
    port = parser.parse_args().port
    try:
        visdom = packages.require("visdom", "the live view")
    except InputError as error:
        sys.exit(str(error))
    from visdom.server.build import download_scripts
    from visdom.server.defaults import DEFAULT_ENV_PATH
    from visdom.server.run_server import start_server

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            sys.exit(f"port {port}: {error.strerror}; another Visdom server may run there")
    socket.setdefaulttimeout(10)
    logging.disable()  # a line a file; what matters is said below
    try:
        download_scripts()
    except Exception as error:  # whatever the network, the disk or urllib think of
        if not Path(visdom.__file__).with_name("static").joinpath("js", "plotly-plotly.min.js").exists():
            print(f"the page's scripts could not be fetched ({type(error).__name__}), so that it stays empty; start the"
                  f" server once with a network, then they are kept", file=sys.stderr)
    logging.disable(logging.NOTSET)
    socket.setdefaulttimeout(None)
    start_server(port=port, hostname="127.0.0.1", base_url="", env_path=DEFAULT_ENV_PATH, bind_local=True)


if __name__ == "__main__":
    main()
