import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION, = re.findall(r'^__version__ = "(.*)"$', Path("guided_diffusion/__init__.py").read_text(encoding="utf-8"), re.M)

PLOTS = ["matplotlib>=3.10"]
CLOUD = ["blobfile"]
S3 = ["s3fs"]
MEDICAL = ["pydicom>=3", "nibabel>=5", "highdicom", "h5py"]
MPI = ["mpi4py", "mpich"]  # mpich brings libmpi and mpiexec; leave it away where MPI is installed
# Visdom for Python 3.11 builds with old setuptools only, see constraints.txt, and serves its page with old tornado only
VISDOM = ["visdom", 'tornado<6.5; python_version < "3.12"']
TESTS = ["pytest", "pytest-xdist", "hypothesis", "ruff", "nbclient", "ipykernel", "setuptools>=70.1",
         "moto[s3]", "flask", "flask-cors"]  # a server of s3:// on this machine

setup(
    name="guided-diffusion-segmentation",
    version=VERSION,
    description="Ambiguous medical image segmentation with diffusion models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["guided_diffusion", "guided_diffusion.*"]),
    package_data={"guided_diffusion": ["py.typed"], "guided_diffusion.draw": ["report.*"],
                  "guided_diffusion.pretrained": ["*.safetensors", "*.sha256", "*.md"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.6", "numpy", "pillow>=10.1", "tqdm", "scipy", "safetensors"],
    extras_require={
        "plots": PLOTS,  # charts of training and scores, outlines from Python
        "visdom": VISDOM,  # the live view
        "cloud": CLOUD,  # results in gs:// and az://
        "s3": S3,  # data and results in s3://
        "mpi": MPI,  # processes that mpiexec starts
        "medical": MEDICAL,  # DICOM, NIfTI and HDF5 files
        # everything that installs without constraints: on Python 3.11 without Visdom
        "all": [*PLOTS, *CLOUD, *S3, *MPI, *MEDICAL, 'visdom; python_version >= "3.12"'],
        "dev": [*PLOTS, *CLOUD, *S3, *MPI, *MEDICAL, *VISDOM, *TESTS],
    },
    entry_points={"console_scripts": [f"cimd-{name} = guided_diffusion.commands.{name}:run"
                                      for name in ("train", "sample", "evaluate", "phantoms", "replay", "export",
                                                   "prepare")]},
)
