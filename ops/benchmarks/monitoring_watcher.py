"""The process that watches for `monitoring_cost.py`, while `on` is what it was told last.

    python ops/benchmarks/monitoring_watcher.py SYSTEM scrape|status|page|trace...

Says `ready`, repeats each word once it is done, and at the end of its input prints how many looks
of each kind it took per second of being on.
"""

import json
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence

from pipemax.client import Client
from pipemax.proto.rundir import METRICS_PORT_FILE, run_dir_of
from pipemax.services.trace.collect import collect
from pipemax.services.where import Where

EVERY_S = {"scrape": 5.0, "status": 1.0, "page": 0.5}
RECORDING = ("page", "trace")
"""For these the stages record spans."""
FIRST_S = 0.5
"""From being switched on to the first look of each kind: with windows of seconds, looks are more
frequent than `EVERY_S` says."""
_TRACE_S = 2.0


class Looks:
    """What is done to look once."""

    def __init__(self, system: str) -> None:
        self._system = system
        port = (run_dir_of(system) / METRICS_PORT_FILE).read_text().strip()
        self._url = f"http://127.0.0.1:{port}"
        self._client = Client(system)
        self._last = 0

    def close(self) -> None:
        self._client.close()

    def scrape(self) -> None:
        self._get("metrics")

    def status(self) -> None:
        self._client.status()

    def page(self) -> None:
        self._last = json.loads(self._get(f"live.json?after={self._last}"))["last"] or self._last

    def trace(self, stop: threading.Event) -> int:
        """Until `stop`; returns how many reports came."""
        num_stages, reports = len(self._client.status().stages), 0
        while not stop.is_set():
            for _ in collect(Where(self._system), num_stages, _TRACE_S):
                reports += 1
                if stop.is_set():
                    break
        return reports

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self._url}/{path}", timeout=30) as answer:
            return bytes(answer.read())


class Watch:
    """Looks of several kinds at once, each at its own pace."""

    def __init__(self, system: str, what: Sequence[str]) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(what, 0))
        self.watched_s = 0.0
        # One each: a client is one thread's.
        self._looks = {name: Looks(system) for name in what}
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._began_s = 0.0

    def on(self) -> None:
        self._stop.clear()
        self._began_s = time.perf_counter()
        self._threads = [
            threading.Thread(target=self._run, args=(name, looks))
            for name, looks in self._looks.items()
        ]
        for thread in self._threads:
            thread.start()

    def off(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.watched_s += time.perf_counter() - self._began_s

    def close(self) -> None:
        for looks in self._looks.values():
            looks.close()

    def _run(self, name: str, looks: Looks) -> None:
        if name == "trace":
            self.counts[name] += looks.trace(self._stop)
            return
        look: Callable[[], None] = getattr(looks, name)
        pause_s = FIRST_S
        while not self._stop.wait(pause_s):
            look()
            self.counts[name] += 1
            pause_s = EVERY_S[name]


def main() -> None:
    system, *what = sys.argv[1:]
    watch = Watch(system, what)
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        watch.on() if word == "on" else watch.off()
        print(word, flush=True)
    watch.close()
    rates = {name: count / max(watch.watched_s, 1e-9) for name, count in watch.counts.items()}
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
