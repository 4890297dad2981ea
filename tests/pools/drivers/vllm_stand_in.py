"""Stands in for the ``vllm`` command where no vLLM is installed: the same command line, endpoints and signals.

What it does not have is an engine. ``FAIL_START=1`` in its environment makes it die as vLLM does where memory is short;
a request whose prompt is ``slow`` lasts half a second; a model path with ``-refusing-`` answers with 400; after a
request whose prompt is ``hang`` none is ever answered.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(BaseHTTPRequestHandler):
    load = 0
    asleep = False
    hangs = False
    lock = threading.Lock()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/v1/completions":
            self.complete(json.loads(body))
        elif os.environ.get("VLLM_SERVER_DEV_MODE") == "1" and self.path in ("/sleep?level=1", "/wake_up"):
            Server.asleep = self.path.startswith("/sleep")
            self.answer({})
        else:
            self.answer({}, 404)

    def do_GET(self):
        answers = {"/load": {"server_load": Server.load}, "/is_sleeping": {"is_sleeping": Server.asleep}}
        self.answer(answers.get(self.path, {"environment": dict(os.environ)}))

    def complete(self, body):
        with Server.lock:
            Server.load += 1
        if body["prompt"] == "slow":
            time.sleep(0.5)
        Server.hangs = Server.hangs or body["prompt"] == "hang"
        if Server.hangs or Server.asleep:
            time.sleep(600)
        refused = "-refusing-" in " ".join(sys.argv)
        self.answer({"usage": {"completion_tokens": body["max_tokens"]}}, 400 if refused else 200)
        with Server.lock:
            Server.load -= 1

    def answer(self, body, status=200):
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


def main():
    words = sys.argv[1:]
    options = dict(itertools.pairwise(words))
    print("loading", words[1], flush=True)
    if os.environ.get("FAIL_START"):
        print("ValueError: free memory on device is less than desired\nclosing", flush=True)
        sys.exit(1)
    subprocess.Popen(["sleep", "600"])  # its engine process
    signal.signal(signal.SIGTERM, lambda *_: None)  # drains: goes on until it is killed
    ThreadingHTTPServer((options["--host"], int(options["--port"])), Server).serve_forever()


main()
