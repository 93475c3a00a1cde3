//! Saved under one layout and loaded under another, in any rectangles.

use crate::parts::*;
use trireme::checkpoint;
use trireme::comm::solo::Solo;
use trireme::comm::threads;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::rng::Random;
use trireme::tensor::DType;

/// What is saved under one layout loads bit for bit under another, weights and optimizer state alike, and back again: a
/// checkpoint is a set of hyper-rectangles and belongs to no layout. Breaks when a piece lands at a wrong offset, is
/// written by no rank or comes from a stale replica.
#[test]
fn any_layout_loads_what_any_other_saved() {
    let random = Random::new(20, "layout pairs");
    let layout = |i: u64| {
        let pick = |from: &[usize], k: u64| from[(random.bits(8 * i + k) % from.len() as u64) as usize];
        ParallelLayout { tp: pick(&[1, 2, 4], 0), pp: pick(&[1, 2], 1), dp: pick(&[1, 2, 3], 2), vp: pick(&[1, 2], 3) }
    };
    for case in 0..14 {
        let (a, b, model) = (layout(2 * case), layout(2 * case + 1), model(case % 2 == 1));
        let dir = tempfile::tempdir().unwrap();
        let path = |step: u64| dir.path().join(format!("step-{step:08}"));
        let save = |step: u64, layout: ParallelLayout| {
            threads::run(layout.world(), |world| {
                let parts = held(&model, &layout, world.rank());
                save_parts(&path(step), &meta(model.clone(), layout, step), &parts, case, &*world).unwrap()
            })
        };
        let load = |step: u64, layout: ParallelLayout| {
            threads::run(layout.world(), |world| {
                let parts = held(&model, &layout, world.rank());
                assert_true(&parts, &load_parts(&path(step), &parts).unwrap(), case);
            });
        };
        let manifests = save(1, a);
        assert!(manifests.windows(2).all(|pair| pair[0] == pair[1]), "ranks disagree about the manifest");
        load(1, b);
        save(2, b);
        load(2, a);
        let reread = checkpoint::open(&path(2)).unwrap();
        assert_eq!(*reread.meta(), meta(model.clone(), b, 2));
        assert!(reread.has_optimizer_state());
    }
}

/// Any sub-rectangle of a tensor of 1 to 4 dims, cut into random tiles, is assembled right, also across the blocks that
/// carry the checksums and with conversion in both directions.
#[test]
fn any_rectangle_of_any_tiling() {
    let random = Random::new(21, "rectangles");
    let mut counter = 0;
    let mut draw = |n: usize| {
        counter += 1;
        (random.bits(counter) % n as u64) as usize
    };
    for case in 0..30 {
        let n_dims = 1 + draw(4);
        let most = [1_500_000, 1300, 110, 34][n_dims - 1];
        let shape: Vec<usize> = (0..n_dims).map(|_| 1 + draw(most)).collect();
        let cuts: Vec<Vec<usize>> = shape
            .iter()
            .map(|&extent| {
                let mut cuts: Vec<usize> = (0..draw(3)).map(|_| draw(extent)).chain([0, extent]).collect();
                cuts.sort();
                cuts.dedup();
                cuts
            })
            .collect();
        let mut slices = vec![Slice { offset: vec![], shape: vec![] }];
        for cuts in &cuts {
            let extend = |slice: &Slice| {
                let with = |pair: &[usize]| {
                    let mut longer = slice.clone();
                    longer.offset.push(pair[0]);
                    longer.shape.push(pair[1] - pair[0]);
                    longer
                };
                cuts.windows(2).map(with).collect::<Vec<Slice>>()
            };
            slices = slices.iter().flat_map(extend).collect();
        }
        let stored_type = if draw(2) == 0 { DType::BF16 } else { DType::F32 };
        let name = "weights/some.tensor".to_string();
        let part = |slice: Slice, dtype| Part { name: name.clone(), shape: shape.clone(), slice, dtype };
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("c");
        let parts: Vec<Part> = slices.into_iter().map(|slice| part(slice, stored_type)).collect();
        save_parts(&out, &meta(model(false), ParallelLayout::SINGLE, 1), &parts, case, &Solo::new()).unwrap();
        for _ in 0..6 {
            let offset: Vec<usize> = shape.iter().map(|&extent| draw(extent)).collect();
            let extent = shape.iter().zip(&offset).map(|(&extent, &offset)| 1 + draw(extent - offset)).collect();
            let asked = if draw(2) == 0 { DType::BF16 } else { DType::F32 };
            let wanted = part(Slice { offset, shape: extent }, asked);
            let found = load_parts(&out, std::slice::from_ref(&wanted)).unwrap().remove(0);
            let convert = |bits| if asked == DType::BF16 { round_to_bf16(bits) } else { bits };
            let expected = global_indices(&shape, &wanted.slice).into_iter().map(|i| convert(truth(case, &name, i, stored_type)));
            assert!(found.into_iter().eq(expected), "{:?} of {shape:?}, {stored_type:?} as {asked:?}", wanted.slice);
        }
    }
}
