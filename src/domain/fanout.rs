//! To how many workers a task is offered first (protocol R4), and how replicas that do not talk to each
//! other share that number.

use super::ids::TaskId;

/// To how many of the workers that a task is for it is offered first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fanout {
    /// To all of them.
    #[default]
    All,
    /// To so many, over all replicas; to more while it stays unclaimed.
    First(u32),
}

/// Where the streams of one replica stand in the row of all streams, replica by replica in the order of
/// their ids. All replicas count the same row, so that their shares add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    before: u64,
    own: u64,
    all: u64,
}

impl Place {
    /// A place among `all` streams: behind `before`, for `own`. `None`: there is no such place, as for a
    /// replica whose streams Postgres does not know yet.
    #[must_use]
    pub fn new(before: u64, own: u64, all: u64) -> Option<Self> {
        let has_room = before.checked_add(own).is_some_and(|end| end <= all);
        (own > 0 && has_room).then_some(Self { before, own, all })
    }

    /// How many of `count` offers of a task fall to this replica. In the mean its part of the streams;
    /// for each task rounded up or down so that the shares of all replicas are `count` together.
    #[must_use]
    pub fn share(self, count: u32, lot: Lot) -> u32 {
        // Offers stand in the row at equal distances, the first one where the lot has it. (32, 64 and 32
        // bits: nothing overflows.)
        let up_to = |streams: u64| {
            let (count, all) = (u128::from(count), u128::from(self.all));
            (((count * u128::from(streams)) << 32) + u128::from(lot.0) * all) / (all << 32)
        };
        let share = up_to(self.before + self.own) - up_to(self.before);
        u32::try_from(share).unwrap_or(u32::MAX)
    }
}

/// A number that every replica draws alike for one announcement of one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lot(u32);

impl Lot {
    /// The lot of the task that a transaction made claimable: when it comes back, others may be first.
    #[must_use]
    pub fn draw(task: TaskId, ready_xid: i64) -> Self {
        // The finalizer of SplitMix64: ids of one millisecond differ in few bits.
        let (high, low) = task.0.as_u64_pair();
        let mut bits = high ^ low.rotate_left(32) ^ ready_xid.cast_unsigned();
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(u32::try_from((bits ^ (bits >> 31)) >> 32).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The places of replicas with so many streams each.
    fn places(streams: &[u64]) -> Vec<Option<Place>> {
        let all = streams.iter().sum();
        let place = |n: usize| Place::new(streams[..n].iter().sum(), streams[n], all);
        (0..streams.len()).map(place).collect()
    }

    proptest! {
        #[test]
        fn the_shares_of_all_replicas_are_the_number_that_was_asked_for(
            streams in proptest::collection::vec(0_u64..10_000, 1..20),
            count in 1_u32..1_000_000,
            id in any::<u128>(),
            xid in any::<i64>(),
        ) {
            prop_assume!(streams.iter().sum::<u64>() > 0);
            let lot = Lot::draw(TaskId(uuid::Uuid::from_u128(id)), xid);
            let shares = places(&streams).into_iter().flatten().map(|place| place.share(count, lot));
            prop_assert_eq!(shares.sum::<u32>(), count);
        }
    }

    #[test]
    fn a_replica_gets_offers_in_proportion_to_its_streams() {
        let places = places(&[1_000, 0, 3_000]);
        assert!(places[1].is_none());
        let mut got = [0, 0];
        for _ in 0..10_000 {
            let lot = Lot::draw(TaskId::generate(), 1);
            got[0] += places[0].map_or(0, |place| place.share(1, lot));
            got[1] += places[2].map_or(0, |place| place.share(1, lot));
        }
        assert_eq!(got[0] + got[1], 10_000);
        assert!((2_300..2_700).contains(&got[0]), "{got:?}");
    }

    #[test]
    fn no_place_is_outside_of_the_row() {
        assert!(Place::new(0, 0, 10).is_none());
        assert!(Place::new(5, 6, 10).is_none());
        assert!(Place::new(u64::MAX, 1, 10).is_none());
    }
}
