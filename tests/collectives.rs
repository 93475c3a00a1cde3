//! Collectives over threads (and the world of one): the table in collective_table, on worlds and groups of them, and what
//! happens when a rank fails.

mod collective_table;

use collective_table::check_all;
use std::panic::{AssertUnwindSafe, catch_unwind};
use trireme::comm::solo::Solo;
use trireme::comm::{Communicator, Groups, ReduceOp, agree, threads};
use trireme::error::{Error, Kind};
use trireme::parallel::layout::ParallelLayout;
use trireme::tensor::Tensor;

/// One rank alone has all collectives: else nothing runs without a launcher.
#[test]
fn solo() {
    check_all(&Solo::new());
    check_all(&*Solo::new().split(5));
}

/// Every collective equals the plain loop in rank order, bit for bit, at powers of two and not: a sum in another order, or
/// rounded twice, differs in its last bits and makes runs differ between layouts.
#[test]
fn worlds_of_threads() {
    for n in [1, 2, 3, 4, 5, 8] {
        threads::run(n, |world| check_all(&*world));
    }
}

/// Groups of different sizes, and groups of groups, work at the same time without hearing each other: a message that went to
/// the other group would change a sum there.
#[test]
fn groups_of_threads() {
    threads::run(8, |world| {
        let third = world.split(world.rank() % 3);
        assert_eq!((third.rank(), third.size()), (world.rank() / 3, if world.rank() % 3 == 2 { 2 } else { 3 }));
        check_all(&*third);
        let alone = third.split(third.rank());
        assert_eq!((alone.rank(), alone.size()), (0, 1));
        check_all(&*alone);
        let again = third.split(third.rank() / 2);
        check_all(&*again);
        check_all(&*world);
    });
}

/// The three groups of each rank have the sizes and the ranks of the layout, for every layout of up to 8 ranks: a pipeline
/// neighbour in another replica would train on the wrong activations.
#[test]
fn groups_of_layouts() {
    for (tp, pp, dp) in [(2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 1, 2), (1, 3, 2), (2, 2, 1), (1, 2, 2), (2, 2, 2), (2, 1, 4)] {
        let layout = ParallelLayout { tp, pp, dp, vp: 1 };
        threads::run(layout.world(), |world| check_groups(&Groups::new(world, layout)));
    }
}

fn check_groups(groups: &Groups) {
    let (at, layout) = (groups.at, groups.layout);
    for (comm, index, size) in [(&groups.tp, at.tp, layout.tp), (&groups.pp, at.pp, layout.pp), (&groups.dp, at.dp, layout.dp)] {
        assert_eq!((comm.rank(), comm.size()), (index, size), "{layout:?} {at:?}");
    }
    let code = |tp: usize, pp: usize, dp: usize| (tp + 10 * pp + 100 * dp) as f64;
    let mine = code(at.tp, at.pp, at.dp);
    assert_eq!(groups.tp.gather_f64(mine), (0..layout.tp).map(|tp| code(tp, at.pp, at.dp)).collect::<Vec<_>>());
    assert_eq!(groups.pp.gather_f64(mine), (0..layout.pp).map(|pp| code(at.tp, pp, at.dp)).collect::<Vec<_>>());
    assert_eq!(groups.dp.gather_f64(mine), (0..layout.dp).map(|dp| code(at.tp, at.pp, dp)).collect::<Vec<_>>());
}

/// The maximum of a NaN and a number is a NaN wherever the NaN is: else a rank with bad logits would be outvoted in silence.
#[test]
fn nan_stays_visible() {
    for culprit in 0..3 {
        for op in [ReduceOp::Sum, ReduceOp::Max] {
            threads::run(3, |world| {
                let value = if world.rank() == culprit { f32::NAN } else { 1.0 };
                let mut x = Tensor::from_f32(&[1], &[value]);
                world.all_reduce(&mut x, op);
                assert!(x.f32()[0].is_nan(), "{op:?} lost the NaN of rank {culprit}");
            });
        }
    }
}

/// A NaN in one bf16 element stays in that element, and infinities of both signs cancel to NaN, as in f32.
#[test]
fn special_values_in_bf16() {
    threads::run(2, |world| {
        let mine = [[f32::INFINITY, f32::NAN, 3.0e38, -0.0], [f32::NEG_INFINITY, 1.0, 3.0e38, -0.0]][world.rank()];
        let mut x = Tensor::from_bf16(&[4], &mine);
        world.all_reduce(&mut x, ReduceOp::Sum);
        let sum = x.to_f32_vec();
        assert!(sum[0].is_nan() && sum[1].is_nan() && sum[2] == f32::INFINITY, "{sum:?}");
        assert_eq!(sum[3].to_bits(), (-0.0f32).to_bits());
    });
}

/// All ranks return the error of the lowest failing rank, kind and text, and each its own value when none fails.
#[test]
fn agreement() {
    let failing: [&[usize]; 5] = [&[], &[0], &[3], &[2, 1], &[0, 1, 2, 3]];
    for ranks in failing {
        let error = |rank: usize| Error::file(format!("shard-{rank}"), "found 3 bytes, expected 4").remedy("copy it again");
        let results = threads::run(4, |world| {
            let rank = world.rank();
            agree(&*world, if ranks.contains(&rank) { Err(error(rank)) } else { Ok(rank) })
        });
        for (rank, result) in results.into_iter().enumerate() {
            match ranks.iter().min() {
                None => assert_eq!(result, Ok(rank)),
                Some(&lowest) => {
                    let found = result.expect_err("one rank failed");
                    assert_eq!((found.kind(), found.to_string()), (Kind::File, error(lowest).to_string()));
                }
            }
        }
    }
    let alone = agree(&Solo::new(), Err::<(), _>(Error::recipe("x"))).expect_err("failed");
    assert_eq!(alone, Error::recipe("x"));
}

fn message_of(run: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(run)).expect_err("a rank panicked");
    payload.downcast_ref::<String>().expect("a message").clone()
}

/// A panic on one rank ends the others wherever they wait, in the world, in a group or for a message, and comes out with its
/// rank: else a failing test would hang.
#[test]
fn one_panic_ends_all() {
    let message = message_of(|| {
        threads::run(5, |world| {
            let half = world.split(world.rank() / 2);
            match world.rank() {
                1 => panic!("disk on fire"),
                0 => half.barrier(),
                2 => world.barrier(),
                3 => drop(half.gather_f64(1.0)),
                _ => {
                    let mut x = Tensor::from_f32(&[1], &[0.0]);
                    let recv = trireme::comm::Recv { peer: 1, tag: 0, tensor: &mut x };
                    world.start_group(Vec::new(), vec![recv]).wait();
                }
            }
        });
    });
    assert_eq!(message, "rank 1 of 5: disk on fire");
}

/// A rank that returns while another still waits for it is found, after what it had sent was received.
#[test]
fn a_rank_that_left_is_missed() {
    let message = message_of(|| {
        threads::run(3, |world| {
            world.barrier();
            if world.rank() != 2 {
                world.barrier();
            }
        });
    });
    assert!(message.contains("Barrier: rank 2 of 3 (world rank 2) has returned already"), "{message}");
}

/// Ranks that call different collectives, or sizes, are told so instead of mixing their bytes.
#[test]
fn mixed_up_calls_are_refused() {
    let message = message_of(|| {
        threads::run(2, |world| {
            let mut x = Tensor::from_f32(&[2], &[0.0, 0.0]);
            let mut shorter = x.rows_mut(0..1 + world.rank());
            world.all_reduce(&mut shorter, ReduceOp::Sum);
        });
    });
    assert!(message.contains("AllGather { shard_bytes: 4 }") && message.contains("AllGather { shard_bytes: 8 }"), "{message}");
    let message = message_of(|| {
        threads::run(2, |world| {
            let mut x = Tensor::from_f32(&[2], &[0.0, 0.0]);
            if world.rank() == 0 {
                world.start_group(vec![trireme::comm::Send { peer: 1, tag: 0, tensor: &x }], Vec::new()).wait();
            } else {
                let mut shorter = x.rows_mut(0..1);
                let recv = trireme::comm::Recv { peer: 0, tag: 0, tensor: &mut shorter };
                world.start_group(Vec::new(), vec![recv]).wait();
            }
        });
    });
    assert_eq!(message, "rank 1 of 2: message of rank 0, tag 0: 8 bytes, expected 4");
}
