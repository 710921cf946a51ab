"""Packaging: maps the repository's folders to import names (see CONTRIBUTING.md, "Where things live").

The folders are named for people, the imports for Python: ``kernels/`` installs as ``distill.kernels`` and
``launch/`` as ``ncclx_py.launch``, because bare top-level packages called ``kernels`` or ``launch`` collide
with packages that transformers and ROS import.
"""

from setuptools import setup

PACKAGE_FOLDERS = {
    "ncclx_py": "ncclx_py",
    "ncclx_py.bench": "ncclx_py/bench",
    "ncclx_py.commands": "ncclx_py/commands",
    "ncclx_py.doctor": "ncclx_py/doctor",
    "ncclx_py.elastic": "ncclx_py/elastic",
    "ncclx_py.faults": "ncclx_py/faults",
    "ncclx_py.plans": "ncclx_py/plans",
    "ncclx_py.plans.algorithms": "ncclx_py/plans/algorithms",
    "ncclx_py.runtime": "ncclx_py/runtime",
    "ncclx_py.simulate": "ncclx_py/simulate",
    "ncclx_py.transport": "ncclx_py/transport",
    "ncclx_py.watch": "ncclx_py/watch",
    "ncclx_py.launch": "launch",
    "distill": "distill",
    "distill.bench": "distill/bench",
    "distill.compare": "distill/compare",
    "distill.config": "distill/config",
    "distill.data": "distill/data",
    "distill.methods": "distill/methods",
    "distill.peers": "distill/peers",
    "distill.replicas": "distill/replicas",
    "distill.rollouts": "distill/rollouts",
    "distill.rollouts.vllm": "distill/rollouts/vllm",
    "distill.teachers": "distill/teachers",
    "distill.teachers.cache": "distill/teachers/cache",
    "distill.teachers.separate": "distill/teachers/separate",
    "distill.teachers.server": "distill/teachers/server",
    "distill.vocabulary": "distill/vocabulary",
    "distill.kernels": "kernels",
    "distill.conf": "conf",
}

CORE = [
    "torch>=2.11",
    "numpy>=1.26",
    "deepspeed>=0.18",
    "transformers>=5.17",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "peft>=0.18",
    "hydra-core>=1.3.2",
    "triton>=3.6; platform_system == 'Linux'",
    "math-verify[antlr4_9_3]>=0.8",
    "rich>=13",
    "tensorboard>=2.17",
    "matplotlib>=3.9",
]

setup(
    name="ncclx-py",
    version="0.1.0",
    description="Topology-aware collectives for PyTorch, and a distillation trainer for reasoning LLMs on top of them",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(PACKAGE_FOLDERS),
    package_dir=PACKAGE_FOLDERS,
    package_data={
        "distill.conf": ["*.yaml", "*/*.yaml"],
        "ncclx_py": ["py.typed"],
        "ncclx_py.bench": ["mpi_peer.c"],
        "ncclx_py.launch": ["recipes/*.sh", "templates/*.sbatch"],
        "distill": ["py.typed"],
    },
    install_requires=CORE,
    extras_require={
        "tasks": ["reasoning-gym>=0.1.20"],
        "wandb": ["wandb"],
        "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.12", "mypy>=1.17", "types-PyYAML"],
    },
    entry_points={
        "console_scripts": ["ncclx = ncclx_py.cli:main", "distill = distill.cli:main"],
    },
)
