import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_check_costs_at_most_15_percent_of_pruning_once_with_torch_pruning() -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_structure", ROOT / "benchmarks" / "structure.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, benchmark)
        spec.loader.exec_module(benchmark)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timings = benchmark.measure(rounds=3)

    assert timings.ratio <= benchmark.LIMIT == 0.15
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in timings.rounds.values())
    assert f"{timings.median(benchmark.PRUNE):.3f}s" in timings.table()


@pytest.mark.slow
def test_the_reach_table_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_reach", ROOT / "benchmarks" / "reach.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = benchmark.document()

    assert text == benchmark.DOCUMENT.read_text(encoding="utf-8")


def test_a_stale_reach_table_is_refused_with_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_reach", ROOT / "benchmarks" / "reach.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "DOCUMENT", tmp_path / "reach.md")
    monkeypatch.setattr(benchmark, "SECTIONS", {"Written by hand": ["plain U-Net"]})

    assert benchmark.main([]) == 0
    assert benchmark.main(["--check"]) == 0
    written = benchmark.DOCUMENT.read_text(encoding="utf-8")
    benchmark.DOCUMENT.write_text(written.replace("| 320 |", "| 319 |"), encoding="utf-8")
    assert benchmark.main(["--check"]) == 1
    assert "-| plain U-Net | 13 | 319 |" in capsys.readouterr().out
