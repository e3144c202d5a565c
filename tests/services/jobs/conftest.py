"""What tests of jobs begin with."""

from pathlib import Path

import pytest

from support.job_lines import write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path)
