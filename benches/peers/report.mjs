// Puts the rows together: the table on standard output, and the JSON into a file.
//
// node report.mjs FOLDER FACTS JOBS FILE: FOLDER has a JSON file for each row, with the time of one
// commit just before it beside it, and a file `missing` that names the rows that failed.

import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import os from "node:os";
import { join } from "node:path";

const [folder, facts, jobs, file] = process.argv.slice(2);
const read = (name) => readFileSync(join(folder, name), "utf8").trim();
const peers = readdirSync(folder)
  .filter((name) => name.endsWith(".json"))
  .sort()
  .map((name) => ({ ...JSON.parse(read(name)), commit_ms: Number(read(`${name}.commit`)) }));
const { server_version: version, ...server } = JSON.parse(facts);
const machine = {
  cpu: os.cpus()[0]?.model.trim() ?? "unknown",
  cores: os.availableParallelism(),
  memory_gib: Math.round(os.totalmem() / 2 ** 30),
  os: `${os.type()} ${os.machine()}`,
};

const number = (value) => (typeof value === "number" ? value.toLocaleString("en-US") : "–");
const line = (cells) => `| ${cells.join(" | ")} |`;
const table = [
  line([
    "peer",
    "idle p50, ms",
    "idle p99, ms",
    "enqueued/s, 32 callers",
    "enqueued/s, 128 callers",
    "enqueued/s, batches of 100",
    `drained/s, ${number(Number(jobs))} jobs`,
    "one commit, ms",
    "what it does differently",
  ]),
  line(["---", ...Array(7).fill("---:"), "---"]),
  ...peers.map((peer) =>
    line([
      [peer.name, peer.version].filter(Boolean).join(" "),
      number(peer.idle_latency_ms?.p50),
      number(peer.idle_latency_ms?.p99),
      number(peer.enqueue_per_s?.c32),
      number(peer.enqueue_per_s?.c128),
      number(peer.enqueue_per_s?.batch100),
      number(peer.drain_per_s),
      number(peer.commit_ms),
      String(peer.notes ?? "").replaceAll("|", "\\|"),
    ]),
  ),
];
process.stdout.write(`${table.join("\n")}\n`);
const report = {
  machine,
  postgres: { version, ...server },
  jobs: Number(jobs),
  peers,
  missing: read("missing").split("\n").filter(Boolean),
};
writeFileSync(file, `${JSON.stringify(report, null, 2)}\n`);
