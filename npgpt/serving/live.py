"""Serves the report of a run while it goes on. The page is made from the log when a browser asks for it.

Needs the extras [serve] and [plot].
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from npgpt.report.page import content_security_policy
from npgpt.report.run_page import LIVE_SCRIPTS, report_page
from npgpt.report.runs import Run
from npgpt.serving.protection import LOCAL_HOSTS, App, Protection
from npgpt.storage.checkpoint import Checkpoint
from npgpt.storage.run import read_log

# Making a page takes time from the run. So the next page waits 15 times as long as that took, but 10 seconds at most.
REST, LONGEST_REST = 15, 10.0
RECENTLY = 5.0  # seconds; a browser that asked within them still looks at the page
SECONDS_TO_SHOW_THE_END = 4.0


class LiveReport:
    """The report of a run, for as long as it goes on. Only this computer can ask for it."""

    def __init__(self, name: str, checkpoint: Checkpoint, log: Path) -> None:
        """checkpoint: says what is trained. log: the run's log, which begins with this run."""
        self._name, self._checkpoint, self._log = name, checkpoint, log
        self._making = threading.Lock()
        self._version, self._page, self._has_ended = "", "", False
        self._not_before = 0.0  # when the next page may be made
        self._is_over = False
        self._last_asked = -RECENTLY
        self._end_was_sent = threading.Event()
        starlette = Starlette(routes=[Route("/", self._whole), Route("/report", self._news)])
        self.app: App = Protection(starlette, LOCAL_HOSTS, None, lambda _: None)

    def stop(self) -> None:
        """There is nothing to end: every request is answered at once."""

    def finish(self) -> None:
        """After the run: if a browser is watching, wait a few seconds until it has the last report."""
        self._is_over = True
        if time.monotonic() - self._last_asked < RECENTLY:
            self._end_was_sent.wait(SECONDS_TO_SHOW_THE_END)

    async def _whole(self, _: Request) -> Response:
        return await self._answer("")

    async def _news(self, request: Request) -> Response:
        return await self._answer(request.query_params.get("since", ""))

    async def _answer(self, since: str) -> Response:
        self._last_asked = time.monotonic()
        version, page, has_ended = await asyncio.to_thread(self._newest)
        if version == since:
            return Response(status_code=204)
        if has_ended:
            self._end_was_sent.set()
        headers = {"X-Report-Version": version, "X-Run-Ended": "1" if has_ended else ""}
        headers["Content-Security-Policy"] = content_security_policy(LIVE_SCRIPTS, connects=True)
        return HTMLResponse(page, headers=headers)

    def _newest(self) -> tuple[str, str, bool]:
        """(version, page, whether the run has ended). The page is made again if the log has grown, but not too often."""
        with self._making:
            size = self._log.stat().st_size if self._log.exists() else 0
            started = time.monotonic()
            if not self._page or (str(size) != self._version and (self._is_over or started >= self._not_before)):
                run = Run(self._name, self._checkpoint, read_log(self._log))
                likeness = "Copied spans are not marked during the run. `npgpt report` marks them afterwards."
                page = report_page([run], [likeness], run.time_left)
                self._page, self._version, self._has_ended = page, str(size), run.end is not None
                self._not_before = time.monotonic() + min(LONGEST_REST, REST * (time.monotonic() - started))
            return self._version, self._page, self._has_ended
