//! What the protocol promises, and the guards that keep the promises.

use super::protocol::Protocol;
use super::state::State;

/// Declares the promises with all that has to be said of each: nothing can be forgotten of a new one.
macro_rules! promises {
    ($($(#[doc = $doc:literal])+ $promise:ident, $text:literal;)+) => {
        /// What holds in every state, whatever happened before.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Promise { $($(#[doc = $doc])+ $promise,)+ }

        impl Promise {
            pub fn all() -> Vec<Self> {
                vec![$(Self::$promise,)+]
            }

            pub fn text(self) -> &'static str {
                match self { $(Self::$promise => $text,)+ }
            }

            pub fn properties() -> Vec<(Self, stateright::Property<Protocol>)> {
                fn always(
                    promise: Promise,
                    kept: fn(&Protocol, &State) -> bool,
                ) -> (Promise, stateright::Property<Protocol>) {
                    (promise, stateright::Property::always(promise.text(), kept))
                }
                vec![$(always(Self::$promise, |protocol, state| {
                    protocol.keeps(Self::$promise, state)
                }),)+]
            }
        }
    };
}

promises! {
    /// C1, and C3: no other write of a claim than that of the one live claim would be accepted.
    OneLiveClaim, "at most one worker holds a live claim of a task";
    /// C1.
    NoTakeover, "a live claim is never taken over";
    /// C3.
    OutcomeByOwner, "an outcome is only written by the claim's owner at its epoch";
    /// C3.
    EndedStaysEnded, "a task ends once and stays as it ended";
    /// Invariant 3 of the design: the epoch is the fencing token.
    EpochsAreNew, "no two claims of a task have the same epoch";
    /// C4: exactly the claims that were not given back count.
    AttemptsAreBounded, "an attempt is a claim that was not released, and there are at most max_attempts";
    /// C2.
    ClaimAnswerIsTrue, "a claim that is answered 200 is the asker's, at the epoch in the answer";
    /// C3.
    CompleteAnswerIsTrue, "a complete is answered 200 exactly when the task is completed by that claim";
    /// C4.
    HeartbeatKeepsClaim, "an acknowledged heartbeat keeps its claim for its lease";
    /// C4.
    StreamKeepsClaim, "an open stream on a replica that shows itself keeps its worker's claims";
    /// S6, S5: each stream, so also some stream.
    ClaimableIsKnown, "when all is quiet, every stream knows of every claimable task";
    /// Section 4, cancel.
    CancelReachesOwner, "when all is quiet, the owner's stream was told of a cancellation";
    /// Section 4, cancel.
    CancelIsKept, "a task that was called off is not given to anyone again";
    /// E3.
    AcknowledgedStays, "an acknowledged task never vanishes";
    /// C4. Only promised with `Guard::VouchForOwnProcess` and `Guard::LateClaimIsRefused`.
    NoClaimIsForgotten, "when all is quiet, no claim is kept alive that nobody knows of";
}

/// Declares the guards, each with the promise that is broken without it.
macro_rules! guards {
    ($($(#[doc = $doc:literal])+ $guard:ident breaks $promise:ident;)+) => {
        /// A rule of the protocol that can be switched off.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Guard { $($(#[doc = $doc])+ $guard,)+ }

        impl Guard {
            pub const ALL: &[Self] = &[$(Self::$guard,)+];

            pub fn breaks(self) -> Promise {
                match self { $(Self::$guard => Promise::$promise,)+ }
            }
        }
    };
}

guards! {
    /// `where claimed_by is null and status = 'pending'` of the claim.
    ClaimOnlyUnclaimed breaks NoTakeover;
    /// `claimed_by = …` in the fence. Where a call names its epoch, the epoch says it too; older
    /// workers name none.
    FenceOwner breaks OutcomeByOwner;
    /// `claim_epoch = …` in the fence.
    FenceEpoch breaks OneLiveClaim;
    /// The epoch is not reset when a task becomes pending again.
    EpochGrows breaks EpochsAreNew;
    /// `status = 'running'` of every finish: ended tasks keep their owner and epoch.
    FinishOnlyRunning breaks EndedStaysEnded;
    /// A claim repeated with its `claim_id` gets the same answer.
    RepeatByClaimId breaks NoClaimIsForgotten;
    /// That answer is read under the condition that the claim still is this one.
    RepeatReadsOwnClaim breaks ClaimAnswerIsTrue;
    /// A repeated complete is answered as the first one was.
    RepeatCompleteIsSuccess breaks CompleteAnswerIsTrue;
    /// The reaper looks for signs of life when it has the row's lock, not before.
    ReaperLooksAfterLocking breaks HeartbeatKeepsClaim;
    /// The heartbeat holds the task's row from its check of the fence to its write.
    HeartbeatHoldsRow breaks HeartbeatKeepsClaim;
    /// The reaper asks for heartbeats.
    HeartbeatCounts breaks HeartbeatKeepsClaim;
    /// The reaper asks for streams.
    StreamVouches breaks StreamKeepsClaim;
    /// A connection's late clean-up only touches its own presence.
    CleanupByConnection breaks StreamKeepsClaim;
    /// A replica that was given up too early writes its streams' presence anew.
    PresenceIsRestored breaks StreamKeepsClaim;
    /// After an outage everyone's signs of life are old: nobody is judged before all had the time
    /// to show themselves.
    JudgeOnlyWhenSteady breaks StreamKeepsClaim;
    /// The presence of a dead replica's streams ends.
    DeadReplicasAreBuried breaks NoClaimIsForgotten;
    /// A stream hears of what happens before its backlog is read.
    SubscribeBeforeBacklog breaks ClaimableIsKnown;
    /// What is pending again is news to streams that knew the task before (`ready_xid`).
    ReopenedIsNews breaks ClaimableIsKnown;
    /// A claim that lost to one which may yet be rolled back does not settle the announcement.
    SettleOnlyDecided breaks ClaimableIsKnown;
    /// The sweep finds what became claimable, announced or not.
    SweepFindsUnannounced breaks ClaimableIsKnown;
    /// After its listener was away, a replica looks at everything.
    ResyncAfterListenerLoss breaks CancelReachesOwner;
    /// The last attempt's end is the task's.
    AttemptsAreCounted breaks AttemptsAreBounded;
    /// A release gives the attempt back.
    ReleaseIsFree breaks AttemptsAreBounded;
    /// A claim that ends while its cancellation is asked for ends the task.
    CancelEndsWithClaim breaks CancelIsKept;
    /// A create is answered after its commit.
    AnswerAfterCommit breaks AcknowledgedStays;
    /// PROPOSED, not in the server yet: a stream vouches for the claims of the process that opened
    /// it, not for those of an earlier process of the same name.
    VouchForOwnProcess breaks NoClaimIsForgotten;
    /// PROPOSED, not in the server yet: a claim names the epoch that was announced, so that a
    /// request that arrives after its time claims nothing.
    LateClaimIsRefused breaks NoClaimIsForgotten;
}

/// Which guards are on.
#[derive(Clone, Copy, Debug)]
pub struct Guards(u32);

impl Guards {
    pub fn proposed() -> Self {
        Self(Guard::ALL.iter().fold(0, |all, guard| all | 1 << *guard as u32))
    }

    /// As the server is.
    pub fn as_built() -> Self {
        Self::proposed().without(Guard::VouchForOwnProcess).without(Guard::LateClaimIsRefused)
    }

    pub fn without(self, guard: Guard) -> Self {
        Self(self.0 & !(1 << guard as u32))
    }

    pub fn has(self, guard: Guard) -> bool {
        self.0 & 1 << guard as u32 != 0
    }
}
