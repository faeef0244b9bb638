from __future__ import annotations
import asyncio, os, re
from collections.abc import Mapping
class Relay:
    def __init__(self, environ): self.environ=dict(environ); self.conns=[]
    @classmethod
    async def start(cls, environ: Mapping[str,str]) -> "Relay":
        self=cls(environ)
        srv=await asyncio.start_server(self._accept,"127.0.0.1",0)
        self.server=srv
        port=srv.sockets[0].getsockname()[1]
        for k,v in environ.items():
            if k.startswith("PMIX_SERVER_URI"):
                m=re.search(r"tcp4://([0-9.]+):(\d+)",v)
                self.target=(m[1],int(m[2]))
                self.environ[k]=v[:m.start()]+f"tcp4://127.0.0.1:{port}"+v[m.end():]
        return self
    async def _accept(self,r,w):
        r2,w2=await asyncio.open_connection(*self.target)
        self.conns.append(w2)
        asyncio.ensure_future(self._up(r,w2))
        asyncio.ensure_future(self._down(r2,w))
    async def _up(self,r,w2):
        buf=b""
        started=False
        try:
            while d:=await r.read(65536):
                w2.write(d)
        except OSError: pass
    async def _down(self,r2,w):
        try:
            while d:=await r2.read(65536): w.write(d)
        except OSError: pass
    async def close(self): pass
