"""Scripts of `ops/` import each other by their names alone."""

import sys

from support.source_tree import ROOT

for _folder in ("ops", "ops/benchmarks", "ops/grafana"):
    if str(ROOT / _folder) not in sys.path:
        sys.path.append(str(ROOT / _folder))
