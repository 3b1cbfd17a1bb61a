"""Show again on Visdom what a run has shown: send the visdom.log of its results folder to a server.

    python scripts/visdom_replay.py --results_dir ./results --visdom start
"""

import os

from .. import logger
from ..live.client import page, split_address, start_server, visdom_client
from ..live.monitor import recorded
from ..system import packages
from ..system.errors import InputError
from ..system.terminal import progress
from .cli import parse_flags, results_folder, run_script


def main() -> None:
    args, _ = parse_flags("replay", __doc__)
    if not args.visdom_port:
        raise InputError("--visdom_port 0: nothing can be sent there; give the port of a server")
    windows = recorded(os.path.join(results_folder(args), "visdom.log"))
    address = split_address(args.visdom_server, args.visdom_port)
    url = "{}:{}{}".format(*address)
    packages.require("visdom", "the live view")
    if args.visdom == "start":
        start_server(*address)
    client = visdom_client("main", *address)
    for content in progress(windows, "sending", unit="window"):
        try:
            client.post("events", content)
        except OSError as error:
            raise InputError(f"no Visdom server answers at {url} ({type(error).__name__}); give --visdom start"
                             f" to start one") from None
    for env in sorted({content["eid"] for content in windows}):
        logger.log("watch it at", page(url, env))


def run() -> None:
    run_script(main)
