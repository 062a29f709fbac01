//! The statements with arguments like those of a busy day, and what each may cost.

/// One statement with one set of arguments.
pub struct Statement {
    /// Its file in `src/store/sql`.
    pub file: &'static str,
    /// What is asked of it.
    pub what: &'static str,
    /// Blocks of tables and indexes that it touched when this was written, with the worse of the two
    /// plans; a plan that scales with a table touches tens of times as many.
    pub buffers: u64,
    /// Rows that it may sort at a time, and that it may read in vain: never more than it is asked
    /// about, but where a comment says so.
    pub rows_max: u64,
    /// The arguments, in SQL. The functions are those of data.sql; the first argument of most is a
    /// task's number: up to 1,000,000 are finished, up to 1,100,000 wait, up to 1,102,000 run.
    pub arguments: &'static str,
}

impl Statement {
    /// Blocks that it may touch. Three times what it did: pages fill up and split, and rows that were
    /// rolled back leave traces. The tables have a hundred thousand.
    pub fn buffers_max(&self) -> u64 {
        self.buffers * 3 + 50
    }

    /// A statement whose filters are all optional is planned for its arguments (`Plans::Own`): with the
    /// generic plan it reads everything.
    pub fn is_planned_anew(&self) -> bool {
        ["task_list", "worker_list"].contains(&self.file)
    }

    pub fn plan_cache_mode(&self) -> &'static str {
        if self.is_planned_anew() { "force_custom_plan" } else { "force_generic_plan" }
    }
}

/// Statements whose cost is of no account, and why.
pub const NOT_HOT: &[(&str, &str)] = &[
    ("ready", "reads settings and the history of migrations, no table that grows"),
    ("replica_place", "counts the streams there are, once a second with WORKER_SSE_FANOUT=k only"),
];

const fn of(
    file: &'static str,
    what: &'static str,
    buffers: u64,
    rows_max: u64,
    arguments: &'static str,
) -> Statement {
    Statement { file, what, buffers, rows_max, arguments }
}

pub const STATEMENTS: &[Statement] = &[
    of(
        "task_create",
        "one",
        22,
        1,
        "array[gen_random_uuid()], '{title}', '{prompt}', '{codebase-1}', '{0}', '{gpu}', \
         '{null}', '{null}', '{null}', array['{}'::jsonb], '{null}', '{null}', '{3}', \
         '{null}', '{null}', '{null}'",
    ),
    of(
        "task_create",
        "256 with keys",
        5_994,
        256,
        "plans.ids(2000000, 256), plans.workers(0, 256, 256), plans.workers(0, 256, 256), \
         array_fill('codebase-1'::text, '{256}'), array_fill(0, '{256}'), \
         array_fill(''::text, '{256}'), array_fill(null::text, '{256}'), \
         array_fill(null::text, '{256}'), array_fill(null::text, '{256}'), \
         array_fill('{}'::jsonb, '{256}'), array_fill(null::timestamptz, '{256}'), \
         array_fill(null::timestamptz, '{256}'), array_fill(3, '{256}'), \
         array_fill(null::int, '{256}'), plans.workers(0, 256, 256), \
         array_fill('\\x00'::bytea, '{256}')",
    ),
    of("task_by_key", "256 keys", 877, 0, "plans.keys(500000, 256)"),
    of("task_claim", "one", 35, 1, "plans.ids(1050001, 1), '{worker-0}', plans.ids(1, 1), 30"),
    of(
        "task_claim",
        "256",
        7_195,
        256,
        "plans.ids(1050001, 256), plans.workers(1050001, 256, 50), array_fill(null::uuid, \
         '{256}'), 30",
    ),
    of(
        "task_claim_explain",
        "256 that are lost",
        1_792,
        256,
        "plans.ids(500001, 256), plans.workers(1, 256, 2000), array_fill(null::uuid, '{256}')",
    ),
    // 68 candidates of each of four codebases; what the worker cannot do is read in vain.
    of("task_claim_next", "one", 470, 300, "'worker-7', 1, null, 30, 68, 4194304"),
    of(
        "task_claim_next",
        "100 of 50 codebases, with an id",
        26_427,
        25_000,
        "'worker-0', 100, plans.id(5), 30, 464, 4194304",
    ),
    of("task_claimed_as", "two", 248, 2, "'worker-1014', plans.id(550001), null"),
    of(
        "task_finish",
        "one complete",
        37,
        1,
        "plans.ids(1100001, 1), plans.owners(1100001, 1), '{1}', '{complete}', \
         array['{}'::jsonb], '{null}', '{false}', '{null}'",
    ),
    of(
        "task_finish",
        "256 complete",
        7_418,
        256,
        "plans.ids(1100001, 256), plans.owners(1100001, 256), array_fill(1::bigint, \
         '{256}'), array_fill('complete'::text, '{256}'), array_fill('{}'::jsonb, '{256}'), \
         array_fill(null::text, '{256}'), array_fill(false, '{256}'), \
         array_fill(null::float8, '{256}')",
    ),
    of(
        "task_finish",
        "256 fail and are retried",
        7_994,
        256,
        "plans.ids(1100001, 256), plans.owners(1100001, 256), array_fill(1::bigint, \
         '{256}'), array_fill('fail'::text, '{256}'), array_fill(null::jsonb, '{256}'), \
         array_fill('exit 1'::text, '{256}'), array_fill(true, '{256}'), \
         array_fill(null::float8, '{256}')",
    ),
    of(
        "task_heartbeat",
        "one",
        12,
        1,
        "plans.ids(1100001, 1), plans.owners(1100001, 1), '{1}', '{0.5}', '{half}', \
         array[null::jsonb], 30",
    ),
    of(
        "task_heartbeat",
        "256",
        2_572,
        256,
        "plans.ids(1100001, 256), plans.owners(1100001, 256), array_fill(1::bigint, \
         '{256}'), array_fill(0.7::float8, '{256}'), array_fill('more'::text, '{256}'), \
         array_fill(null::jsonb, '{256}'), 30",
    ),
    of(
        "task_late",
        "256 repeats",
        3_146,
        512, // the task that nobody holds any more, and the attempt that is only repeated
        "plans.ids(600001, 256), plans.workers(600001, 256, 2000), array_fill(1::bigint, \
         '{256}'), array_fill(true, '{256}')",
    ),
    of(
        "task_late",
        "256 that are late",
        7_321,
        512,
        "plans.ids(600001, 256), plans.workers(600001, 256, 2000), array_fill(null::bigint, \
         '{256}'), array_fill(false, '{256}')",
    ),
    of("task_cancel", "a pending one", 23, 0, "plans.id(1050001), 'no need'"),
    of("task_cancel", "a running one", 16, 0, "plans.id(1100001), 'no need'"),
    of("task_get", "one", 12, 0, "plans.id(600001)"),
    of("task_attempts", "one", 9, 10, "plans.id(600001), 1001"),
    of("task_watch", "200", 1_542, 0, "plans.ids(1099901, 200)"),
    // Not listed here, as they walk through what is newer, or sort what there is: by a status other than
    // pending, and by a worker without a status. Operators have views for that.
    of("task_list", "the first page", 874, 0, "null, null, null, null, null, null, null, 100"),
    of(
        "task_list",
        "a page far down",
        356,
        0,
        "null, null, null, null, null, now() - interval '20 days', plans.id(1), 100",
    ),
    // One task in fifty is of this codebase.
    of(
        "task_list",
        "of a codebase",
        578,
        10_000,
        "null, 'codebase-7', null, null, null, null, null, 100",
    ),
    of(
        "task_list",
        "what is pending",
        349,
        0,
        "'pending', null, null, null, null, null, null, 100",
    ),
    of(
        "task_list",
        "what a worker runs",
        48,
        2,
        "'running', null, 'worker-1014', null, null, null, null, 100",
    ),
    // The window of each codebase; what a worker cannot do is read in vain.
    of("push_backlog", "8 workers of 2 codebases", 4_980, 1_000, "plans.workers(1, 8, 2000), 128"),
    of("push_backlog", "a worker of 50 codebases", 6_536, 6_656, "'{worker-0}', 128"),
    of(
        "push_backlog_shared",
        "8 ways of 2 codebases",
        8_120,
        2_048,
        "plans.codebases(1, 8), array_fill('linux'::text, '{8}'), 256",
    ),
    of(
        "push_backlog_shared",
        "one of 50 codebases",
        16_100,
        13_312,
        "plans.all_codebases(), '{linux}', 256",
    ),
    of("push_claimable", "200", 1_622, 200, "plans.ids(1050001, 200)"),
    of("push_still_claimable", "1,000", 3_213, 1_000, "plans.ids(1050001, 1000)"),
    // Of so many workers it reads all, which are not many more.
    of("push_asked", "1,000", 2_000, 2_000, "plans.workers(1, 1000, 2000)"),
    of("push_ready_since", "nothing new", 523, 0, "plans.snapshot(-9), 2000"),
    of("push_ready_since", "too much", 13, 0, "plans.snapshot(3), 2000"),
    // Only asked when there is too much to name: as many rows as are new.
    of("push_ready_codebases", "2,000", 74, 2_000, "plans.snapshot(1), 200"),
    // Three questions about each.
    of(
        "push_cancelled",
        "200 tasks, 8 workers",
        2_700,
        600,
        "plans.ids(1100001, 200), plans.workers(1000, 8, 2000)",
    ),
    of("push_cancelled", "200 that are finished", 2_018, 400, "plans.ids(700001, 200), '{}'"),
    // Whatever runs, or what each of them runs.
    of("push_cancelled", "500 workers", 2_000, 2_000, "'{}', plans.workers(1000, 500, 2000)"),
    of("maintain_reap", "200 of 500", 6_760, 200, "500, 30, 15"),
    of("maintain_promote", "500", 12_134, 0, "500"),
    of("maintain_expire", "500", 10_562, 0, "500"),
    of("maintain_prune", "500", 7_620, 0, "500, 30"),
    of("maintain_prune", "nothing", 3, 0, "500, 40"),
    of(
        "stream_open",
        "one known",
        22,
        1,
        "'{worker-1}', '{null}', '{null}', '{null}', plans.ids(1, 1), plans.id(1), '{null}'",
    ),
    // Looks for each worker among those of its batch.
    of(
        "stream_open",
        "64 known",
        1_600,
        4_096,
        "plans.workers(1, 64, 2000), array_fill(null::text, '{64}'), \
         array_fill('codebase-9'::text, '{64}'), array_fill(null::text, '{64}'), \
         plans.ids(1, 64), plans.id(1), array_fill(9, '{64}')",
    ),
    of("stream_close", "500", 8_936, 500, "plans.workers(1, 500, 2000), plans.ids(1, 500)"),
    of("stream_review", "8", 55, 0, "plans.workers(1, 8, 2000)"),
    // Reads both tables as a whole, rather than a third of them by index.
    of("stream_review", "500", 1_600, 0, "plans.workers(1, 500, 2000)"),
    of(
        "stream_restore",
        "500",
        8_609,
        500,
        "plans.workers(1400, 500, 2000), plans.ids(1400, 500), plans.id(1), array_fill(9, '{500}')",
    ),
    of("slots_held", "500 workers", 2_000, 500, "plans.workers(1000, 500, 2000), 4000"),
    of("slots_check", "500", 2_100, 500, "plans.owners(1100001, 500), plans.ids(1100001, 500)"),
    of("slots_tasks", "40 that others hold", 171, 40, "'worker-1014', plans.ids(1100001, 40)"),
    of(
        "slots_freed",
        "256",
        600,
        256,
        "plans.workers(1, 256, 2000), plans.ids(1, 256)::text[], plans.id(1)",
    ),
    of("slots_elsewhere", "one", 4, 1, "plans.workers(1, 1, 2000), plans.ids(9, 1)"),
    of("replica_heartbeat", "one", 6, 3, "plans.id(1), '127.0.0.1:1', '0.1.0', 15"),
    of("replica_leave", "nobody", 18, 3, "null, 15"),
    of("replica_leave", "one with 500 streams", 3_861, 2_000, "plans.id(1), 15"),
    of("worker_seen", "one", 10, 1, "'{worker-1}', '{1}', '{null}', '{null}'"),
    of(
        "worker_seen",
        "500",
        6_367,
        500,
        "plans.workers(1, 500, 2000), array_fill(1::float8, '{500}'), plans.ids(1, 500), \
         array_fill(1::float8, '{500}')",
    ),
    of("worker_claims", "50", 230, 100, "plans.workers(1000, 50, 2000)"),
    of("worker_running", "two", 4, 2, "'worker-1014'"),
    of("worker_list", "one", 14, 3, "'worker-1', 60, 15, false"),
    of("worker_register", "a known one", 6, 0, "'worker-1', null, null, '{linux}', null, null"),
    of("worker_set_codebases", "one", 8, 0, "'worker-1', '{codebase-1}'"),
    of("worker_unregister", "one that holds two", 77, 2, "'worker-1014'"),
];
