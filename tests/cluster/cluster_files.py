"""The files of cluster/, and the versions that all of them have to name."""

import configparser
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
GROUPS = {"head", "cpu", "incubate", "finetune"}
RAY_UP = sorted(CLUSTER.glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("ray*.yaml"))


def of(file: Path) -> str:
    """How tests call a file."""
    return file.relative_to(CLUSTER).as_posix()


def load(file: Path) -> dict:
    """The one YAML document of a file."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{re.escape(package)}={{2,3}}(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None, f"constraints.txt does not pin {package}"
    return found[1]


def python_version() -> str:
    """The Python that constraints.txt was made with, as setup.cfg has it for mypy (3.11)."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["mypy"]["python_version"]


def ray_arguments(command: str, name: str, words: list[str]) -> dict[str, object]:
    """What a command of Ray's reads from its arguments; SystemExit or click's error if it does not know one."""
    from ray.scripts import scripts

    context = scripts.cli.commands[name].make_context(command, words, resilient_parsing=False)
    return dict(context.params)


def shim(folder: Path, name: str, body: str) -> None:
    """Put a program in the place of one that this machine lacks or that must not really start."""
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    file.chmod(0o755)
