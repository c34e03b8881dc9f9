"""`m2mkd doctor`: what this machine, or a cluster, can do, and what is missing."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from m2mkd_ray.commands.output import print_json
from m2mkd_ray.commands.run import Address
from m2mkd_ray.commands.session import AsJson, StoreRoot, session
from m2mkd_ray.errors import M2mkdError

PYTHON = (3, 11)
IN_PROCESS = ("torch", "torchvision", "timm", "ray", "pyarrow", "safetensors", "matplotlib")
NEEDED_GB = {"memory": 4.0, "/dev/shm": 1.0, "disk": 5.0}
"""What the demo is comfortable with."""
_DEEPSPEED_TIMEOUT_S = 120


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's."""

    what: str
    level: Literal["OK", "WARN", "FAIL"]
    found: str
    todo: str = ""
    """What to do about it; empty if it is well."""


def doctor(
    context: typer.Context,
    store: StoreRoot = "runs",
    data_root: Annotated[str, typer.Option("--data-root", help="Folder with imported data sets.")] = "data",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine (and a cluster, with --address): a line each, with what to do."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _deepspeed,
        _compiler,
        _machine,
        lambda: _disk(store),
        _gpus,
        lambda: _store(context, store),
        lambda: _data(data_root),
    ]
    if address is not None:
        checks.append(lambda: _cluster(address))
    findings = []
    for check in checks:
        for finding in check():
            findings.append(finding)
            if not as_json:
                typer.echo(_line(finding))
    is_well = all(finding.level != "FAIL" for finding in findings)
    if as_json:
        print_json({"ok": is_well, "findings": [asdict(finding) for finding in findings]})
    if not is_well:
        raise typer.Exit(1)


def _line(finding: Finding) -> str:
    todo = f"\n      {finding.todo}" if finding.todo else ""
    return f"{finding.level:<4}  {finding.what}: {finding.found}{todo}"


def _python() -> Iterator[Finding]:
    is_new = sys.version_info >= PYTHON
    wanted = ".".join(map(str, PYTHON))
    yield Finding(
        "python", "OK" if is_new else "FAIL", platform.python_version(), "" if is_new else f"Install {wanted}."
    )


def _packages() -> Iterator[Finding]:
    for name in IN_PROCESS:
        try:
            importlib.import_module(name)
            yield Finding(name, "OK", importlib.metadata.version(name))
        except (ImportError, OSError, RuntimeError) as error:  # a package of another build raises any of these
            yield Finding(name, "FAIL", f"{type(error).__name__}: {error}", "Install the tested set: make install.")


def _deepspeed() -> Iterator[Finding]:
    # In a process of its own: it prints, looks for a compiler, and takes seconds.
    done = subprocess.run(
        [sys.executable, "-c", "import deepspeed"],
        capture_output=True,
        text=True,
        timeout=_DEEPSPEED_TIMEOUT_S,
        check=False,
    )
    if done.returncode == 0:
        yield Finding("deepspeed", "OK", importlib.metadata.version("deepspeed"))
        return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    todo = "Install the tested set: make install. Without it: --set placement.finetune.engine=torch."
    yield Finding("deepspeed", "FAIL", last, todo)


def _compiler() -> Iterator[Finding]:
    for tool in ("g++", "ninja"):
        path = shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
        todo = f"Nothing here needs {tool}. DeepSpeed does if it is made to compile ops of its own, on GPUs."
        yield Finding(tool, "OK" if path else "WARN", path or "not found", "" if path else todo)


def _machine() -> Iterator[Finding]:
    from m2mkd_ray.preflight import available_cpus

    cpus = available_cpus()
    few = "" if cpus >= 2 else "The demo fine-tunes on two ranks: --set placement.finetune.num_workers=1."
    yield Finding("CPU cores", "WARN" if few else "OK", str(cpus), few)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield _size("memory", memory, "Use smaller batches (micro_batch), or another machine.")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total / 1e9
        yield _size("/dev/shm", shared, "Ray keeps objects there; in Docker: --shm-size=2g.")


def _disk(root: str) -> Iterator[Finding]:
    if "://" in root:
        return
    folder = Path(root).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    yield _size("disk", shutil.disk_usage(there).free / 1e9, "Free some, or choose another --store.")


def _size(what: str, gigabytes: float, todo: str) -> Finding:
    is_enough = gigabytes >= NEEDED_GB[what]
    return Finding(what, "OK" if is_enough else "WARN", f"{gigabytes:.1f} GB", "" if is_enough else todo)


def _gpus() -> Iterator[Finding]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Finding("GPUs", "OK", ", ".join(names) or "none: all recipes run on the CPU, the large ones for very long")


def _store(context: typer.Context, root: str) -> Iterator[Finding]:
    try:
        store = session(context).open_store(root)
        is_new = "://" not in root and not Path(root).exists()
        store.probe()
        if is_new and not any(Path(root).iterdir()):
            Path(root).rmdir()
        yield Finding("store", "OK", f"{store.root} can be written")
    except M2mkdError as error:
        yield Finding("store", "FAIL", str(error), "Choose another folder with --store.")


def _data(data_root: str) -> Iterator[Finding]:
    from m2mkd_ray.data import DATASETS, find
    from m2mkd_ray.errors import DataError

    there = []
    for name in DATASETS:
        try:
            find(name, data_root)
            there.append(name)
        except DataError:
            continue  # most are not imported, and need not be
    todo = "" if there else "Not even the one that ships is there: install the package again."
    yield Finding("data sets", "OK" if there else "FAIL", ", ".join(there) or "none", todo)


def _cluster(address: str) -> Iterator[Finding]:
    from m2mkd_ray.execution.ray_launcher import RayLauncher

    todo = "Start a head node (`ray start --head`), or look at the address and the firewall."
    try:
        launcher = RayLauncher(address)
    except M2mkdError as error:
        yield Finding("cluster", "FAIL", str(error), todo)
        return
    try:
        for node in launcher.nodes():
            amounts = ", ".join(f"{node.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
            yield Finding(f"node {node.name}", "OK", amounts)
    finally:
        launcher.close()
