"""`python ops/gpu_check`: finds its own modules wherever it is called from."""

import sys
from pathlib import Path

_OPS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_OPS), str(_OPS / "benchmarks")]

from gpu_check.check import main  # noqa: E402

sys.exit(main())
