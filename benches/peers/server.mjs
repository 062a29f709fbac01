// What `run` asks of the Postgres server: a fresh database for each peer, and what server it is.
//
// node server.mjs URL facts | commit | create NAME | drop NAME

import { load } from "./common.mjs";

const { Client } = (await load("pg")).default;
const [url, command, name] = process.argv.slice(2);

/** What must be on: figures of commits that do not wait for the disk compare with nothing. */
const DURABLE = ["fsync", "synchronous_commit", "full_page_writes"];
/** Commits that are timed, and the most that this may take. */
const COMMITS = 300;
const COMMITS_LIMIT_MS = 5_000;

/** The median time of one durable insert on one connection, ms: what nobody who waits can beat. */
async function commitTime() {
  await client.query("create table commits (n int)");
  const times = [];
  const deadline = performance.now() + COMMITS_LIMIT_MS;
  while (times.length < COMMITS && performance.now() < deadline) {
    const before = performance.now();
    await client.query("insert into commits values (1)");
    times.push(performance.now() - before);
  }
  await client.query("drop table commits");
  times.sort((a, b) => a - b);
  return times[Math.floor(times.length / 2)].toFixed(2);
}

/** The URL of another database of the same server. */
function urlOf(database) {
  const other = new URL(url);
  other.pathname = `/${database}`;
  return other.href;
}

const client = new Client({ connectionString: url });
await client.connect();
try {
  const quoted = client.escapeIdentifier(name ?? "");
  if (command === "create") {
    await client.query(`create database ${quoted}`);
    process.stdout.write(`${urlOf(name)}\n`);
  } else if (command === "drop") {
    await client.query(`drop database if exists ${quoted} with (force)`);
  } else if (command === "commit") {
    process.stdout.write(`${await commitTime()}\n`);
  } else if (command === "facts") {
    const facts = {};
    for (const setting of ["server_version", "max_connections", ...DURABLE]) {
      facts[setting] = (await client.query(`show ${setting}`)).rows[0][setting];
    }
    for (const setting of DURABLE) {
      const value = facts[setting];
      if (value !== "on") throw new Error(`the server has ${setting} ${value}, not on`);
    }
    process.stdout.write(`${JSON.stringify(facts)}\n`);
  } else {
    throw new Error(`unknown command ${command}`);
  }
} finally {
  await client.end();
}
