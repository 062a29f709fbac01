// graphile-worker: a library for Node. Producers call a SQL function that inserts and notifies; the
// worker listens, fetches with `for update skip locked`, and deletes a job that is done.
//
// Measures idle latency, enqueue rates and the drain of a backlog (see common.mjs), with one of two
// settings, both from the page "Performance" of its documentation, where its own figures were made:
//
//   batching   concurrentJobs 24, maxPoolSize 25, localQueue.size 500, completeJobBatchDelay 0,
//              failJobBatchDelay 0: its fastest. Jobs are fetched 500 at a time, and completions
//              that end in the same moment are deleted by one statement.
//   unbatched  The same without the local queue and the batches, which is its default: each job is
//              fetched and completed by a statement, and a commit, of its own.
//
// Fair because these are the maintainers' own settings for a throughput test, on the same server
// with the same durability. The producer's pool is as large as the worker's: pools of 10, 64 and
// 128 enqueued no more on the two cores where this was tried, since the commits that notify wait
// for each other.
//
// Alone: node graphile-worker.mjs --url URL [--settings batching|unbatched] [--jobs N] [--quick]

import { load, measure, parse, version } from "./common.mjs";

const { Logger, makeWorkerUtils, run } = await load("graphile-worker");
const { Pool } = (await load("pg")).default;

const TASK = "noop";
const CONCURRENT_JOBS = 24;
const MAX_POOL_SIZE = 25;
const SETTINGS = {
  batching: { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 },
  unbatched: { localQueue: { size: -1 }, completeJobBatchDelay: -1, failJobBatchDelay: -1 },
};
const NOTES = {
  batching:
    "In process, straight to Postgres: no HTTP in between. Woken by NOTIFY. Fetches 500 jobs a " +
    "statement into memory and completes in batches, so a crash leaves up to 500 jobs locked for " +
    "4 hours. A job that is done is deleted: no history, and no lease that is checked at the end.",
  unbatched:
    "In process, straight to Postgres: no HTTP in between. Woken by NOTIFY. One statement to " +
    "fetch a job and one to delete it, each committed for itself; no history.",
};

const options = parse(process.argv.slice(2));
const chosen = options.settings ?? "batching";
if (!SETTINGS[chosen]) throw new Error(`--settings is one of ${Object.keys(SETTINGS).join(", ")}`);
const quiet = new Logger(() => (level, message) => {
  if (level === "error") process.stderr.write(`${message}\n`);
});
const common = { connectionString: options.url, maxPoolSize: MAX_POOL_SIZE, logger: quiet };
const producer = await makeWorkerUtils({ preset: { worker: common } });
await producer.migrate();
const database = new Pool({ connectionString: options.url, max: 1 });

await measure(
  {
    row: {
      name: `graphile-worker (${chosen})`,
      version: version("graphile-worker"),
      settings: {
        concurrentJobs: CONCURRENT_JOBS,
        maxPoolSize: MAX_POOL_SIZE,
        ...SETTINGS[chosen],
      },
      notes: NOTES[chosen],
    },
    enqueue: () => producer.addJob(TASK, { n: 1 }),
    enqueueBatch: (count) =>
      producer.addJobs(
        Array.from({ length: count }, () => ({ identifier: TASK, payload: { n: 1 } })),
      ),
    async startWorker(onStart) {
      const runner = await run({
        preset: {
          worker: { ...common, ...SETTINGS[chosen], concurrentJobs: CONCURRENT_JOBS },
        },
        parsedCronItems: [],
        noHandleSignals: true,
        taskList: { [TASK]: () => onStart() },
      });
      return () => runner.stop();
    },
    query: (sql) => database.query(sql),
    clear: () => database.query("truncate graphile_worker._private_jobs"),
    async unfinished() {
      const sql = "select count(*)::int as count from graphile_worker._private_jobs";
      return (await database.query(sql)).rows[0].count;
    },
    async close() {
      await producer.release();
      await database.end();
    },
  },
  options,
);
