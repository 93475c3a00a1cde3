//! The CUDA device on a GPU: the whole table of operations, sums whose bits come twice, sums in canonical orders whose bits depend on
//! nothing around them, training under many layouts bit by bit, and models held to the numbers of transformers. Without a GPU each
//! test says so and passes, unless TRIREME_NEEDS_GPU is set (tests/gpu.sh sets it).

mod canonical_cases;
#[allow(dead_code)] // the bench reads more of it
#[path = "operations/cases.rs"]
mod cases;
#[allow(dead_code)] // other programs take the attention cases together
#[path = "operations/check.rs"]
mod check;
mod common;
mod decode_cases;
#[path = "golden_runs/mod.rs"]
mod golden_runs;
mod numerics_runs;
#[path = "operations/oracle.rs"]
mod oracle;

use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::Algorithms;

/// The first GPU of this machine.
fn gpu() -> Option<Cuda> {
    gpu_with(Algorithms::Measured)
}

fn gpu_with(algorithms: Algorithms) -> Option<Cuda> {
    match Cuda::open_with(0, algorithms) {
        Ok(cuda) => Some(cuda),
        Err(error) => {
            assert!(std::env::var_os("TRIREME_NEEDS_GPU").is_none(), "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

mod operations {
    use crate::cases::{self, Case, Kind, Vocabulary};
    use crate::oracle::Near;
    use crate::{check, decode_cases, gpu, gpu_with};
    use std::collections::BTreeMap;
    use std::io::Write;
    use trireme::device::cuda::Cuda;
    use trireme::device::cuda::backend::Algorithms;
    use trireme::device::{Activation, Device, Fp8Scales, Gemm};
    use trireme::recipe::Mode;
    use trireme::tensor::{DType, Tensor};

    const BOTH: [DType; 2] = [DType::F32, DType::BF16];

    /// All cases, whatever becomes of the ones before, so that one run on a GPU tells everything that is off. Prints each case as it
    /// begins (a kernel that hangs is the last one named) and how much of what is allowed it took.
    fn check_on(cuda: &Cuda, cases: &[Case], dtypes: &[DType]) {
        let (mut taken, mut wrong) = (BTreeMap::<_, f64>::new(), Vec::new());
        for (case, dtype) in cases.iter().flat_map(|case| dtypes.iter().map(move |dtype| (case, *dtype))) {
            print!("{} {} {dtype:?}: ", case.operation, case.shape);
            std::io::stdout().flush().unwrap();
            match check::worst(cuda, case, dtype) {
                Ok(share) => {
                    println!("{share:.3} of what is allowed");
                    let most = taken.entry((case.operation, format!("{dtype:?}"))).or_default();
                    *most = most.max(share);
                }
                Err(text) => {
                    println!("OFF");
                    wrong.push(text);
                }
            }
        }
        taken.iter().for_each(|((operation, dtype), share)| println!("worst of {operation} {dtype}: {share:.3} of what is allowed"));
        assert!(wrong.is_empty(), "{} cases are off:\n{}", wrong.len(), wrong.join("\n"));
    }

    fn check_all(cases: Vec<Case>) {
        let Some(cuda) = gpu() else { return };
        check_on(&cuda, &cases, &BOTH);
        assert_eq!(cuda.memory().live_bytes, 0);
    }

    /// Before everything else: bytes come back as they went, and one kernel runs.
    #[test]
    fn the_device_answers() {
        let Some(cuda) = gpu() else { return };
        println!("{}", cuda.name());
        check_on(&cuda, &[cases::elementwise("copy", 70_001, (Kind::Float, Kind::Float))], &BOTH);
    }

    /// Every element is the formula's within the rounding it is entitled to; outputs start as NaN, inputs must come back unchanged.
    #[test]
    fn matrix_products_match_the_oracle() {
        check_all(check::gemm_cases());
        let Some(cuda) = gpu() else { return };
        check_on(&cuda, &check::normed_gemm_cases(), &[DType::BF16]);
    }

    /// As above, with the algorithms that add whole sums in a fixed order; their bits come twice, also from another start of the library.
    #[test]
    fn fixed_matrix_products_match_the_oracle() {
        let Some(first) = gpu_with(Algorithms::Fixed) else { return };
        check_on(&first, &check::gemm_cases(), &[DType::BF16]);
        let second = gpu_with(Algorithms::Fixed).expect("a GPU");
        let long = cases::gemm(Gemm::TN.accumulate(), (515, 1032, 4096), Kind::F32);
        assert!(outputs(&first, &long, DType::BF16) == outputs(&second, &long, DType::BF16));
    }

    /// Large copies arrive whole, chunk by chunk, in order with the kernels before and after them, and beside a thread that saves.
    #[test]
    fn large_copies_are_in_order_with_kernels() {
        let Some(cuda) = gpu() else { return };
        const MANY: usize = (7 << 21) + 12_345;
        let pattern = |seed: usize| (0..MANY).map(|i| ((i * 31 + seed) % 8191) as f32).collect::<Vec<f32>>();
        let (mut x, mut y) = (cuda.alloc(&[MANY], DType::F32).unwrap(), cuda.alloc(&[MANY], DType::F32).unwrap());
        let values = |x: &Tensor| bytemuck::cast_slice::<u8, f32>(&x.host_bytes()).to_vec();
        cuda.upload(bytemuck::cast_slice(&pattern(1)), &mut x);
        Device::copy(&cuda, &mut y, &x);
        let saved = std::thread::scope(|scope| {
            let saving = scope.spawn(|| values(&x));
            (0..50).for_each(|_| cuda.scale(&mut y, 2.0));
            saving.join().unwrap()
        });
        cuda.scale(&mut x, 3.0);
        cuda.upload(bytemuck::cast_slice(&pattern(5)), &mut y);
        cuda.scale(&mut y, 4.0);
        assert!(saved == pattern(1));
        assert!(values(&x).iter().zip(pattern(1)).all(|(found, was)| *found == 3.0 * was));
        assert!(values(&y).iter().zip(pattern(5)).all(|(found, was)| *found == 4.0 * was));
    }

    /// The device takes the token that the host takes, for the same logits and noise.
    #[test]
    fn tokens_are_drawn_as_on_the_host() {
        if let Some(cuda) = gpu() {
            decode_cases::sample::check(&cuda);
        }
    }

    /// Decode steps launched as a graph have the bits of those that are asked for one by one, and use no memory that comes and goes.
    #[test]
    fn recorded_steps_see_new_values() {
        if let Some(cuda) = gpu_with(Algorithms::Fixed) {
            decode_cases::check(&cuda, decode_cases::How::PLAIN, |_| {});
        }
    }

    /// The same in bf16, where recorded kernels follow each other and come onto the device before those before them have ended: in the
    /// shortest order of sums and in the canonical one.
    #[test]
    fn recorded_kernels_may_come_early() {
        for order in [Mode::Fast, Mode::Reproducible] {
            let Some(cuda) = gpu_with(Algorithms::Fixed) else { return };
            decode_cases::check(&cuda, decode_cases::How { dtype: DType::BF16, order, ..decode_cases::How::PLAIN }, |_| {});
        }
    }

    /// What one launch does has the bits of the launches that it stands for.
    #[test]
    fn fused_operations_keep_their_bits() {
        if let Some(cuda) = gpu_with(Algorithms::Fixed) {
            decode_cases::fused::check(&cuda);
        }
    }

    /// What ends a product in canonical order has the bits of the pass that it stands for.
    #[test]
    fn products_that_end_in_an_activation_have_the_bits_of_both() {
        if let Some(cuda) = gpu_with(Algorithms::Fixed) {
            // One tile a processor, where there are 128 to 147 of them.
            decode_cases::fused::check_canonical_activation(&cuda, &[((2047, 2048, 264), cuda.has_hopper_kernels())]);
        }
    }

    /// As above, for those of a train step in fast numerics and for products that fill the GPU, by whoever is faster.
    #[test]
    fn products_by_the_fastest_match_the_oracle() {
        let Some(cuda) = gpu() else { return };
        let (shape, kind) = ((2047, 2048, 264), Activation::SquaredRelu);
        let mut list = vec![cases::activated::gemm_and_activation(kind, shape), cases::activated::gemm_activation_backward(kind, shape)];
        list.extend([Gemm::NT, Gemm::NN].map(|how| cases::gemm(how, shape, Kind::Float)));
        list.extend([Gemm::TN, Gemm::TN.accumulate()].map(|how| cases::gemm(how, (2048, 1032, 777), Kind::F32)));
        check_on(&cuda, &list, &[DType::BF16]);
        println!("{}", cuda.contest_table());
    }

    /// As above, for everything that works on rows, and rows of every form of the norms' kernels.
    #[test]
    fn row_operations_match_the_oracle() {
        let mut list = check::row_cases();
        for columns in [8, 4096, 8192 + 24, 12_289, 18_432] {
            list.push(cases::norm(true, (2, columns)));
            list.push(cases::add_norm(false, (2, columns)));
            list.push(cases::norm_backward(true, (19, columns)));
        }
        check_all(list);
    }

    /// Products of E4M3 by cuBLASLt. Hopper's tensor cores keep about 14 bits between the additions of 8-bit products (DeepSeek-V3 2024,
    /// section 3.3.2), so a sum may be off by as much more than in f32 as 2^-13 is more than 2^-24; a scale of another row would show.
    #[test]
    fn products_of_fp8_match_the_oracle() {
        let Some(cuda) = gpu() else { return };
        if let Err(error) = cuda.check_fp8(Fp8Scales::Rows) {
            return println!("skipped: {error}");
        }
        let mut cases: Vec<Case> = check::fp8_cases().into_iter().filter(|case| case.operation == "gemm_fp8").collect();
        for case in &mut cases {
            let in_f32 = std::mem::replace(&mut case.oracle, Box::new(|_, _| Vec::new()));
            case.oracle = Box::new(move |values, round| {
                let widened = |near: Near| Near { bound: near.bound * 2f64.powi(24 - 13), ..near };
                in_f32(values, round).into_iter().map(|output| output.into_iter().map(widened).collect()).collect()
            });
        }
        check_on(&cuda, &cases, &[DType::BF16]);
    }

    /// As above, for elements and scales of E4M3.
    #[test]
    fn rounding_to_fp8_matches_the_oracle() {
        check_all(check::fp8_cases().into_iter().filter(|case| case.operation != "gemm_fp8").collect());
    }

    /// Cases of attention with heads of these dims, of one operation where it is named.
    fn attention(dims: &[usize], operation: Option<&str>) -> Vec<Case> {
        let heads = check::HEADS.into_iter().filter(|heads| dims.contains(&heads.2));
        let cases = heads.flat_map(check::attention_cases_of);
        cases.filter(|case| operation.is_none_or(|operation| case.operation == operation)).collect()
    }

    /// As above, for attention with the kernels of this GPU, on a Hopper GPU its own: each by itself, for one that hangs ends its process.
    #[test]
    fn attention_d64_matches_the_oracle() {
        check_all(attention(&[64], Some("attention")));
    }

    #[test]
    fn attention_d128_matches_the_oracle() {
        check_all(attention(&[128], Some("attention")));
    }

    #[test]
    fn attention_d192_matches_the_oracle() {
        check_all(attention(&[192], Some("attention")));
    }

    #[test]
    fn attention_backward_d64_matches_the_oracle() {
        check_all(attention(&[64], Some("attention_backward")));
    }

    #[test]
    fn attention_backward_d128_matches_the_oracle() {
        check_all(attention(&[128], Some("attention_backward")));
    }

    #[test]
    fn attention_backward_d192_matches_the_oracle() {
        check_all(attention(&[192], Some("attention_backward")));
    }

    /// As above, over a cache, and for other dims, of which no GPU has kernels of its own.
    #[test]
    fn attention_over_a_cache_and_of_other_dims_matches_the_oracle() {
        check_all(attention(&[64, 128, 192], Some("attention_cached")));
        check_all(attention(&[8, 34, 40], None));
    }

    /// As above, with the kernels that run on every GPU.
    #[test]
    fn portable_attention_matches_the_oracle() {
        let Some(cuda) = gpu() else { return };
        let portable = cuda.without_hopper();
        check_on(&portable, &attention(&[64, 128, 192], Some("attention")), &[DType::BF16]);
        check_on(&portable, &attention(&[64, 128, 192], Some("attention_backward")), &[DType::BF16]);
    }

    /// Outputs as bytes.
    fn outputs(cuda: &Cuda, case: &Case, dtype: DType) -> Vec<Vec<u8>> {
        let host = check::fresh(case, dtype);
        let upload = |x: &Tensor| {
            let mut copy = cuda.alloc(x.dims(), x.dtype()).unwrap();
            cuda.upload(x.bytes(), &mut copy);
            copy
        };
        let mut tensors: Vec<Tensor> = host.iter().map(upload).collect();
        (case.run)(cuda, &mut tensors);
        tensors.iter().map(|tensor| tensor.host_bytes().to_vec()).collect()
    }

    /// Sums that many blocks work on give the same bits each time: an atomic, a race or a missing barrier would not. The sizes fill the
    /// GPU several times over.
    #[test]
    fn the_same_bits_come_twice() {
        let Some(cuda) = gpu() else { return };
        let heads = (8, 2, 128);
        let wide = Vocabulary { t: 300, columns: 20_011, n_valid: 20_000, first_row: 0 };
        let tokens: Vec<usize> = (0..4000).map(|i| i * i % 17).collect();
        let list = [
            cases::norm_backward(true, (5000, 4096)),
            cases::embed_backward(tokens, (13, 1024), 2),
            cases::attention(vec![0, 1000, 4001], heads),
            cases::attention_backward(vec![0, 1000, 2001], heads),
            cases::attention_cached(&[(0, 2500, 90), (0, 17, 1), (20, 1280, 33)], heads),
            cases::activation(Activation::Swiglu, (3001, 385)),
            cases::cross_entropy_sum(wide),
            cases::cross_entropy_forward(wide),
            cases::gemm(Gemm::TN.accumulate(), (515, 1032, 4096), Kind::F32),
        ];
        for case in &list {
            for dtype in [DType::F32, DType::BF16] {
                let first = outputs(&cuda, case, dtype);
                for _ in 0..5 {
                    assert!(outputs(&cuda, case, dtype) == first, "{} {} {dtype:?}", case.operation, case.shape);
                }
            }
        }
    }
}

/// NCCL's own library with the one rank that a card allows: a communicator whose calls do not block, collectives and a message to itself
/// on a stream beside the kernels, and the end. What takes two GPUs is not seen here.
mod nccl {
    use crate::gpu;
    use std::time::Duration;
    use trireme::comm::nccl::{self, Nccl, Options, Sums};
    use trireme::comm::solo::Solo;
    use trireme::comm::{Communicator, Recv, ReduceOp, Send};
    use trireme::device::Device;
    use trireme::device::cuda::Cuda;
    use trireme::tensor::{DType, Tensor};

    #[test]
    fn one_rank_keeps_its_values() {
        const N: usize = 100_003;
        let Some(cuda) = gpu() else { return };
        if let Err(error) = nccl::check(&Solo::new(), &cuda) {
            return println!("skipped: {error}");
        }
        let pattern = |seed: usize| (0..N).map(|i| ((i * 31 + seed) % 251) as f32).collect::<Vec<f32>>();
        let tensor = |cuda: &Cuda, dtype: DType, values: &[f32]| {
            let host = if dtype == DType::F32 { Tensor::from_f32(&[N], values) } else { Tensor::from_bf16(&[N], values) };
            let mut copy = cuda.alloc(&[N], dtype).unwrap();
            cuda.upload(host.bytes(), &mut copy);
            copy
        };
        let values = |x: &Tensor| match x.dtype() {
            DType::F32 => bytemuck::cast_slice::<u8, f32>(&x.host_bytes()).to_vec(),
            _ => bytemuck::cast_slice::<u8, half::bf16>(&x.host_bytes()).iter().map(|x| x.to_f32()).collect(),
        };
        for sums in [Sums::Library, Sums::Ordered] {
            let options = Options { sums, timeout: Duration::from_secs(20) };
            let alone = Nccl::new(Box::new(Solo::new()), cuda.sharing_memory(), options);
            for dtype in [DType::F32, DType::BF16] {
                let (a, mut b) = (tensor(&cuda, dtype, &pattern(1)), tensor(&cuda, dtype, &pattern(2)));
                alone.all_gather(&a, &mut b);
                assert!(values(&b) == pattern(1), "all-gather {dtype:?} {sums:?}");
                cuda.scale(&mut b, 0.0);
                alone.reduce_scatter(&a, &mut b);
                assert!(values(&b) == pattern(1), "reduce-scatter {dtype:?} {sums:?}");
                for op in [ReduceOp::Sum, ReduceOp::Max] {
                    alone.all_reduce(&mut b, op);
                    assert!(values(&b) == pattern(1), "all-reduce {dtype:?} {sums:?} {op:?}");
                }
                alone.broadcast(&mut b, 0);
                cuda.scale(&mut b, 0.0);
                let recv = Recv { peer: 0, tag: 3, tensor: &mut b };
                alone.start_group(vec![Send { peer: 0, tag: 3, tensor: &a }], vec![recv]).wait();
                assert!(values(&b) == pattern(1), "a message {dtype:?} {sums:?}");
            }
        }
    }
}

/// What tests/kernels holds over the emulator, with the rounding and the races of a GPU.
mod canonical {
    use crate::numerics_runs::{Run, model, train};
    use crate::{canonical_cases as cases, check, gpu};
    use trireme::device::Device;
    use trireme::device::cuda::Cuda;
    use trireme::model::config::ModelConfig;
    use trireme::model::ctx::SequenceMode;
    use trireme::parallel::layout::ParallelLayout;
    use trireme::recipe::Recompute;
    use trireme::tensor::DType;

    #[test]
    fn sums_match_the_oracle_and_see_no_neighbours() {
        let Some(cuda) = gpu() else { return };
        assert_canonical(&cuda);
        // On Hopper tensor cores are asked in two ways: by wgmma, and as on every GPU.
        if cuda.has_hopper_kernels() {
            assert_canonical(&cuda.without_hopper());
        }
    }

    fn assert_canonical(cuda: &Cuda) {
        for dtype in [DType::F32, DType::BF16] {
            check::canonical_gemm_cases().iter().for_each(|case| check::check(cuda, case, dtype));
            // Of sizes that fill the GPU with each form, and parts of them that do not.
            for (shape, n_pieces) in [
                ((1500, 2000, 1000), 1),
                ((1500, 2000, 1000), 8),
                ((70, 75, 4001), 8),
                ((300, 400, 4096), 4),
                ((2048, 4096, 1024), 1),
                ((2048, 2048, 4096), 8),
            ] {
                cases::products_do_not_depend_on_their_surroundings(cuda, dtype, shape, n_pieces);
            }
            cases::parts_of_ranks_add_up_to_the_whole(cuda, dtype, &[8, 40, 12, 104, 3416, 16_384]);
            for starts in [&[0, 5, 10, 15][..], &[0, 700, 1400, 2101], &[0, 0, 3, 3], &[0, 512, 1024, 2048]] {
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (21, 37), starts);
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (1400, 2000), starts);
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (2048, 4096), starts);
            }
        }
        cases::the_vocabulary_adds_up(cuda);
        cases::squares_add_up(cuda);
        cases::groups_are_added_in_pairs_and_in_turn(cuda);
        cases::a_row_of_attention_does_not_see_its_neighbours(cuda);
    }

    fn cuda() -> Box<dyn Device> {
        Box::new(gpu().expect("asked for before"))
    }

    /// Loss, gradient norm, every gradient and weight of two steps, with ranks that share the GPU.
    #[test]
    fn every_layout_gives_the_same_bits() {
        if gpu().is_none() {
            return;
        }
        let wide = ModelConfig { n_layers: 2, hidden: 128, n_heads: 8, n_kv_heads: 4, head_dim: 64, ffn_hidden: 256, ..model() };
        for dtype in [DType::F32, DType::BF16] {
            let alone = Run { global: 8, open: Some(cuda), ..Run::reference(wide.clone(), dtype) };
            let expected = train(&alone, 2);
            for (tp, pp, dp, micro) in [(1, 1, 1, 4), (2, 1, 1, 1), (1, 2, 1, 2), (1, 1, 2, 1), (2, 2, 2, 2), (4, 1, 2, 1)] {
                let (layout, recompute) = (ParallelLayout { tp, pp, dp, vp: 1 }, [Recompute::None, Recompute::Full][dp - 1]);
                let sequence = if tp == 2 { SequenceMode::Sharded } else { SequenceMode::Replicated };
                let run = Run { layout, micro, recompute, sequence, ..alone.clone() };
                assert_eq!(train(&run, 2).first_difference(&expected), None, "{run:?}");
            }
        }
    }
}

mod model {
    use crate::{golden_runs, gpu};
    use trireme::device::Device;
    use trireme::tensor::DType;

    fn cuda() -> Box<dyn Device> {
        Box::new(gpu().expect("asked for before"))
    }

    #[test]
    fn logits_equal_transformers() {
        if gpu().is_some() {
            golden_runs::check_logits(&*cuda());
        }
    }

    /// On one rank and under every layout, whose ranks share the GPU.
    #[test]
    fn training_equals_transformers() {
        if gpu().is_some() {
            golden_runs::check_training(&cuda, DType::F32, |_| true);
            golden_runs::check_training(&cuda, DType::BF16, |layout| layout.world() == 1);
        }
    }
}
