"""Nothing here ends, or joins, a Ray that it has not started: others may have one on the same machine."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENDS_ANY = re.compile(
    r"""\bray["']\s*,\s*["']stop["']"""  # as a list of words
    r"""|^\s*(exec )?ray stop\b"""  # in a shell
    r"""|\b(pkill|killall) """
    r"""|(?<!`)AutoscalingCluster\("""  # Ray's own, which calls `ray stop --force`
    r"""|\bray\.init\(\s*\)"""  # joins whatever is there
)


@pytest.mark.parametrize("folder", ["m2mkd_ray", "tests", "benchmarks", "cluster/slurm", "Makefile", ".ci"])
def test_no_other_ray_of_the_machine_is_ended_or_joined(folder: str) -> None:
    place = ROOT / folder
    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    texts = [file for file in files if file.suffix in ("", ".py", ".sh", ".sbatch") and file != Path(__file__)]
    assert texts
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in texts
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if ENDS_ANY.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'run(["ray", "stop"])',
        "  ray stop --force",
        "pkill -f raylet",
        "ray.init()",
        "cluster = AutoscalingCluster(head)",
    ],
)
def test_what_would_do_so_is_seen(line: str) -> None:
    assert ENDS_ANY.search(line)
