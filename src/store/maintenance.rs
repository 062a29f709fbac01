//! What keeps the tables true without anyone asking. Each is one guarded statement that is safe on
//! all replicas at once: rows that another replica is at are skipped, not waited for.

use super::{Store, StoreError};

/// What became of claims whose lease had run out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    /// They live: the lease moves on.
    pub kept: u64,
    /// Their owners fell silent.
    pub lapsed: u64,
    /// They took longer than their task allows.
    pub timed_out: u64,
}

impl Store {
    /// Looks at `limit` claims whose lease has run out; at none while the replicas have not been steady
    /// for a lease.
    pub async fn maintain_reap(&self, limit: i64) -> Result<Reaped, StoreError> {
        let rows = sqlx::query_file!(
            "src/store/sql/maintain_reap.sql",
            limit,
            self.times().lease.as_secs_f64(),
            self.times().gap().as_secs_f64(),
        )
        .fetch_all(self.link())
        .await?;
        let mut reaped = Reaped::default();
        for row in rows {
            match row.claim_outcome.as_deref() {
                None => reaped.kept += 1,
                Some("timed_out") => reaped.timed_out += 1,
                Some(_) => reaped.lapsed += 1,
            }
        }
        Ok(reaped)
    }

    /// Makes `limit` scheduled tasks whose time has come claimable. How many.
    pub async fn maintain_promote(&self, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query_file!("src/store/sql/maintain_promote.sql", limit)
            .execute(self.link())
            .await?;
        Ok(done.rows_affected())
    }

    /// Ends `limit` tasks that nobody claimed before they expired. How many.
    pub async fn maintain_expire(&self, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query_file!("src/store/sql/maintain_expire.sql", limit)
            .execute(self.link())
            .await?;
        Ok(done.rows_affected())
    }

    /// Forgets `limit` tasks that finished more than `days` ago. How many.
    pub async fn maintain_prune(&self, limit: i64, days: i32) -> Result<u64, StoreError> {
        let done = sqlx::query_file!("src/store/sql/maintain_prune.sql", limit, days)
            .execute(self.link())
            .await?;
        Ok(done.rows_affected())
    }
}
