// pg-boss: a library for Node. `send()` is one insert; workers fetch with `for update skip locked`
// and mark a job that is done as completed.
//
// Measures idle latency, enqueue rates and the drain of a backlog (see common.mjs), with one of two
// settings, from the pages "Workers", "Queues" and "Constructor" of its documentation:
//
//   notify   useListenNotify, and `notify` on the queue: an insert wakes the workers at once. This
//            is how it is set up where latency matters, and what the other rows do, too.
//   polling  Its default, without NOTIFY, at the shortest interval that it allows (0.5 s): to
//            enqueue takes no lock for notifications, and idle latency is half the interval.
//
// With both: `batchSize` jobs a fetch, two workers (`localConcurrency`), and `burstWhenBatchFull`,
// which fetches again without a pause while there is a backlog. Its documentation names no numbers;
// these were the best of those tried here (batches of 100 to 1,000, one to four workers). The pool
// has `max` 25 connections instead of 10, as the other Node peer has.
//
// Alone: node pg-boss.mjs --url URL [--settings notify|polling] [--jobs N] [--quick]

import { load, measure, note, parse, version } from "./common.mjs";

const { PgBoss } = await load("pg-boss");
const { Pool } = (await load("pg")).default;

const QUEUE = "noop";
const MAX = 25;
const POLLING_S = 0.5;
const WORK = {
  batchSize: 1_000,
  localConcurrency: 2,
  burstWhenBatchFull: true,
  pollingIntervalSeconds: POLLING_S,
};
const SETTINGS = { notify: { useListenNotify: true }, polling: { useListenNotify: false } };
const NOTES = {
  notify:
    "In process, straight to Postgres: no HTTP in between. Woken by NOTIFY, then fetches. A " +
    "handler gets up to 1,000 jobs at once, and one statement completes them: all or nothing, " +
    "not job by job.",
  polling:
    "In process, straight to Postgres: no HTTP in between. Polls every 0.5 s: nothing tells it " +
    "of a new job, and commits without NOTIFY do not wait for each other. Completes by the batch.",
};

const options = parse(process.argv.slice(2));
const chosen = options.settings ?? "notify";
if (!SETTINGS[chosen]) throw new Error(`--settings is one of ${Object.keys(SETTINGS).join(", ")}`);

async function connect() {
  const boss = new PgBoss({ connectionString: options.url, max: MAX, ...SETTINGS[chosen] });
  boss.on("error", (error) => note(`  pg-boss: ${error.message}`));
  boss.on("warning", (warning) => note(`  pg-boss: ${warning.message}`));
  await boss.start();
  return boss;
}

const producer = await connect();
await producer.createQueue(QUEUE, { notify: SETTINGS[chosen].useListenNotify });
const database = new Pool({ connectionString: options.url, max: 1 });

await measure(
  {
    row: {
      name: `pg-boss (${chosen})`,
      version: version("pg-boss"),
      settings: { max: MAX, ...SETTINGS[chosen], ...WORK },
      notes: NOTES[chosen],
    },
    // Pauses of 10 to 510 ms: the poll is at a random distance then, as for jobs in real life.
    idlePauseMs: chosen === "polling" ? [10, 10 + POLLING_S * 1_000] : undefined,
    enqueue: () => producer.send(QUEUE, { n: 1 }),
    enqueueBatch: (count) =>
      producer.insert(QUEUE, Array.from({ length: count }, () => ({ data: { n: 1 } }))),
    async startWorker(onStart) {
      const worker = await connect();
      await worker.work(QUEUE, WORK, async (jobs) => onStart(jobs.length));
      return () => worker.stop({ graceful: true });
    },
    query: (sql) => database.query(sql),
    clear: () => producer.deleteAllJobs(), // Without a name: one truncate.
    async unfinished() {
      const sql = `select count(*)::int as count from pgboss.job
        where name = $1 and state in ('created', 'retry', 'active')`;
      return (await database.query(sql, [QUEUE])).rows[0].count;
    },
    async close() {
      await producer.stop({ graceful: false });
      await database.end();
    },
  },
  options,
);
