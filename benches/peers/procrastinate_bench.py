"""procrastinate: a library for Python. Producers call a SQL function that inserts and notifies; the
worker listens, fetches jobs one by one with `for update skip locked`, and marks one that is done.

Measures idle latency, enqueue rates and the drain of a backlog, in the same loops as common.mjs.
Settings, from the pages "Execute multiple jobs at the same time", "Asynchronous operations &
concurrency" (section "Mind the size of your PostgreSQL pool") and "Launch a worker":

  concurrency 30, a pool of 31 connections (for short jobs "as many connections as your concurrency
  (plus one)"), listen_notify on; the task is async, so no thread is needed to run it.

Fair because that is what its documentation says for many short jobs, on the same server with the
same durability. One producer process and one worker process, as for the other peers: Python's own
speed is part of the result, and its documentation says to start more processes for more throughput.

Alone: python procrastinate_bench.py --url URL [--jobs N] [--quick]
"""

import argparse
import asyncio
import json
import logging
import math
import os
import random
import statistics
import sys
import time
from importlib.metadata import version

import procrastinate
import psycopg

# The same numbers as in common.mjs, which says what each is for.
IDLE_JOBS = 300
IDLE_WARM_UP = 20
IDLE_PAUSE_S = (0.010, 0.020)
IDLE_LIMIT_S = 45
START_LIMIT_S = 10
ENQUEUE_S = 3
ENQUEUE_WARM_UP_S = 0.5
BATCH = 100
BATCH_CALLERS = 1
DRAIN_WARM_UP = 1_000
DRAIN_LIMIT_S = 30
DRAIN_POLL_S = 0.005
FILL_BATCH = 1_000
RUNS = 3

CONCURRENCY = 30
POOL_SIZE = CONCURRENCY + 1
SETTINGS = {"concurrency": CONCURRENCY, "max_size": POOL_SIZE, "listen_notify": True}
NOTES = (
    "In process, straight to Postgres: no HTTP in between. Woken by NOTIFY (two a job). Fetches "
    "one job after the other, a commit each, and completes each by another; keeps the row and "
    "three events a job. Its documentation adds processes for throughput; this is one, as for "
    "the others."
)


class Peer:
    """The producer, the worker and the database, each with connections of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.on_start = lambda: None
        self.producer = self.make_app()
        self.noop = self.producer.tasks["noop"]

    def make_app(self) -> procrastinate.App:
        connector = procrastinate.PsycopgConnector(conninfo=self.url, max_size=POOL_SIZE)
        app = procrastinate.App(connector=connector)

        @app.task(name="noop")
        async def noop(n: int) -> None:
            self.on_start()

        return app

    async def enqueue(self) -> None:
        await self.noop.defer_async(n=1)

    async def enqueue_batch(self, count: int) -> None:
        await self.noop.batch_defer_async(*({"n": 1} for _ in range(count)))

    async def start_worker(self, on_start):
        """Starts a worker that calls `on_start` for each job; returns what stops it."""
        self.on_start = on_start
        app = self.make_app()
        await app.open_async()
        worker = asyncio.create_task(
            app.run_worker_async(
                concurrency=CONCURRENCY, listen_notify=True, install_signal_handlers=False
            )
        )

        async def stop() -> None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
            await app.close_async()

        return stop

    async def clear(self) -> None:
        sql = "truncate procrastinate_jobs cascade"
        await self.producer.connector.execute_query_async(sql)

    async def vacuum(self) -> None:
        """On a connection of its own: vacuum runs in no transaction, and the pool begins one."""
        connection = await psycopg.AsyncConnection.connect(self.url, autocommit=True)
        async with connection:
            await connection.execute("vacuum analyze")

    async def unfinished(self) -> int:
        row = await self.producer.connector.execute_query_one_async(
            "select count(*) as count from procrastinate_jobs where status in ('todo', 'doing')"
        )
        return row["count"]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * share) - 1)]


async def idle_latency(peer: Peer, quick: bool) -> dict:
    """From just before the enqueue call until the handler runs, nothing else going on."""
    started: asyncio.Future | None = None

    def on_start() -> None:
        if started is not None and not started.done():
            started.set_result(time.perf_counter())

    stop = await peer.start_worker(on_start)
    try:
        samples = []
        wanted = IDLE_WARM_UP + (IDLE_JOBS // 5 if quick else IDLE_JOBS)
        deadline = time.perf_counter() + IDLE_LIMIT_S
        while len(samples) < wanted and time.perf_counter() < deadline:
            await asyncio.sleep(random.uniform(*IDLE_PAUSE_S))
            started = asyncio.get_running_loop().create_future()
            before = time.perf_counter()
            # Both are awaited: the handler may well run before the producer hears of its commit.
            start = asyncio.wait_for(started, START_LIMIT_S)
            after, _ = await asyncio.gather(start, peer.enqueue())
            samples.append((after - before) * 1_000)
    finally:
        await stop()
    ordered = sorted(samples[IDLE_WARM_UP:])
    if not ordered:
        raise RuntimeError("no idle job was measured")
    return {
        "p50": round(percentile(ordered, 0.5), 2),
        "p99": round(percentile(ordered, 0.99), 2),
        "samples": len(ordered),
    }


async def enqueue_rate(enqueue, callers: int, jobs: int, duration: float) -> float:
    before = time.perf_counter()
    deadline = before + duration
    done = 0

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < deadline:
            await enqueue()
            done += jobs

    await asyncio.gather(*(caller() for _ in range(callers)))
    return done / (time.perf_counter() - before)


async def enqueue_rates(peer: Peer, quick: bool, runs: int) -> dict:
    """Enqueues without a worker: what a producer gets answered, each answer after the commit."""
    kinds = {
        "c32": (peer.enqueue, 32, 1),
        "c128": (peer.enqueue, 128, 1),
        "batch100": (lambda: peer.enqueue_batch(BATCH), BATCH_CALLERS, BATCH),
    }
    rates = {}
    for kind, (enqueue, callers, jobs) in kinds.items():
        results = []
        for _ in range(runs):
            await peer.clear()
            await enqueue_rate(enqueue, callers, jobs, ENQUEUE_WARM_UP_S)
            duration = ENQUEUE_S / 3 if quick else ENQUEUE_S
            results.append(await enqueue_rate(enqueue, callers, jobs, duration))
        rates[kind] = round(statistics.median(results))
        note(f"  enqueue {kind}: {', '.join(str(round(rate)) for rate in results)} /s")
    return rates


async def drain_once(peer: Peer, jobs: int) -> float:
    """One worker against a backlog: from its start until the last completion is committed."""
    await peer.clear()
    for filled in range(0, jobs, FILL_BATCH):
        await peer.enqueue_batch(min(jobs - filled, FILL_BATCH))
    # A server that has run for a while knows its tables.
    await peer.vacuum()
    handled = 0

    def on_start() -> None:
        nonlocal handled
        handled += 1

    before = time.perf_counter()
    deadline = before + DRAIN_LIMIT_S
    stop = await peer.start_worker(on_start)
    left = jobs
    while time.perf_counter() < deadline:
        # As long as the handlers have not seen all, asking would only take the worker's time.
        left = jobs - handled if handled < jobs else await peer.unfinished()
        if left == 0:
            break
        await asyncio.sleep(DRAIN_POLL_S)
    if left > 0:
        left = await peer.unfinished()
    seconds = time.perf_counter() - before
    await stop()
    return (jobs - left) / seconds


async def drain_rate(peer: Peer, jobs: int, runs: int) -> int:
    await drain_once(peer, min(jobs, DRAIN_WARM_UP))
    results = [await drain_once(peer, jobs) for _ in range(runs)]
    note(f"  drain: {', '.join(str(round(rate)) for rate in results)} /s")
    return round(statistics.median(results))


async def main(url: str, jobs: int, quick: bool) -> None:
    runs = 1 if quick else RUNS
    peer = Peer(url)
    row = {"name": "procrastinate", "version": version("procrastinate"), "settings": SETTINGS}
    note(f"{row['name']} {row['version']}")
    async with peer.producer.open_async():
        await peer.producer.schema_manager.apply_schema_async()
        row["idle_latency_ms"] = idle = await idle_latency(peer, quick)
        note(f"  idle: p50 {idle['p50']} ms, p99 {idle['p99']} ms ({idle['samples']} jobs)")
        row["enqueue_per_s"] = await enqueue_rates(peer, quick, runs)
        row["drain_per_s"] = await drain_rate(peer, jobs, runs)
    print(json.dumps({**row, "notes": NOTES}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default=os.environ.get("DATABASE_URL"))
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if not arguments.url:
        parser.error("give --url, the URL of an empty database")
    # A line a job would be measured, too.
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(main(arguments.url, arguments.jobs, arguments.quick))
