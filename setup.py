from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="guided-diffusion-segmentation",
    version="0.1.0",
    description="Ambiguous medical image segmentation with diffusion models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["guided_diffusion", "guided_diffusion.*"]),
    package_data={"guided_diffusion.draw": ["report.*"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.6", "numpy", "scipy", "pillow>=10.1", "matplotlib>=3.10", "tqdm", "blobfile", "visdom"],
    extras_require={
        "mpi": ["mpi4py", "mpich"],  # mpich brings libmpi and mpiexec; leave it away where MPI is installed
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "nbclient", "ipykernel"],
    },
)
