"""aiohttp that reads the body and answers a constant: what no gateway on it can exceed."""

import asyncio

import uvloop
from aiohttp import web

from tests.bench.peers.sessions import HOST, port

_ANSWER = b'{"outputs":[{"name":"output","shape":[1,4],"datatype":"FP32","data":[0,0,0,0]}]}'


async def _answer(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(body=_ANSWER, content_type="application/json")


async def _serve() -> None:
    app = web.Application(client_max_size=64 * 1024**2)
    app.router.add_post("/v2/models/{model}/infer", _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port()).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve())
