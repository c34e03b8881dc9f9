"""Every benchmark is a program that says what it measures; each can be imported with the package as it is now."""

import importlib
import pkgutil
import sys

import pytest

import benchmarks

PROGRAMS = [found.name for found in pkgutil.iter_modules(benchmarks.__path__) if not found.name.startswith("_")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_says_what_it_measures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0
    assert "--json FILE" in capsys.readouterr().out
