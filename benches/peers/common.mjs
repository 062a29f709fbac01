// What the scripts of the Node peers share: arguments, and the three measurements. Every
// peer goes through the same loops; only the adapter (how to enqueue, how to start a worker, how
// to ask the database what is left) is its own. procrastinate_bench.py repeats these loops in
// Python, word for word where it can.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { setTimeout as sleep } from "node:timers/promises";

/** Jobs enqueued one at a time for the idle latency, and those before them that do not count. */
const IDLE_JOBS = 300;
const IDLE_WARM_UP = 20;
/**
 * The pause before each of them, ms: random, so that no timer of a peer falls into step. A peer
 * that polls has pauses spread over its interval instead: a job comes at any moment of it.
 */
const IDLE_PAUSE_MS = [10, 20];
/** The longest the idle measurement may take (then there are fewer jobs), and a start. */
const IDLE_LIMIT_MS = 45_000;
const START_LIMIT_MS = 10_000;
/** How long one enqueue run takes, and its warm-up. */
const ENQUEUE_MS = 3_000;
const ENQUEUE_WARM_UP_MS = 500;
/** Jobs a batch call carries, and how many callers send batches. */
const BATCH = 100;
const BATCH_CALLERS = 1;
/** Jobs of the warm-up drain; the longest one drain may take, after which what is done counts. */
const DRAIN_WARM_UP = 1_000;
const DRAIN_LIMIT_MS = 30_000;
/** How often the database is asked whether the last completion is in it. */
const DRAIN_POLL_MS = 5;
/** Jobs inserted by one statement when a backlog is made; not measured. */
const FILL_BATCH = 1_000;
/** Runs of each rate; the median counts. */
const RUNS = 3;

const here = dirname(fileURLToPath(import.meta.url));
/** Where `run` has installed the packages. */
const modules = process.env.PEERS_MODULES ?? join(here, "../../target/peers");
const require = createRequire(join(modules, "package.json"));

/** Imports a package from that folder: it is not above this file, where Node would look. */
export function load(name) {
  return import(pathToFileURL(require.resolve(name)).href);
}

/** The installed version of a package. */
export function version(name) {
  // Not by `require`: a package need not let others read this file.
  const file = join(modules, "node_modules", name, "package.json");
  return JSON.parse(readFileSync(file, "utf8")).version;
}

/** `--url URL [--settings NAME] [--jobs N] [--quick]` */
export function parse(args) {
  const options = { url: process.env.DATABASE_URL, jobs: 20_000, quick: false };
  for (let i = 0; i < args.length; i += 1) {
    if (args[i] === "--quick") options.quick = true;
    else if (args[i] === "--url") options.url = args[(i += 1)];
    else if (args[i] === "--settings") options.settings = args[(i += 1)];
    else if (args[i] === "--jobs") options.jobs = Number(args[(i += 1)]);
    else throw new Error(`unknown argument ${args[i]}`);
  }
  if (!options.url) throw new Error("give --url, the URL of an empty database");
  if (!(options.jobs >= 1)) throw new Error("--jobs wants a number");
  return options;
}

export function note(text) {
  process.stderr.write(`${text}\n`);
}

function percentile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.ceil(sorted.length * share) - 1)];
}

function median(values) {
  return percentile([...values].sort((a, b) => a - b), 0.5);
}

const milliseconds = (value) => Number(value.toFixed(2));

/**
 * From just before the enqueue call until the handler runs, nothing else going on.
 * The producer and the worker are in one process, each with connections of its own.
 */
async function idleLatency(adapter, { quick }) {
  let started;
  const stop = await adapter.startWorker(() => started?.());
  try {
    const samples = [];
    const wanted = IDLE_WARM_UP + (quick ? IDLE_JOBS / 5 : IDLE_JOBS);
    const deadline = performance.now() + IDLE_LIMIT_MS;
    while (samples.length < wanted && performance.now() < deadline) {
      const [least, most] = adapter.idlePauseMs ?? IDLE_PAUSE_MS;
      await sleep(least + Math.random() * (most - least));
      const start = new Promise((resolve, reject) => {
        const timer = setTimeout(() => reject(new Error("a job never started")), START_LIMIT_MS);
        started = () => {
          clearTimeout(timer);
          resolve(performance.now());
        };
      });
      const before = performance.now();
      // Both are awaited: the handler may well run before the producer hears of its commit.
      const [after] = await Promise.all([start, adapter.enqueue()]);
      samples.push(after - before);
    }
    const sorted = samples.slice(IDLE_WARM_UP).sort((a, b) => a - b);
    if (sorted.length === 0) throw new Error("no idle job was measured");
    return {
      p50: milliseconds(percentile(sorted, 0.5)),
      p99: milliseconds(percentile(sorted, 0.99)),
      samples: sorted.length,
    };
  } finally {
    await stop();
  }
}

/** `callers` loops call `enqueue` again and again; each call brings `jobs` jobs. */
async function enqueueRate(enqueue, callers, jobs, duration) {
  const before = performance.now();
  const deadline = before + duration;
  let done = 0;
  const caller = async () => {
    while (performance.now() < deadline) {
      await enqueue();
      done += jobs;
    }
  };
  await Promise.all(Array.from({ length: callers }, caller));
  return (done / (performance.now() - before)) * 1_000;
}

/** Enqueues without a worker: what a producer gets answered, each answer after the commit. */
async function enqueueRates(adapter, { quick, runs }) {
  const kinds = {
    c32: [() => adapter.enqueue(), 32, 1],
    c128: [() => adapter.enqueue(), 128, 1],
    batch100: [() => adapter.enqueueBatch(BATCH), BATCH_CALLERS, BATCH],
  };
  const rates = {};
  for (const [kind, [enqueue, callers, jobs]] of Object.entries(kinds)) {
    const results = [];
    for (let run = 0; run < runs; run += 1) {
      await adapter.clear();
      await enqueueRate(enqueue, callers, jobs, ENQUEUE_WARM_UP_MS);
      results.push(await enqueueRate(enqueue, callers, jobs, quick ? ENQUEUE_MS / 3 : ENQUEUE_MS));
    }
    rates[kind] = Math.round(median(results));
    note(`  enqueue ${kind}: ${results.map(Math.round).join(", ")} /s`);
  }
  return rates;
}

/**
 * One worker process against a backlog: from the call that starts the worker (its connections
 * included) until the last completion is committed, which the database is asked, not the worker.
 */
async function drainOnce(adapter, jobs) {
  await adapter.clear();
  for (let left = jobs; left > 0; left -= FILL_BATCH) {
    await adapter.enqueueBatch(Math.min(left, FILL_BATCH));
  }
  // A server that has run for a while knows its tables.
  await adapter.query("vacuum analyze");
  let handled = 0;
  const before = performance.now();
  const deadline = before + DRAIN_LIMIT_MS;
  const stop = await adapter.startWorker((count = 1) => {
    handled += count;
  });
  let left = jobs;
  while (performance.now() < deadline) {
    // As long as the handlers have not seen all, asking would only take the worker's time.
    left = handled < jobs ? jobs - handled : await adapter.unfinished();
    if (left === 0) break;
    await sleep(DRAIN_POLL_MS);
  }
  if (left > 0) left = await adapter.unfinished();
  const seconds = (performance.now() - before) / 1_000;
  await stop();
  return (jobs - left) / seconds;
}

async function drainRate(adapter, { jobs, runs }) {
  await drainOnce(adapter, Math.min(jobs, DRAIN_WARM_UP));
  const results = [];
  for (let run = 0; run < runs; run += 1) results.push(await drainOnce(adapter, jobs));
  note(`  drain: ${results.map(Math.round).join(", ")} /s`);
  return Math.round(median(results));
}

/** Runs all three, prints the row as JSON and leaves nothing running. */
export async function measure(adapter, options) {
  const runs = options.quick ? 1 : RUNS;
  note(`${adapter.row.name} ${adapter.row.version}`);
  try {
    const idle = await idleLatency(adapter, options);
    note(`  idle: p50 ${idle.p50} ms, p99 ${idle.p99} ms (${idle.samples} jobs)`);
    const enqueue = await enqueueRates(adapter, { ...options, runs });
    const drain = await drainRate(adapter, { ...options, runs });
    const { name, version: installed, settings, notes } = adapter.row;
    process.stdout.write(
      `${JSON.stringify({
        name,
        version: installed,
        settings,
        idle_latency_ms: idle,
        enqueue_per_s: enqueue,
        drain_per_s: drain,
        notes,
      })}\n`,
    );
  } finally {
    await adapter.close();
  }
}
