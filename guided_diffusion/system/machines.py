"""What the recipes of scripts/launch ask before they start anything: are the machines there?

    python -m guided_diffusion.system.machines hosts node1,node2        # or a file with a name a line; prints them
    python -m guided_diffusion.system.machines meeting node1:29500 600  # waits so many seconds until it can be reached
"""

import os
import re
import socket
import sys
import time

from .errors import InputError
from .launchers import interfaces

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def hosts_of(text: str) -> list[str]:
    """Names of machines, out of a list with commas or a file with one a line, where # begins a comment.

    :raises InputError: for what is no name, a name that does not resolve here, or one that is there twice.
    """
    if os.path.isfile(text):
        with open(text, encoding="utf-8", errors="replace") as file:
            lines = enumerate((line.partition("#")[0].strip() for line in file), 1)
            entries = [(f"{text}, line {number}", name) for number, name in lines if name]
    else:
        entries = [("HOSTS", name.strip()) for name in text.split(",")]
    names = []
    for where, name in entries:
        if not _NAME.fullmatch(name):
            raise InputError(f"{where}: {name!r} is no name of a machine; give node1,node2, or a file with a name a"
                             f" line")
        addresses_of(name, where)
        if name in names:
            raise InputError(f"{where}: {name} is there twice; name each machine once")
        names.append(name)
    if not names:
        raise InputError(f"{text}: names no machine; give a name a line")
    return names


def addresses_of(name: str, where: str) -> set[str]:
    """The addresses of a machine.

    :param where: the name comes from, for the message.
    :raises InputError: if it does not resolve here.
    """
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError) as error:
        raise InputError(f"{where}: {name} does not resolve on {socket.gethostname()}"
                         f" ({getattr(error, 'strerror', None) or error}); mend the name, or give an IP address"
                         ) from None


def wait_for_meeting(endpoint: str, seconds: float) -> None:
    """Wait until something listens at HOST:PORT; not at all on the machine itself, whose launcher will listen there.

    :raises InputError: if that is no such text, the host does not resolve, or nothing listens in time.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"RENDEZVOUS {endpoint}: is not HOST:PORT; give one of the machines, and a free port of it")
    own = {*interfaces().values(), "::1"}
    if any(address in own or address.startswith("127.") for address in addresses_of(host, "RENDEZVOUS")):
        return
    end, reason = time.monotonic() + seconds, "no answer"
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise InputError(f"RENDEZVOUS {endpoint}: could not be reached from {socket.gethostname()} within"
                             f" {seconds:g} seconds ({reason}); start the recipe on {host}, too, and let the port"
                             f" through between the machines")
        time.sleep(1)


def main() -> None:
    what, text, *seconds = sys.argv[1:]
    try:
        if what == "hosts":
            print(",".join(hosts_of(text)))
        else:
            wait_for_meeting(text, float(*seconds))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
