"""The example is a client in full: it runs as it stands, with zmq and msgpack alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from pipemax.client import Submit
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.messages.ingest import Refused
from support.fake_coordinator import FakeCoordinator, finished

EXAMPLE = Path(__file__).parents[2] / "ops" / "examples" / "minimal_client.py"


def test_the_example_gets_its_results(runtime_dir: Path) -> None:
    def answer(submit: Submit) -> Any:
        if submit.prompt is None:
            return Refused(request_id=submit.request_id, code="vocabulary", message="not for us")
        return finished(submit)

    with FakeCoordinator(runtime_dir / "ingest.sock", answer) as fake:
        shown = subprocess.run(
            [sys.executable, "-I", str(EXAMPLE), fake.endpoint],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert [submit.request_id for submit in fake.submitted] == ["text", "ids"]
    assert "connected to fake" in shown.stdout
    assert "text finished WATER HAS NO PLAN." in shown.stdout
    assert "ids refused not for us" in shown.stdout
    assert shown.stderr == ""


def test_it_is_small_and_speaks_todays_protocol() -> None:
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 40
    assert f"protocol={PROTOCOL_VERSION}," in source
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import sys", "import msgpack", "import zmq"]
