"""The files that Visdom's page needs and its package lacks, from where Visdom would get them or from npm's registry."""

import fcntl
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

REGISTRY = "https://registry.npmjs.org"
PATIENCE = 40  # seconds for either source, about
DOWNLOAD = """
import sys
from visdom.server.build import download_scripts
download_scripts(install_dir=sys.argv[1])
"""

# package and version -> file in it -> file in visdom/static
FILES = {
    "jquery-3.1.1": {"dist/jquery.min.js": "js/jquery.min.js"},
    "bootstrap-3.3.7": {
        "dist/js/bootstrap.min.js": "js/bootstrap.min.js",
        "dist/css/bootstrap.min.css": "css/bootstrap.min.css",
        "dist/fonts/glyphicons-halflings-regular.woff2": "fonts/glyphicons-halflings-regular.woff2"},
    "react-16.2.0": {"umd/react.production.min.js": "js/react-react.min.js"},
    "react-dom-16.2.0": {"umd/react-dom.production.min.js": "js/react-dom.min.js"},
    "plotly.js-dist-min-2.11.1": {"plotly.min.js": "js/plotly-plotly.min.js"},
    "d3-3.5.17": {"d3.min.js": "js/d3.v3.min.js"},
    "d3-selection-multi-1.0.1": {"build/d3-selection-multi.js": "js/d3-selection-multi.v1.js"},
    "save-svg-as-png-1.4.17": {"lib/saveSvgAsPng.js": "js/saveSvgAsPng.js"},
    "layout-bin-packer-1.4.0": {"dist/layout-bin-packer.js": "js/layout_bin_packer.js"},
    "react-resizable-1.4.6": {"css/styles.css": "css/react-resizable-styles.css"},
    "react-grid-layout-0.16.3": {"css/styles.css": "css/react-grid-layout-styles.css"},
}


def provide(static):
    """Put what is missing into visdom/static; returns why that cannot be done, or an empty string.

    Processes that do this at once wait for each other, and no file is ever there in part.
    """
    reasons = []
    with open(static / "index.html") as page:
        fcntl.flock(page, fcntl.LOCK_EX)
        text = page.read()
        for fetch in (from_visdoms_sources, from_npm):
            if not missing(static, text):
                return ""
            try:
                with tempfile.TemporaryDirectory(dir=static.parent) as folder:
                    fetch(Path(folder))
                    move(Path(folder, "static"), static)
            except (OSError, EOFError, tarfile.TarError, subprocess.SubprocessError) as error:
                reasons.append(f"{type(error).__name__}: {error}")
        lacking = missing(static, text)
    return f"Visdom's page lacks {', '.join(lacking)} ({'; '.join(reasons)})" if lacking else ""


def missing(static, page):
    """The files that index.html names and that are not there; without MathJax the page works, too."""
    names = re.findall(r"""static_url\(["']((?:js|css)/[^"']+)["']\)""", page)
    return [name for name in names if "mathjax" not in name and not (static / name).is_file()]


def from_visdoms_sources(folder):
    # in a process that can be ended: it sets no limit to how long a server may take
    subprocess.run([sys.executable, "-c", DOWNLOAD, folder], timeout=PATIENCE, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def from_npm(folder):
    deadline = time.monotonic() + PATIENCE
    for package, files in FILES.items():
        name = package.rpartition("-")[0]
        with urllib.request.urlopen(f"{REGISTRY}/{name}/-/{package}.tgz", timeout=PATIENCE / 4) as answer:
            archive = tarfile.open(fileobj=io.BytesIO(answer.read()))
        for source, target in files.items():
            file = folder / "static" / target
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.extractfile(f"package/{source}").read())
        if time.monotonic() > deadline:
            raise TimeoutError(f"{REGISTRY} is too slow")


def move(source, target):
    for file in filter(Path.is_file, source.rglob("*")):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
