"""Ways out of the machine while the network is off: each is refused, and under strace no packet is addressed outside.

Nothing is sent anywhere: the addresses are reserved for documentation (RFC 5737, RFC 3849).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys

ATTEMPTS = r"""
import asyncio, importlib.util, os, socket, threading, urllib.request
from medvqa_rl.core.network import NetworkRefused, forbid_network
forbid_network()
FAR, FAR6 = "192.0.2.1", "2001:db8::1"

def refused(error):
    seen = []
    while isinstance(error, BaseException) and error not in seen:
        if isinstance(error, NetworkRefused):
            return True
        seen.append(error)
        reason = getattr(error, "reason", None)
        error = reason if isinstance(reason, BaseException) else error.__cause__ or error.__context__
    return False

def attempt(name, call):
    try:
        call()
        print(f"{name}\tdone", flush=True)
    except BaseException as error:
        print(f"{name}\t{'refused' if refused(error) else type(error).__name__}", flush=True)

def tcp(*address, family=socket.AF_INET): return lambda: socket.socket(family).connect(address)
def udp(*address): return lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", address)
def opened(url): return lambda: urllib.request.urlopen(url, timeout=2)

attempt("TCP", tcp(FAR, 80))
attempt("TCP 6", tcp(FAR6, 80, family=socket.AF_INET6))
attempt("TCP mapped", tcp("::ffff:192.0.2.1", 80, family=socket.AF_INET6))
attempt("TCP link-local", tcp("fe80::1", 80, 0, 2, family=socket.AF_INET6))
attempt("connect_ex", lambda: socket.socket().connect_ex((FAR, 80)))
attempt("_socket", lambda: importlib.import_module("_socket").socket().connect((FAR, 80)))
attempt("subclass", lambda: type("S", (socket.socket,), {})().connect((FAR, 80)))
attempt("UDP", udp(FAR, 9))
attempt("broadcast", udp("255.255.255.255", 9))
attempt("multicast", udp("224.0.0.1", 9))
attempt("sendmsg", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendmsg([b"x"], [], 0, (FAR, 9)))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).sendto(b"\x08\0\0\0\0\0\0\0", (FAR, 0)))
attempt("packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).sendto(b"\0" * 60, ("lo", 0x0800)))
attempt("name", lambda: socket.getaddrinfo("example.com", 80))
attempt("other name", lambda: socket.gethostbyname_ex("example.com"))
attempt("address to name", lambda: socket.getnameinfo((FAR, 80), 0))
attempt("decimal address", tcp("3221225985", 80))
attempt("short address", tcp("192.2", 80))
attempt("like localhost", tcp("localhost.example.com", 80))
attempt("asyncio", lambda: asyncio.run(asyncio.open_connection(FAR, 80)))
attempt("urllib", opened(f"http://{FAR}/"))
attempt("ftp", opened(f"ftp://{FAR}/x"))
attempt("smtp", lambda: importlib.import_module("smtplib").SMTP(FAR, timeout=2))
proxy = urllib.request.build_opener(urllib.request.ProxyHandler({"http": f"http://{FAR}:3128"}))
attempt("proxy", lambda: proxy.open("http://example.com/", timeout=2))
for module in ("httpx", "httpx2", "requests", "urllib3"):
    if importlib.util.find_spec(module):
        get = lambda: importlib.import_module(module).request("GET", f"http://{FAR}/", timeout=2)
        attempt(module, get)
import huggingface_hub
attempt("hub", lambda: huggingface_hub.HfApi().model_info("a/b"))
import openai
client = openai.OpenAI(base_url=f"http://{FAR}/v1", api_key="x", max_retries=0, timeout=2)
attempt("openai", lambda: client.models.list())
attempt("reloaded", lambda: (importlib.reload(socket), socket.socket().connect((FAR, 80))))
thread = threading.Thread(target=lambda: attempt("thread", tcp(FAR, 80)))
thread.start()
thread.join()
if os.fork() == 0:
    attempt("fork", tcp(FAR, 80))
    os._exit(0)
os.wait()
"""
_OFFLINE = {"hub"}
"""Refused by the library itself, in its offline mode."""
_OUTSIDE = re.compile(r'(?:inet_addr\("|inet_pton\(AF_INET6, ")([0-9a-f.:]+)"|(AF_PACKET)')


def main(options: argparse.Namespace) -> bool:
    """Try every way out; returns whether none was open."""
    out = options.out / "network"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    script, log = out / "attempts.py", out / "strace.log"
    script.write_text(ATTEMPTS)
    command = [sys.executable, str(script)]
    if has_strace := shutil.which("strace") is not None:
        command = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(log), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=out, check=False)
    lines = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    faults = [f"{name}: {how}" for name, how in lines if how != "refused" and not (name in _OFFLINE and how != "done")]
    if done.returncode or len(lines) < 30:
        faults.append(f"the attempts ended early: {done.stderr[-300:]}")
    for line in log.read_text().splitlines() if has_strace else ():
        for address, packet in _OUTSIDE.findall(line):
            if packet or not address.startswith(("127.", "::1", "0.0.0.0")):
                faults.append(f"a system call: {line[:160]}")
    for fault in faults:
        print(fault)
    print(f"{len(lines)} ways out, {len(faults)} open{'' if has_strace else ' (system calls not watched: no strace)'}")
    return not faults
