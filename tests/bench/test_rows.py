"""What the benchmarks in C++ print: the same head and rows as `csfast bench`, checked as there."""

import json
import pathlib
import shutil
import subprocess

import pytest

from csfast.bench import head, timed

ROOT = pathlib.Path(__file__).parents[2]
COMPILER = shutil.which("g++")
# One row at the speed of reading and one above it, both of the first case.
PROGRAM = r"""
#include "rows.h"

int main(int argc, char** argv) {
  using namespace csfast::bench;
  const Row fair = {.of = kCpuCases[0],
                    .variant = "execute",
                    .timing = {2e-6, 1e-6, 4e-6},
                    .bytes = 2000,
                    .workspace_bytes = 64,
                    .dense = 8e-6,
                    .read_bandwidth = 1e9,
                    .executes = true};
  Row fast = fair;
  fast.variant = "select";
  fast.bytes = 2080;
  fast.executes = false;
  print_json({.command = command_of(argc, argv),
              .commit = "",
              .machine = {{"device", "\"cpu\""}, {"cpu", quoted("a \"quoted\" name")}},
              .versions = {}},
             1e9, {fair, fast});
  return too_fast({fair, fast});
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.cc").write_text(PROGRAM)
    includes = [f"-I{ROOT / 'bench'}", f"-I{ROOT / 'cpp' / 'include'}"]
    build = [COMPILER, "-std=c++20", *includes, "-o", folder / "rows", folder / "rows.cc"]
    subprocess.run(build, check=True)
    return subprocess.run([folder / "rows", "--json"], capture_output=True, text=True)


pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def test_the_head_is_that_of_all_results(printed):
    found = json.loads(printed.stdout)
    assert head.faults(found) == []
    assert list(found) == [*head.KEYS, "read_bandwidth", "rows"]
    assert found["command"] == ["rows", "--json"] and found["commit"] is None
    assert found["machine"]["cpu"] == 'a "quoted" name'


def test_rows_have_the_keys_and_figures_of_csfast_bench(printed):
    recorded = json.loads((ROOT / "bench/results/h200/layers.json").read_text(encoding="utf-8"))
    rows = json.loads(printed.stdout)["rows"]
    assert [list(row) for row in rows] == [list(recorded["rows"][0])] * 2
    case = timed.CASES["cpu"][0]
    assert rows[0] == {
        "case": case.name,
        "variant": "execute",
        "density": case.density,
        "batch": 1,
        "median_us": 2.0,
        "p10_us": 1.0,
        "p90_us": 4.0,
        "bytes": 2000,
        "fraction_of_read_bandwidth": 1.0,
        "workspace_bytes": 64,
        "baselines": {"csfast all neurons": 8.0},
        "ratio_vs_best": 4.0,
        "ratio_vs_dense": 4.0,
        "sigma": case.density * 4,
    }
    assert rows[1]["sigma"] is None


def test_a_row_that_reads_faster_than_reading_is_named_and_counted(printed):
    assert printed.returncode == 1
    assert printed.stderr == (
        f"[bench] {timed.CASES['cpu'][0].name} select: 1.040 of what reading alone reaches: "
        "want at most 1.\n"
    )
