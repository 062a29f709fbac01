//! What keeps the tables true without anyone asking. Each is one guarded statement that is safe on
//! all replicas at once: rows that another replica is at are skipped, not waited for.

use std::time::Duration;

use super::{REPLICA_SILENCE, Store, StoreError};
use crate::domain::{ReplicaId, Status};

/// A replica ends claims of others only after its own signs of life have come for so long: a little
/// longer than every living replica takes to show one.
const STEADY_AFTER: Duration = Duration::from_secs(6);

/// What became of claims whose lease had lapsed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named after the status the tasks got")]
pub struct Reaped {
    /// Their owners are alive.
    pub kept: u64,
    pub pending: u64,
    pub failed: u64,
    pub cancelled: u64,
}

impl Store {
    /// Looks at `limit` claims whose lease has lapsed; at none while this replica has not been steady
    /// for a while.
    pub async fn maintain_reap(
        &self,
        limit: i64,
        replica: ReplicaId,
    ) -> Result<Reaped, StoreError> {
        let rows = sqlx::query_file!(
            "src/store/sql/maintain_reap.sql",
            limit,
            self.times().lease.as_secs_f64(),
            REPLICA_SILENCE.as_secs_f64(),
            replica.0,
            STEADY_AFTER.as_secs_f64()
        )
        .fetch_all(self.pool())
        .await?;
        let mut reaped = Reaped::default();
        for row in rows {
            match row.status {
                Status::Running => reaped.kept += 1,
                Status::Pending => reaped.pending += 1,
                Status::Cancelled => reaped.cancelled += 1,
                Status::Failed | Status::Completed => reaped.failed += 1,
            }
        }
        Ok(reaped)
    }

    /// Makes `limit` scheduled tasks whose time has come claimable. How many.
    pub async fn maintain_promote(&self, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query_file!("src/store/sql/maintain_promote.sql", limit)
            .execute(self.pool())
            .await?;
        Ok(done.rows_affected())
    }

    /// Ends `limit` tasks that nobody claimed before they expired. How many.
    pub async fn maintain_expire(&self, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query_file!("src/store/sql/maintain_expire.sql", limit)
            .execute(self.pool())
            .await?;
        Ok(done.rows_affected())
    }

    /// Forgets `limit` tasks that finished more than `days` ago. How many.
    pub async fn maintain_prune(&self, limit: i64, days: i32) -> Result<u64, StoreError> {
        let done = sqlx::query_file!("src/store/sql/maintain_prune.sql", limit, days)
            .execute(self.pool())
            .await?;
        Ok(done.rows_affected())
    }
}
