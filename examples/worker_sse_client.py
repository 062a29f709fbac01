#!/usr/bin/env python3
"""A complete Taskwire worker in Python's standard library: the reference for other languages.

    worker_sse_client.py --codebases my-project,api --capabilities build,test
    worker_sse_client.py --exec ./run-task      # gets the task's JSON on stdin, prints the result

Tasks are executed inside the read loop: one thread, no queue. That is correct because the server
bounds what it announces to a worker that is not reading, so nothing fills up meanwhile, and an
announcement that has become stale costs one 409. Two things cannot wait for the loop, so a small
thread does them while a task runs: it extends the lease, which otherwise lives only as long as a
stream that may break unnoticed, and it learns that the task was cancelled or taken away.
"""
import argparse, contextlib, functools, hashlib, http.client, itertools, json, logging, os, random
import re, shlex, signal, socket, subprocess, sys, tempfile, threading, time, urllib.parse, uuid

CALL_SECONDS_MAX = 30
WAIT_SECONDS_MAX = 60
HEALTHY_SECONDS_MIN = 5  # a stream that lived this long was no failure: the backoff starts anew
RESULT_BYTES_MAX = 256 * 1024  # the server refuses more
ERROR_CHARS_MAX = 2000
NETWORK_ERRORS = (OSError, http.client.HTTPException)
quote = functools.partial(urllib.parse.quote, safe="")
log = logging.getLogger("worker")

class Failed(Exception):
    """Failed(message, retry): the task failed; `retry` if another attempt may end differently."""

class Interrupted(Exception):
    """A handler gave up half way, because it was asked to."""

class Unavailable(OSError):
    """The server's answer is "later"; `seconds` is how much later at least."""
    seconds = 0

class Claim:
    """A task that is ours, and the thread that keeps it so until it is `over` or `unwanted`."""
    def __init__(self, worker, task):
        self.worker, self.task, self.over, self.unwanted = worker, task, threading.Event(), False
        threading.Thread(target=self.keep, daemon=True).start()

    def keep(self):
        lease_seconds = self.task["lease_expires_in"]
        while not self.over.wait(lease_seconds / 3) and not self.unwanted:
            with contextlib.suppress(*NETWORK_ERRORS):  # the lease leaves time for two more tries
                status, answer = self.call("heartbeat")
                self.unwanted = status == 409 or answer.get("cancel_requested", False)
                lease_seconds = answer.get("lease_expires_in", lease_seconds)

    def call(self, verb, **fields):
        # The epoch is a fence: once the claim is over, a late call gets 409 and changes nothing. So
        # any of these may be repeated, and an outcome is, for as long as it takes.
        fields.update(worker_id=self.worker.id, claim_epoch=self.task["claim_epoch"])
        path, once = f"/v1/tasks/{quote(self.task['id'])}/{verb}", verb in ("heartbeat", "release")
        return self.worker.call(path, fields, lambda: once)

class Worker:
    def __init__(self, options, handler):
        server = urllib.parse.urlsplit(options.server)
        kind = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
        self.connect = functools.partial(kind, server.hostname, server.port, timeout=CALL_SECONDS_MAX)
        self.options, self.handler, self.prefix = options, handler, server.path.rstrip("/")
        # The random part tells a restarted container (same host name, same pid) from its last life.
        self.id = options.worker_id or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.retry_seconds, self.last_event_id = 0, ""
        # Plain values, for the signal handler: a lock might be held by the very code it interrupts.
        self.stopping, self.stream_socket = False, None

    def on_signal(self, number, _frame):
        if self.stopping:
            sys.exit(128 + number)  # the second signal: at once
        self.stopping = True
        if self.stream_socket:
            with contextlib.suppress(OSError):
                self.stream_socket.shutdown(socket.SHUT_RDWR)  # ends a read that waits

    def run(self):
        farewell = f"/v1/agent/workers/{quote(self.id)}/unregister"
        with contextlib.suppress(*NETWORK_ERRORS):  # they get here only when we are to stop
            if self.options.worker_id:  # our stream would keep alive what a crashed namesake held
                self.call(farewell, {})
            self.call("/v1/agent/workers/register", {
                "worker_id": self.id, "name": self.options.name, "hostname": socket.gethostname(),
                "codebases": self.options.codebases, "capabilities": self.options.capabilities})
            self.follow_streams()
        with contextlib.suppress(*NETWORK_ERRORS):
            self.call(farewell, {})
        log.info("stopped")

    def follow_streams(self):
        failures = 0
        while not self.stopping:
            opened = time.monotonic()
            try:
                self.follow_stream()
            except NETWORK_ERRORS as error:
                failures = 0 if time.monotonic() - opened >= HEALTHY_SECONDS_MIN else failures + 1
                # `retry:` is the least to wait: with it the server spreads its workers' return.
                wait = max(getattr(error, "seconds", 0), self.retry_seconds, backoff(failures))
                if not self.stopping:
                    log.info("%r; connecting in %.1f s", error, wait)
                    pause(wait, lambda: self.stopping)

    def follow_stream(self):
        """Opens one stream and works through it until it breaks."""
        path = f"{self.prefix}/v1/worker/tasks/stream?worker_id={quote(self.id)}"
        headers = {"Accept": "text/event-stream", "X-Codebases": ",".join(self.options.codebases),
                   "X-Capabilities": ",".join(self.options.capabilities)}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        with contextlib.closing(self.connect()) as connection:
            connection.connect()
            self.stream_socket = connection.sock  # http.client forgets it after handing it over
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    sys.exit(f"no stream: {parse(response)[1]['detail']}")
                for name, data in self.events(lambda: b"" if self.stopping else response.readline()):
                    log.debug("event %s %s", name, data)
                    if name == "connected":
                        log.info("connected as %s", self.id)
                        # Silence for longer than two keepalives is a connection that broke unnoticed.
                        self.stream_socket.settimeout(json.loads(data).get("keepalive_seconds", 30) * 2 + 5)
                    elif name == "task_available":
                        self.take(json.loads(data)["task_id"])
                    elif name == "error":
                        error = json.loads(data)
                        if error.get("reconnect") is False:
                            sys.exit(f"the server ended the stream: {error['message']}")
                        raise Unavailable(error["message"])
                    # The rest needs nothing: `task` repeats what was just announced (the claim's
                    # answer is the whole task), and of `task_cancelled` a heartbeat has told in time.
        raise Unavailable("the stream ended")

    def events(self, readline):
        """Parses text/event-stream (WHATWG HTML, 9.2) with LF or CR LF into names and data."""
        name, data = "", []
        for raw in iter(readline, b""):
            line = raw.decode(errors="replace").rstrip("\r\n")
            field, value = re.match("([^:]*):? ?(.*)", line).groups()  # a comment's field is ""
            if not line:  # an empty line ends the event; one without data is none
                if data:
                    yield name or "message", "\n".join(data)
                name, data = "", []
            elif field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif field == "id":
                self.last_event_id = value
            elif field == "retry" and value.isdecimal():
                self.retry_seconds = min(int(value) / 1000, WAIT_SECONDS_MAX)

    def take(self, task_id):
        """Claims a task and, if it becomes ours, executes it and reports."""
        # Under one claim_id a claim may be repeated, and must be until it is answered: it may have
        # been made, and our open stream would then keep alive a task that nobody works on.
        body = {"worker_id": self.id, "claim_id": str(uuid.uuid4())}
        status, task = self.call(f"/v1/tasks/{quote(task_id)}/claim", body)
        if status != 200:  # most often 409: somebody was faster
            return log.debug("task %s is not for us: %s", task_id, task["detail"])
        log.info("task %s: %s", task_id, task["title"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        claim = Claim(self, task)
        verb, fields = self.execute(claim)
        status, answer = claim.call(verb, **fields)
        if verb == "complete" and status >= 400 and status not in (404, 409):
            verb, error = "fail", f"the server refused the result: {answer['detail']}"
            status, answer = claim.call(verb, error=error, retry=False)
        claim.over.set()
        signal.setitimer(signal.ITIMER_REAL, self.options.once_idle)
        log.info("task %s: %s %s", task_id, verb, "done" if status < 400 else answer["detail"])

    def execute(self, claim):
        """Runs the handler; returns the call that reports the outcome, and the call's fields."""
        try:
            result = self.handler(claim.task, lambda: claim.unwanted or self.stopping)
            if len(json.dumps(result, ensure_ascii=False)) > RESULT_BYTES_MAX:
                raise Failed(f"the result is larger than {RESULT_BYTES_MAX} bytes", False)
            return "complete", {"result": result}
        except Interrupted:  # unfinished; if the task is no longer ours, the 409 does no harm
            return "release", {}
        except Exception as error:  # a bug in a handler costs its task, not the worker
            message, retry = error.args if isinstance(error, Failed) else (repr(error), True)
            return "fail", {"error": message.replace("\0", "")[:ERROR_CHARS_MAX], "retry": retry}

    def call(self, path, body, give_up=None):
        """POSTs until there is an answer, or reason to give up; returns (status, JSON object)."""
        give_up, headers = give_up or (lambda: self.stopping), {"Content-Type": "application/json"}
        for attempt in itertools.count(1):
            try:
                with contextlib.closing(self.connect()) as connection:
                    connection.request("POST", self.prefix + path, json.dumps(body), headers)
                    status, answer = parse(connection.getresponse())
                if status >= 400 and status not in (403, 404, 409) and "result" not in body:
                    sys.exit(f"refused: {answer['detail']}")  # it will not get better by itself
                return status, answer
            except NETWORK_ERRORS as error:
                log.warning("%s: %r", path, error)
                if not give_up():
                    pause(max(getattr(error, "seconds", 0), backoff(attempt)), give_up)
                if give_up():
                    raise

def parse(response):
    """Its status and its JSON object, which for an error has a `detail`, whoever made it."""
    status, text, answer = response.status, response.read(), None
    with contextlib.suppress(ValueError):  # a proxy's page, say
        answer = json.loads(text or "{}")
    if status >= 400:
        answer = {"detail": f"{status} {response.reason}", **(answer or {})}
    if answer is None or status >= 500 or status in (408, 429):
        error, seconds = Unavailable(answer and answer["detail"]), response.getheader("Retry-After", "")
        error.seconds = int(seconds) if seconds.isdecimal() else 0
        raise error
    return status, answer

def backoff(failures):
    """Exponential with full jitter: workers that failed together do not return together."""
    return random.uniform(0, min(2 ** failures, WAIT_SECONDS_MAX))

def pause(seconds, until):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        time.sleep(0.05)

# A handler turns a task into a result, any JSON. One that takes long asks `interrupted()` at times.
def print_task(task, _interrupted):
    print(json.dumps(task, indent=2), flush=True)
    return {"ok": True}

def file_stats(task, _interrupted):
    path, digest, lines, size = task.get("prompt") or "", hashlib.sha256(), 0, 0
    if not os.path.isfile(path):
        raise Failed(f"no such file: {path}", False)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
            lines, size = lines + block.count(b"\n"), size + len(block)
    return {"path": path, "lines": lines, "bytes": size, "sha256": digest.hexdigest()}

def sleep(task, interrupted):
    pause(float(task["metadata"]["seconds"]), interrupted)
    if interrupted():
        raise Interrupted
    return {"ok": True}

def run_command(command, task, interrupted):
    """Runs one fixed command: nothing that a task says gets into its arguments."""
    temporary = tempfile.TemporaryFile  # not pipes: nobody waits for what nobody reads or writes
    with temporary() as stdin, temporary() as stdout, temporary() as stderr:
        stdin.write(json.dumps(task).encode())
        stdin.seek(0)
        # In a session of its own, so that Ctrl-C is for us alone and its children end with it.
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            pause(float("inf"), lambda: process.poll() is not None or interrupted())
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                pause(5, lambda: process.poll() is not None)
                raise Interrupted
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        stdout.seek(0)
        stderr.seek(max(stderr.seek(0, os.SEEK_END) - ERROR_CHARS_MAX // 2, 0))
        output, complaint = (file.read(RESULT_BYTES_MAX).decode(errors="replace") for file in (stdout, stderr))
    if process.returncode != 0:
        raise Failed(f"exit code {process.returncode}: {complaint.strip()}", True)
    try:
        return json.loads(output)
    except ValueError:
        return {"output": output}

def main():
    names = functools.partial(re.findall, r"[^,\s]+")
    handlers = {"print": print_task, "file-stats": file_stats, "sleep": sleep}
    parser = argparse.ArgumentParser(description="A Taskwire worker.")
    add = parser.add_argument
    add("--server", default=os.environ.get("TASKWIRE_SERVER", "http://127.0.0.1:8000"), help="%(default)s")
    add("--worker-id", help="default: host name, pid and a random part; new with each start")
    add("--name", default=socket.gethostname(), help="default: the host name")
    add("--codebases", type=names, default=[], metavar="A,B", help="whose tasks to take, besides global ones")
    add("--capabilities", type=names, default=[], metavar="A,B", help="what this worker can do")
    add("--handler", choices=sorted(handlers), default="print", help="default: print")
    add("--exec", type=shlex.split, metavar="CMD", help="run CMD instead: task on stdin, result on stdout")
    add("--once-idle", type=float, default=0, metavar="N", help="exit after N seconds without a task")
    add("--verbose", action="store_true", help="log every event")
    options = parser.parse_args()
    logging.basicConfig(level="DEBUG" if options.verbose else "INFO", format="%(asctime)s %(message)s")
    work = functools.partial(run_command, options.exec) if options.exec else handlers[options.handler]
    worker = Worker(options, work)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):  # the alarm is --once-idle's
        signal.signal(number, worker.on_signal)
    signal.setitimer(signal.ITIMER_REAL, options.once_idle)
    worker.run()

if __name__ == "__main__":
    main()
