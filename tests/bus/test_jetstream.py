"""What is said when JetStream does not answer: that it is off only where nobody listens."""

import os
import signal

import psutil
import pytest

from bus.broker import running_broker
from bus.client import connect
from bus.errors import Unavailable
from bus.jetstream import ask_jetstream
from bus.testing import until


async def test_a_broker_that_is_busy_is_not_said_to_be_without_jetstream(tmp_path):
    async with running_broker(tmp_path) as broker, connect(broker.url, name="t", root="r") as at:
        nc = at.store.galleries._nc
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            await until(lambda: psutil.Process(broker.pid).status() == psutil.STATUS_STOPPED)
            with pytest.raises(Unavailable) as caught:
                await ask_jetstream(nc, "$JS.API.INFO", b"", patience_s=0.5)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        assert caught.value.message == (
            "the broker did not store or read $JS.API.INFO within 0.5 s"
        )
